import io
import json
import tarfile

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genkd.errors import UserError
from genkd.preprocessing import shards
from genkd.preprocessing.shards import SCHEMA, Corrupt, Dataset, ShardWriter, gop_table, tar_name


def test_crc32c_is_castagnolis():
    """The check value of the CRC-32C standard (RFC 3720, B.4: "123456789")."""
    assert google_crc32c.value(b"123456789") == 0xE3069283


def test_a_member_that_fails_leaves_the_tar_as_it_was(tmp_path):
    writer = ShardWriter(tmp_path / "a.tar")
    with writer.member("one.mp4") as payload:
        payload.write(b"abc")
        payload.write(b"defg")
    with pytest.raises(RuntimeError), writer.member("two.mp4") as lost:
        lost.write(b"x" * 5000)
        raise RuntimeError
    with writer.member("a/" + "long" * 50 + ".json") as other:
        other.write(b"{}")
    writer.finish()
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
        assert [(m.name, m.size, m.offset_data) for m in members] == [
            ("one.mp4", 7, payload.offset),
            ("a/" + "long" * 50 + ".json", 2, other.offset),
        ]
        assert tar.extractfile(members[0]).read() == b"abcdefg"
    assert payload.crc32c == google_crc32c.value(b"abcdefg")


def test_gop_table_takes_fragments_only():
    assert gop_table(
        [("ftyp", 0, 24), ("moov", 24, 600), ("moof", 624, 80), ("mdat", 704, 900), ("moof", 1604, 80)], 2000
    ) == (
        624,
        [624, 1604, 2000],
    )
    for boxes in ([("ftyp", 0, 24), ("mdat", 24, 99)], [("moof", 0, 9), ("mdat", 9, 9), ("mfra", 18, 9)]):
        with pytest.raises(Corrupt):
            gop_table(boxes, 999)


def test_tar_names_have_one_dot_before_the_extension():
    assert tar_name("a.b/c.d.e") == "a.b/c%2Ed%2Ee"


def test_the_index_describes_the_tar(data):
    table = pq.read_table(data.path / "index.parquet")
    assert table.schema.equals(SCHEMA)
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    assert table.num_rows == 50
    for row in range(0, 50, 7):
        video = data.video(row)
        with tarfile.open(data.path / "shards" / video.shard) as tar:
            names = tar.getnames()
            assert names.count(f"{video.key}.mp4") == names.count(f"{video.key}.json") == 1
            payload = tar.extractfile(f"{video.key}.mp4").read()
            about = json.load(tar.extractfile(f"{video.key}.json"))
        with open(data.path / "shards" / video.shard, "rb") as file:
            file.seek(video.offset)
            assert file.read(video.size) == payload
        assert google_crc32c.value(payload) == video.crc32c
        assert video.gop_offsets[0] == video.header_size and video.gop_offsets[-1] == video.size
        assert (about["label"], about["class"]) == (video.label, video.key.split("/")[0])
        assert video.gop_frames.tolist() == [0, 8, 16, 24, 32, 40]


def test_dataset_json_counts_what_is_there(data):
    info = json.loads((data.path / "dataset.json").read_text())
    assert info["format_version"] == 1
    assert {split: entry["videos"] for split, entry in info["splits"].items()} == {"train": 10, "test": 40}
    assert info["splits"]["train"]["frames"] == 400 and info["splits"]["train"]["seconds"] == 16.0
    assert info["classes"] == data.classes and len(data.classes) == 10


def test_index_arrow_is_a_cache_made_anew_when_absent_or_of_another_index(data, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(data.path, copy)
    before = (copy / "index.arrow").read_bytes()
    for spoil in (lambda p: p.unlink(), lambda p: p.write_bytes(b"rubbish"), lambda p: p.write_bytes(before[:-40])):
        spoil(copy / "index.arrow")
        assert Dataset.open(copy).table.equals(data.table)
        assert (copy / "index.arrow").read_bytes() == before
    info = json.loads((copy / "dataset.json").read_text())
    (copy / "index.parquet").write_bytes(shards.parquet_bytes(data.table[:7]))
    info["index_digest"] = shards.digest_of((copy / "index.parquet").read_bytes())
    (copy / "dataset.json").write_text(json.dumps(info))
    assert Dataset.open(copy).table.num_rows == 7
    info["index_digest"] = "sha256:other"
    (copy / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"index\.parquet .* not the file that dataset\.json describes; run the same"):
        Dataset.open(copy)


def test_rows_of_a_split(data):
    assert len(data.rows("train")) == 10
    assert set(np.concatenate([data.rows("train"), data.rows("test")])) == set(range(50))
    with pytest.raises(UserError, match=r"'val'; its splits: test, train|'val'; its splits: train, test"):
        data.rows("val")


def test_a_data_set_that_is_none_or_not_finished_is_refused(tmp_path):
    with pytest.raises(UserError, match="no genkd data set"):
        Dataset.open(tmp_path / "none")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="version 2"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 1, "index_digest": "x"}')
    with pytest.raises(UserError, match="damaged"):
        Dataset.open(tmp_path)
    info = {"format_version": 1, "name": "x", "index_digest": "x", "classes": [], "splits": {}}
    info["video"] = {"codec": "vp9"}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"index\.parquet"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".hidden.tar"])
def test_a_shard_name_that_points_outside_is_refused(data, name):
    columns = {field: data.table[field] for field in data.table.column_names}
    columns["shard"] = pa.array([name] * data.table.num_rows)
    with pytest.raises(Corrupt, match="outside"):
        Dataset(data.storage, data.info, pa.table(columns)).video(0)


def test_boxes_of_a_payload_with_a_nonsensical_size_are_refused():
    from genkd.preprocessing.shards import Payload

    payload = Payload(io.BytesIO(), 0)
    payload.write(b"\x00\x00\x00\x02moof")
    with pytest.raises(Corrupt, match="box"):
        payload.boxes()
