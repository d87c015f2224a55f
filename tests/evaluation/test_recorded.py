"""Cards and reports tell only what was measured of the very weights that they are about."""

import hashlib
import json
import logging

import numpy as np
import pytest
import torch

from genkd.configs import load as configs
from genkd.configs.schema import ModelConfig
from genkd.errors import UserError
from genkd.evaluation import export, metrics, recorded
from genkd.evaluation.report import write_report
from genkd.models.checkpoints import ModelCard, save_weights

CLASSES = ("a", "b", "c")
LOGGED = [{"epoch": 1, "top1": 0.625, "top5": 0.9, "loss": 1.5}, {"epoch": 2, "top1": 0.5, "top5": 0.95, "loss": 1.25}]


@pytest.fixture
def make_run(tmp_path):
    """A function: -> the folder of a run of two epochs, of which the first was the better one."""

    def make(keep="last"):
        run = tmp_path / "run"
        config = configs.load("demo", "teacher", [f"keep={keep}", "epochs=2", "eval_every=1"])
        card = ModelCard(ModelConfig(width=0.25), CLASSES, 16, 32, False, "none", {})
        for seed, name in enumerate(("weights", "best")):
            torch.manual_seed(seed if keep == "last" else 0)
            save_weights(run / name, card, {"recognizer": card.build()})
        (run / "config.yaml").write_text(configs.dump(config))
        (run / "best" / "best.json").write_text(json.dumps({"epoch": 1, "top1": 0.625, "loss": 1.5}))
        train = {"kind": "train", "step": 1, "recognizer/class": 1.0, "clips_per_s": 10.0, "data_wait": 0.5}
        lines = [train, *({"kind": "eval", "step": 10 * line["epoch"], **line} for line in LOGGED)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def evaluated(run, weights):
    """RUN/evaluation/results.json as of these weights: two of three videos are right."""
    result = metrics.score(np.arange(3), np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]]), np.arange(3))
    about = {
        "weights_sha256": hashlib.sha256((weights / "recognizer.safetensors").read_bytes()).hexdigest(),
        "split": "test", "clips": 10, "crops": 1, "decoder": "pyav", "precision": "float32", "device": "cpu",
    }  # fmt: skip
    (run / "evaluation").mkdir(exist_ok=True)
    values = metrics.to_json(result, CLASSES, about)
    (run / "evaluation" / "results.json").write_text(json.dumps(values))
    return values


def card_of(place, out):
    return export.export(place, out, force=True)


def test_an_evaluation_counts_only_for_the_weights_it_is_of(make_run, tmp_path, caplog):
    run, out = make_run(), tmp_path / "out"
    values = evaluated(run, run / "weights")
    found = card_of(run, out)["metrics"]["evaluation"]
    assert found["top1"] == pytest.approx(2 / 3) and found["ece"] == values["ece"] > 0
    page = (out / "README.md").read_text()
    assert "66.67 %" in page and f"{100 * values['ece']:.2f} %" in page
    evaluated(run, run / "best")
    with caplog.at_level(logging.WARNING, "genkd"):
        assert "evaluation" not in card_of(run, out)["metrics"]
    assert "is of other weights than" in caplog.text and "left out" in caplog.text
    write_report(tmp_path / "report.html", [run])
    page = (tmp_path / "report.html").read_text()
    assert "66.7 %" not in page and '<td class="n">50.0 %</td>' in page, "what training measured last stands in"


def test_training_numbers_are_those_of_the_weights_that_were_kept(make_run, tmp_path):
    run, out = make_run(), tmp_path / "out"
    last, best = ({"step": 10 * line["epoch"], **line} for line in reversed(LOGGED))
    assert recorded.training(run, configs.read_run(run)) == last
    assert last.items() <= card_of(run, out)["metrics"]["training"].items()
    assert best.items() <= card_of(run / "best", out)["metrics"]["training"].items()
    run = make_run("best")
    values = card_of(run, out)
    assert best.items() <= values["metrics"]["training"].items() and values["training"]["keep"] == "best"
    write_report(tmp_path / "report.html", [run])
    page = (tmp_path / "report.html").read_text()
    assert '<td class="n">62.5 %</td>' in page and '<td class="n">50.0 %</td>' not in page


def test_the_best_weights_of_a_run_belong_to_it_but_not_its_evaluation(make_run, tmp_path):
    run = make_run()
    evaluated(run, run / "weights")
    assert recorded.run_folder(run / "best" / "recognizer.safetensors") == run
    values = card_of(run / "best", tmp_path / "out")
    assert set(values["metrics"]) == {"training"} and values["training"]["phase"] == "teacher"
    assert values["name"] == "run"
    (run / "config.yaml").unlink()
    assert recorded.run_folder(run / "best" / "recognizer.safetensors") is None


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("evaluation/results.json", "{", "results.json is damaged; remove it, or evaluate"),
        ("evaluation/results.json", "[1]", "results.json is damaged"),
        ("evaluation/results.json", '{"splits": []}', "is of several runs' splits"),
        ("metrics.jsonl", '{"kind": "eval", "st', "metrics.jsonl is damaged"),
        ("metrics.jsonl", '{"kind": "eval", "step": 1, "epoch": 1}\n', "metrics.jsonl is damaged"),
        ("best/best.json", "{}", "best.json is damaged"),
    ],
)
def test_damaged_records_are_one_sentence(make_run, tmp_path, file, text, words):
    run = make_run("best")
    evaluated(run, run / "weights")
    (run / file).write_text(text)
    with pytest.raises(UserError, match=words):
        card_of(run, tmp_path / "out")
    with pytest.raises(UserError, match=words):
        write_report(tmp_path / "report.html", [run])
    assert not (tmp_path / "out").exists() and not (tmp_path / "report.html").exists()
