import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import av
import pytest

from genkd.benchmarks import peers, shard, shard_contenders
from genkd.benchmarks.process import run_measured
from genkd.errors import UserError
from genkd.preprocessing import sources
from genkd.preprocessing.video import transcode


@pytest.fixture(scope="module")
def few(videos, tmp_path_factory):
    """Four of the synthetic videos: 40 frames of 64x48 each."""
    out = tmp_path_factory.mktemp("few")
    for name in ("Bob", "Orbit"):
        (out / name).mkdir()
        for path in sorted((videos / "UCF-101" / name).iterdir())[:2]:
            shutil.copy(path, out / name)
    return out


@pytest.fixture
def small(monkeypatch):
    """Settings that cost little."""
    monkeypatch.setattr(shard, "SETTINGS", replace(shard.SETTINGS, short_side=48, gop=8))


@pytest.mark.slow
def test_every_contender_converts_every_frame_of_the_same_videos(few, small):
    result = shard.run(few, 1)
    rows = {row["name"]: row for row in result["rows"]}
    cores = len(os.sched_getaffinity(0))
    # A peer is measured, or named with the reason why it is not.
    for label in ("webdataset + PyAV", "litData optimize", "MosaicML MDS"):
        assert any(name.startswith(label) for name in rows) != (label in result["about"]["skipped"])
    assert rows.keys() >= {shard.genkd_label(1), shard.genkd_label(cores), shard.FAST, shard.COPY, shard.AGAIN}
    assert {row["extra"]["frames"] for row in rows.values()} == {4 * 40}
    for row in rows.values():
        assert row["median"] > 0 and row["extra"]["MB"] > 0
        assert row["extra"]["videos/s"] == pytest.approx(row["median"] / 40, abs=0.006)
        assert row["extra"]["peak MB"] is None or row["extra"]["peak MB"] > 5
    assert {"videos/s of the copy against the transcode", "bytes against the JPEG loop"} <= {
        entry["name"] for entry in result["targets"]
    }
    json.dumps(result)


def test_targets_are_ratios_of_medians():
    def row(rate, videos, size):
        return {"median": rate, "extra": {"videos/s": videos, "MB": size}}

    rows = {
        "genkd, 1 worker": row(100, 10, 2), "genkd, 2 workers": row(190, 19, 2), "ffmpeg, 1 process": row(120, 12, 2),
        "ffmpeg, 2 processes": row(200, 20, 2), "OpenCV to JPEG, 2 workers": row(380, 38, 8),
        shard.COPY: row(5000, 500, 2), shard.AGAIN: row(200, 20, 2),
    }  # fmt: skip
    found = {entry["name"]: (entry["measured"], entry["met"]) for entry in shard.targets(rows, 2)}
    assert found == {
        "frames/s against the ffmpeg limit": (0.95, True),
        "videos/s of the copy against the transcode": (25.0, True),
        "videos/s against the JPEG loop": (0.5, False),
        "bytes against the JPEG loop": (0.25, False),
        "scaling from 1 worker to 2": (1.9, True),
        "for comparison, ffmpeg's scaling from 1 process to 2": (1.667, None),
    }


@pytest.mark.ffmpeg
@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 36)])
def test_the_peers_transcode_has_the_settings_of_the_others(tmp_path, size):
    path = tmp_path / "in.avi"
    source = f"testsrc2=size={size[0]}x{size[1]}:rate=25:duration=0.84"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-c:v", "mpeg4", path], check=True)
    job = shard_contenders.Job("", [], "", "", 1, "h264", 32, 8, 23, "medium")
    entry, payload, frames = shard_contenders._encoded(("k", str(path), 3), job)
    (tmp_path / "out.mp4").write_bytes(payload)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(25) and stream.codec_context.name == "h264"
        pictures = list(container.decode(stream))
    assert entry == ("k", str(path), 3) and frames == len(pictures) == 21
    assert [picture.key_frame for picture in pictures] == [number % 8 == 0 for number in range(21)]
    long = round(32 * max(size) / min(size) / 2) * 2
    assert (pictures[0].width, pictures[0].height) == ((long, 32) if size[0] > size[1] else (32, long))


