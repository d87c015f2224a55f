"""Other libraries read the shards and the Parquet export, and find the bytes that the index describes."""

import collections
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from genkd.errors import UserError
from genkd.preprocessing import sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.export import COLUMNS, dali_index, export_parquet
from genkd.preprocessing.shards import Corrupt, Dataset, ShardWriter, digest_of, tar_name
from genkd.preprocessing.video import VideoSettings

ODD_NAMES = ["a.b.c", "two words (1)! & [x]", "größe", "große", "l" * 120, "m" * 120]


@pytest.fixture(scope="session")
def odd(videos, tmp_path_factory) -> Dataset:
    """Videos whose names have dots, spaces, umlauts or 120 characters, in a folder with both."""
    root = tmp_path_factory.mktemp("odd")
    folder = root / "videos" / "Class v1.0"
    folder.mkdir(parents=True)
    (first, *_) = sorted(videos.rglob("*.avi"))
    for name in ODD_NAMES:
        shutil.copy(first, folder / f"{name}.avi")
    convert(sources.folder(root / "videos"), root / "data", VideoSettings("vp9", short_side=48, gop=8), workers=0)
    return Dataset.open(root / "data")


@pytest.fixture(scope="session")
def exported(shard_sets, tmp_path_factory) -> Path:
    """The VP9 shards as Parquet; several row groups a file."""
    out = tmp_path_factory.mktemp("export") / "out"
    export_parquet(shard_sets("vp9").path, out, workers=2, row_group_bytes=12_000)
    return out


@pytest.fixture
def copy(data, tmp_path):
    shutil.copytree(data.path, tmp_path / "copy")
    return tmp_path / "copy"


def payloads(dataset: Dataset) -> dict[str, bytes]:
    """key -> the bytes where the index says they are."""
    found = {}
    for row in range(dataset.table.num_rows):
        video = dataset.video(row)
        with open(dataset.path / "shards" / video.shard, "rb") as file:
            file.seek(video.offset)
            found[video.key] = file.read(video.size)
    return found


def shard_paths(dataset: Dataset) -> list[str]:
    return [str(dataset.path / "shards" / name) for name in sorted(set(dataset.table["shard"].to_pylist()))]


def replace_column(path: Path, column: str, values: list) -> None:
    """Changes the index of a data set, and the digest that dataset.json has of it."""
    table = pq.read_table(path / "index.parquet")
    number = table.column_names.index(column)
    table = table.set_column(number, column, pa.array(values, table.schema.field(column).type))
    pq.write_table(table, path / "index.parquet")
    info = json.loads((path / "dataset.json").read_text())
    info["index_digest"] = digest_of((path / "index.parquet").read_bytes())
    (path / "dataset.json").write_text(json.dumps(info))


# --- WebDataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data", "odd"])
def test_webdataset_reads_the_shards(name, request):
    webdataset = pytest.importorskip("webdataset", reason="needs the package webdataset")
    dataset = request.getfixturevalue(name)
    expected = payloads(dataset)
    rows = {row["key"]: row for row in dataset.table.to_pylist()}
    samples = list(webdataset.WebDataset(shard_paths(dataset), shardshuffle=False))
    assert len(samples) == len(expected)
    for sample in samples:
        about = json.loads(sample["json"])
        key = about["key"]
        assert sample["__key__"] == tar_name(key)
        assert sample["mp4"] == expected.pop(key)
        for field in ("split", "label", "num_frames", "fps", "width", "height", "codec"):
            assert about[field] == rows[key][field]
        assert about["class"] == dataset.classes[rows[key]["label"]] == key.split("/")[0]
    assert not expected


# --- DALI ------------------------------------------------------------------------------------------------------------


def read_with_dali(paths: list[str], indexes: list[str], samples: int, decode: bool = False) -> list[tuple]:
    """(mp4 bytes, JSON value) of every sample in turn, or (number of frames, JSON value)."""
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=samples, num_threads=2, device_id=None)
    def graph():
        media, about = fn.readers.webdataset(
            paths=paths, index_paths=indexes, ext=["mp4", "json"], missing_component_behavior="error", name="reader"
        )
        return (fn.decoders.video(media, device="cpu").shape() if decode else media), about

    pipeline = graph()
    pipeline.build()
    assert pipeline.reader_meta("reader")["epoch_size"] == samples
    first, second = pipeline.run()
    values = [int(np.array(shape)[0]) if decode else np.array(shape).tobytes() for shape in first]
    return list(zip(values, (json.loads(np.array(text).tobytes()) for text in second), strict=True))


