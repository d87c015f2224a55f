"""One conversion over a corpus of damaged and hostile files: nothing crashes, hangs or gets lost."""

import collections
import io
import random
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.sources import printable
from genkd.preprocessing.video import decode_frames
from genkd.tests.preprocessing.fuzz_corpus import DAMAGES, boxes, write_corpus

# Runs a command and prints, as the last line, the most memory in KiB that one of its processes had.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stderr=subprocess.STDOUT).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def genkd(*arguments, seconds) -> tuple[str, int]:
    """Output and peak memory in MiB of a command; fails after `seconds`."""
    command = [sys.executable, "-c", MEASURED, sys.executable, "-m", "genkd", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds, stdin=subprocess.DEVNULL)
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0 and "Traceback" not in text, text[-3000:]
    return text, int(text.split()[-1]) >> 10


def assert_every_file_is_accounted_for(root, out, paths):
    index, errors = pq.read_table(out / "index.parquet"), pq.read_table(out / "errors.parquet").to_pylist()
    expected = collections.Counter(printable(path) for path in paths)
    found = collections.Counter(index["source"].to_pylist() + [entry["path"] for entry in errors])
    assert found == expected
    assert set(expected.values()) == {1}
    assert all(entry["stage"] in ("scan", "open", "decode", "encode") and entry["reason"] for entry in errors)
    assert all("\n" not in entry["reason"] for entry in errors)
    return index["source"].to_pylist(), {entry["path"]: entry["reason"] for entry in errors}


def assert_every_video_decodes(out):
    dataset = Dataset.open(out)
    for row in range(dataset.table.num_rows):
        video = dataset.video(row)
        with open(out / "shards" / video.shard, "rb") as shard:
            shard.seek(video.offset)
            frames = list(decode_frames(io.BytesIO(shard.read(video.size))))
        assert len(frames) == video.num_frames
        assert {(frame.width, frame.height) for frame in frames} == {(video.width, video.height)}


def convert_and_check(root, out, count, clips=(), seed=0, seconds=60):
    paths = write_corpus(root, count, clips=clips, seed=seed)
    assert len(paths) == count
    options = ["--short-side", "32", "--preset", "ultrafast", "--source-fps", "25"]
    _, peak = genkd("shard", "folder", root, out, *options, "--workers", "2", seconds=seconds)
    text, _ = genkd("verify", out, "--workers", "2", seconds=seconds)
    assert "sound" in text
    assert_every_video_decodes(out)
    return *assert_every_file_is_accounted_for(root, out, paths), peak


def test_a_small_corpus(tmp_path):
    converted, rejected, peak = convert_and_check(tmp_path / "corpus", tmp_path / "out", 50)
    assert peak < 600
    names = "sound", "dash", "one_frame", "eight_pixels", "caf%E9", "%0A", "100%25d"
    assert all(any(name in path for path in converted) for name in names)
    reasons = {path.partition("_")[2].partition(".")[0]: reason for path, reason in rejected.items()}
    for name, words in {
        "empty": "the file is empty", "pipe": "a pipe", "gone": "points nowhere", "loop": "symbolic links",
        "wav": "it holds audio", "text": "not a video", "playlist": "not a video", "concat": "not a video",
        "y4m_rate": "frame rate", "npy_pickle": "not a readable .npy", "other": "extension",
    }.items():  # fmt: skip
        assert words in reasons[name]


def test_the_same_seed_writes_the_same_damage(tmp_path):
    data = b"".join(
        (8 + len(body)).to_bytes(4, "big") + kind + body
        for kind, body in ((b"ftyp", b"isom"), (b"moov", bytes(range(200)) * 2), (b"mdat", bytes(1000)))
    )
    assert [kind for kind, _, _ in boxes(data)][:2] == [b"ftyp", b"moov"]
    for name in ("cut_at_a_box", "cut_anywhere", "flip_anywhere", "shuffled", "huge_box", "hole"):
        made = [DAMAGES[name](random.Random(seed), data) for seed in (1, 1, 2, 3, 4, 5)]
        assert made[0] == made[1]
        assert any(other != data for other in made)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_500_files(real_data, tmp_path, seed):
    small = sorted((real_data / "fights").glob("*/*.mp4"), key=lambda path: path.stat().st_size)[:20]
    clips = [path for path in sorted((real_data / "clips").iterdir()) if path.stat().st_size < 700_000]
    converted, rejected, peak = convert_and_check(
        tmp_path / "corpus", tmp_path / "out", 500, (*clips, *small), seed, seconds=900
    )
    assert peak < 1000
    assert len(converted) > 100 and len(rejected) > 100
    assert any("8k" in path for path in converted)
    kinds = {path.partition("_")[2].partition(".")[0] for path in [*converted, *rejected]}
    assert set(DAMAGES) <= kinds
    # Of damage inside the coded pictures alone, what decodes in the main is kept.
    assert sum("flip_the_media" in path for path in converted) > sum("flip_the_media" in path for path in rejected)