def _x264_options(payload):
    """x264 writes its version and options into the first picture."""
    text = re.search(rb"x264 - core [^\0]*options: ([^\0]*)\0", payload)[1].decode()
    return dict(option.split("=") for option in text.split())


@pytest.mark.ffmpeg
def test_all_encode_with_the_same_options(few, tmp_path):
    source = sources.folder(few)
    job = replace(shard._job(source, 1), out=str(tmp_path), frames_log=str(tmp_path / "log"))
    entry = job.videos[0]
    written = io.BytesIO()
    transcode(source.videos[0], written, shard.SETTINGS)
    ours = _x264_options(written.getvalue())
    assert ours["crf"] == "23.0" and ours["keyint"] == "16" and ours["threads"] == "1" and ours["deblock"] == "0:0:0"
    assert _x264_options(shard_contenders._encoded(entry, job)[1]) == ours
    shard_contenders.run_ffmpeg(replace(job, videos=[entry]))
    theirs = _x264_options((tmp_path / f"{entry[0]}.mp4").read_bytes())
    assert theirs.keys() & ours.keys() >= {"keyint", "mbtree", "subme", "cabac"}  # their x264 may be another version
    assert [name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]] == []


def test_jpeg_loop_writes_the_reference_layout(few, tmp_path):
    video = sources.folder(few).videos[0]
    job = shard_contenders.Job("", [], str(tmp_path), "", 1, "h264", 32, 8, 23, "medium")
    assert shard_contenders._write_jpegs((video.key, video.path, 0), job) == 40
    names = sorted(path.name for path in (tmp_path / video.key).iterdir())
    assert names == [*(f"image_{number:05d}.jpg" for number in range(1, 41)), "n_frames"]
    assert (tmp_path / video.key / "n_frames").read_text() == "40"


# A parent that fills 60 MB and two forked children that share them, each with 30 MB of its own.
_FORKS = """
import os, time
shared = bytearray(os.urandom(1000)) * 60_000
for _ in range(2):
    if not os.fork():
        own = bytearray(os.urandom(1000)) * 30_000
        time.sleep(3)
        os._exit(0)
for _ in range(2):
    os.wait()
"""


def test_peak_memory_counts_all_processes_and_shared_pages_once(tmp_path):
    usage = run_measured([sys.executable, "-c", _FORKS], os.environ, tmp_path / "log")
    if usage.peak_mb is None:
        pytest.skip("the system does not tell PSS")
    assert 120 <= usage.peak_mb < 170  # 240 MB and more if the shared ones counted three times
    assert 1 <= usage.seconds < 30 and 0 < usage.cpu_seconds < usage.seconds + 1


def test_a_contender_that_fails_says_why(tmp_path, few):
    with pytest.raises(UserError, match="ended with 3: first / the reason"):
        code = "import sys; print('first'); print('the reason', file=sys.stderr); sys.exit(3)"
        run_measured([sys.executable, "-uc", code], os.environ, tmp_path / "log")
    (tmp_path / "a").mkdir()
    shutil.copytree(few, tmp_path / "videos")
    (tmp_path / "videos" / "Bob" / "broken.avi").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"1 videos cannot be measured with, e\.g\. Bob/broken\.avi"):
        shard.take_turn("genkd", shard._job(sources.folder(tmp_path / "videos"), 1))


def test_a_peer_that_cannot_be_imported_is_told_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "streaming.py").write_text("raise ImportError('made for this test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "made for this test" in shard.find_peer("mds")
    monkeypatch.setenv(peers.PEERS_PYTHON, "/no/such/python")
    with pytest.raises(UserError, match="GENKD_BENCH_PYTHON=/no/such/python cannot be run"):
        shard.find_peer("mds")
    (tmp_path / "streaming.py").write_text("__version__ = '1.2.3'")
    python, versions = shard.find_peer("mds")
    assert python == sys.executable and versions == {"av": av.__version__, "streaming": "1.2.3"}
