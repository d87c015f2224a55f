import numpy as np
import pytest

from genkd.configs.schema import DataConfig
from genkd.pipelines import plan

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = DataConfig(clip_length=8, stride=2, size=32)


@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_position_belongs_to_one_rank_and_ranks_share_evenly(count, batch_size, world_size):
    seen = []
    for batch in range(plan.batches_per_epoch(count, batch_size)):
        shares = [plan.rank_positions(batch, batch_size, count, rank, world_size) for rank in range(world_size)]
        sizes = [len(positions) for positions, _ in shares]
        assert max(sizes) - min(sizes) <= 1
        assert {total for _, total in shares} == {sum(sizes)}
        # In rank order the slices make up the global batch, whatever the number of ranks.
        together = [position for positions, _ in shares for position in positions]
        assert together == list(range(batch * batch_size, min(count, (batch + 1) * batch_size)))
        seen += together
    assert seen == list(range(count))


@given(st.data(), st.integers(1, 200), st.integers(1, 40), st.sampled_from([0, 1, 3]), st.integers(0, 2**31 - 1))
@settings(max_examples=100, deadline=None)
def test_a_run_that_goes_on_with_other_ranks_sees_the_rest_and_nothing_twice(data, count, batch_size, width, seed):
    """Every video once an epoch, whatever the ranks before and after the stop, with either kind of shuffling."""
    rows = np.arange(1000, 1000 + count)
    shards = np.arange(2000) // 7
    shapes = plan.Shapes(*(np.full(2000, value) for value in (40, 64, 48)))
    config = CONFIG.model_copy(update={"shuffle_shards": width})
    clips = plan.TrainingClips(config, seed, rows, shapes, shards if width else None)
    batches = plan.batches_per_epoch(count, batch_size)
    stop = data.draw(st.integers(0, batches))
    before, after = (data.draw(st.sampled_from([1, 2, 3, 4, 8])) for _ in range(2))

    def seen(numbers, ranks):
        return [
            [clips.sample(2, place).row for rank in range(ranks)
             for place in plan.rank_positions(number, batch_size, count, rank, ranks)[0]]
            for number in numbers
        ]  # fmt: skip

    got = seen(range(stop), before) + seen(range(stop, batches), after)
    assert got == seen(range(batches), 1)
    assert sorted(sum(got, [])) == rows.tolist()


