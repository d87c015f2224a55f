import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from genkd.configs.load import load
from genkd.errors import UserError
from genkd.evaluation import recognition
from genkd.evaluation.report import write_report
from genkd.trainers.loop import train


def test_metrics_by_hand():
    """Six videos of classes 0, 0, 0, 0, 1, 2: four right, one each of the others wrong in rank 2 and rank 3."""
    scores = np.array([[0.8, 0.1, 0.1]] * 3 + [[0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1]])
    labels = np.array([0, 0, 0, 0, 1, 2])
    result = recognition.score(np.arange(6), scores, labels)
    assert result.top1 == 3 / 6 and result.top5 == 1.0
    assert result.mean_class == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert result.confusion.tolist() == [[3, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert result.loss == pytest.approx(-np.log([0.8, 0.8, 0.8, 0.1, 0.3, 0.1]).mean())
    np.testing.assert_allclose(result.per_class(), [0.75, 0, 0])


def test_top5_and_ties():
    scores = np.tile(np.arange(10.0), (10, 1)) + 1
    result = recognition.score(np.arange(10), scores, np.arange(10))
    assert (result.top1, result.top5) == (0.1, 0.5)
    flat = recognition.score(np.arange(4), np.ones((4, 8)), np.zeros(4, int))
    assert (flat.top1, flat.top5) == (0, 0), "a network that prefers no class is never right"


def test_a_class_without_videos_does_not_count():
    result = recognition.score(np.arange(2), np.array([[1.0, 0, 0], [0, 1.0, 0]]), np.array([0, 1]))
    assert result.mean_class == 1.0 and np.isnan(result.per_class()[2])


@pytest.fixture(scope="module")
def run(shard_sets, tmp_path_factory):
    """A student trained for a moment."""
    data = shard_sets("vp9")
    out = tmp_path_factory.mktemp("runs")
    small = ["data.clip_length=16", "data.size=32", f"data.dataset={data.path}", "epochs=1", "batch_size=5"]
    train(load("demo", "representation", small), out / "rep", lambda text: None)
    train(load("demo", "distill", [*small, "method=none"]), out / "plain", lambda text: None)
    train(load("demo", "distill", [*small, f"teacher={out / 'rep'}"]), out / "student", lambda text: None)
    return out


def test_stored_weights_are_measured_and_scores_written(run, data, tmp_path):
    values = recognition.evaluate_weights(run / "student", data.path, tmp_path / "out", clips=2, crops=3)
    assert values["videos"] == 40 and values["clips"] == 2 and values["decoder"] == "pyav"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(values))
    table = pq.read_table(tmp_path / "out" / "scores.parquet")
    assert table.column_names == ["key", "label", "prediction", "scores", "logits"]
    scores = np.array(table["scores"].to_pylist())
    assert scores.shape == (40, 10)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-6)
    assert (table["label"].to_numpy() == table["prediction"].to_numpy()).mean() == pytest.approx(values["top1"])
    again = recognition.evaluate_weights(run / "student", data.path, clips=2, crops=3, batch_size=7)
    assert again["loss"] == pytest.approx(values["loss"], abs=1e-6)


def test_a_wrong_data_set_or_split_is_refused(run, data, tmp_path):
    with pytest.raises(UserError, match="'val'"):
        recognition.evaluate_weights(run / "student", data.path, split="val")
    with pytest.raises(UserError, match="no genkd data set"):
        recognition.evaluate_weights(run / "student", tmp_path)


def test_the_report_is_one_file_with_everything_in_it(run, data, tmp_path):
    for name in ("plain", "student"):
        recognition.evaluate_weights(run / name, data.path, run / name / "evaluation", clips=1)
    write_report(
        tmp_path / "report.html", [run / name for name in ("rep", "plain", "student")], timings={"one step": 1.5}
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 4 + 2 + 2 + 4
    assert "The student reaches" in page and "standard error" in page and "one step" in page
    links = set(re.findall(r"https?://[^/\"]+", page)) - {"http://www.w3.org"}
    assert not links, "the page loads nothing from elsewhere"
    for word in ("Bob", "no distillation", "feature representation", "data:image/jpeg;base64,"):
        assert word in page
    for name in ("plain", "student"):
        results = run / name / "evaluation" / "results.json"
        values = json.loads(results.read_text())
        assert f"{name}, ECE {100 * values['ece']:.1f} %" in page
    del values["reliability"], values["ece"]  # as an older version wrote it
    results.write_text(json.dumps(values))
    write_report(tmp_path / "older.html", [run / "student"])
    assert "Calibration" not in (tmp_path / "older.html").read_text()
    results.write_text(json.dumps({"splits": [values, values]}))
    with pytest.raises(UserError, match="is of several runs' splits"):
        write_report(tmp_path / "x.html", [run / "student"])
    with pytest.raises(UserError, match="no training run"):
        write_report(tmp_path / "x.html", [tmp_path])
