"""Actions over time: as a chart, and drawn into a video's pictures."""

import numpy as np
import pytest
from PIL import Image

from genkd.evaluation.render import ActionOverlay
from genkd.evaluation.timeline import Action, ActionTimeline, Timeline
from genkd.evaluation.timeline_chart import minutes, ticks, write_timeline

CLASSES = ("Background", "Dive", "Jump", "Throw")
LINE = ActionTimeline((Action(0, 25, 2, 0.4), Action(10, 20, 2, 0.8), Action(50, 100, 1, 0.2)), 100.0, 3)


def test_what_goes_on_at_a_time():
    """Of two overlapping actions of a class the surer one; an action's end is no longer part of it."""
    assert [action.score for action in LINE.at(5)] == [0.4] and [action.score for action in LINE.at(15)] == [0.8]
    assert LINE.at(25) == [] and LINE.at(100) == [] and LINE.at(50)[0].label == 1
    assert LINE.classes() == [2, 1]
    both = ActionTimeline((Action(0, 5, 1, 0.3), Action(0, 5, 3, 0.6)), 5.0, 1)
    assert [action.label for action in both.at(1)] == [3, 1]


@pytest.mark.parametrize(
    ("seconds", "step", "last"),
    [(0.5, 1, 0), (9, 1, 9), (40, 5, 40), (100, 10, 100), (599, 60, 540), (7200, 900, 7200)],
)
def test_ticks_are_round(seconds, step, last):
    found = ticks(seconds)
    assert found[0] == 0 and found[-1] == last and len(found) <= 11
    assert set(np.diff(found)) <= {step}


def test_clock_of_the_axis():
    assert [minutes(value) for value in (0, 9, 60, 754, 3600, 3725)] == ["0:00", "0:09", "1:00", "12:34", "1:00:00",
                                                                          "1:02:05"]  # fmt: skip


def test_bars_lie_where_the_actions_are(tmp_path):
    """Blue pixels by rows of the picture: the class that comes first on top, surer ones darker."""
    write_timeline(tmp_path / "new" / "line.png", LINE, CLASSES, title="video.mp4")
    picture = np.asarray(Image.open(tmp_path / "new" / "line.png").convert("RGB")).astype(int)
    blue = picture[..., 2] - picture[..., 0] > 40  # more than the letters are
    blue[:, int(0.93 * blue.shape[1]) :] = False  # the scale of the scores
    rows = np.flatnonzero(blue.any(1))
    gap = int(np.diff(rows).argmax())
    upper, lower = (int(np.mean(part)) for part in (rows[: gap + 1], rows[gap + 1 :]))
    left, right = np.flatnonzero(blue[lower])[[0, -1]]
    a_second = (right - left) / 50
    first, last = np.flatnonzero(blue[upper])[[0, -1]]
    assert (last - first) / a_second == pytest.approx(25, abs=0.5)
    assert (left - first) / a_second == pytest.approx(50, abs=0.5)

    def brightness(seconds, row):
        return picture[row, round(first + seconds * a_second)].sum()

    assert brightness(15, upper) < brightness(5, upper) < brightness(75, lower), "0.8, 0.4 and 0.2"


def test_without_actions_and_of_a_recognizer(tmp_path):
    write_timeline(tmp_path / "none.png", ActionTimeline((), 10.0, 1), CLASSES)
    scores = np.array([[0.0, 0.9, 0.1, 0], [0.0, 0.2, 0.8, 0]])
    write_timeline(tmp_path / "segments.png", Timeline(np.array([0, 5]), 5.0, 10.0, scores), CLASSES)
    none, segments = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("none.png", "segments.png"))
    assert (segments[:, :1300] < 130).sum() > 10 * (none[:, :1300] < 130).sum() > 0


def drawn(line, seconds, size=(320, 240)):
    picture = Image.new("RGB", size, (128, 128, 128))
    overlay = ActionOverlay(line, CLASSES, *size)
    overlay.draw(picture, seconds)
    return overlay, np.asarray(picture).astype(int)


def test_the_actions_of_a_moment_stand_in_the_picture():
    """The upper panel is there while an action goes on, with a bar as long as its score."""
    _, quiet = drawn(LINE, 30)
    assert (quiet[:100] == 128).all()
    _, weak = drawn(LINE, 5)
    _, strong = drawn(LINE, 15)
    bars = [((pixels[..., 2] - pixels[..., 0]) > 80)[:60].sum(1).max() for pixels in (weak, strong)]
    assert bars[1] == pytest.approx(2 * bars[0], rel=0.15) and bars[0] > 20


def test_a_row_a_class_below():
    """Rows in the classes' order: Dive in the second half, Jump in the first quarter; what is played is blue."""
    overlay, pixels = drawn(LINE, 100)
    left, top, right, bottom = overlay.plot
    blue = (pixels[..., 2] - pixels[..., 0]) > 30
    for row, (start, end) in enumerate(((0.5, 1.0), (0.0, 0.25))):
        columns = np.flatnonzero(blue[top + row * overlay.row + overlay.row // 2, left : right + 1]) / (right - left)
        assert (columns.min(), columns.max()) == pytest.approx((start, end), abs=0.03)
    assert bottom - top == 2 * overlay.row
    _, ahead = drawn(LINE, 0)
    assert ((ahead[..., 2] - ahead[..., 0]) > 30)[top:bottom].sum() == 0


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (240, 4000), (4000, 240)])
def test_panels_stay_in_pictures_of_any_shape(size):
    many = ActionTimeline(tuple(Action(0, 5, label, 0.1 + label / 10) for label in (1, 2, 3)), 5.0, 1)
    for line in (many, ActionTimeline((), 5.0, 1)):
        _, pixels = drawn(line, 1.0, size)
        border = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert all((edge == 128).all() for edge in border)
