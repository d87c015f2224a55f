"""Flow, pairs, detection windows, shared decoding, types and padding: what a loader does beyond RGB clips."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.pipelines import windows
from genkd.pipelines.loader import Loader
from genkd.pipelines.pyav import decode_rgb
from genkd.preprocessing.convert import convert
from genkd.preprocessing.flow import FlowSettings
from genkd.preprocessing.interop import dataset_sources
from genkd.preprocessing.shards import Corrupt, Dataset

# This spread of flow maps its levels to -1..1.
CONFIG = DataConfig(clip_length=8, stride=2, size=32, scales=(1.0, 0.75), flow_std=(0.5, 0.5))


def loader(dataset, split="train", training=True, batch_size=5, config=CONFIG, **options):
    return Loader(dataset, split, config, batch_size=batch_size, training=training, **options)


def clips_of(dataset, config=CONFIG, **options):
    with loader(dataset, config=config, **options) as batches:
        return torch.cat([batch.clips for batch in batches])


@pytest.fixture(scope="module")
def flow_sets(shard_sets, tmp_path_factory):
    """A function: codec -> the flow of the synthetic videos' training split, GOP 8."""
    made = {}

    def get(codec):
        if codec not in made:
            out = tmp_path_factory.mktemp("flow") / codec
            convert(dataset_sources(shard_sets("mjpeg"), None), out, FlowSettings("dis", codec=codec, gop=8), workers=2)
            made[codec] = Dataset.open(out)
        return made[codec]

    return get


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_flow_clips_have_two_channels_which_are_the_halves_of_the_frames(flow_sets, codec):
    """One clip by hand, without resizing: x from the left half and y from the right one, 127.5 is no motion."""
    dataset = flow_sets(codec)
    decoder = "pyav" if codec == "h264" else "dali"
    config = CONFIG.model_copy(update={"size": 48, "scales": (1.0,), "flip": 0.0, "decoder": decoder})
    with loader(dataset, config=config, batch_size=1) as batches:
        batch, sample = next(iter(batches)), batches.sample(0, 0)
        part = batches.streams[0].read(sample)
    assert batch.clips.shape == (1, 2, 8, 48, 48)
    top, left, bottom, right = sample.crop
    assert (right - left, bottom - top) == (48, 48) and right <= 64
    frames = decode_rgb(part.data, sample.frames - part.base)[:, top:bottom, :, 0].astype(np.float32)
    want = np.stack([frames[..., left:right], frames[..., 64 + left : 64 + right]]) / 127.5 - 1
    assert np.abs(batch.clips[0].numpy() - want).max() < (0.5 if codec == "h264" else 3) / 127.5 + 1e-6


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_flipped_flow_clip_moves_the_other_way(flow_sets, codec):
    config = CONFIG.model_copy(update={"dtype": "uint8", "decoder": "pyav" if codec == "h264" else "dali"})
    plain, flipped = (clips_of(flow_sets(codec), config.model_copy(update={"flip": share})) for share in (0.0, 1.0))
    mirrored = plain.flip(-1).int()
    assert torch.equal(flipped[:, 0].int(), 255 - mirrored[:, 0]) and torch.equal(flipped[:, 1].int(), mirrored[:, 1])
    assert plain[:, 0].float().std() > 1


def test_dali_and_pyav_give_the_same_flow(flow_sets):
    clips = [clips_of(flow_sets("vp9"), CONFIG.model_copy(update={"decoder": name})) for name in ("dali", "pyav")]
    assert ((clips[0] - clips[1]).abs() * 127.5).quantile(0.99) < 6


