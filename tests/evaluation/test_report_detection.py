"""Reports of detectors: what training logged, and detections beside a ground truth, checked by hand."""

import json
import logging
import re

import pytest
import torch
from click.testing import CliRunner

from genkd.cli import main
from genkd.configs import load as configs
from genkd.errors import UserError
from genkd.evaluation.report import write_report
from genkd.files import sha256_of
from genkd.models.checkpoints import ModelCard, save_weights

CLASSES = ("Background", "Dive", "Jump")
TRUTH = {
    "one": [("Dive", 0, 10), ("Dive", 20, 30), ("Jump", 40, 50)],
    "two": [("Jump", 10, 20)],
}  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """A function: -> the folder of a detector's run of two epochs."""

    def make(name="run", phase="detect-teacher", extra=()):
        run = tmp_path / name
        config = configs.load("detect-demo", phase, ["epochs=2", "eval_every=1", "model.width=0.0625"])
        card = ModelCard(config.model, CLASSES, 128, 64, False, "none", config.data.model_dump(mode="json"),
                         task="detection")  # fmt: skip
        torch.manual_seed(0)
        save_weights(run / "weights", card, {"detector": card.build()})
        (run / "config.yaml").write_text(configs.dump(config))
        terms = dict.fromkeys(("detector/conf", "detector/loc", *extra), 1.5)
        lines = [{"kind": "train", "step": step, **terms, "clips_per_s": 2.0, "data_wait": 0.5} for step in (1, 2)]
        measured = [(1, 0.125, 0.0625), (2, 0.4375, 0.3125)]
        lines += [{"kind": "eval", "step": n, "epoch": n, "map": m, "map_0.5": half} for n, m, half in measured]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def detections(run, results, **about):
    """Puts detections of a run's weights on record."""
    digest = sha256_of(run / "weights" / "detector.safetensors")
    values = {"results": {key: [{"label": name, "segment": [start, end], "score": score}
                                for name, start, end, score in found] for key, found in results.items()},
              "genkd": {"weights_sha256": digest, "split": "test", "dataset": "gone", **about}}  # fmt: skip
    path = run / "evaluation" / "detections.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "truth.json"
    database = {
        key: {"subset": "test", "annotations": [{"label": n, "segment": [s, e]} for n, s, e in actions]}
        for key, actions in TRUTH.items()
    }
    path.write_text(json.dumps({"database": database}))
    return path


def cells(page, run):
    """The rows of the page's tables that begin with a run's name, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    found = [
        [re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.S)] for row in rows
    ]
    return [row for row in found if row and row[0] == run]


def test_numbers_by_hand(make_run, truth, tmp_path):
    """Dive: one of two found, the other missed. Jump: one found exactly, one at tIoU 1/3 that counts up to 0.3."""
    run = make_run()
    detections(run, {"one": [("Dive", 0, 10, 0.9), ("Jump", 40, 50, 0.8)], "two": [("Jump", 15, 25, 0.7)]})
    write_report(tmp_path / "page.html", [run], ground_truth=truth)
    page = (tmp_path / "page.html").read_text()
    trained, measured = cells(page, "run")
    assert trained[-2:] == ["43.8 %", "31.2 %"] and trained[-3:-2] == ["2"]
    assert measured == ["run", "test", "2", "4", "3", "75.0", "75.0", "75.0", "50.0", "50.0", "65.0"]
    assert cells(page, "Dive") == [["Dive", "2", "1"]] and cells(page, "Jump") == [["Jump", "2", "2"]]
    assert "one, 3 instances" in page and "two, 1 instance<" in page
    assert page.count("<svg") == 13 and "<img" not in page and "src=" not in page, "nothing from elsewhere"
    assert "detector/" not in page and "conditional VAEs" not in page


def test_several_runs_stand_side_by_side(make_run, truth, tmp_path):
    one, two = make_run("one"), make_run("two", "detect-distill", ("detector/att", "cvae/total"))
    detections(one, {"one": [("Dive", 0, 10, 0.9)]})
    detections(two, {}, flow_weights_sha256="0" * 64)
    write_report(tmp_path / "page.html", [one, two], ground_truth=truth)
    page = (tmp_path / "page.html").read_text()
    assert cells(page, "one")[1][-1] == "25.0" and cells(page, "two (RGB and flow)")[0][-1] == "0.0"
    assert "attention distillation loss" in page and "conditional VAEs" in page and "No predictions." in page


def test_without_detections_the_curves_remain(make_run, tmp_path, caplog):
    """None on record, those of other weights, and those whose data set is not here."""
    run = make_run()
    write_report(tmp_path / "page.html", [run])
    page = (tmp_path / "page.html").read_text()
    assert "mAP while training" in page and "genkd detect" in page and "beside the ground truth" not in page
    path = detections(run, {"one": []}, weights_sha256="0" * 64)
    with caplog.at_level(logging.WARNING):
        write_report(tmp_path / "page.html", [run])
    assert f"{path} is of other weights" in caplog.text
    detections(run, {"one": []})
    write_report(tmp_path / "page.html", [run])
    assert "give --ground-truth" in (tmp_path / "page.html").read_text()


def test_bad_input_is_one_sentence(make_run, truth, tmp_path):
    run = make_run()
    path = detections(run, {})
    other = tmp_path / "recognizer"
    card = ModelCard(configs.load("demo", "teacher").model, ("a", "b"), 16, 32, False, "none", {})
    save_weights(other / "weights", card, {"recognizer": card.build()})
    (other / "config.yaml").write_text(configs.dump(configs.load("demo", "teacher")))
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    for arguments, words in (
        ([run, other], "is a detector's run"),
        ([other, "--ground-truth", truth], "are for detectors"),
        ([run, "--ground-truth", truth, "--subset", "validation"], "validation"),
        ([run, "--subset", "validation"], "--ground-truth"),
        ([run, "--ground-truth", tmp_path / "none.json"], "there is no file"),
    ):
        done = CliRunner().invoke(main, ["report", *map(str, arguments)])
        assert done.exit_code == 1 and words in done.output and "Traceback" not in done.output
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        write_report(tmp_path / "page.html", [run])
    assert not (tmp_path / "page.html").exists() and not (run / "report.html").exists()
