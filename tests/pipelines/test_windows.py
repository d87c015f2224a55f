import hashlib
import random

import numpy as np
import pytest

from genkd.errors import UserError
from genkd.pipelines import plan, windows
from genkd.thumos_files import thumos_frames


@pytest.fixture(scope="module")
def files(real_data):
    """Video info, annotations and class index of THUMOS14's validation videos."""
    folder = real_data / "splits" / "thumos14"
    return folder / "val_video_info.csv", folder / "val_Annotation.csv", folder / "Class Index_Detection.txt"


@pytest.fixture(scope="module")
def expected(reference):
    return np.load(reference / "open" / "data_windows.npz")


@pytest.fixture(scope="module")
def found(files, expected):
    return plan.detection_windows(*files, int(expected["clip_length"]), int(expected["stride"]))


@pytest.mark.real
def test_windows_are_those_of_the_reference(found, expected):
    assert len(found) == int(expected["n_windows"]) == 7842
    pairs = "".join(f"{window.video}\t{window.offset}\n" for window in found)
    assert hashlib.sha256(pairs.encode()).hexdigest() == str(expected["pairs_sha256"])


@pytest.mark.real
def test_actions_of_windows_are_those_of_the_reference(found, expected):
    assert np.array_equal([len(window.annotations) for window in found], expected["n_annos"])
    sums = np.array([window.annotations.sum(0) for window in found])
    np.testing.assert_allclose(sums, expected["anno_sums"], rtol=1e-12)
    assert np.array_equal(np.concatenate([window.annotations for window in found[:50]]), expected["first50_annos"])


@pytest.mark.real
def test_boundary_targets_are_those_of_the_reference(found, expected):
    assert np.array_equal([window.start.sum() for window in found], expected["start_sums"])
    assert np.array_equal([window.end.sum() for window in found], expected["end_sums"])
    assert np.array_equal([window.start for window in found[:50]], expected["first50_start"])
    assert np.array_equal([window.end for window in found[:50]], expected["first50_end"])


@pytest.mark.real
def test_shortest_actions_are_those_of_the_reference(files, expected):
    validation = thumos_frames(*files)
    assert len(validation) == int(expected["n_videos"]) == 200
    shortest = {video: windows.shortest_action(frames, actions) for video, (frames, actions) in validation.items()}
    assert shortest == dict(zip(expected["min_anno_videos"].tolist(), expected["min_anno"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("frames", "offsets"),
    [(100, [0]), (256, [0]), (257, [0, 1]), (286, [0, 30]), (300, [0, 30, 44])],
)
def test_windows_cover_a_video_to_its_end(frames, offsets):
    assert [window.offset for window in windows.training_windows(frames, [(50.0, 90.0, 1)])] == offsets


def test_a_window_keeps_what_lies_in_it_by_half():
    # Frames 1 to 256: all of the first action, half of the second, less than half of the third.
    actions = [(10.0, 20.0, 1), (206.0, 306.0, 2), (207.0, 307.0, 3)]
    (window,) = windows.training_windows(256, actions)
    assert window.actions == ((10.0, 20.0, 1), (206.0, 256, 2))
    assert windows.training_windows(256, actions[1:]) == []


def test_actions_that_a_video_does_not_show_are_left_out():
    actions = [(10.0, 20.0, 1), (90.0, 110.0, 2), (90.0, 110.1, 3), (100.0, 101.0, 4), (250.0, 260.0, 5)]
    assert windows.actions_inside(100, actions) == [(10.0, 20.0, 1), (90.0, 100.0, 2)]


def test_boundary_targets_stay_inside_the_window():
    targets = windows.boundary_targets([(1.0, 256.0, 1)])
    assert np.flatnonzero(targets[0]).tolist() == list(range(15))  # 1 - 12.75 to 1 + 12.75
    assert np.flatnonzero(targets[1]).tolist() == list(range(243, 256))


def splices(reference):
    """(actions, threshold, whether the reference spliced, its frame order, its segments), one after another."""
    data = np.load(reference / "open" / "data_augment.npz")
    ends = np.cumsum(data["anno_counts"])
    for number, threshold in enumerate(data["thresholds"]):
        actions = [tuple(row) for row in data["annos"][ends[number] - data["anno_counts"][number] : ends[number]]]
        outputs = (data[name][number] for name in ("flags", "frame_order", "new_annos"))
        yield actions, int(threshold), *outputs


def test_splices_are_those_of_the_reference_draw_for_draw(reference):
    draws = random.Random(int(np.load(reference / "open" / "data_augment.npz")["seed"]))
    made = 0
    for actions, threshold, flag, order, segments in splices(reference):
        result = windows.splice(actions, threshold, draws)
        assert (result is not None) == flag
        if result is not None:
            made += 1
            assert np.array_equal(result.order, order) and np.array_equal(result.segments, segments)
    assert made > 50


def test_a_clean_splice_takes_no_frame_of_an_action(reference):
    """By the reference's rule some stretches do: a window's end and overlapping actions count as background there."""
    touched = {False: 0, True: 0}
    for clean in touched:
        draws = random.Random(0)
        for actions, threshold, *_ in splices(reference):
            result = windows.splice(actions, threshold, draws, clean=clean)
            if result is None:
                continue
            assert not clean or sorted(result.order) == list(range(256))
            first, last = (int(place) for place in result.segments[2])
            stretch = result.order[first - 1 : last + 1]
            assert len(stretch) == threshold and set(np.diff(stretch)) <= {1}
            touched[clean] += any(start < stretch[-1] and stretch[0] < end for start, end, _ in actions)
    assert touched[False] > 0 and touched[True] == 0


def test_a_splice_by_hand():
    class First:
        def choice(self, seq):
            return seq[0]

    # Action 100 to 120, threshold 5: cut at 105, background (0, 100), frames 0 to 4 move in front of frame 105.
    result = windows.splice([(100.0, 120.0, 1)], 5, First())
    assert result.order.tolist() == [*range(5, 105), *range(5), *range(105, 256)]
    assert result.segments.tolist() == [[95, 100], [105, 120], [101, 104]]
    # With the background behind it, between the actions, what lies between moves back.
    result = windows.splice([(0.0, 20.0, 1), (40.0, 255.0, 1)], 5, First(), clean=True)
    assert result.order.tolist() == [*range(5), *range(20, 25), *range(5, 20), *range(25, 256)]
    assert result.segments.tolist() == [[0, 5], [10, 25], [6, 9]]
    assert windows.splice([(0.0, 10.0, 1)], 5, First()) is None
    assert windows.splice([(0.0, 255.0, 1)], 5, First()) is None


@pytest.mark.parametrize(
    ("frames", "offsets"), [(40, [0]), (256, [0]), (257, [0, 1]), (384, [0, 128]), (400, [0, 128, 144])]
)
def test_test_windows_cover_a_video(frames, offsets):
    assert windows.window_offsets(frames) == offsets


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no list file .*index"):
        plan.detection_windows(tmp_path / "info.csv", tmp_path / "anno.csv", tmp_path / "index.txt")
    (tmp_path / "index.txt").write_text("7 BaseballPitch\n")
    with pytest.raises(UserError, match=r"info\.csv cannot be read \(No such file"):
        plan.detection_windows(tmp_path / "info.csv", tmp_path / "anno.csv", tmp_path / "index.txt")
