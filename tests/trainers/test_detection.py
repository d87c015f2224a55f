"""The phases of detection on a few untrimmed synthetic videos: they run, resume bit for bit, and end in results."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from genkd.cli import main
from genkd.configs.load import load
from genkd.errors import UserError
from genkd.evaluation import detect
from genkd.evaluation.detection import mean_average_precision
from genkd.models.checkpoints import load_cvae, load_detector, read_card
from genkd.models.detector import DetectorOutput
from genkd.preprocessing import interop, thumos
from genkd.preprocessing.convert import convert
from genkd.preprocessing.flow import FlowSettings
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.untrimmed import UntrimmedSettings, synthesize_untrimmed
from genkd.preprocessing.video import VideoSettings
from genkd.tests.support import processes
from genkd.tests.support.processes import TORCHRUN
from genkd.trainers.loop import train

# 2 or 3 steps an epoch.
TINY = """
base: detect-demo
epochs: 1
batch_size: 2
log_every: 1
eval_every: 0
checkpoint_every: 1
data: {size: 32, window_stride: 128, eval_window_stride: 128}
model: {width: 0.0625}
"""


def quiet(text):
    pass


@pytest.fixture(scope="session")
def untrimmed(tmp_path_factory):
    place = tmp_path_factory.mktemp("untrimmed")
    settings = UntrimmedSettings(
        validation_videos=3, test_videos=2, seconds=(20, 24), width=48, height=48, classes=("Slide", "Spin")
    )
    synthesize_untrimmed(place / "videos", settings, workers=0)
    convert(thumos.thumos14(place / "videos"), place / "data", VideoSettings("h264", 32, fps=10.0), workers=0)
    return place / "data"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, untrimmed):
    path = tmp_path_factory.mktemp("configs") / "tiny-detection.yaml"
    path.write_text(TINY)

    def make(phase, *overrides):
        return load(str(path), phase, [f"data.dataset={untrimmed}", *overrides])

    make.path = path

    return make


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """A teacher, its representation, and a student distilled from it."""
    place = tmp_path_factory.mktemp("detection-runs")
    train(tiny("detect-teacher"), place / "teacher", quiet)
    train(tiny("detect-representation", f"init={place / 'teacher'}"), place / "rep", quiet)
    train(tiny("detect-distill", f"teacher={place / 'rep'}"), place / "student", quiet)
    return place


def steps(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "/" in key} for line in lines if line["kind"] == "train"]


def test_every_phase_has_its_losses_and_weights(runs):
    own = {"center", "conf", "end", "loc", "prop_conf", "prop_loc", "start", "total", "triplet"}
    names = {
        "teacher": {"detector": own},
        "rep": {"detector": own | {"background", "rec"}, "cvae": {"kl", "mse", "total"}},
        "student": {"detector": own | {"background", "rec", "att"}, "cvae": {"kd", "kl", "mse", "total"}},
    }
    for name, wanted in names.items():
        for step in steps(runs / name):
            assert step.keys() == {f"{module}/{term}" for module, terms in wanted.items() for term in terms}
            assert np.isfinite(list(step.values())).all()
    detector, card = load_detector(runs / "student")
    assert (card.task, card.classes, card.model.temporal) == ("detection", ("Background", "Slide", "Spin"), "top_heavy")
    assert detector.pyramid.outputs == 3 and set(load_cvae(runs / "student").keys()) == {"Mixed_4f", "Mixed_5c"}
    assert not read_card(runs / "teacher").attention and read_card(runs / "rep").attention


def test_the_total_is_the_weighted_sum(runs):
    step = steps(runs / "student")[0]
    d = {key.removeprefix("detector/"): value for key, value in step.items() if key.startswith("detector/")}
    want = (
        10 * (d["loc"] + d["prop_loc"]) + d["conf"] + d["prop_conf"] + d["center"] + d["start"] + d["end"]
        + 35 * d["background"] + 0.1 * d["triplet"] + 0.025 * d["rec"] + 10 * d["att"]
    )  # fmt: skip
    assert d["total"] == pytest.approx(want, rel=1e-5)


def test_the_backbone_starts_from_the_teacher_and_keeps_its_statistics(runs):
    """init= freezes batch norm by default; the teacher's own, from random weights, moved."""
    teacher, rep = (load_detector(runs / name)[0].state_dict() for name in ("teacher", "rep"))
    moved = "backbone.Mixed_5c.b0.bn.running_mean"
    assert teacher[moved].any() and torch.equal(teacher[moved], rep[moved])
    assert not torch.equal(teacher["backbone.Mixed_5c.b0.conv3d.weight"], rep["backbone.Mixed_5c.b0.conv3d.weight"])