def test_pairs_show_the_same_windows_of_both_data_sets(shard_sets, flow_sets):
    """The flow alone, with the same seed, has the same draws: keys and order are the same in both indexes."""
    rgb, flow = shard_sets("vp9"), flow_sets("h264")
    with loader(rgb, flow=flow) as batches:
        pairs = list(batches)
    alone = clips_of(flow)
    assert torch.equal(torch.cat([pair.flow for pair in pairs]), alone)
    assert torch.equal(torch.cat([pair.clips for pair in pairs]), clips_of(rgb))
    assert pairs[0].flow.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_pair_is_matched_by_key_and_its_crops_by_size(shard_sets, flow_sets, tmp_path):
    """Flow of half the size, rows in another place: crops are halved."""
    rgb = shard_sets("vp9")
    source = dataset_sources(shard_sets("mjpeg"), "train")
    convert(source, tmp_path / "flow", FlowSettings("dis", codec="h264", gop=8, short_side=24), workers=2)
    flow = Dataset.open(tmp_path / "flow")
    assert flow.table.num_rows < rgb.table.num_rows
    config = CONFIG.model_copy(update={"flip": 0.0, "scales": (0.5,), "size": 24})
    with loader(rgb, flow=flow, config=config, batch_size=10) as batches:
        (pair,) = list(batches)
        stream = batches.streams[1]
        for number in range(10):
            sample = batches.sample(0, number)
            assert stream.video(sample).key == rgb.video(sample.row).key
            top, left, bottom, right = (round(edge / 2) for edge in sample.crop)
            part = stream.read(sample)
            frames = decode_rgb(part.data, sample.frames - part.base)[:, top:bottom, left:right, 0]
            means = frames.reshape(8, -1).mean(1) / 127.5 - 1
            np.testing.assert_allclose(pair.flow[number, 0].mean((1, 2)).numpy(), means, atol=0.02)
    with pytest.raises(UserError, match=r"lacks \d+ of the \d+ videos of .*, e\.g\. .*genkd flow"):
        loader(rgb, "test", flow=flow, training=False)
    with pytest.raises(UserError, match="a pair is an RGB data set and a flow data set"):
        loader(rgb, flow=rgb)
    with pytest.raises(UserError, match="has no colour"):
        loader(flow, config=CONFIG.model_copy(update={"hue": 0.1}))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_hybrid_decoding_shares_each_batch(data, share):
    config = CONFIG.model_copy(update={"decoder": "hybrid", "hybrid_share": share})
    with loader(data, config=config, batch_size=4) as batches:
        assert batches.decoder == "hybrid"
        got = [(batch.ids.tolist(), batch.clips) for batch in batches]
    alone = {
        name: clips_of(data, CONFIG.model_copy(update={"decoder": name}), batch_size=4) for name in ("dali", "pyav")
    }
    with loader(data, batch_size=4) as batches:
        assert [rows for rows, _ in got] == [batch.ids.tolist() for batch in batches]
    start = 0
    for rows, clips in got:
        by_dali = round(len(rows) * (1 - share))
        assert torch.equal(clips[:by_dali], alone["dali"][start : start + by_dali])
        assert torch.equal(clips[by_dali:], alone["pyav"][start + by_dali : start + len(rows)])
        start += len(rows)
    assert clips.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_clips_come_in_every_type(data, decoder):
    clips = {
        dtype: clips_of(data, CONFIG.model_copy(update={"dtype": dtype, "decoder": decoder}))
        for dtype in ("float32", "float16", "uint8")
    }
    assert [clip.dtype for clip in clips.values()] == [torch.float32, torch.float16, torch.uint8]
    mean, std = (torch.tensor(values)[:, None, None, None] * 255 for values in (CONFIG.mean, CONFIG.std))
    assert (clips["float32"] - (clips["uint8"].float() - mean) / std).abs().max() < 1e-5
    assert (clips["float32"] - clips["float16"].float()).abs().max() < 2e-3
    assert all(clip.is_contiguous(memory_format=torch.channels_last_3d) for clip in clips.values())


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
@pytest.mark.parametrize(("padding", "value"), [("black", "normalized"), ("zero", 0.0)])
def test_short_videos_are_filled_up(data, decoder, padding, value):
    config = CONFIG.model_copy(update={"clip_length": 24, "padding": padding, "decoder": decoder})
    clips = clips_of(data, config)
    assert clips.shape[2] == 24  # 40 frames at stride 2 give 20
    filled = clips[:, :, 20:]
    if padding == "black":
        want = -torch.tensor(CONFIG.mean) / torch.tensor(CONFIG.std)
        torch.testing.assert_close(filled, want[None, :, None, None, None].expand_as(filled))
    else:
        assert not filled.any()
    looped = clips_of(data, config.model_copy(update={"padding": "loop"}))
    assert torch.equal(clips[:, :, :20], looped[:, :, :20]) and looped[:, :, 20:].std() > 0.1


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_colour_jitter_is_what_was_drawn(data, decoder):
    """Brightness multiplies; a saturation of 0 would make R, G and B equal; strengths of 0 change nothing."""
    base = CONFIG.model_copy(update={"dtype": "uint8", "decoder": decoder, "brightness": 1e-9})
    plain = clips_of(data, CONFIG.model_copy(update={"dtype": "uint8", "decoder": decoder}))
    assert (clips_of(data, base).int() - plain.int()).abs().max() <= 1
    with loader(data, config=base.model_copy(update={"brightness": 0.5})) as batches:
        got = torch.cat([batch.clips for batch in batches]).float()
        drawn = [batches.sample(0, position).colour for position in range(10)]
    for clip, before, colour in zip(got, plain.float(), drawn, strict=True):
        want = (before * colour.brightness).clamp(0, 255)
        assert (clip - want).abs().max() <= 1.5
        assert (colour.contrast, colour.saturation, colour.hue) == (1, 1, 0)
    grey = clips_of(data, base.model_copy(update={"saturation": 1.0})).float()
    drawn_saturation = []
    with loader(data, config=base.model_copy(update={"saturation": 1.0})) as batches:
        drawn_saturation = [batches.sample(0, position).colour.saturation for position in range(10)]
    spread = [(clip.max(0).values - clip.min(0).values).mean() for clip in grey]
    before = [(clip.max(0).values - clip.min(0).values).mean() for clip in plain.float()]
    lowest = int(np.argmin(drawn_saturation))
    assert spread[lowest] < before[lowest] * (drawn_saturation[lowest] + 0.1)


