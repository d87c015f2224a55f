"""What is said before a conversion begins: dry runs, refused sources, places that cannot be used."""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest
from click.testing import CliRunner

from genkd.cli import main
from genkd.errors import UserError
from genkd.preprocessing import estimate, sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.decoding import VideoError
from genkd.preprocessing.export import export_parquet
from genkd.preprocessing.preview import preview
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.verify import verify
from genkd.preprocessing.video import VideoSettings

SETTINGS = VideoSettings("mjpeg", short_side=48)
OPTIONS = ("--codec", "mjpeg", "--short-side", "48")


@pytest.fixture(scope="module")
def root(videos, tmp_path_factory):
    """Four short videos of two classes."""
    root = tmp_path_factory.mktemp("root") / "root"
    for name in ("Bob", "Orbit"):
        (root / name).mkdir(parents=True)
        for path in sorted((videos / "UCF-101" / name).iterdir())[:2]:
            shutil.copy(path, root / name)
    return root


def told(*arguments, code=0):
    """What a command prints in this process."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


class Slow(VideoSettings):
    """Settings under which every frame takes a while."""

    def encode(self, video, sink, on_frame):
        def slowly():
            time.sleep(0.02)
            on_frame()

        return super().encode(video, sink, slowly)


def test_a_sample_that_ends_in_its_first_video_is_extrapolated(root, monkeypatch, tmp_path):
    """40 frames of 20 ms, of which the time allows about 15; four videos of 0.8 s on one worker are 3.2 s."""
    monkeypatch.setattr(estimate, "SAMPLE_SECONDS", 0.15)
    source = sources.folder(root)
    expected = preview(source, tmp_path / "out", Slow("mjpeg", short_side=48), workers=1)
    found = estimate.estimate(source, Slow("mjpeg", short_side=48), *expected, workers=1)
    assert found["sample"]["videos"] == 0 and 0.1 < found["sample"]["part"] < 0.6
    assert 2.5 < found["estimate"]["seconds"] < 8
    convert(source, tmp_path / "out", SETTINGS, workers=0)
    size = sum(Dataset.open(tmp_path / "out").column("size").tolist())
    assert 0.6 < found["estimate"]["bytes"] / size < 1.7


def test_the_share_of_a_part_or_an_array_counts_its_own_frames(root, tmp_path):
    video = sources.folder(root).videos[0]  # 40 frames at 25 a second
    part = dataclasses.replace(video, start_s=0.4, end_s=1.2)
    np.save(tmp_path / "a.npy", np.zeros((20, 16, 16, 3), np.uint8))
    array = sources.source_video(str(tmp_path / "a.npy"), tmp_path, "train", 0, 10.0)
    for source, settings, share in (
        (video, SETTINGS, 0.25), (part, SETTINGS, 0.5), (array, SETTINGS, 0.5),
        (video, VideoSettings(fps=12.5), 0.5), (dataclasses.replace(video, path="gone.avi"), SETTINGS, 0),
    ):  # fmt: skip
        assert estimate._share(source, settings, 10) == pytest.approx(share, abs=0.03)


def test_a_dry_run_knows_slices_and_finished_shards(root, tmp_path):
    command = ("shard", "folder", root, tmp_path / "out", *OPTIONS, "--dry-run")
    before = json.loads(told(*command, "--slice", "1/2", "--json"))
    assert (before["videos"], before["shards"], before["finished_shards"]) == (2, 2, 0)
    assert not (tmp_path / "out").exists()
    convert(sources.folder(root), tmp_path / "out", SETTINGS, workers=0, part=(2, 2))
    half = json.loads(told(*command, "--json"))
    assert (half["videos"], half["finished_shards"], half["sample"]["videos"]) == (4, 2, 2)
    assert half["estimate"]["bytes"] == before["estimate"]["bytes"]
    assert "4, 2 of them finished" in told(*command) and "still to write" in told(*command)
    done = json.loads(told(*command, "--slice", "2/2", "--json"))
    assert done["estimate"] == {"bytes": 0, "seconds": 0, "workers": done["estimate"]["workers"]}


def test_a_dry_run_refuses_what_a_run_would(root, tmp_path):
    convert(sources.folder(root), tmp_path / "out", SETTINGS, workers=0)
    for place, options, words in (
        (tmp_path / "x", ("--slice", "5/2"), "is not of the form K/N"),
        (root / "out", (), "lies inside the source"),
        (tmp_path / "out", ("--gop", "8"), "begun with other settings"),
        (tmp_path, (), "not empty"),
        (tmp_path / "x", ("--fps", "0.0004"), "fps 0.0004 is not between 0.01 and 1000"),
    ):
        assert words in told("shard", "folder", root, place, *OPTIONS, *options, "--dry-run", code=1)
    (tmp_path / "frames" / "a").mkdir(parents=True)
    np.save(tmp_path / "frames" / "a" / "x.npy", np.zeros((3, 16, 16, 3), np.uint8))
    command = ("shard", "folder", tmp_path / "frames", tmp_path / "x", "--dry-run")
    assert "give it with --source-fps" in told(*command, code=1)
    assert "0.0001 is not between 0.01 and 1000" in told(*command, "--source-fps", "0.0001", code=1)
    assert not (tmp_path / "x").exists()


def test_a_dry_run_prints_why_a_source_of_its_sample_fails(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "x.mp4").write_text("no video")
    shown = told("shard", "folder", tmp_path / "root", tmp_path / "out", "--dry-run", code=1)
    assert "first error" in shown and "a/x: open: not a video" in shown


def test_on_error_fail_stops_before_the_work_at_what_is_rejected_already(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    (tmp_path / "root" / "Bob" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"^Bob/notes\.txt: scan: not a video .*the first of 1 .*--on-error fail out"):
        convert(sources.folder(tmp_path / "root"), tmp_path / "out", SETTINGS, workers=0, on_error="fail")
    assert not (tmp_path / "out").exists()
    (tmp_path / "root" / "Bob" / "notes.txt").unlink()
    whole = (tmp_path / "root" / "Bob" / sorted(os.listdir(root / "Bob"))[0]).read_bytes()
    broken = tmp_path / "root" / "Bob" / "broken.avi"
    broken.write_bytes(bytes(len(whole)))
    os.utime(broken, ns=(7, 7))
    found = sources.folder(tmp_path / "root")
    convert(found, tmp_path / "out", SETTINGS, workers=0)
    for run in (convert, preview):
        with pytest.raises(UserError, match=r"^Bob/broken\.avi: open: .*earlier run left out.*--retry-rejected"):
            run(found, tmp_path / "out", SETTINGS, workers=0, on_error="fail")
    broken.write_bytes(whole)
    os.utime(broken, ns=(7, 7))
    done = convert(found, tmp_path / "out", SETTINGS, workers=0, on_error="fail", retry_rejected=True)
    assert not done.rejected and done.resumed_shards == 4


@pytest.mark.parametrize("url", ["github://x", "zip://x.zip", "nfs9://server/data"])
def test_urls_that_cannot_be_opened_are_one_sentence(url):
    shown = told("verify", url, code=1)
    assert shown.startswith(f"Error: {url} ") and shown.count("\n") == 1


def test_memory_is_refused_where_worker_processes_would_not_see_it(root, tmp_path):
    convert(sources.folder(root), "memory://seen", SETTINGS, workers=0)
    assert verify("memory://seen", workers=0) == []
    for run in (
        lambda: convert(sources.folder(root), "memory://unseen", SETTINGS, workers=2),
        lambda: convert(sources.folder(root), "memory://unseen", SETTINGS, workers=0, engine="ray"),
        lambda: verify("memory://seen", workers=1),
        lambda: export_parquet("memory://seen", tmp_path / "out", workers=1),
    ):
        with pytest.raises(UserError, match=r"^memory://\w+ is memory of this process.*--workers 0"):
            run()


def test_lists_count_what_is_missing(tmp_path):
    (tmp_path / "frames" / "v_A_g01_c01").mkdir(parents=True)
    (tmp_path / "frames" / "v_A_g01_c01" / "n_frames").write_text("3")
    (tmp_path / "classInd.txt").write_text("1 A\n")
    (tmp_path / "trainlist01.txt").write_text("A/v_A_g01_c01.avi 1\nA/v_A_g01_c02.avi 1\nA/v_A_g01_c03.avi 1\n")
    (tmp_path / "testlist01.txt").write_text("A/v_A_g01_c01.avi\n")
    command = ("lists", "ucf101", tmp_path / "frames", tmp_path / "out", "--annotations", tmp_path, "--fold", 1)
    assert "train_rgb_split1.txt: 1 videos, 2 missing\n" in told(*command, "--skip-missing")


def test_changed_sources_are_named_when_frames_are_written_again(root, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    command = ("frames", tmp_path / "root", tmp_path / "out", "--height", 0, "--workers", 0)
    told(*command)
    path = next((tmp_path / "root" / "Bob").iterdir())
    os.utime(path, ns=(7, 7))
    assert f"1 sources changed since and were written again: Bob/{path.stem}\n" in told(*command)


def test_a_sample_of_bad_sources_alone_has_no_estimate(root, tmp_path):
    class Bad(VideoSettings):
        def encode(self, video, sink, on_frame):
            raise VideoError("decode", "no luck")

    source = sources.folder(root)
    found = estimate.estimate(source, Bad(), *preview(source, tmp_path / "x", Bad(), workers=0), workers=1)
    assert found["estimate"] is None and found["sample"]["failed"] == 4