def index_paths(dataset: Dataset) -> list[str]:
    return [path.removesuffix(".tar") + ".idx" for path in shard_paths(dataset)]


@pytest.mark.parametrize(("name", "indexed"), [("data", True), ("data", False), ("odd", True), ("odd", False)])
def test_dali_reads_the_shards(name, indexed, request):
    dataset = request.getfixturevalue(name)
    expected = payloads(dataset)
    found = read_with_dali(shard_paths(dataset), index_paths(dataset) if indexed else [], len(expected))
    assert {about["key"]: media for media, about in found} == expected
    assert all(about["class"] == about["key"].split("/")[0] for _, about in found)


def test_dali_decodes_what_it_reads(data):
    found = read_with_dali(shard_paths(data), index_paths(data), 50, decode=True)
    assert [frames for frames, _ in found] == [about["num_frames"] for _, about in found] == [40] * 50


def test_the_index_is_that_of_dalis_own_tool(data, tmp_path):
    tool = pytest.importorskip("wds2idx", reason="needs wds2idx, which comes with NVIDIA DALI")
    if not shutil.which("tar"):
        pytest.skip("needs the program tar")
    for path in map(Path, shard_paths(data)):
        with tool.IndexCreator(str(path), str(tmp_path / "reference.idx"), verbose=False) as creator:
            creator.create_index()
        assert dali_index(path) == (tmp_path / "reference.idx").read_bytes()


def test_the_index_takes_only_the_headers_of_a_tar(tmp_path):
    path = tmp_path / "sparse.tar"
    with open(path, "wb") as file:
        for number in range(200):
            info = tarfile.TarInfo(f"a b/{number}.mp4")
            info.size = 7 << 30
            file.write(info.tobuf(tarfile.PAX_FORMAT))
            file.seek(info.size, io.SEEK_CUR)
        file.write(bytes(1024))
    lines = dali_index(path).decode().splitlines()
    assert lines[0] == "v1.2 200"
    assert lines[-1] == f"mp4 {199 * ((7 << 30) + 512) + 512} {7 << 30} a%20b/199.mp4"


def test_the_index_of_no_tar_and_of_an_empty_one(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"a\.tar cannot be read as a tar file"):
        dali_index(tmp_path / "a.tar")
    writer = ShardWriter(tmp_path / "b.tar")
    writer.finish()
    assert dali_index(tmp_path / "b.tar") == b"v1.2 0\n"


# --- Parquet: other readers ------------------------------------------------------------------------------------------


def test_pyarrow_reads_the_export(data, exported):
    table = pyarrow.dataset.dataset(exported, format="parquet").to_table()
    assert table.schema.equals(COLUMNS)
    videos = pc.struct_field(table["video"], "bytes").to_pylist()
    assert dict(zip(table["key"].to_pylist(), videos, strict=True)) == payloads(data)
    assert pc.struct_field(table["video"], "path").to_pylist() == [f"{key}.mp4" for key in table["key"].to_pylist()]
    ours = data.table.take(pc.index_in(table["key"], data.table["key"]))
    for name in ("split", "label", "num_frames", "fps", "width", "height", "codec"):
        assert table[name].to_pylist() == ours[name].to_pylist(), name
    assert table["class"].to_pylist() == [key.split("/")[0] for key in table["key"].to_pylist()]


def test_a_file_a_shard_with_bounded_row_groups_and_bare_payloads(data, exported):
    names = sorted(path.name for path in (exported / "data").iterdir())
    shards = collections.Counter(name.split("-")[0] for name in set(data.table["shard"].to_pylist()))
    assert names == [
        f"{split}-{number:05d}-of-{shards[split]:05d}.parquet"
        for split in sorted(shards) for number in range(shards[split])
    ]  # fmt: skip
    groups = 0
    for name in names:
        metadata = pq.read_metadata(exported / "data" / name)
        groups += metadata.num_row_groups
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            (video,) = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "video.bytes"]
            assert video.compression == "UNCOMPRESSED" and not video.has_dictionary_page and video.statistics is None
            assert video.total_uncompressed_size <= 12_000 + 1_000 or group.num_rows == 1
    assert groups > len(names)