@pytest.fixture
def untrimmed(data):
    """The synthetic training videos as untrimmed ones: 40 frames at 25 a second, with actions."""
    actions = [{"start_s": 0.24, "end_s": 0.56, "label": 1}, {"start_s": 0.8, "end_s": 0.92, "label": 2}]
    column = data.table.schema.names.index("annotations")
    values = pa.array([actions] * data.table.num_rows, data.table.schema.field("annotations").type)
    table = data.table.set_column(column, data.table.schema.field("annotations"), values).combine_chunks()
    return Dataset(data.storage, data.info, table)


DETECTION = DataConfig(
    clip_length=24, size=32, scales=(0.75,), max_distort=0, window_stride=6, eval_window_stride=10, eval_scale=0.75
)


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_detection_windows_with_their_targets(untrimmed, decoder):
    config = DETECTION.model_copy(update={"decoder": decoder})
    plan = windows.training_windows(40, [(6.0, 14.0, 1), (20.0, 23.0, 2)], clip=24, stride=6)
    assert [window.offset for window in plan] == [0, 6, 12, 16]
    with loader(untrimmed, config=config, detection=True, batch_size=8) as batches:
        assert batches.count == 10 * len(plan)
        got = list(batches)
        samples = [batches.sample(0, position) for position in range(batches.count)]
    seen = []
    for batch in got:
        found = batch.windows
        for number in range(batch.count):
            offset = int(found.offsets[number])
            window = next(entry for entry in plan if entry.offset == offset)
            torch.testing.assert_close(found.actions[number], torch.tensor(window.actions, dtype=torch.float32))
            assert np.array_equal(found.boundaries[number].numpy(), windows.boundary_targets(window.actions, 24))
            seen.append((int(batch.ids[number]), offset))
    assert sorted(seen) == [(int(row), entry.offset) for row in untrimmed.rows("train") for entry in plan]
    assert seen == [(sample.row, sample.window.offset) for sample in samples]
    splices = 0
    for sample, batch, number in zip(
        samples, [b for b in got for _ in range(b.count)], [n for b in got for n in range(b.count)], strict=True
    ):
        clip, spliced = batch.clips[number], batch.windows.spliced[number]
        assert bool(batch.windows.has_splice[number]) == (sample.splice is not None)
        if sample.splice is None:
            assert torch.equal(clip, spliced) and not batch.windows.segments[number].any()
            continue
        splices += 1
        assert torch.equal(spliced, clip[:, torch.from_numpy(sample.splice.order).long()])
        np.testing.assert_allclose(batch.windows.segments[number], sample.splice.segments, rtol=1e-6)
    assert splices > 0


