import importlib.util
import json

import numpy as np
import pytest
from click.testing import CliRunner

from genkd.benchmarks import detect, detect_reference
from genkd.cli import main
from genkd.errors import UserError
from genkd.tables import benchmark_tables, show

needs_pandas = pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="needs pandas")


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(detect, "SECONDS", 0.01)


ALGORITHMS = ("soft-nms", "map")
WORKLOADS = ["soft-NMS, sigma 0.5", "soft-NMS, sigma 0.1", "mAP"]


@needs_pandas
def test_every_workload_is_measured_beside_the_original(capsys):
    result = detect.run(None, 1, ALGORITHMS, classes=2, segments=60, predictions=150)
    names = [(row["workload"], row["name"]) for row in result["rows"]]
    assert names == [(name, label) for name in WORKLOADS for label in (detect.ORIGINAL, detect.GENKD)]
    for row in result["rows"]:
        assert row["median"] > 0 and row["unit"] == ("predictions/s" if row["workload"] == "mAP" else "segments/s")
    ratios = [row["ratio"] for row in result["rows"] if row["name"] == detect.GENKD]
    assert [target["measured"] for target in result["targets"]] == ratios
    assert [target["at_least"] for target in result["targets"]] == [100, 100, 20]
    assert result["about"]["ground_truth"] == "synthetic" and result["versions"]["numba"]
    json.dumps(result)
    show(benchmark_tables(result))
    assert "mAP beside the original algorithm" in capsys.readouterr().out


def test_without_pandas_the_original_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(detect.importlib.util, "find_spec", lambda name: None)
    result = detect.run(None, 1, ALGORITHMS, classes=1, segments=60, predictions=50)
    assert [row["name"] for row in result["rows"] if row["workload"] == "mAP"] == [detect.GENKD]
    assert result["about"]["skipped"] == {"mAP, original algorithm": "needs pandas, which is not installed"}
    assert [target["name"].split(" beside")[0] for target in result["targets"]] == WORKLOADS[:2]


def test_other_results_are_no_comparison(monkeypatch):
    monkeypatch.setattr(detect_reference, "soft_nms", lambda segments, *settings: segments[:3])
    with pytest.raises(AssertionError):
        detect.run(None, 1, ["soft-nms"], classes=1, segments=60)


@needs_pandas
def test_the_originals_evaluation_by_the_reference_numbers(reference, real_data):
    """A part of the classes of the reference predictions, as a data frame's row takes a millisecond."""
    import gzip

    arrays = np.load(reference / "open/detection_map.npz")
    with gzip.open(reference / "open/detection_predictions.json.gz", "rt") as file:
        found = json.load(file)
    truth = json.loads((real_data / "splits/thumos14/thumos_gt.json").read_text())
    few = {"GolfSwing", "BaseballPitch"}
    found["results"] = {
        video: [entry for entry in own if entry["label"] in few] for video, own in found["results"].items()
    }
    ap = detect_reference.average_precision(truth, found, arrays["tiou_01_05"], "test")
    wanted = np.where(np.isin(arrays["classes"], list(few)), arrays["ap_01_05"], 0)
    np.testing.assert_allclose(ap, wanted, atol=1e-7)


def test_the_generated_ground_truth_is_of_thumos14s_size():
    database = detect.synthetic_truth()["database"]
    assert len(database) == 210 and sum(len(entry["annotations"]) for entry in database.values()) == 3311
    assert len({action["label"] for entry in database.values() for action in entry["annotations"]}) == 20
    segments = detect.detector_segments(3, 2000)
    assert segments.shape == (3, 2000, 3) and (segments[..., 1] > segments[..., 0]).all()
    assert (segments[..., 2] > 0.01).all() and (segments[..., 2] <= 1).all()


def test_data_is_a_ground_truth(tmp_path):
    (tmp_path / "truth.json").write_text('{"database": {"a": {"subset": "train", "annotations": []}}}')
    with pytest.raises(UserError, match=r"truth\.json: there is no subset 'test'"):
        detect.run(tmp_path / "truth.json", 1)
    with pytest.raises(UserError, match="is the ground truth of the workload map, which --workload leaves out"):
        detect.run(tmp_path / "truth.json", 1, ["training"])


@needs_pandas
def test_command_line(monkeypatch, tmp_path):
    run = detect.run
    small = {"classes": 1, "segments": 40, "predictions": 20}
    monkeypatch.setattr(detect, "run", lambda data, repeats, names: run(data, repeats, names or ALGORITHMS, **small))
    done = CliRunner().invoke(main, ["bench", "detect", "--repeats", "1", "--out", str(tmp_path / "result.json")])
    assert done.exit_code == 0 and "targets" in done.output
    assert len(json.loads((tmp_path / "result.json").read_text())["rows"]) == 6
    done = CliRunner().invoke(main, ["bench", "detect", "--repeats", "1", "--workload", "soft", "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["rows"]) == 4
    done = CliRunner().invoke(main, ["bench", "detect", "--workload", "speed"])
    assert done.exit_code == 1 and "there are soft-nms, map, inference, training" in done.output
    done = CliRunner().invoke(main, ["bench", "detect", "--tune"])
    assert done.exit_code == 1 and "genkd bench detect has no --tune" in done.output
