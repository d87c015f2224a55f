import json

import numpy as np
import pytest
from PIL import Image

from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.pipelines import plan, show
from genkd.pipelines.loader import Loader

CONFIG = DataConfig(clip_length=8, stride=2, size=show._HEIGHT, brightness=0.4, decoder="pyav", dtype="uint8")


def test_the_sheet_shows_what_a_run_with_that_seed_sees(data, tmp_path):
    """The clip of the second epoch, found in the picture pixel by pixel; it is as large as a thumbnail."""
    rows = data.rows("train")
    key = data.table["key"][int(rows[3])].as_py()
    drawn = show.contact_sheet(data, CONFIG, key, tmp_path / "new" / "clips.png", seed=5, epochs=(1, 2))
    for number, entry in enumerate(drawn):
        sample = plan.train_sample(CONFIG, 5, number, int(rows[3]), 40, 64, 48)
        assert entry == {
            "epoch": number + 1, "frames": sample.frames.tolist(), "crop": list(sample.crop), "flip": sample.flip,
            "colour": sample.colour._asdict(),
        }  # fmt: skip
    with Loader(data, "train", CONFIG, batch_size=10, training=True, seed=5) as loader:
        loader.load_state_dict({"epoch": 1, "batch": 0})
        batch = next(iter(loader))
        seen = batch.clips[batch.ids.tolist().index(int(rows[3]))].permute(1, 2, 3, 0).numpy()
    sheet = np.asarray(Image.open(tmp_path / "new" / "clips.png").convert("RGB"))
    side = show._HEIGHT
    left = show._MARGIN + 52
    places = [
        top for top in range(sheet.shape[0] - side) if (sheet[top : top + side, left : left + side] == seen[0]).all()
    ]
    assert len(places) == 1
    for number in range(8):
        x = left + number * (side + show._GAP)
        assert np.array_equal(sheet[places[0] : places[0] + side, x : x + side], seen[number])


def test_an_unknown_key_is_refused_with_its_neighbours(data):
    key = data.table["key"][0].as_py()
    with pytest.raises(UserError, match=f"no video .*{key[:-1]}x.*for example, .*{key[:-1]}"):
        show.find_key(data, key[:-1] + "x")


def test_the_command_writes_a_picture(data, genkd, tmp_path):
    key = data.table["key"][0].as_py()
    told = genkd("show", data.path, "--key", key, "--epoch", 4, "--json", "data.clip_length=8", "data.size=64")
    assert [entry["epoch"] for entry in json.loads(told.stdout)] == [4]
    assert Image.open(tmp_path / "clips.png").width > 400
    told = genkd("show", data.path, "--key", "nobody", check=False)
    assert told.returncode == 1 and "has no video 'nobody'" in told.stderr