def test_detection_covers_each_video_once_in_evaluation_on_any_number_of_ranks(untrimmed):
    want = [(int(row), offset) for row in untrimmed.rows("test") for offset in (0, 10, 16)]
    for world_size in (1, 3):
        shares = []
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "detection": True, "training": False}
            with loader(untrimmed, "test", config=DETECTION, batch_size=7, **options) as batches:
                shares.append([
                    list(zip(batch.ids.tolist(), batch.windows.offsets.tolist(), strict=True))[: batch.count]
                    for batch in batches
                ])  # fmt: skip
        assert [entry for parts in zip(*shares, strict=True) for part in parts for entry in part] == want
    with loader(untrimmed, "test", config=DETECTION, detection=True, training=False) as batches:
        assert batches.sample(0, 0).crop == (6, 14, 42, 50)  # 36 of 48 pixels from the centre of 64x48


def test_windows_refuse_what_they_cannot_have(untrimmed):
    for update, message in (({"stride": 2}, "data.stride=1"), ({}, "one view each")):
        with pytest.raises(UserError, match=message):
            loader(
                untrimmed, "test", config=DETECTION.model_copy(update=update), detection=True, training=False,
                views=(1, 1) if update else (2, 1),
            )  # fmt: skip


def test_block_shuffling_reads_few_shards_at_a_time(data):
    with loader(data, config=CONFIG.model_copy(update={"shuffle_shards": 2}), batch_size=2) as batches:
        shards = [[data.video(int(row)).shard for batch in batches for row in batch.ids] for _ in range(2)]
    for epoch in shards:
        assert len(epoch) == 10
        ends = {name: 9 - epoch[::-1].index(name) for name in epoch}
        for place in range(10):
            open_now = [name for name in ends if epoch.index(name) <= place <= ends[name]]
            assert len(open_now) <= 2
    assert shards[0] != shards[1]


def test_a_replaced_pair_is_of_one_video_on_both_sides(shard_sets, flow_sets, tmp_path):
    """Pixels of both sides against those of each video alone, with damage in some GOPs of either."""
    sides = {}
    for name, dataset in (("rgb", shard_sets("mjpeg")), ("flow", flow_sets("mjpeg"))):
        shutil.copytree(dataset.path, tmp_path / name)
        sides[name] = Dataset.open(tmp_path / name)
    keys = sides["rgb"].table["key"].take(sides["rgb"].rows("train")).to_pylist()
    for name, key, gop in (("rgb", keys[2], 9), ("flow", keys[6], 20)):
        dataset = sides[name]
        video = dataset.video(dataset.table["key"].to_pylist().index(key))
        with open(tmp_path / name / "shards" / video.shard, "r+b") as file:
            file.seek(video.offset + int(video.gop_offsets[gop]) + 100)
            file.write(b"damaged")
    config = CONFIG.model_copy(update={"prefetch": 3, "on_error": "replace", "dtype": "uint8"})
    with loader(sides["rgb"], flow=sides["flow"], config=config, batch_size=2) as batches:
        got = [(epoch, batch) for epoch in range(4) for batch in batches]
        assert batches.stats()["replaced"] > 2
    with loader(shard_sets("mjpeg"), flow=flow_sets("mjpeg"), config=config, batch_size=10) as batches:
        sound = [batch for _ in range(4) for batch in batches]
    rows = {epoch: {int(row): number for number, row in enumerate(batch.ids)} for epoch, batch in enumerate(sound)}
    for epoch, batch in got:
        for number, row in enumerate(batch.ids.tolist()):
            place = rows[epoch][row]
            assert torch.equal(batch.clips[number], sound[epoch].clips[place])
            assert torch.equal(batch.flow[number], sound[epoch].flow[place])
            assert batch.labels[number] == sound[epoch].labels[place]
    refusing = config.model_copy(update={"on_error": "fail"})
    with loader(sides["rgb"], flow=sides["flow"], config=refusing, rows=sides["rgb"].rows("train")[6:7]) as batches:
        with pytest.raises(Corrupt, match=f"{keys[6]} in {tmp_path / 'flow'}/shards/"):
            for _ in range(20):
                list(batches)


