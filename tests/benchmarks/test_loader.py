import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest

from genkd.benchmarks import loader, loader_contenders, loader_data, loader_footprint, peers, run_benchmark
from genkd.benchmarks.loader_contenders import Clip
from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.synthetic import SynthSettings
from genkd.tables import benchmark_tables

TINY = loader_data.Workload(DataConfig(clip_length=6, stride=2, size=32), 5, "trimmed")


@pytest.fixture(scope="module")
def job(shard_sets, tmp_path_factory):
    """A job on the VP9 shards of 64x48: two batches to measure, with everything that peers read."""
    dataset = shard_sets("vp9")
    with loader.prepared(dataset, loader_data.draw_job(dataset, TINY, (1, 2, 2), "cpu")) as ready:
        yield replace(ready, workers=1)


def _taken(contender, job, folder, **config):
    """Rows and clips, in 0..255, of a contender's first three batches."""
    saved = folder / "saved.npz"
    told = loader.take_turn(contender, replace(job, save=str(saved), config={**job.config, **config})).told
    assert told["rate"] > 0 and told["first_batch_s"] > 0 and told["cpu_s_per_clip"] >= 0  # in ticks of 10 ms
    assert told["shape"] == [5, 3, 6, 32, 32] and told["dtype"] == "torch.float32"
    with np.load(saved) as found:
        mean, std = (value[:, None, None, None] for value in job.scaled)
        return found["rows"].tolist(), found["clips"] * std + mean


def _close(ours, theirs, mean, worst):
    gap = np.abs(ours - theirs)
    assert gap.mean() < mean and np.percentile(gap, 99.5) < worst


def test_peers_deliver_the_clips_that_genkd_draws(job, tmp_path):
    rows, clips = _taken("genkd", job, tmp_path, decoder="pyav")
    assert rows == [job.clips[number].row for batch in job.batches[:3] for number in batch]
    # Only where a crop is made smaller does one resize with more taps than the other.
    peer_rows, peer_clips = _taken("pyav", job, tmp_path)
    assert peer_rows == rows
    _close(peer_clips, clips, 1.5, 12)
    jpeg_rows, jpeg_clips = _taken("jpeg", job, tmp_path)
    assert jpeg_rows == rows
    _close(jpeg_clips, peer_clips, 4, 40)


@pytest.mark.slow
def test_every_peer_here_delivers_the_same_clips(job, tmp_path):
    rows, clips = _taken("genkd", job, tmp_path)
    for contender in ("dali-reader", "decord", "torchcodec", "torchcodec-opencv", "jpeg-numpy"):
        found = loader.find_peer(contender)
        if isinstance(found, str) or found[0] != sys.executable:
            continue
        peer_rows, peer_clips = _taken(contender, job, tmp_path)
        assert peer_rows == rows, contender
        _close(peer_clips, clips, 4, 40)


def test_dalis_webdataset_reader_gets_its_own_order(job, tmp_path):
    rows, clips = _taken("dali-webdataset", job, tmp_path)
    wanted = [job.clips[number] for number in job.archived[:15]]
    assert rows == [clip.row for clip in wanted]
    assert sorted(job.archived) == list(range(len(job.clips)))
    # The same frames by PyAV: another colour conversion of the same video.
    peer = [loader_contenders.Clips(job, loader_contenders._pyav)[number][0].numpy() for number in job.archived[:15]]
    mean, std = job.scaled
    _close(clips, (np.stack(peer) * std + mean).transpose(0, 4, 1, 2, 3), 4, 40)


@pytest.mark.parametrize("start", [0, 13])
def test_the_pyav_peer_seeks_to_the_very_frames(job, start):
    clip = job.clips[0]
    path = f"{job.files}/{clip.row}.mp4"
    whole = loader_contenders.pyav_frames(path, list(range(40)))
    found = loader_contenders.pyav_frames(path, [start, start + 5])
    assert sorted(found) == [start, start + 5] and sorted(whole) == list(range(40))
    assert all((found[number] == whole[number]).all() for number in found)


def test_a_flipped_clip_is_mirrored_and_normalized(job):
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(1, 32, 32, 3)
    clip = Clip(0, 5, [0], [0, 0, 32, 32], True)
    clips = loader_contenders.Clips(replace(job, clips=[clip]), lambda job, clip: image)
    found, label, row = clips[0]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found, (image[:, :, ::-1] / 255 - mean) / std, atol=1e-5)
    assert (label, row) == (5, 0)


def test_long_videos_hold_the_frames_of_short_ones_again_and_again(tmp_path):
    kind = loader_data.Synthetic(2, SynthSettings(seconds=2, fps=10, width=64, height=64), 64, repeats=5)
    long = loader_data.synthetic_set(tmp_path, "long", "h264", kind)
    short = loader_data.synthetic_set(tmp_path, "long once", "h264", kind)
    assert long.num_frames.tolist() == [100, 100] and short.num_frames.tolist() == [20, 20]
    assert long.video(0).fps == 10 and set(long.column("codec")) == {"h264"}
    job = replace(
        loader_data.draw_job(long, TINY, (1, 1, 1), "cpu"), clips=[Clip(r, 0, [0], [], False) for r in (0, 1)]
    )
    loader_data.write_files(long, job, tmp_path / "long files")
    loader_data.write_files(short, job, tmp_path / "short files")
    longs = loader_contenders.pyav_frames(str(tmp_path / "long files" / "1.mp4"), list(range(100)))
    for number, image in longs.items():
        row = 1 - number // 20 % 2  # the second long video begins with the second short one
        short_frame = loader_contenders.pyav_frames(str(tmp_path / "short files" / f"{row}.mp4"), [number % 20])
        assert (image == short_frame[number % 20]).all()


