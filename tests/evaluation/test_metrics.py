import numpy as np
import pytest

from genkd.errors import UserError
from genkd.evaluation import metrics


def test_calibration_error_by_hand():
    """Two videos of 0.9, one right, in a bin; 0.6, an upper edge, right; 0.62 wrong: (2 * 0.4 + 0.4 + 0.62) / 4."""
    bins = metrics.reliability(np.array([0.9, 0.9, 0.6, 0.62]), np.array([True, False, True, False]))
    assert metrics.calibration_error(bins) == pytest.approx(0.455)
    filled = {number: entry for number, entry in enumerate(bins) if entry.videos}
    assert set(filled) == {8, 9, 13} and len(bins) == 15
    assert filled[13] == pytest.approx((13 / 15, 14 / 15, 2, 0.9, 0.5))
    assert filled[8] == pytest.approx((8 / 15, 9 / 15, 1, 0.6, 1.0))
    assert filled[9] == pytest.approx((9 / 15, 10 / 15, 1, 0.62, 0.0))


def test_confidence_is_the_share_of_the_highest_score():
    """0.75 right and 0.75 wrong in one bin, 0.5 right in another: (2 * 0.25 + 0.5) / 3."""
    scores = np.array([[6, 1, 1], [1, 6, 1], [2, 1, 1]])
    result = metrics.score(np.arange(3), scores, np.array([0, 2, 0]))
    assert result.ece == pytest.approx(1 / 3)


def test_sums_over_time_steps_are_as_confident_as_their_shares():
    shares = np.random.default_rng(0).dirichlet(np.ones(6) / 2, 50)
    labels = np.random.default_rng(1).integers(0, 6, 50)
    one, seven = (metrics.score(np.arange(50), factor * shares, labels) for factor in (1, 7))
    assert seven.ece == pytest.approx(one.ece) and seven.loss == pytest.approx(one.loss) and one.ece > 0.05


def test_certain_and_right_is_calibrated_certain_and_wrong_is_not():
    for labels, error in (([0, 1], 0.0), ([1, 0], 1.0)):
        assert metrics.score(np.arange(2), np.eye(2), np.array(labels)).ece == error


def test_the_mean_over_bins_is_the_accuracy_and_json_has_no_nan():
    scores = np.random.default_rng(0).dirichlet(np.ones(5), 200)
    result = metrics.score(np.arange(200), scores, np.random.default_rng(1).integers(0, 5, 200))
    assert sum(e.videos * e.accuracy for e in result.reliability if e.videos) / 200 == pytest.approx(result.top1)
    values = metrics.to_json(result, list("abcde"), {"split": "test"})
    empty = [entry for entry in values["reliability"] if not entry["videos"]]
    assert empty and all(entry["accuracy"] is None and entry["confidence"] is None for entry in empty)


def test_ties_count_against_a_video_in_every_accuracy():
    """Of class 0 a tie and a hit, of class 1 a hit: 2 of 3, and the mean of 1/2 and 1."""
    scores = np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    result = metrics.score(np.arange(3), scores, np.array([0, 0, 1]))
    assert result.per_class().tolist() == [0.5, 1.0] and result.mean_class == 0.75
    assert result.top1 == pytest.approx(2 / 3)
    assert metrics.to_json(result, "ab", {})["per_class"]["a"] == {"videos": 2, "top1": 0.5}


def test_a_paired_difference_by_hand():
    """Differences 1, 0, 0, -1, 1: mean 0.2, variance (0.64 + 0.04 + 0.04 + 1.44 + 0.64) / 4 = 0.7."""
    right, other = np.array([1, 1, 0, 0, 1], bool), np.array([0, 1, 0, 1, 0], bool)
    assert metrics.paired_difference(right, other) == pytest.approx((0.2, (0.7 / 5) ** 0.5))
    assert metrics.paired_difference(right[:1], other[:1]) == (1.0, None)


def test_mean_and_standard_deviation_over_splits_by_hand():
    splits = [dict.fromkeys(metrics.SHOWN, value) for value in (0.5, 0.7, 0.9)]
    mean, std = metrics.summary(splits)
    assert mean["top1"] == pytest.approx(0.7) and std["ece"] == pytest.approx(0.2)


def test_what_cannot_be_scored_is_named():
    scores, keys = np.full((3, 4), 0.25), ["a", "b", "c"]

    def refused(scores, labels, words):
        with pytest.raises(UserError, match=words):
            metrics.score(np.arange(len(labels)), scores, np.array(labels, int), keys)

    refused(scores, [0, 4, -1], r"2 of 3 videos have labels outside 0\.\.3, the first is b with 4")
    for value in (np.nan, np.inf):
        bad = scores.copy()
        bad[2, 1] = value
        refused(bad, [0, 1, 2], "1 of 3 videos have scores that are nan or infinite, the first is c")
    refused(-scores, [0, 1, 2], "negative or all zero, the first is a")
    refused(scores[:0], [], "no videos")
    with pytest.raises(UserError, match="that of row 7"):
        metrics.score(np.array([7]), scores[:1], np.array([9]))