def test_duckdb_reads_the_export(data, exported):
    duckdb = pytest.importorskip("duckdb", reason="needs the package duckdb")
    with duckdb.connect() as base:
        rows = base.sql(
            "select split, class, count(*), sum(octet_length(video.bytes)), max(num_frames) "
            f"from '{exported}/data/*.parquet' group by split, class"
        ).fetchall()
    sizes: dict = {}
    for row in data.table.to_pylist():
        sizes.setdefault((row["split"], row["key"].split("/")[0]), []).append(row["size"])
    assert {row[:2]: row[2:] for row in rows} == {name: (len(s), sum(s), 40) for name, s in sizes.items()}


def test_hugging_face_datasets_read_the_export(data, exported, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    files = {split: str(exported / "data" / f"{split}-*.parquet") for split in ("train", "test")}
    named = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    found = datasets.load_dataset(str(exported), cache_dir=str(tmp_path / "cache"))
    expected, labels = payloads(data), dict(zip(data.table["key"].to_pylist(), data.labels.tolist(), strict=True))
    for sets in (named, found):
        assert {split: len(rows) for split, rows in sets.items()} == {"train": 10, "test": 40}
        for split, rows in sets.items():
            assert rows.features["label"].names == data.classes
            assert rows.features["annotations"].feature["label"].names == data.classes
            assert isinstance(rows.features["video"], datasets.Video)
            for row in rows.cast_column("video", datasets.Video(decode=False)):
                assert row["video"]["bytes"] == expected[row["key"]]
                assert row["label"] == labels[row["key"]] and row["split"] == split
                assert rows.features["label"].int2str(row["label"]) == row["class"]


@pytest.mark.slow
def test_ray_data_reads_the_export(data, exported, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="needs the package ray")
    if started := not ray.is_initialized():
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address="local", num_cpus=1, object_store_memory=100 << 20, **quiet)
    try:
        rows = pytest.importorskip("ray.data", reason="needs Ray Data").read_parquet(str(exported)).take_all()
    finally:
        if started:
            ray.shutdown()
    assert {row["key"]: row["video"]["bytes"] for row in rows} == payloads(data)
    assert all(row["class"] == data.classes[row["label"]] for row in rows)


# --- Parquet: what the export promises -------------------------------------------------------------------------------


def test_annotations_and_videos_without_a_label(copy, tmp_path):
    annotations = [{"start_s": 0.5, "end_s": 1.25, "label": 3}, {"start_s": 1.0, "end_s": 1.5, "label": 0}]
    replace_column(copy, "annotations", [annotations] + [[]] * 49)
    replace_column(copy, "label", [-1, *Dataset.open(copy).labels.tolist()[1:]])
    export_parquet(copy, tmp_path / "out", workers=0)
    table = pq.read_table(tmp_path / "out", columns=["label", "class", "annotations"])
    assert table.filter(pc.field("label") == -1).to_pylist() == [
        {"label": -1, "class": None, "annotations": annotations}
    ]
    assert table.filter(pc.field("label") == 0).to_pylist() == [{"label": 0, "class": "Bob", "annotations": []}] * 4


def test_odd_names_and_one_split(odd, data, tmp_path):
    summary = export_parquet(odd.path, tmp_path / "odd", workers=0)
    assert sorted(pq.read_table(tmp_path / "odd")["key"].to_pylist()) == sorted(payloads(odd))
    assert (summary.files, summary.videos, summary.resumed_files) == (6, 6, 0)
    summary = export_parquet(data.path, tmp_path / "train", workers=0, split="train")
    assert (summary.videos, summary.payload_bytes) == (10, int(data.column("size")[data.rows("train")].sum()))
    with pytest.raises(UserError, match="'val'"):
        export_parquet(data.path, tmp_path / "val", workers=0, split="val")


