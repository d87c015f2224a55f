import hashlib

import numpy as np
import pytest

from genkd.preprocessing import thumos, windows


@pytest.fixture(scope="module")
def validation(real_data):
    return thumos.thumos_frames(real_data / "splits" / "thumos14", "val")


@pytest.fixture(scope="module")
def expected(reference):
    return np.load(reference / "open" / "data_windows.npz")


@pytest.fixture(scope="module")
def found(validation, expected):
    """(video, window) of every training window."""
    options = {"clip": int(expected["clip_length"]), "stride": int(expected["stride"])}
    return [
        (video, window)
        for video, (frames, actions) in validation.items()
        for window in windows.training_windows(frames, actions, **options)
    ]


@pytest.mark.real
def test_windows_are_those_of_the_reference(validation, found, expected):
    assert len(found) == int(expected["n_windows"]) == 7842
    assert len(validation) == int(expected["n_videos"]) == 200
    pairs = "".join(f"{video}\t{window.offset}\n" for video, window in found)
    assert hashlib.sha256(pairs.encode()).hexdigest() == str(expected["pairs_sha256"])


@pytest.mark.real
def test_actions_of_windows_are_those_of_the_reference(found, expected):
    assert np.array_equal([len(window.actions) for _, window in found], expected["n_annos"])
    sums = np.array([np.sum(window.actions, axis=0) for _, window in found])
    np.testing.assert_allclose(sums, expected["anno_sums"], rtol=1e-12)
    first = np.concatenate([window.actions for _, window in found[:50]])
    assert np.array_equal(first, expected["first50_annos"])


@pytest.mark.real
def test_boundary_targets_are_those_of_the_reference(found, expected):
    targets = np.array([windows.boundary_targets(window.actions) for _, window in found])
    assert np.array_equal(targets[:, 0].sum(1), expected["start_sums"])
    assert np.array_equal(targets[:, 1].sum(1), expected["end_sums"])
    assert np.array_equal(targets[:50, 0], expected["first50_start"])
    assert np.array_equal(targets[:50, 1], expected["first50_end"])


@pytest.mark.real
def test_shortest_actions_are_those_of_the_reference(validation, expected):
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


def test_boundary_targets_stay_inside_the_window():
    targets = windows.boundary_targets([(1.0, 256.0, 1)])
    assert np.flatnonzero(targets[0]).tolist() == list(range(15))  # 1 - 12.75 to 1 + 12.75
    assert np.flatnonzero(targets[1]).tolist() == list(range(243, 256))
