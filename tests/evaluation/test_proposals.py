import json
import math

import numpy as np
import pytest

from genkd.errors import UserError
from genkd.evaluation.proposals import Proposals, fuse_proposals, read_proposals, write_proposals

FOUND = {
    "a": {"x": np.array([[0.0, 10.0, 0.9], [20.0, 30.5, 0.25]]), "y": np.empty((0, 3))},
    "nothing": {},
    "b": {"y": np.array([[1, 2, 1]], np.float32), "x": np.array([[3, 4, 0.5]])},
}


def test_written_proposals_are_in_activitynets_format_and_read_again(tmp_path):
    path = tmp_path / "found.json"
    write_proposals(path, Proposals.of(FOUND), "THUMOS14")
    values = json.loads(path.read_text())
    assert values["version"] == "THUMOS14" and values["external_data"] == {}
    assert list(values["results"]) == ["a", "nothing", "b"] and values["results"]["nothing"] == []
    assert values["results"]["a"][1] == {"label": "x", "score": 0.25, "segment": [20.0, 30.5]}
    assert [entry["label"] for entry in values["results"]["b"]] == ["y", "x"]
    again = read_proposals(path)
    assert again.to_json("THUMOS14") == values
    assert read_proposals(again) is again and read_proposals(values).scores.tolist() == [0.9, 0.25, 1, 0.5]
    assert [entry.name for entry in tmp_path.iterdir()] == ["found.json"]


def test_times_may_be_text():
    entry = {"label": "x", "score": 1, "segment": ["0.5", 2]}
    assert read_proposals({"results": {"a": [entry]}}).segments.tolist() == [[0.5, 2.0]]


def test_what_is_not_finite_is_not_written():
    with pytest.raises(UserError, match="a segment of b with label 'x' is not finite: 0, nan, 1"):
        Proposals.of({"a": {}, "b": {"x": np.array([[0, math.nan, 1]])}})


def test_fusion_by_hand():
    """In a both detectors find x at tIoU 1/3, and y one of them; b has one alone, c another."""
    first = Proposals.of({
        "a": {"x": np.array([[0, 10, 0.9]]), "y": np.array([[0, 10, 0.6]])}, "b": {"y": np.array([[1, 2, 0.3]])},
    })  # fmt: skip
    second = Proposals.of({"c": {"x": np.array([[5, 6, 0.8]])}, "a": {"x": np.array([[5, 15, 0.8]])}})
    results = fuse_proposals([first, second.to_json()], [2, 1], sigma=0.5).to_json()["results"]
    assert list(results) == ["a", "b", "c"]
    decayed = 0.8 / 2 * math.exp(-((1 / 3) ** 2) / 0.5)
    assert results["a"] == [
        {"label": "x", "score": 0.9, "segment": [0.0, 10.0]},
        {"label": "y", "score": 0.6, "segment": [0.0, 10.0]},
        {"label": "x", "score": pytest.approx(decayed), "segment": [5.0, 15.0]},
    ]
    assert results["b"] == [{"label": "y", "score": 0.3, "segment": [1.0, 2.0]}]
    assert results["c"] == [{"label": "x", "score": 0.4, "segment": [5.0, 6.0]}]
    alone = fuse_proposals([first, second], [0, 3]).to_json()["results"]
    assert alone["a"] == [{"label": "x", "score": 0.8, "segment": [5.0, 15.0]}] and alone["b"] == []


def test_a_video_that_one_detector_lacks_is_said(caplog):
    fuse_proposals([Proposals.of({"a": {}, "b": {}}), Proposals.of({"a": {}})])
    assert "detector 2 has 1 of the 2 videos" in caplog.text and "detector 1" not in caplog.text


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1], "1 weights for 2 detectors"), ([0, 0], "weights 0, 0: must be 0 or more"), ([1, -1], "weights 1, -1: "),
     ([1, math.inf], "weights 1, inf: ")],
)  # fmt: skip
def test_bad_weights(weights, words):
    with pytest.raises(UserError, match=words):
        fuse_proposals([Proposals.of(FOUND)] * 2, weights)


def test_one_detector_cannot_be_fused():
    with pytest.raises(UserError, match="two detectors or more"):
        fuse_proposals([Proposals.of(FOUND)])