def test_a_stopped_run_continues_with_the_same_losses(tiny, runs, tmp_path):
    """The newest checkpoint of a finished run's copy is an earlier one."""
    config = tiny("detect-distill", f"teacher={runs / 'rep'}", "epochs=2", "keep_checkpoints=20")
    train(config, tmp_path / "whole", quiet)
    whole = steps(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    files = sorted((tmp_path / "again" / "checkpoints").glob("step-*.pt"))
    for path in files[len(files) // 2 :]:
        path.unlink()
    (tmp_path / "again" / "result.json").unlink()
    train(config, tmp_path / "again", quiet)
    assert steps(tmp_path / "again") == whole and len(whole) >= 4


def test_results_of_weights_on_a_split(runs, untrimmed):
    found = detect.detect_weights(runs / "student", untrimmed, device="cpu", decoding=detect.Decoding(threshold=0.0))
    results = found["results"]
    assert sorted(results) == ["video_test_0000001", "video_test_0000002"]
    dataset = Dataset.open(untrimmed)
    lengths = dict(zip(dataset.table["key"].to_pylist(), dataset.num_frames / 10, strict=True))
    for key, actions in results.items():
        assert actions and [a["score"] for a in actions] == sorted((a["score"] for a in actions), reverse=True)
        for action in actions:
            start, end = action["segment"]
            assert 0 <= start < end <= lengths[key] + 1e-6 and action["label"] in ("Slide", "Spin")
    # The same windows in batches of another size.
    again = detect.detect_weights(
        runs / "student", untrimmed, device="cpu", batch_size=1, decoding=detect.Decoding(threshold=0.0)
    )
    for key in results:
        assert [a["score"] for a in again["results"][key]] == pytest.approx(
            [a["score"] for a in results[key]], rel=1e-3
        )


def test_the_ground_truth_is_the_data_sets_own(untrimmed):
    own = json.loads((untrimmed.parent / "videos" / "thumos_annotations" / "thumos_gt.json").read_text())["database"]
    found = detect.ground_truth(Dataset.open(untrimmed), "test")["database"]
    assert len(found) == 2
    for key, entry in found.items():
        want = [(a["label"], *map(float, a["segment"])) for a in own[key]["annotations"]]
        got = [(a["label"], *a["segment"]) for a in entry["annotations"]]
        assert len(got) == len(want)
        for (label, start, end), (other, *times) in zip(sorted(got), sorted(want), strict=True):
            assert label == other and (start, end) == pytest.approx(times, abs=0.11)


def test_decoding_by_hand():
    """One anchor in the middle of 100 frames, 10 frames to each side, refined by half of 20 / 2 to the left and 0."""
    output = DetectorOutput(
        loc=torch.full((1, 1, 2), 10.0), conf=torch.tensor([[[0.0, np.log(3)]]]).float(),
        prop_loc=torch.tensor([[[0.5, 0.0]]]), prop_conf=torch.zeros(1, 1, 2), center=torch.zeros(1, 1, 1),
        priors=torch.tensor([[0.5]]), **dict.fromkeys(DetectorOutput._fields[6:]),
    )  # fmt: skip
    segments, scores = detect.decode(output, 100)
    assert segments.tolist() == [[[35.0, 60.0]]]
    assert scores.item() == pytest.approx((0.75 + 0.5) / 2 * 0.5)


def test_what_does_not_fit_is_refused(tiny, runs, data, tmp_path, untrimmed):
    with pytest.raises(UserError, match="holds no untrimmed videos with annotations"):
        train(tiny("detect-teacher", f"data.dataset={data.path}", "data.train_split=train"), tmp_path / "a", quiet)
    with pytest.raises(UserError, match="needs teacher=RUN, the folder of a finished detect-representation run"):
        train(tiny("detect-distill"), tmp_path / "b", quiet)
    with pytest.raises(UserError, match="has no attention head; use the run of the representation phase"):
        train(tiny("detect-distill", f"teacher={runs / 'teacher'}"), tmp_path / "c", quiet)
    with pytest.raises(UserError, match="method=logits is for recognition"):
        tiny("detect-distill", "method=logits", f"teacher={runs / 'rep'}")
    with pytest.raises(UserError, match=r"data\.clip_length must be a multiple of 128"):
        train(tiny("detect-teacher", "data.clip_length=96"), tmp_path / "d", quiet)
    with pytest.raises(UserError, match="holds no untrimmed videos"):
        detect.detect_weights(runs / "student", data.path, device="cpu")


def test_a_student_without_a_teacher_has_attention_and_no_vae(tiny, tmp_path):
    train(tiny("detect-distill", "method=none"), tmp_path / "alone", quiet)
    assert {key.split("/")[0] for step in steps(tmp_path / "alone") for key in step} == {"detector"}
    assert read_card(tmp_path / "alone").attention
    assert not (tmp_path / "alone" / "weights" / "cvae.safetensors").exists()


@pytest.fixture(scope="session")
def flow_data(untrimmed, tmp_path_factory):
    out = tmp_path_factory.mktemp("untrimmed-flow") / "data"
    convert(interop.dataset_sources(Dataset.open(untrimmed)), out, FlowSettings("dis"), workers=0)
    return out


def test_flow_alone_and_with_rgb_by_the_command_line(tiny, runs, untrimmed, flow_data, tmp_path):
    """The outputs' mean of a pair; detect, then evaluate, as a user does."""
    train(tiny("detect-teacher", f"data.dataset={flow_data}"), tmp_path / "flow", quiet)
    detector, card = load_detector(tmp_path / "flow")
    assert (card.modality, detector.in_channels) == ("flow", 2)
    call = CliRunner().invoke

    def detect_to(name, *options):
        done = call(
            main, ["detect", *map(str, options), str(tmp_path / name), "--device", "cpu", "--precision", "fp32"]
        )
        assert done.exit_code == 0, done.output
        assert "actions in 2 videos" in done.output
        return json.loads((tmp_path / name).read_text())["results"]

    alone = detect_to("flow.json", tmp_path / "flow", flow_data)
    fused = detect_to("fused.json", runs / "student", untrimmed, "--flow", tmp_path / "flow", flow_data)
    assert alone.keys() == fused.keys() and alone != fused
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(detect.ground_truth(Dataset.open(untrimmed), "test")))
    rgb = detect_to("rgb.json", runs / "student", untrimmed)
    files = [str(tmp_path / name) for name in ("rgb.json", "flow.json")]
    done = call(main, ["fuse-detections", *files, "--out", str(tmp_path / "late.json"), "--weights", "1,0.5"])
    assert done.exit_code == 0, done.output
    late = json.loads((tmp_path / "late.json").read_text())["results"]
    for key, actions in late.items():
        # The best of all is the first of either, as nothing decays it.
        best = max([a["score"] for a in rgb[key]] + [0.5 * a["score"] for a in alone[key]])
        assert max(a["score"] for a in actions) == pytest.approx(best, rel=1e-5)
    done = call(main, ["evaluate", "detection", str(tmp_path / "fused.json"), "--ground-truth", str(truth), "--json"])
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.output)["average_map"] <= 1
    for options, problem in (
        ([runs / "student", flow_data], "takes rgb windows"),
        ([tmp_path / "flow", untrimmed], "takes flow windows"),
        ([runs / "student", untrimmed, "--split", "train"], "train"),
    ):
        failed = call(main, ["detect", *map(str, options), str(tmp_path / "no.json"), "--device", "cpu"])
        assert failed.exit_code == 1 and problem in failed.output
    failed = call(main, ["detect", str(runs / "student"), str(untrimmed), str(tmp_path)])
    assert failed.exit_code == 1 and "is a folder; name a file" in failed.output