@given(st.integers(1, 60), st.integers(1, 9), st.sampled_from([(1, 1), (3, 1), (2, 3)]), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_evaluation_has_every_view_once_on_any_number_of_ranks(videos, ranks, views, batch_size):
    rows = np.arange(videos) * 2
    shapes = plan.Shapes(*(np.full(200, value) for value in (40, 64, 48)))
    clips = plan.EvaluationClips(CONFIG, rows, shapes, views)
    found = [
        clips.sample(0, place)
        for rank in range(ranks)
        for number in range(plan.batches_per_epoch(clips.count, batch_size))
        for place in plan.rank_positions(number, batch_size, clips.count, rank, ranks)[0]
    ]
    seen = sorted((sample.row, int(sample.frames[0]), sample.crop) for sample in found)
    assert len(set(seen)) == len(seen) == videos * views[0] * views[1]
    assert sorted({row for row, *_ in seen}) == rows.tolist()


@given(st.integers(1, 500), st.integers(0, 2**31 - 1), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_an_epochs_order_is_a_permutation_of_its_own(count, seed, epoch):
    order = plan.epoch_order(count, seed, epoch)
    assert sorted(order) == list(range(count))
    np.testing.assert_array_equal(order, plan.epoch_order(count, seed, epoch))
    if count > 20:
        assert not np.array_equal(order, plan.epoch_order(count, seed, epoch + 1))
        assert not np.array_equal(order, plan.epoch_order(count, seed + 1, epoch))


@given(st.lists(st.integers(0, 12), max_size=200), st.integers(0, 2**31 - 1), st.integers(0, 100), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_block_shuffling_opens_few_shards_at_a_time(shards, seed, epoch, width):
    shards = np.array(shards, int)
    order = plan.block_order(shards, seed, epoch, width)
    assert sorted(order) == list(range(len(shards)))
    np.testing.assert_array_equal(order, plan.block_order(shards, seed, epoch, width))
    blocks = []
    for shard in shards[order]:  # consecutive groups of at most `width` shards, none of which comes back
        if not blocks or shard not in blocks[-1]:
            if not blocks or len(blocks[-1]) == width:
                blocks.append(set())
            blocks[-1].add(shard)
    assert sum(map(len, blocks)) == len(set(shards))


def test_block_shuffling_mixes_shards_and_what_is_in_them():
    shards = np.repeat(np.arange(20), 50)
    orders = [plan.block_order(shards, seed, epoch, 4) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(orders[a], orders[b])
        assert set(shards[orders[a][:200]]) != set(shards[orders[b][:200]])
    first = shards[orders[0][:50]]
    assert len(set(first)) == 4 and np.bincount(first).max() < 30
    # With a window of all shards it is a shuffle of everything.
    assert len(set(shards[plan.block_order(shards, 0, 0, 20)[:60]])) > 12


def test_an_epochs_order_never_changes():
    """Numbers from numpy's own Philox; another order would make old checkpoints resume on other samples."""
    generator = np.random.Generator(np.random.Philox(key=[7, 3], counter=[0, 0, 0, 0]))
    np.testing.assert_array_equal(plan.epoch_order(10, 7, 3), generator.permutation(10))


@given(st.integers(1, 100), st.integers(16, 400), st.integers(16, 400), st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_training_draws_stay_inside_the_video(frames, width, height, row):
    sample = plan.train_sample(CONFIG, 0, 1, row, frames, width, height)
    top, left, bottom, right = sample.crop
    assert 0 <= top < bottom <= height and 0 <= left < right <= width
    assert sample.frames.shape == (8,) and sample.frames.min() >= 0 and sample.frames.max() < frames
    again = plan.train_sample(CONFIG, 0, 1, row, frames, width, height)
    assert again.crop == sample.crop and again.flip == sample.flip
    if frames >= 15:
        assert set(np.diff(sample.frames)) == {2}


def test_draws_differ_between_rows_and_epochs_and_cover_all_windows():
    starts = {plan.train_sample(CONFIG, 0, epoch, 5, 20, 64, 48).frames[0] for epoch in range(100)}
    assert starts == set(range(6))
    flips = [plan.train_sample(CONFIG, 0, 0, row, 20, 64, 48).flip for row in range(400)]
    assert 150 < sum(flips) < 250


def test_a_short_video_is_played_in_a_loop():
    np.testing.assert_array_equal(plan.window_frames(3, 5, CONFIG), [3, 0, 2, 4, 1, 3, 0, 2])


def test_crop_sides_are_scales_of_the_short_side_at_most_one_step_apart():
    """TSN's multi-scale crop on 340x256: sides 256, 224, 192, 168, rounded to 169 here (0.66 x 256)."""
    random = np.random.default_rng(0)
    sizes = set()
    for _ in range(500):
        top, left, bottom, right = plan.multi_scale_crop(random, 340, 256, (1, 0.875, 0.75, 0.66), 1, "random")
        sizes.add((right - left, bottom - top))
    sides = [256, 224, 192, 169]
    assert sizes == {(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1}


def test_corner_crops_are_the_corners_and_the_centre():
    random = np.random.default_rng(0)
    places = {plan.multi_scale_crop(random, 100, 80, (0.5,), 0, "corners")[:2] for _ in range(200)}
    assert places == {(0, 0), (0, 60), (40, 0), (40, 60), (20, 30)}


def test_frames_jitter_within_their_stride():
    config = DataConfig(clip_length=8, stride=4, frame_jitter=3)
    seen = set()
    for epoch in range(60):
        frames = plan.train_sample(config, 0, epoch, 5, 32, 64, 48).frames
        assert frames.max() < 32 and (np.diff(frames) > 0).all()
        seen |= set((frames - np.arange(8) * 4 - frames[0]).tolist())
    assert seen == set(range(-3, 4))


def test_without_jitter_the_draws_are_those_of_before():
    """Crops and flips are drawn before what later options ask for."""
    plain = plan.train_sample(CONFIG, 0, 3, 9, 60, 64, 48)
    colourful = CONFIG.model_copy(update={"brightness": 0.4, "hue": 0.1, "frame_jitter": 1})
    jittered = plan.train_sample(colourful, 0, 3, 9, 60, 64, 48)
    assert (plain.crop, plain.flip, plain.colour) == (jittered.crop, jittered.flip, None)
    assert np.isin(jittered.frames - plain.frames, [0, 1]).all()


def test_colour_is_drawn_within_its_strengths():
    config = CONFIG.model_copy(update={"brightness": 0.4, "contrast": 0.2, "saturation": 1.0, "hue": 0.1})
    drawn = np.array([plan.train_sample(config, 0, 0, row, 60, 64, 48).colour for row in range(500)])
    for column, (low, high) in enumerate([(0.6, 1.4), (0.8, 1.2), (0, 2), (-0.1, 0.1)]):
        assert low <= drawn[:, column].min() < low + 0.02 * (high - low)
        assert high >= drawn[:, column].max() > high - 0.02 * (high - low)


@pytest.mark.parametrize(("padding", "frames"), [("loop", [3, 0, 2, 4, 1, 3, 0, 2]), ("black", [3]), ("zero", [3])])
def test_a_video_that_ends_before_the_clip(padding, frames):
    config = CONFIG.model_copy(update={"padding": padding})
    assert plan.window_frames(3, 5, config).tolist() == frames


@pytest.mark.parametrize(
    ("frames", "clips", "starts"), [(115, 1, [50]), (115, 2, [25, 75]), (115, 4, [12, 38, 62, 88]), (10, 3, [0, 0, 0])]
)
def test_evaluation_windows_are_spread_evenly(frames, clips, starts):
    samples = plan.eval_samples(CONFIG, 0, frames, 64, 48, clips, 1)
    assert [int(sample.frames[0]) for sample in samples] == starts
    assert not any(sample.flip for sample in samples)


def test_three_crops_are_the_ends_and_the_centre_of_the_long_side():
    assert plan.square_crops(100, 60, 3) == [(0, 0, 60, 60), (0, 20, 60, 80), (0, 40, 60, 100)]
    assert plan.square_crops(60, 100, 3) == [(0, 0, 60, 60), (20, 0, 80, 60), (40, 0, 100, 60)]
    assert plan.square_crops(100, 60, 1) == [(0, 20, 60, 80)]


def test_evaluation_crops_may_be_smaller_than_the_short_side():
    """AFSD's test: the centre 96x96 of 112x112."""
    assert plan.square_crops(112, 112, 1, 96 / 112) == [(8, 8, 104, 104)]
    assert plan.square_crops(100, 60, 3, 0.5) == [(15, 0, 45, 30), (15, 35, 45, 65), (15, 70, 45, 100)]


def test_dropout_belongs_to_the_sample_and_keeps_the_mean():
    together = plan.dropout(1, 2, [5, 9, 7], (64, 7), 0.5)
    assert together.shape == (3, 64, 7) and together.dtype == np.float32 and set(np.unique(together)) == {0.0, 2.0}
    np.testing.assert_array_equal(plan.dropout(1, 2, [9], (64, 7), 0.5)[0], together[1])
    for other in (plan.dropout(1, 3, [9], (64, 7), 0.5), plan.dropout(2, 2, [9], (64, 7), 0.5)):
        assert not np.array_equal(other[0], together[1])
    many = plan.dropout(1, 2, range(100), (100, 10), 0.3)
    assert (many == 0).mean() == pytest.approx(0.3, abs=0.01) and many.mean() == pytest.approx(1, abs=0.01)
    # A stream of its own: what is kept says nothing of the noise.
    noise = plan.noise(1, 2, range(100), (100, 10))
    assert abs(np.corrcoef(many.ravel(), noise.ravel())[0, 1]) < 0.02


def test_noise_belongs_to_the_sample_not_to_the_batch():
    together = plan.noise(1, 2, [5, 9, 7], (4, 3))
    assert together.shape == (3, 4, 3) and together.dtype == np.float32
    np.testing.assert_array_equal(plan.noise(1, 2, [9], (4, 3))[0], together[1])
    assert not np.array_equal(plan.noise(1, 3, [9], (4, 3))[0], together[1])
    many = plan.noise(1, 2, range(500), (10, 10))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
