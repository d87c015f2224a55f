"""Damaged payloads, shards that are not those of the index: named, replaced or refused, and nothing ever hangs."""

import itertools
import shutil

import numpy as np
import pyarrow as pa
import pytest

from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.pipelines.loader import Loader
from genkd.preprocessing.shards import Corrupt, Dataset, checksum_of

CONFIG = DataConfig(clip_length=8, stride=2, size=32, scales=(1.0, 0.75))


def loader(dataset, batch_size=4, config=CONFIG, **options):
    return Loader(dataset, "train", config, batch_size=batch_size, training=True, **options)


def ids(batches):
    return [batch.ids[: batch.count].tolist() for batch in batches]


@pytest.fixture
def spoiled(shard_sets, tmp_path):
    """A copy of the data set in which one training video's payload is noise, and that row.

    sums: the index has the noise's checksums, so that only decoding finds it.
    """

    def make(codec, sums=False):
        shutil.copytree(shard_sets(codec).path, tmp_path / codec)
        dataset = Dataset.open(tmp_path / codec)
        video = dataset.video(int(dataset.rows("train")[4]))
        path = dataset.path / "shards" / video.shard
        content = bytearray(path.read_bytes())
        noise = np.random.default_rng(0).integers(0, 256, video.size - video.header_size - 200, np.uint8).tobytes()
        content[video.offset + video.header_size + 200 : video.offset + video.size] = noise
        path.write_bytes(content)
        if sums:
            _set_sums(dataset, video, bytes(content[video.offset : video.offset + video.size]))
        return dataset, video

    return make


def _set_sums(dataset, video, payload):
    """Gives the opened data set the checksums of another payload."""
    bounds = [0, *video.gop_offsets.tolist()]
    lists = dataset.table["gop_crc32c"].to_pylist()
    lists[video.row] = [checksum_of(payload[a:b]) for a, b in itertools.pairwise(bounds)]
    column = dataset.table.schema.names.index("gop_crc32c")
    values = pa.array(lists, pa.list_(pa.uint32()))
    dataset.table = dataset.table.set_column(column, "gop_crc32c", values).combine_chunks()


def by_decoder(codec):
    return CONFIG.model_copy(update={"decoder": "pyav" if codec == "h264" else "dali"})


BAD = [("h264", False), ("h264", True), ("vp9", False), ("vp9", True)]


@pytest.mark.parametrize(("codec", "sums"), BAD)
def test_a_corrupt_payload_stops_the_run_with_key_and_shard(spoiled, codec, sums):
    dataset, video = spoiled(codec, sums)
    with loader(dataset, config=by_decoder(codec)) as batches, pytest.raises(Corrupt) as caught:
        list(batches)
    assert video.key in str(caught.value) and video.shard in str(caught.value)
    assert "data.on_error=replace" in str(caught.value)
    assert ("checksum" in str(caught.value)) != sums


@pytest.mark.parametrize(("codec", "sums"), BAD)
def test_a_corrupt_payload_is_replaced_by_its_neighbour_on_demand(spoiled, codec, sums, caplog):
    dataset, video = spoiled(codec, sums)
    config = by_decoder(codec).model_copy(update={"on_error": "replace"})
    with loader(dataset, config=config) as batches:
        order = [batches.sample(0, position).row for position in range(10)]
        got = sum(ids(batches), [])
        assert batches.stats()["replaced"] >= 1
    place = order.index(video.row)
    want = [*order]
    want[place] = order[(place + 1) % 10]
    assert got == want
    assert video.key in caplog.text


@pytest.mark.parametrize("prefetch", [1, 2, 4])
@pytest.mark.parametrize("codec", ["vp9", "h264"])
def test_all_batches_before_a_corrupt_payload_come_and_it_is_raised_again(spoiled, codec, prefetch):
    dataset, video = spoiled(codec)
    config = by_decoder(codec).model_copy(update={"prefetch": prefetch})
    with loader(dataset, batch_size=2, config=config) as batches:
        place = [batches.sample(0, position).row for position in range(10)].index(video.row)
        for _ in range(2):
            batches.load_state_dict({"epoch": 0, "batch": 0})
            got = 0
            with pytest.raises(Corrupt):
                for batch in batches:
                    got += batch.count
            assert got == place // 2 * 2
            with pytest.raises(Corrupt):
                list(batches)


