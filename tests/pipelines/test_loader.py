import gc
import json
import os
import shutil

import numpy as np
import pytest
import torch

from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.pipelines.loader import Loader
from genkd.pipelines.pyav import decode_rgb
from genkd.pipelines.store import ClipStore
from genkd.preprocessing.shards import Dataset

CONFIG = DataConfig(clip_length=8, stride=2, size=32, scales=(1.0, 0.75))


def loader(dataset, split="train", training=True, batch_size=4, config=CONFIG, **options):
    return Loader(dataset, split, config, batch_size=batch_size, training=training, **options)


def ids(batches):
    return [batch.ids[: batch.count].tolist() for batch in batches]


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_batches_have_the_promised_form(shard_sets, codec):
    with loader(shard_sets(codec)) as batches:
        assert batches.decoder == "pyav"
        got = list(batches)
    assert [batch.count for batch in got] == [4, 4, 2] and [batch.total for batch in got] == [4, 4, 2]
    clips = got[0].clips
    assert clips.shape == (4, 3, 8, 32, 32) and clips.dtype == torch.float32
    assert clips.is_contiguous(memory_format=torch.channels_last_3d)
    assert got[0].labels.tolist() == shard_sets(codec).labels[got[0].ids].tolist()


@pytest.mark.parametrize("codec", ["vp9", "mjpeg"])
@pytest.mark.parametrize("training", [True, False])
def test_dali_and_pyav_give_the_same_clips(shard_sets, codec, training):
    """Same frames, crops and flips; their colour conversions differ by a few of 255 levels."""
    stacks = {}
    for decoder in ("dali", "pyav"):
        config = CONFIG.model_copy(update={"decoder": decoder})
        with loader(shard_sets(codec), training=training, config=config) as batches:
            stacks[decoder] = torch.cat([batch.clips for batch in batches])
    difference = (stacks["dali"] - stacks["pyav"]).abs() * 255 * 0.226
    assert difference.mean() < 3 and difference.quantile(0.99) < 12


