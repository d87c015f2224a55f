import av
import numpy as np
import pytest

from genkd.errors import UserError
from genkd.preprocessing.synthetic import CLASSES, SynthSettings, motion_path, render, synthesize

SETTINGS = SynthSettings(videos_per_class=5, seconds=1.0, width=64, height=48)


def test_files_are_mpeg4_avi_in_ucf101s_layout(videos):
    files = sorted((videos / "UCF-101").glob("*/*.avi"))
    assert len(files) == 50 and {path.parent.name for path in files} == set(CLASSES)
    assert files[0].name == "v_Bob_g01_c01.avi"
    with av.open(str(files[0])) as container:
        stream = container.streams.video[0]
        assert (container.format.name, stream.codec_context.name, stream.codec_context.codec_tag) == (
            "avi",
            "mpeg4",
            "XVID",
        )
        assert sum(1 for _ in container.decode(video=0)) == 40
    lists = videos / "ucfTrainTestlist"
    assert (lists / "classInd.txt").read_text().splitlines()[0] == "1 Bob"
    assert (lists / "trainlist01.txt").read_text().splitlines()[0] == "Bob/v_Bob_g02_c01.avi 1"
    assert (lists / "testlist01.txt").read_text().splitlines()[0] == "Bob/v_Bob_g01_c01.avi"


def test_the_same_seed_gives_the_same_files(videos, tmp_path, content):
    from genkd.preprocessing.synthetic import SynthSettings as Settings

    synthesize(tmp_path / "again", Settings(5, 1.6, 25, 64, 48, 0, 0.5), workers=0)
    assert content(tmp_path / "again") == content(videos)
    assert not np.array_equal(
        render(SETTINGS, "Bob", 0, 0), render(SynthSettings(seed=1, width=64, height=48), "Bob", 0, 0)[:25]
    )


def test_one_frame_does_not_tell_the_class():
    """Background, object and light are the same for all classes: only where the object has been, pixels differ."""
    for clip in range(4):
        medians = np.stack([np.median(render(SETTINGS, name, 0, clip), 0) for name in CLASSES])
        differs = (np.ptp(medians, 0) > 25).any(-1)
        assert differs.mean() < 0.45
        starts = np.stack([motion_path(name, np.random.default_rng(clip), np.zeros(1), 1.0)[0] for name in CLASSES])
        assert np.ptp(starts[:, :2], 0).max() < 1


def test_classes_move_as_they_are_called():
    t = np.arange(50) / 25
    paths = {name: motion_path(name, np.random.default_rng(3), t, 2.0) for name in CLASSES}
    change = {name: path[-1] - path[0] for name, path in paths.items()}
    assert change["Rise"][1] < -0.4 and change["Fall"][1] > 0.4 and abs(change["Slide"][0]) > 0.4
    assert change["Grow"][2] > 0.5 and change["Shrink"][2] < -0.5 and abs(change["Spin"][3]) > 200
    for name, axis in (("Sway", 0), ("Bob", 1), ("Pulse", 2)):
        turns = np.diff(np.sign(np.diff(paths[name][:, axis])))
        assert np.count_nonzero(turns) >= 2 and not np.ptp(paths[name][:, 3])
    assert np.ptp(np.hypot(*(paths["Orbit"][:, :2] - paths["Orbit"][:, :2].mean(0)).T)) < 0.12


def test_an_interrupted_run_is_continued(tmp_path, content):
    synthesize(tmp_path / "a", SETTINGS, workers=0)
    before = content(tmp_path / "a")
    for path in sorted((tmp_path / "a").glob("UCF-101/*/*.avi"))[::3]:
        path.unlink()
    synthesize(tmp_path / "a", SETTINGS, workers=2)
    assert content(tmp_path / "a") == before


def test_bad_settings_and_places_are_refused(tmp_path):
    for options in ({"videos_per_class": 3}, {"test_share": 1.0}, {"seconds": 0.01}, {"width": 63}):
        with pytest.raises(UserError):
            SynthSettings(**options)
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="not empty"):
        synthesize(tmp_path, SETTINGS, workers=0)
    synthesize(tmp_path / "a", SETTINGS, workers=2)
    with pytest.raises(UserError, match="seed 0 -> 1"):
        synthesize(
            tmp_path / "a", SynthSettings(videos_per_class=5, seconds=1.0, width=64, height=48, seed=1), workers=0
        )
