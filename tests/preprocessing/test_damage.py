"""Files of a data set that were lost, cut, flipped or put there: named by verify, mended by repair, no traceback."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genkd.errors import UserError
from genkd.preprocessing import finished, index, sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.inspection import inspect
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.verify import verify
from genkd.preprocessing.video import VideoSettings

SETTINGS = VideoSettings("mjpeg", short_side=48)


@pytest.fixture(scope="module")
def source(videos, tmp_path_factory):
    root = tmp_path_factory.mktemp("root") / "root"
    for name in ("Bob", "Orbit"):
        (root / name).mkdir(parents=True)
        for path in sorted((videos / "UCF-101" / name).iterdir())[:2]:
            shutil.copy(path, root / name)
    (root / "Bob" / "broken.avi").write_text("no video")
    return sources.folder(root)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "data"
    convert(source, out, SETTINGS, workers=0)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def found(path):
    return {problem.file for problem in verify(path, workers=0)}


def test_a_shard_whose_videos_were_all_rejected_is_no_stray(whole):
    assert len(Dataset.open(whole).table["shard"].unique()) < len(list(whole.glob("shards/*.tar")))
    assert verify(whole, workers=0) == []


def test_one_flipped_bit_of_index_arrow_crashes_nothing_and_is_named(whole, copy):
    data = (whole / "index.arrow").read_bytes()
    table = Dataset.open(whole).table
    for at in [*np.random.default_rng(0).integers(0, len(data), 150).tolist(), 0, len(data) - 20]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        (copy / "index.arrow").write_bytes(flipped)
        assert inspect(copy)["codecs"] == {"mjpeg": 4}
        opened = Dataset.open(copy).table  # made anew, or different in the numbers alone
        assert opened.schema.equals(index.SCHEMA) and opened.num_rows == table.num_rows
    flipped = bytearray(data)
    at = data.index(b"Bob/v_Bob")
    flipped[at] ^= 128
    (copy / "index.arrow").write_bytes(flipped)
    assert found(copy) == {"index.arrow"}


def test_an_index_of_many_rows_is_opened_without_being_read(tmp_path, whole):
    import time

    table = pa.concat_tables([Dataset.open(whole).table] * 25_000).combine_chunks()
    (tmp_path / "index.arrow").write_bytes(index.arrow_bytes(table, "sha256:x"))
    began = time.monotonic()
    assert index._mapped(tmp_path / "index.arrow", "sha256:x").num_rows == 100_000
    assert time.monotonic() - began < 0.2


@pytest.mark.parametrize("note", [b"genkd.errors", b"genkd.reencoded", b"genkd.fingerprint"])
def test_a_shard_that_has_lost_a_note_is_named_and_made_anew(source, whole, copy, content, note):
    path = sorted((copy / "shards").glob("*.parquet"))[1]
    table = pq.read_table(path)
    notes = {key: value for key, value in table.schema.metadata.items() if key != note}
    path.write_bytes(index.parquet_bytes(table.replace_schema_metadata(notes)))
    assert found(copy) == {path.name}
    convert(source, copy, SETTINGS, workers=0)
    assert content(copy) == content(whole)


def test_any_damage_of_a_shard_s_rows_is_corrupt_and_nothing_else(whole):
    """Also a key error or an unimplemented type, which Arrow raises for torn Parquet files."""
    data = sorted((whole / "shards").glob("*.parquet"))[1].read_bytes()
    random, caught = np.random.default_rng(1), 0
    for _ in range(1500):
        torn = bytearray(data)
        at = int(random.integers(len(data)))
        torn[at] ^= 1 << int(random.integers(8))
        try:
            finished.shard_rows(bytes(torn))
        except index.Corrupt:
            caught += 1
    assert caught > 300


def test_repair_takes_other_columns_for_damage(source, whole, copy, content):
    path = sorted((copy / "shards").glob("*.parquet"))[1]
    table = pq.read_table(path)
    path.write_bytes(index.parquet_bytes(table.drop_columns(["gop_frames"])))
    convert(source, copy, SETTINGS, workers=0, repair=True)
    assert content(copy) == content(whole)


def test_a_shard_that_is_lost_while_it_is_checked_is_damaged(whole):
    from genkd.preprocessing.verify import _check_finished

    assert _check_finished((str(whole), "train-09999", ()), lambda event: None)[1]


@pytest.mark.parametrize("name", ["errors.parquet", "plan.json", "sources.parquet", "index.parquet"])
def test_a_lost_or_damaged_file_is_named(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).unlink()
    assert [(p.file, "missing" in p.what) for p in verify(copy, workers=0)] == [(name, True)]
    (copy / name).write_bytes(data[: len(data) // 2])
    assert found(copy) == {name}


def test_a_rejection_that_is_gone_from_errors_parquet_is_named(source, copy):
    table = pq.read_table(copy / "errors.parquet")
    for other in (table[:0], table.set_column(2, "reason", pa.array(["another"]))):
        (copy / "errors.parquet").write_bytes(index.parquet_bytes(other))
        assert found(copy) == {"errors.parquet"}
    (copy / "errors.parquet").write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(UserError, match=r"^errors\.parquet in .* cannot be read \(.*; run the same"):
        inspect(copy)
    convert(source, copy, SETTINGS, workers=0)
    assert verify(copy, workers=0) == []


def test_strays_and_bytes_behind_a_tar_s_end_are_named_and_repaired(source, whole, copy, content):
    tar = sorted((copy / "shards").glob("*.tar"))[0]
    shutil.copy(tar, copy / "shards" / "train-00077.tar")
    (copy / "shards" / f"{tar.stem}.bak").touch()
    assert found(copy) == {"train-00077.tar", f"{tar.stem}.bak"}
    with open(tar, "ab") as file:
        file.write(b"hidden")
    assert found(copy) == {"train-00077.tar", f"{tar.stem}.bak", tar.name}
    convert(source, copy, SETTINGS, workers=0, repair=True)
    assert content(copy) == content(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info["splits"]["train"].pop("videos"),
        lambda info: info["splits"].update(train=3),
        lambda info: info.update(classes="Bob"),
        lambda info: info.update(rejected="many"),
        lambda info: info["video"].pop("codec"),
    ],
)
def test_a_damaged_description_is_one_sentence(copy, change):
    info = json.loads((copy / "dataset.json").read_text())
    change(info)
    (copy / "dataset.json").write_text(json.dumps(info))
    for command in (Dataset.open, inspect, lambda path: verify(path, workers=0)):
        with pytest.raises(UserError, match=r"dataset\.json in .* is damaged; run the same"):
            command(copy)