def test_pixels_are_the_planned_ones(shard_sets):
    """One clip by hand: decode with PyAV, crop, mirror and normalize with numpy, no resize needed."""
    dataset = shard_sets("mjpeg")
    config = DataConfig(clip_length=8, stride=2, size=48, scales=(1.0,), decoder="pyav", flip=1.0)
    with loader(dataset, config=config, batch_size=1) as batches:
        batch = next(iter(batches))
        sample = batches.sample(0, 0)
    video = dataset.video(sample.row)
    data, base = ClipStore(dataset).read(video, 0, video.num_frames - 1)
    top, left, bottom, right = sample.crop
    frames = decode_rgb(data, sample.frames - base)[:, top:bottom, left:right][:, :, ::-1]
    want = (frames / 255 - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(batch.clips[0].permute(1, 2, 3, 0).numpy(), want, atol=1e-4)


def test_every_video_once_an_epoch_in_another_order_each_time(data):
    with loader(data, batch_size=3) as batches:
        first, second = ids(batches), ids(batches)
    for epoch in (first, second):
        assert sorted(sum(epoch, [])) == data.rows("train").tolist()
    assert first != second
    with loader(data, batch_size=3, seed=1) as other:
        assert ids(other) != first


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("training", [True, False])
def test_ranks_see_the_global_batches_between_them(data, world_size, training):
    size = {3: 3, 8: 8}.get(world_size, 4)
    with loader(data, batch_size=size, training=training) as alone:
        want = list(alone)
    parts = []
    for rank in range(world_size):
        with loader(data, batch_size=size, training=training, rank=rank, world_size=world_size) as batches:
            parts.append(list(batches))
    for number, whole in enumerate(want):
        shares = [part[number] for part in parts]
        assert sum([share.ids[: share.count].tolist() for share in shares], []) == whole.ids.tolist()
        torch.testing.assert_close(torch.cat([share.clips[: share.count] for share in shares]), whole.clips)
        assert all(len(share.clips) >= 1 and share.total == whole.total for share in shares)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_state_is_json_and_resumes_exactly_on_any_number_of_ranks(data, world_size):
    with loader(data, batch_size=6) as batches:
        full = ids(batches) + ids(batches)
    with loader(data, batch_size=6, rank=1, world_size=2) as batches:
        next(iter(batches))
        state = json.loads(json.dumps(batches.state_dict()))
    assert state == {"epoch": 0, "batch": 1}
    rest: list[list[int]] = [[] for _ in full[1:]]
    for rank in range(world_size):
        with loader(data, batch_size=6, rank=rank, world_size=world_size) as batches:
            batches.load_state_dict(state)
            for number, part in enumerate(ids(batches) + ids(batches)):
                rest[number] += part
    assert rest == full[1:]


def test_restoring_in_the_middle_of_iteration_goes_back(data):
    with loader(data, batch_size=3) as batches:
        first = ids(batches)
        batches.load_state_dict({"epoch": 0, "batch": 1})
        assert ids(batches) == first[1:]


def test_evaluation_gives_every_view_once_and_again(data):
    with loader(data, "test", training=False, batch_size=7, views=(2, 3)) as batches:
        for _ in range(2):
            seen = sum(ids(batches), [])
            assert seen == np.repeat(data.rows("test"), 6).tolist()


def test_an_evaluation_that_was_left_begins_anew(data):
    with loader(data, "test", training=False, batch_size=7) as batches:
        next(iter(batches))
        assert sum(ids(batches), []) == data.rows("test").tolist()
        batches.load_state_dict({"epoch": 0, "batch": 1})
        assert sum(ids(batches), []) == data.rows("test").tolist()[7:]


def test_places_that_do_not_exist_are_refused(data):
    with loader(data, batch_size=3) as batches:
        for state in ({"epoch": 3, "batch": 5}, {"epoch": 0, "batch": -1}, {"epoch": -1, "batch": 0}):
            with pytest.raises(UserError, match=r"an epoch of .* has 4 batches"):
                batches.load_state_dict(state)
        batches.load_state_dict({"epoch": 1, "batch": 4})
        assert ids(batches) == [] and batches.state_dict() == {"epoch": 2, "batch": 0}
    with pytest.raises(UserError, match="the loader is closed"):
        next(iter(batches))
    for views in ((0, 1), (1, 2)):
        with pytest.raises(UserError, match="crops 1 or 3"):
            loader(data, "test", training=False, views=views)


def test_chosen_rows_only(data):
    with loader(data, "", training=False, rows=data.rows("test")[3:5]) as batches:
        assert ids(batches) == [data.rows("test")[3:5].tolist()]


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_replayed_epochs_give_the_same_pixels(data, decoder):
    stacks = []
    for threads in (1, 4):
        config = CONFIG.model_copy(update={"decoder_threads": threads, "prefetch": threads, "decoder": decoder})
        with loader(data, config=config) as batches:
            stacks.append(torch.cat([batch.clips for batch in batches]))
    assert torch.equal(*stacks)


def test_clips_longer_than_their_videos(data, caplog):
    long = CONFIG.model_copy(update={"clip_length": 32})
    caplog.set_level("INFO")
    with loader(data, config=long):
        assert "10 of 10 videos are shorter than a clip of 63 frames and are played in a loop" in caplog.text
    refusing = long.model_copy(update={"padding": "fail"})
    with pytest.raises(UserError, match=r"10 videos of .* are shorter than a clip of 63 frames, e\.g\. .* with 40"):
        loader(data, config=refusing)


def test_bad_requests_are_refused_before_work(data, shard_sets, tmp_path):
    with pytest.raises(UserError, match="no videos in a split 'val'"):
        loader(data, "val")
    with pytest.raises(UserError, match="batch size 4 cannot be shared evenly by 3 ranks; use 3"):
        loader(data, batch_size=4, rank=0, world_size=3)
    with pytest.raises(UserError, match="has 10 videos in 'train', fewer than 12 ranks"):
        loader(data, batch_size=12, rank=0, world_size=12)
    with pytest.raises(UserError, match=r"does not decode h264 on cpu.*pyav"):
        loader(shard_sets("h264"), config=CONFIG.model_copy(update={"decoder": "dali"}))
    shutil.copytree(data.path, tmp_path / "copy")
    next((tmp_path / "copy" / "shards").glob("train-*.tar")).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its shards, e\.g\. train-"):
        loader(Dataset.open(tmp_path / "copy"))


def test_copied_sources_of_several_codecs_are_loaded_together(shard_sets, tmp_path):
    """A data set made by copying has whatever codecs its sources had; the decoder is chosen for what is there."""
    import dataclasses

    from genkd.preprocessing.convert import convert
    from genkd.preprocessing.interop import dataset_sources
    from genkd.preprocessing.video import VideoSettings

    listed = [dataset_sources(shard_sets(codec), "train") for codec in ("h264", "vp9")]
    videos = [
        dataclasses.replace(video, key=f"{number}/{video.key}")
        for number, one in enumerate(listed) for video in one.videos
    ]  # fmt: skip
    both = dataclasses.replace(listed[0], root=tmp_path / "none", videos=tuple(videos))
    convert(both, tmp_path / "both", VideoSettings("copy", short_side=0), workers=0)
    dataset = Dataset.open(tmp_path / "both")
    assert set(dataset.table["codec"].to_pylist()) == {"h264", "vp9"} and not dataset.info["reencoded"]
    with loader(dataset, training=False) as batches:
        assert batches.decoder == "pyav"
        mixed = {int(row): clip for batch in batches for row, clip in zip(batch.ids, batch.clips, strict=True)}
    only = np.flatnonzero(np.char.startswith(np.asarray(dataset.table["key"].to_pylist()), "1/"))
    by_dali = CONFIG.model_copy(update={"decoder": "dali"})
    with pytest.raises(UserError, match="does not decode h264 on cpu"):
        loader(dataset, training=False, config=by_dali)
    with loader(dataset, training=False, rows=only, config=by_dali) as batches:
        assert batches.decoder == "dali" and len(list(batches)) == len(batches)
    with loader(shard_sets("h264"), training=False) as batches:
        plain = {int(row): clip for batch in batches for row, clip in zip(batch.ids, batch.clips, strict=True)}
    keys = dataset.table["key"].to_pylist()
    row_of = {key: row for row, key in enumerate(shard_sets("h264").table["key"].to_pylist())}
    for row, clip in mixed.items():
        if keys[row].startswith("0/"):
            assert torch.equal(clip, plain[row_of[keys[row][2:]]])


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_fifty_loaders_leave_no_threads_and_no_memory(data, decoder):
    def resources():
        gc.collect()
        with open("/proc/self/statm") as file:
            return len(os.listdir("/proc/self/task")), int(file.read().split()[1]) * 4096

    for number in range(50):
        with loader(data, batch_size=2, config=CONFIG.model_copy(update={"decoder": decoder})) as batches:
            next(iter(batches))
        del batches
        if number == 9:
            threads, memory = resources()
    threads_after, memory_after = resources()
    assert threads_after <= threads + 1
    assert memory_after - memory < 40e6  # one loader's buffers alone are larger than a fortieth of that


def test_stats_count_what_was_read_and_decoded(shard_sets):
    """MJPEG has a GOP a frame: for 8 frames at stride 2, 15 are read and decoded."""
    with loader(shard_sets("mjpeg")) as batches:
        assert batches.stats()["clips"] == 0 and batches.meter.started is None  # idle time counts for nothing
        list(batches)
        batches.close()
        stats = batches.stats()
    assert (stats["batches"], stats["clips"], stats["replaced"]) == (3, 10, 0)
    assert stats["decoded_per_used"] == 15 / 8
    assert 0 < stats["wait_s"] <= stats["seconds"] and 0 < stats["wait_share"] <= 1
    assert 0 < stats["first_batch_s"] <= stats["seconds"]
    np.testing.assert_allclose(stats["frames_per_s"], 8 * stats["clips_per_s"])
    sizes = [video.size for video in (shard_sets("mjpeg").video(int(row)) for row in shard_sets("mjpeg").rows("train"))]
    assert sum(sizes) * 15 / 40 < stats["read_mb"] * 1e6  # the second epoch was begun ahead


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_nvdec_decodes_gop_slices_as_the_cpu_does(videos, tmp_path, training):
    from genkd.preprocessing import sources
    from genkd.preprocessing.convert import convert
    from genkd.preprocessing.video import VideoSettings

    convert(sources.ucf101(videos), tmp_path / "data", VideoSettings("h264", short_side=144, gop=8), workers=2)
    dataset = Dataset.open(tmp_path / "data")
    stacks = {}
    for device in ("cuda", "cpu"):
        decoder = "dali" if device == "cuda" else "pyav"
        config = CONFIG.model_copy(update={"decoder": decoder})
        with loader(dataset, training=training, device=device, config=config) as batches:
            stacks[device] = torch.cat([batch.clips.cpu() for batch in batches])
    assert ((stacks["cuda"] - stacks["cpu"]).abs() * 255 * 0.226).mean() < 3