def test_targets_are_ratios_of_medians():
    def row(workload, name, rate, first=1.0, cpu=10.0):
        return {
            "workload": workload, "name": name, "median": rate,
            "extra": {"first batch s": first, "CPU ms/clip": cpu},
        }  # fmt: skip

    rows = [
        row("16x224 vp9", "DataLoader + PyAV", 40, cpu=30.0), row("16x224 vp9", "DataLoader + decord", 50, cpu=40.0),
        row("16x224 vp9", loader.JPEG, 10, cpu=90.0), row("16x224 vp9", loader.GENKD, 55, first=5.0, cpu=20.0),
        row("16x224 vp9", loader.GENKD_PYAV, 75, first=2.5, cpu=25.0),
        row("256x96-long h264", loader.GENKD, 33), row("256x96-long h264", loader.GENKD + loader.ON_SHORT, 44),
        {"workload": "index", "name": "opening, seconds", "median": 2.5, "bounds": (None, 2.0), "extra": {}},
        {"workload": "index", "name": "first opening, seconds", "median": 9.0, "bounds": (None, None), "extra": {}},
    ]  # fmt: skip
    found = {entry["name"]: (entry["measured"], entry["met"]) for entry in loader.targets(rows)}
    assert found == {
        "16x224 vp9: seconds to the first batch": (2.5, True),
        "16x224 vp9: clips/s against the best peer, DataLoader + decord": (1.5, True),
        "16x224 vp9: for comparison, clips a CPU second against DataLoader + PyAV": (1.5, None),
        f"16x224 vp9: clips/s against {loader.JPEG}": (7.5, True),
        "256x96-long h264: seconds to the first batch": (1.0, True),
        "256x96-long h264: clips/s against 30-second videos": (0.75, False),
        "index: opening, seconds": (2.5, False),
    }


def test_a_peer_that_is_missing_or_unfit_is_named_with_its_reason(job, monkeypatch):
    monkeypatch.delenv(peers.PEERS_PYTHON, raising=False)
    monkeypatch.setattr(loader, "find_peer", lambda name: "no such package" if name == "decord" else ("py", {"x": "1"}))
    about = {"skipped": {}, "packages": {}}
    assert "DataLoader + PyAV" in loader._peer_entries("16x224", "h264", job, about)
    assert about["skipped"]["DataLoader + decord"] == "no such package"
    reason = about["skipped"]["DALI readers.webdataset + decoders.video, 16x224 h264"]
    assert reason == "on a CPU, DALI decodes vp8, vp9, mjpeg only"
    assert about["packages"]["DataLoader + PyAV: x"] == "1"
    looped = replace(job, clips=[Clip(0, 0, [38, 39, 0, 1], [0, 0, 8, 8], False)])
    about = {"skipped": {}, "packages": {}}
    assert "DALI experimental.readers.video" not in loader._peer_entries("16x224", "vp9", looped, about)
    assert "in a loop" in about["skipped"]["DALI experimental.readers.video, 16x224 vp9"]


def test_genkd_is_measured_with_pyav_where_auto_is_dali(job):
    assert loader._genkd_entries("vp9", job).keys() == {loader.GENKD, loader.GENKD_PYAV}
    assert loader._genkd_entries("h264", job).keys() == {loader.GENKD}
    assert loader._genkd_entries("h264", replace(job, device="cuda")).keys() == {
        loader.GENKD, loader.GENKD_PYAV, loader.GENKD_DALI
    }  # fmt: skip


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="unknown workload '16x225'; there are 16x224, 64x224"):
        run_benchmark("loader", None, 1, ["16x225"])
    with pytest.raises(UserError, match="no contender has '16x224' in its name"):
        run_benchmark("train", None, 1, ["16x224"])


def test_index_of_many_videos_is_opened_as_a_conversion_writes_it(tmp_path):
    rows = loader_footprint.measure_index(tmp_path, 1, videos=5000)
    assert [row["name"] for row in rows] == [
        "first opening, seconds", "first opening, MB", "opening, seconds", "opening, MB",
    ]  # fmt: skip
    assert all(row["median"] > 0 for row in rows)
    dataset = Dataset.open(tmp_path / "index of 5000")
    video = dataset.video(4321)
    assert len(video.gop_frames) == 9 and video.num_frames == 128 and video.shard == "train-00001.tar"
    assert video.key == f"class_{video.label:03d}/video_0004321"


@pytest.mark.slow
def test_memory_stays_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_footprint, "LOOKS", (50, 200))
    (row,) = loader_footprint.measure_memory(tmp_path, "cpu")
    assert row["median"] < 1.5 and list(row["extra"]) == ["MB after 50 batches", "MB after 200 batches"]


@pytest.mark.slow
def test_a_whole_run_prints_and_serializes(shard_sets, monkeypatch):
    monkeypatch.setitem(loader_data.WORKLOADS, "16x224", TINY)
    monkeypatch.setattr(loader, "MEASURED", 2)
    result = loader.run(shard_sets("h264").path, 1, ["16x224"])
    names = {row["name"] for row in result["rows"]}
    assert {"DataLoader + PyAV", "DataLoader + JPEG frames", loader.JPEG, loader.GENKD} <= names
    for label in ("DataLoader + decord", "DataLoader + torchcodec"):
        assert (label in names) != (label in result["about"]["skipped"])
    assert result["about"]["workloads"]["16x224 h264"]["workers"] == len(os.sched_getaffinity(0))
    json.dumps(result)
    assert benchmark_tables(result)[0].title.startswith("loader 16x224 h264 on ")