def test_what_dali_alone_refuses_is_found_and_named(shard_sets, tmp_path):
    """A track header of zeros, with its checksum: packets that go straight to a decoder do not need it."""
    shutil.copytree(shard_sets("vp9").path, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    video = dataset.video(int(dataset.rows("train")[4]))
    path = tmp_path / "data" / "shards" / video.shard
    content = bytearray(path.read_bytes())
    header = content[video.offset : video.offset + video.header_size]
    start = header.index(b"tkhd") + 4
    header[start : start + 84] = bytes(84)
    content[video.offset : video.offset + video.header_size] = header
    path.write_bytes(content)
    _set_sums(dataset, video, bytes(content[video.offset : video.offset + video.size]))
    config = CONFIG.model_copy(update={"decoder": "dali"})
    with loader(dataset, config=config) as batches, pytest.raises(Corrupt) as caught:
        list(batches)
    assert video.key in str(caught.value) and "DALI does not decode it (" in str(caught.value)
    assert "fn.decoders" not in str(caught.value)
    with loader(dataset, config=config.model_copy(update={"on_error": "replace"})) as batches:
        order = [batches.sample(0, position).row for position in range(10)]
        got = sum(ids(batches), [])
    place = order.index(video.row)
    assert got == [*order[:place], order[(place + 1) % 10], *order[place + 1 :]]
    with loader(dataset, config=CONFIG.model_copy(update={"decoder": "pyav"})) as batches:
        assert sorted(sum(ids(batches), [])) == dataset.rows("train").tolist()


def test_replacements_are_the_same_in_a_run_that_goes_on(shard_sets, tmp_path):
    """Only a GOP is bad: which clips of the video need it depends on the epoch, and on nothing that was met before."""
    shutil.copytree(shard_sets("mjpeg").path, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    video = dataset.video(int(dataset.rows("train")[4]))
    with open(tmp_path / "data" / "shards" / video.shard, "r+b") as file:
        file.seek(video.offset + int(video.gop_offsets[12]) + 200)
        file.write(b"damaged")
    config = CONFIG.model_copy(update={"on_error": "replace"})
    with loader(dataset, config=config) as batches:
        epochs = [ids(batches) for _ in range(12)]
    counts = [sum(epoch, []).count(video.row) for epoch in epochs]
    assert 0 < sum(counts) < 12
    for start in (3, 7):
        with loader(dataset, config=config, rank=1, world_size=2) as batches:
            batches.load_state_dict({"epoch": start, "batch": 1})
            rest = ids(batches)
        assert rest == [batch[len(batch) // 2 :] for batch in epochs[start][1:]]


def test_a_data_set_without_any_good_video_ends_with_a_sentence(data, tmp_path):
    shutil.copytree(data.path, tmp_path / "data")
    dataset = Dataset.open(tmp_path / "data")
    for row in dataset.rows("train"):
        video = dataset.video(int(row))
        with open(tmp_path / "data" / "shards" / video.shard, "r+b") as file:
            file.seek(video.offset + 50)  # in the header, which every clip needs
            file.write(b"damaged")
    config = CONFIG.model_copy(update={"on_error": "replace"})
    with pytest.raises(Corrupt, match=r"no video of .* can be decoded"):
        with loader(dataset, config=config) as batches:
            list(batches)


def test_shards_that_are_not_those_of_the_index_are_refused_before_work(data, tmp_path):
    def copy(name):
        shutil.copytree(data.path, tmp_path / name)
        return sorted((tmp_path / name / "shards").glob("train-*.tar"))

    first, *_ = copy("cut")
    with open(first, "r+b") as file:
        file.truncate(first.stat().st_size - 4096)
    with pytest.raises(
        UserError, match=r"shard train-00000\.tar of .* has \d+ bytes, the index needs \d+: it is cut off"
    ):
        loader(Dataset.open(tmp_path / "cut"))
    first, second, *_ = copy("mixed")
    shutil.copy(second, first)
    with pytest.raises(UserError, match=r"train-00000\.tar .*(different versions|cut off)"):
        loader(Dataset.open(tmp_path / "mixed"))