def test_black_flow_is_no_motion_and_padding_asks_for_one_size_of_memory(flow_sets):
    config = CONFIG.model_copy(update={"clip_length": 24, "padding": "black", "dtype": "uint8"})
    with loader(flow_sets("mjpeg"), config=config) as batches:
        clips = torch.cat([batch.clips for batch in batches])
        assert list(batches.streams[0].buffers._free) == [(24, 32, 32, 2)]
    assert (clips[:, :, 20:] == 128).all() and (clips[:, :, :20] != 128).any()


@pytest.fixture(scope="module")
def nvdec_sets(videos, tmp_path_factory):
    """RGB and flow as H.264 large enough for NVDEC."""
    from genkd.preprocessing import sources
    from genkd.preprocessing.video import VideoSettings

    out = tmp_path_factory.mktemp("nvdec")
    convert(sources.ucf101(videos), out / "rgb", VideoSettings("h264", short_side=144, gop=8), workers=2)
    rgb = Dataset.open(out / "rgb")
    convert(dataset_sources(rgb, "train"), out / "flow", FlowSettings("dis", codec="h264", gop=8), workers=2)
    return rgb, Dataset.open(out / "flow")


PYAV = {"decoder": "pyav"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "update",
    [{}, {"pipelines_per_gpu": 2}, {"decoder": "hybrid"}, {"dtype": "float16"}, {"brightness": 0.4, "hue": 0.1}],
)
def test_every_way_of_decoding_on_a_gpu_shows_the_same_clips(nvdec_sets, update):
    rgb, flow = nvdec_sets
    found = {}
    for device in ("cuda", "cpu"):
        config = CONFIG.model_copy(update={"decoder": "dali", **update, **({} if device == "cuda" else PYAV)})
        with loader(rgb, flow=flow, config=config, device=device) as batches:
            got = list(batches)
            assert all(batch.clips.device.type == device and batch.flow.device.type == device for batch in got)
        found[device] = [torch.cat([getattr(batch, name).cpu().float() for batch in got]) for name in ("clips", "flow")]
    for gpu, cpu, level in zip(found["cuda"], found["cpu"], (255 * 0.226, 127.5), strict=True):
        assert ((gpu - cpu).abs() * level).mean() < 3


@pytest.mark.gpu
def test_detection_windows_on_a_gpu(nvdec_sets):
    rgb, _ = nvdec_sets
    config = DETECTION.model_copy(update={"decoder": "dali"})
    with loader(rgb, config=config, detection=True, training=False, device="cuda") as batches:
        for batch in batches:
            assert batch.clips.shape[2] == 24 and batch.windows.offsets.device.type == "cpu"


@pytest.mark.gpu
def test_fifty_loaders_leave_no_gpu_memory(nvdec_sets):
    rgb, _ = nvdec_sets
    free = []
    for _ in range(50):
        with loader(rgb, config=CONFIG.model_copy(update={"decoder": "dali"}), batch_size=2, device="cuda") as batches:
            next(iter(batches))
        del batches
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert min(free[10:]) > free[9] - 64e6