def test_a_killed_export_continues_and_ends_with_the_same_bytes(data, exported, tmp_path, content):
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from genkd.preprocessing.export import export_parquet\n"
        "seen = []\n"
        "def on_videos(count):\n"
        "    seen.append(count)\n"
        "    if len(seen) == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_parquet(sys.argv[1], sys.argv[2], workers=0, row_group_bytes=12_000, on_videos=on_videos)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, data.path, out], cwd=tmp_path, timeout=60)
    assert done.returncode == -signal.SIGKILL
    left = sorted((out / "data").iterdir())
    finished = [path for path in left if path.suffix == ".parquet"]
    assert len(left) == len(finished) + 1 and left[0].name.endswith(".tmp")
    times = {path: path.stat().st_mtime_ns for path in finished}

    started, seen = [], []
    summary = export_parquet(
        data.path, out, workers=2, row_group_bytes=12_000,
        on_start=lambda videos, earlier: started.append((videos, earlier)), on_videos=seen.append,
    )  # fmt: skip
    assert summary.resumed_files == len(finished) > 0 and summary.videos == 50
    assert started == [(50, 50 - sum(seen))] and 0 < sum(seen) < 50
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    assert content(out) == content(exported)
    finished[1].write_bytes(finished[1].read_bytes()[:-100])
    summary = export_parquet(data.path, out, workers=0, row_group_bytes=12_000)
    assert summary.files - summary.resumed_files == 1 and content(out) == content(exported)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_payload_is_named_and_leaves_no_file(copy, tmp_path, workers):
    video = Dataset.open(copy).video(7)
    path = copy / "shards" / video.shard
    spoilt = bytearray(path.read_bytes())
    spoilt[video.offset + video.size // 2] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(Corrupt, match="checksum") as caught:
        export_parquet(copy, tmp_path / "out", workers=workers)
    assert video.key in str(caught.value) and video.shard in str(caught.value)
    assert not list((tmp_path / "out" / "data").glob(".*.tmp"))
    written = [pq.read_table(file)["key"].to_pylist() for file in (tmp_path / "out" / "data").iterdir()]
    assert video.key not in sum(written, [])


def test_missing_and_cut_shards_are_named(copy, tmp_path):
    video = Dataset.open(copy).video(7)
    path = copy / "shards" / video.shard
    path.write_bytes(path.read_bytes()[: video.offset + 10])
    with pytest.raises(Corrupt, match=f"past the end of shard .*{video.shard}"):
        export_parquet(copy, tmp_path / "out", workers=0)
    path.unlink()
    with pytest.raises(Corrupt, match=f"{video.shard} of .* is missing"):
        export_parquet(copy, tmp_path / "out", workers=0)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("shard", "../../x.tar", "outside"),
        ("split", "../../x", "outside"),
        ("label", 10, "label 10, and dataset.json names only 10 classes"),
        ("size", 1 << 40, "lower --short-side"),
        ("offset", -512, "past the end|contradict"),
    ],
)
def test_index_entries_that_cannot_be_are_refused(copy, tmp_path, column, value, words):
    replace_column(copy, column, [value, *Dataset.open(copy).table[column].to_pylist()[1:]])
    with pytest.raises(UserError, match=words):
        export_parquet(copy, tmp_path / "a" / "b", workers=0)
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "copy"}


def test_from_and_to_a_url(data, exported, tmp_path, content):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    source, out = "memory://interchange/in", "memory://interchange/out"
    memory.put(str(data.path), source, recursive=True)
    try:
        for _ in range(2):
            summary = export_parquet(source, out, workers=0, row_group_bytes=12_000)
        assert summary.resumed_files == summary.files > 0
        memory.get(out, str(tmp_path / "out"), recursive=True)
        assert content(tmp_path / "out") == {n: data for n, data in content(exported).items() if n != ".lock"}
        with pytest.raises(UserError, match="inside the source"):
            export_parquet(source, source + "/x", workers=0)
    finally:
        memory.rm("/interchange", recursive=True)


def test_another_out_is_refused(data, odd, exported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"not empty and holds no export \(found 'thesis.tex'\)"):
        export_parquet(data.path, tmp_path / "full", workers=0)
    with pytest.raises(UserError, match=r"another export \(its classes, files, index_digest differ\)"):
        export_parquet(odd.path, exported, workers=0, row_group_bytes=12_000)
    with pytest.raises(UserError, match=r"another export \(its files, split differ\)"):
        export_parquet(data.path, exported, workers=0, split="train", row_group_bytes=12_000)
    with pytest.raises(UserError, match="inside the source"):
        export_parquet(data.path, data.path / "parquet", workers=0)
    with pytest.raises(UserError, match="no genkd data set"):
        export_parquet(tmp_path / "none", tmp_path / "out", workers=0)
    shutil.copytree(exported, tmp_path / "spoilt")
    (tmp_path / "spoilt" / "_export.json").write_text("{")
    with pytest.raises(UserError, match=r"_export\.json is damaged"):
        export_parquet(data.path, tmp_path / "spoilt", workers=0)


def test_a_full_disk_is_one_sentence(data, small_disk):
    with pytest.raises(UserError, match="no space left"):
        export_parquet(data.path, small_disk("100k"), workers=0)
