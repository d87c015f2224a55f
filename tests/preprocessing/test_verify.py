import io
import json
import os
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genkd.preprocessing.inspection import inspect
from genkd.preprocessing.shards import Dataset, digest_of, parquet_bytes
from genkd.preprocessing.verify import verify


@pytest.fixture
def copy(data, tmp_path):
    shutil.copytree(data.path, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite_index(path, table):
    """Other rows as the index, of which dataset.json then gives the digest."""
    (path / "index.parquet").write_bytes(parquet_bytes(table))
    info = json.loads((path / "dataset.json").read_text())
    info["index_digest"] = digest_of((path / "index.parquet").read_bytes())
    (path / "dataset.json").write_text(json.dumps(info))
    (path / "index.arrow").unlink()


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_a_fresh_data_set_is_sound(shard_sets, codec):
    seen = []
    assert verify(shard_sets(codec).path, workers=0, on_videos=seen.append) == []
    assert sum(seen) == 50


def test_one_changed_byte_is_found_and_named(copy):
    video = Dataset.open(copy).video(7)
    path = copy / "shards" / video.shard
    data = bytearray(path.read_bytes())
    data[video.offset + video.size - 10] ^= 1
    path.write_bytes(data)
    problems = verify(copy, workers=2)
    assert [(p.file, p.key) for p in problems] == [(video.shard, video.key)]
    assert "checksum" in problems[0].what


def test_missing_and_cut_shards_are_found(copy):
    names = sorted(path.name for path in (copy / "shards").glob("*.tar"))
    (copy / "shards" / names[0]).unlink()
    path = copy / "shards" / names[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert {p.file for p in verify(copy, workers=0)} == set(names[:2])


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("gop_frames", [0, 8, 16, 24, 33, 40], "GOP 3 holds 8 frames, the index says 9"),
        ("num_frames", 41, "contradict"),
        ("gop_frames", [0, 8, 16, 24, 24, 40], "contradict"),
        ("gop_offsets", [1, 2, 3, 4, 5, 6], "contradict"),
        ("gop_offsets", lambda offsets: [*offsets[:2], offsets[2] + 1, *offsets[3:]], "GOP table"),
        ("shard", "../../train.tar", "outside"),
        ("shard", lambda name: name.removesuffix(".tar"), "outside"),
        ("offset", -512, "contradict"),
        ("width", 66, "is not 66x48"),
        ("label", 10, "its label 10 is none of the 10 classes"),
        ("offset", 1024, "no such member"),
    ],
)
def test_a_wrong_index_entry_is_found(copy, column, value, words):
    dataset = Dataset.open(copy)
    values = dataset.table[column].to_pylist()
    values[3] = value(values[3]) if callable(value) else value
    number = dataset.table.column_names.index(column)
    table = dataset.table.set_column(number, column, pa.array(values, dataset.table.schema.field(column).type))
    rewrite_index(copy, table)
    problems = verify(copy, workers=0)
    key = dataset.table["key"][3].as_py()
    assert all(p.key.startswith(key) or p.file.endswith(".parquet") for p in problems)
    assert any(words in problem.what for problem in problems if problem.key == key)


def rewritten(path, change):
    """A tar file again, each member's bytes as change(name, bytes) says, and what change(None, b"") adds."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    members = [(name, change(name, data)) for name, data in members] + change(None, b"")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset + 2 * tarfile.BLOCKSIZE
    os.truncate(path, end)  # tarfile fills up a record


def test_a_changed_sidecar_is_found(copy):
    video = Dataset.open(copy).video(7)
    flip = lambda name, data: [] if name is None else data.replace(b'"label": ', b'"lab3l": ')  # noqa: E731
    rewritten(copy / "shards" / video.shard, flip)
    problems = verify(copy, workers=0)
    assert {problem.file for problem in problems} == {video.shard} and video.key in {p.key for p in problems}
    assert all("json does not say" in problem.what for problem in problems)


@pytest.mark.parametrize("stranger", ["../../outside.mp4", "/etc/passwd", "unknown.mp4"])
def test_a_tar_member_that_is_not_of_the_data_set_is_found(copy, stranger):
    shard = Dataset.open(copy).video(7).shard
    rewritten(copy / "shards" / shard, lambda name, data: [(stranger, b"x")] if name is None else data)
    problems = [problem for problem in verify(copy, workers=0) if problem.file == shard]
    assert [(problem.key, problem.what) for problem in problems] == [(stranger, "is in the tar, but not in the index")]


def test_another_index_than_described_is_found(copy):
    info = json.loads((copy / "dataset.json").read_text())
    info["splits"]["train"]["videos"] = 11
    (copy / "dataset.json").write_text(json.dumps(info))
    pq.write_table(pq.read_table(copy / "index.parquet"), copy / "index.parquet", compression="none")
    assert {p.file for p in verify(copy, workers=0)} == {"dataset.json", "index.parquet"}


def test_inspect_counts(data):
    found = inspect(data.path)
    assert found["codecs"] == {"vp9": 50}
    assert found["classes"]["Bob"] == {"test": 4, "train": 1}
    assert found["duration_s"] == {"min": 1.6, "median": 1.6, "max": 1.6}
    assert found["gop_frames"] == {"min": 8.0, "median": 8.0, "max": 8.0}
    assert found["rejected"] == {}


def test_verify_and_inspect_from_the_command_line(copy, genkd):
    assert "sound" in genkd("verify", copy).stdout
    assert json.loads(genkd("verify", copy, "--json").stdout) == []
    assert json.loads(genkd("inspect", copy, "--json").stdout)["splits"]["test"]["videos"] == 40
    assert "Bob" in genkd("inspect", copy).stdout
    next((copy / "shards").glob("*.tar")).unlink()
    broken = genkd("verify", copy, check=False)
    assert broken.returncode == 1 and "problems" in broken.stdout
    nothing = genkd("inspect", copy / "shards", check=False)
    assert nothing.returncode == 1 and "no genkd data set" in nothing.stderr