def test_each_stream_of_a_pair_is_normalized_as_its_own_weights_say(
    tiny, runs, untrimmed, flow_data, tmp_path, monkeypatch
):
    train(tiny("detect-teacher", f"data.dataset={flow_data}", "data.flow_std=[0.25,0.25]"), tmp_path / "flow", quiet)
    seen = {}
    real = detect.windows

    def watched(models, loader, *rest):
        seen["config"] = loader.config
        return real(models, loader, *rest)

    monkeypatch.setattr(detect, "windows", watched)
    detect.detect_weights(runs / "student", untrimmed, flow=(tmp_path / "flow", flow_data), device="cpu")
    assert seen["config"].flow_std == (0.25, 0.25) and seen["config"].std == (0.25,) * 3
    train(tiny("detect-teacher", f"data.dataset={flow_data}", "data.eval_window_stride=64"), tmp_path / "other", quiet)
    with pytest.raises(UserError, match=r"data\.eval_window_stride=128.*64; only detectors of the same windows"):
        detect.detect_weights(runs / "student", untrimmed, flow=(tmp_path / "other", flow_data), device="cpu")


def test_the_originals_weighting_does_not_hang_on_neighbours_in_tests(tiny, tmp_path, untrimmed):
    """Also: stages by epoch, averaged weights and an evaluation in training, all under compat."""
    options = ("compat=reference", "ema=0.9", "eval_every=1")
    train(tiny("detect-representation", *options), tmp_path / "run", quiet)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [0 <= line["map"] <= 1 for line in lines if line["kind"] == "eval"] == [True]
    decoding = detect.Decoding(threshold=0.0, compat="reference")
    one, four = (
        detect.detect_weights(tmp_path / "run", untrimmed, device="cpu", batch_size=size, decoding=decoding)["results"]
        for size in (1, 4)
    )
    for key, actions in one.items():
        scores = [[a["score"] for a in found] for found in (actions, four[key])]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_a_report_shows_curves_and_what_was_detected(tiny, runs, untrimmed, tmp_path):
    """The numbers of `genkd evaluate detection` on the page, and those that training measured."""
    train(tiny("detect-teacher", "eval_every=1"), tmp_path / "run", quiet)
    run, call = tmp_path / "run", CliRunner().invoke
    file = run / "evaluation" / "detections.json"
    done = call(main, ["detect", str(run), str(untrimmed), str(file), "--device", "cpu", "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    done = call(main, ["report", str(run), str(runs / "student"), "--out", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    truth = detect.ground_truth(Dataset.open(untrimmed), "test")
    found = mean_average_precision(truth, json.loads(file.read_text()), detect.TIOUS, "test")
    assert f"<b>{100 * found.average_map:.1f}</b>" in page
    (line,) = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == "eval"]
    assert line["map"] == pytest.approx(found.average_map, abs=1e-3)
    assert f"{100 * line['map']:.1f} %" in page and "video_test_0000001" in page
    assert "student has no detections of its weights on record" in page
    for title in ("mAP while training", "Average recall", "What the errors are", "conditional VAEs", "Throughput"):
        assert title in page


def test_averaging_is_of_outputs():
    one = DetectorOutput(*(torch.full((1, 2, 2), float(number)) for number in range(12)))
    two = DetectorOutput(*(torch.full((1, 2, 2), float(number) + 2) for number in range(12)))
    for number, value in enumerate(detect.average([one, two])):
        assert (value == number + 1).all()


def test_two_ranks_reach_the_weights_of_one(tiny, tmp_path):
    """A batch of 3 windows, whose actions and splices the ranks have unequal numbers of."""
    losses = {}
    for ranks in (1, 2):
        run = tmp_path / f"run{ranks}"
        options = ["batch_size=4", "model.freeze_bn=always", "optimizer.name=sgd", "optimizer.warmup_epochs=0"]
        config = tiny("detect-representation", *options)
        processes.run(
            *TORCHRUN, ranks, "-m", "genkd", "train", "detect-representation", "--config", tiny.path, "--out", run,
            f"data.dataset={config.data.dataset}", *options, check=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        losses[ranks] = [{name: line[name] for name in line if "/" in name} for line in lines]
    assert len(losses[1]) >= 2 and any(line["detector/triplet"] for line in losses[1])
    for one, two in zip(losses[1], losses[2], strict=True):
        assert two == pytest.approx(one, rel=2e-4, abs=1e-6)
    for name in ("detector", "cvae"):
        one, two = (load_file(tmp_path / f"run{n}" / "weights" / f"{name}.safetensors") for n in (1, 2))
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
