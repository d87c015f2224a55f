import numpy as np
import pytest

from genkd.evaluation.timeline import Segment, Timeline, clock


def line(top, starts=None, *, length=2.0, duration=None, attention=None):
    """Windows a second apart whose class `top[n]` has the score 0.6 + n/100, of three classes."""
    starts = np.arange(len(top), dtype=float) if starts is None else np.array(starts, float)
    scores = np.empty((len(top), 3))
    for number, label in enumerate(top):
        best = 0.6 + number / 100
        scores[number] = (1 - best) / 2
        scores[number, label] = best
    return Timeline(starts, length, starts[-1] + length if duration is None else duration, scores, attention)


def test_segments_join_windows_of_one_class_and_meet_midway():
    """Middles at 1, 2, 3, 4, 5 s of 6 s; the class changes after the second and the fourth window."""
    found = line([0, 0, 2, 2, 0]).segments()
    assert [entry[:3] for entry in found] == [(0.0, 2.5, 0), (2.5, 4.5, 2), (4.5, 6.0, 0)]
    np.testing.assert_allclose([entry.score for entry in found], [(0.6 + 0.61) / 2, (0.62 + 0.63) / 2, 0.64])
    assert [entry.windows for entry in found] == [2, 2, 1]


def test_one_window_is_one_segment_of_the_whole_video():
    assert line([1], duration=1.2).segments() == [Segment(0.0, 1.2, 1, 0.6, 1)]


def test_a_window_that_reaches_beyond_the_end_has_its_middle_within_the_video():
    short = line([0, 1], [0, 1], duration=2.5)
    np.testing.assert_allclose(short.ends, [2, 2.5])
    assert short.segments()[0].end_s == pytest.approx((1.0 + 1.75) / 2)


def test_scores_go_over_from_window_to_window():
    scores = line([0, 1]).scores_at(np.array([0.0, 1.0, 1.25, 2.0, 3.0]))
    first, second = [0.6, 0.2, 0.2], [0.195, 0.61, 0.195]
    np.testing.assert_allclose(scores[[0, 1]], [first, first])
    np.testing.assert_allclose(scores[2], 0.75 * np.array(first) + 0.25 * np.array(second))
    np.testing.assert_allclose(scores[[3, 4]], [second, second])
    np.testing.assert_allclose(line([0, 1]).mean_scores, (np.array(first) + second) / 2)


def test_attention_is_the_mean_over_the_windows_that_cover_a_moment():
    """Two windows of two seconds, a second apart, each of two steps: 1, 2 and 4, 8."""
    of_two = line([0, 0], attention=np.array([[1.0, 2], [4, 8]]))
    np.testing.assert_allclose(of_two.attention_at([2.5, 0.5, 1.5, 3.0, 0.0]), [8, 1, (2 + 4) / 2, 8, 1])
    np.testing.assert_allclose(of_two.attention_by_second(), [1, 3, 8])


def test_attention_of_a_part_of_a_second_counts_that_part_alone():
    cut = line([0], duration=1.25, attention=np.array([[1.0, 5]]))
    np.testing.assert_allclose(cut.attention_by_second(), [1, 5])
    tiny = line([0], duration=0.02, attention=np.array([[1.0, 5]]))
    np.testing.assert_allclose(tiny.attention_by_second(), [1])


def test_between_windows_attention_is_the_nearest():
    apart = line([0, 0], [0, 10], attention=np.array([[1.0, 2], [4, 8]]))
    np.testing.assert_allclose(apart.attention_at([2.5, 5.9, 6.1, 9.9]), [2, 2, 4, 4])


def test_without_a_head_there_is_no_attention():
    assert line([0]).attention_by_second() is None
    with pytest.raises(ValueError, match="no attention head"):
        line([0]).attention_at([0.0])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00.0"), (59.94, "00:59.9"), (59.96, "01:00.0"), (75.25, "01:15.2"), (6000, "100:00.0")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
