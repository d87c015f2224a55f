"""The options of a training run, on the synthetic data set."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genkd.configs.load import load
from genkd.errors import UserError
from genkd.evaluation import recognition
from genkd.models import checkpoints
from genkd.pipelines.plan import noise
from genkd.preprocessing.convert import convert
from genkd.preprocessing.flow import FlowSettings
from genkd.preprocessing.interop import dataset_sources
from genkd.preprocessing.shards import Dataset
from genkd.tests.support import processes
from genkd.tests.support.processes import wait_until
from genkd.trainers import frozen, metrics
from genkd.trainers.distributed import Ranks
from genkd.trainers.loop import train
from genkd.trainers.step import Stepper


@pytest.fixture(scope="module")
def teachers(shard_sets, tiny_yaml, tmp_path_factory):
    """A finished representation run, trained for a moment; 10 training videos, so 3 steps an epoch."""
    folder = tmp_path_factory.mktemp("teachers")
    config = load(str(tiny_yaml), "representation", [f"data.dataset={shard_sets('vp9').path}", "epochs=1"])
    train(config, folder / "rep", quiet)
    return folder / "rep"


def quiet(text):
    pass


def lines(run, kind):
    return [line for line in metrics.read(run) if line["kind"] == kind]


@pytest.mark.parametrize("method, terms", [
    ("generative", {"cvae/total", "cvae/mse", "cvae/kl", "cvae/kd", "recognizer/rec", "recognizer/att"}),
    ("generative-only", {"cvae/total", "cvae/mse", "cvae/kl", "cvae/kd", "recognizer/rec"}),
    ("attention-only", {"cvae/total", "cvae/mse", "cvae/kl", "recognizer/rec", "recognizer/att"}),
    ("logits", {"recognizer/follow"}),
    ("features", {"recognizer/follow"}),
    ("attention-transfer", {"recognizer/follow"}),
    ("none", set()),
])  # fmt: skip
def test_every_method_trains_with_its_own_terms(tiny, teachers, tmp_path, method, terms):
    train(tiny("distill", "epochs=1", f"method={method}", f"teacher={teachers}"), tmp_path / "run", quiet)
    found = lines(tmp_path / "run", "train")
    assert {name for name in found[0] if "/" in name} == terms | {"recognizer/total", "recognizer/class"}
    for line in found:
        total = line["recognizer/class"] + line.get("recognizer/follow", 0.0)
        if "recognizer/rec" in line:  # epoch 1 of a ramp of 20 to one half
            total += 0.5 / 20 * line["recognizer/rec"] + 0.1 * line.get("recognizer/att", 0.0)
        assert line["recognizer/total"] == pytest.approx(total, rel=1e-5)


def test_methods_that_need_no_attention_take_a_plain_teacher(tiny, tmp_path):
    train(tiny("teacher", "epochs=1"), tmp_path / "teacher", quiet)
    options = ["epochs=1", f"teacher={tmp_path / 'teacher'}"]
    train(tiny("distill", "method=logits", *options), tmp_path / "student", quiet)
    with pytest.raises(UserError, match="no attention head"):
        train(tiny("distill", "method=attention-only", *options), tmp_path / "other", quiet)


def test_stages_that_take_turns_by_epoch_pass_over_the_data_twice(tiny, teachers, tmp_path):
    """Each epoch all of A, then all of B: two epochs of three steps are twelve. A leaves the recognizer's weights as
    they are, except for batch norm's statistics."""
    config = tiny("distill", f"teacher={teachers}", "alternate=epoch", "eval_every=2")
    result = train(config, tmp_path / "run", quiet)
    assert result["steps"] == 12 and result["epochs"] == 2
    stages = [
        {name.split("/")[0] for name in line if name.endswith("/total")} for line in lines(tmp_path / "run", "train")
    ]
    assert stages == ([{"cvae"}] * 3 + [{"recognizer"}] * 3) * 2
    assert [line["epoch"] for line in lines(tmp_path / "run", "train")] == [1] * 6 + [2] * 6
    assert [(line["epoch"], line["step"]) for line in lines(tmp_path / "run", "eval")] == [(2, 12)]
    # Both schedules go by a module's own six steps, and end at next to nothing.
    rates = [line["lr"] for line in lines(tmp_path / "run", "train")]
    half_cosine = [0.001 * 0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    np.testing.assert_allclose(rates[3:6] + rates[9:], half_cosine)
    states = [torch.load(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt") for step in (11, 12)]
    assert not torch.equal(*[state["modules"]["recognizer"]["logits.weight"] for state in states])
    assert torch.equal(*[state["modules"]["cvae"]["decoder.mlp.0.weight"] for state in states])


def test_the_reference_alternates_by_epoch_and_draws_separate_noise(tiny, teachers, data):
    from genkd.pipelines.loader import Loader
    from genkd.trainers import phases

    drawn = {}
    for compat in ("none", "reference"):
        config = tiny("distill", f"teacher={teachers}", f"compat={compat}")
        phase = phases.build(config, tuple(data.classes))
        stepper = Stepper(config, phase, Ranks(0, 1, torch.device("cpu")), 3)
        with Loader(data, "train", config.data, batch_size=2, training=True) as loader:
            drawn[compat] = stepper._noise(next(iter(loader)), 0)
        assert config.passes == (2 if compat == "reference" else 1)
    one = drawn["none"]
    assert torch.equal(one.encoder, one.teacher) and torch.equal(one.encoder, one.prior)
    other = drawn["reference"]
    assert torch.equal(one.encoder, other.encoder)
    assert len({tensor.flatten()[0].item() for tensor in other}) == 3
    many = noise(0, 1, range(50), (8, 64), 1)
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


@pytest.mark.parametrize("options", [["alternate=epoch", "ema=0.5"], ["ema=0.9", "patience=1", "keep=best"]])
def test_a_killed_run_with_these_options_ends_with_the_same_bytes(tiny, data, teachers, tmp_path, options):
    arguments = [f"teacher={teachers}", "epochs=2", "eval_every=1", *options]
    train(tiny("distill", *arguments), tmp_path / "undisturbed", quiet)
    run = tmp_path / "disturbed"
    process = processes.start("-m", "genkd", "train", "distill", "--config", tiny.path, "--out", run,
                              f"data.dataset={data.path}", *arguments)  # fmt: skip
    log = run / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 5, process=process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "result.json").exists()
    train(tiny("distill", *arguments), run, quiet)
    for name in ("recognizer", "cvae"):
        for folder in ("weights", "best"):
            file = f"{folder}/{name}.safetensors"
            assert (run / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes(), file


def test_averages_rest_while_their_module_does(tiny, teachers, tmp_path):
    """Steps 7 to 9 are of the VAE: the recognizer's average stays what it was, the VAE's moves."""
    options = [f"teacher={teachers}", "alternate=epoch", "ema=0.5", "keep_checkpoints=20", "eval_every=0"]
    train(tiny("distill", *options), tmp_path / "run", quiet)
    before, after = (torch.load(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt") for step in (6, 9))
    for name, key, same in (("recognizer", "logits.weight", True), ("cvae", "decoder.mlp.0.weight", False)):
        assert torch.equal(before["averages"][name][key], after["averages"][name][key]) == same
    trained = after["modules"]["recognizer"]["logits.weight"]
    assert not torch.equal(after["averages"]["recognizer"]["logits.weight"], trained)


def test_averaged_weights_are_evaluated_and_saved(tiny, data, tmp_path):
    train(tiny("teacher", "ema=0.5", "eval_every=2"), tmp_path / "run", quiet)
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000006.pt")
    averaged = state["averages"]["recognizer"]["logits.weight"]
    assert not torch.equal(averaged, state["modules"]["recognizer"]["logits.weight"])
    assert torch.equal(load_file(tmp_path / "run" / "weights" / "recognizer.safetensors")["logits.weight"], averaged)
    found = recognition.evaluate_weights(tmp_path / "run", data.path, clips=1, device="cpu")
    assert found["loss"] == pytest.approx(lines(tmp_path / "run", "eval")[-1]["loss"], rel=1e-5)


def test_the_best_evaluation_is_kept_and_a_hopeless_run_ends_early(tiny, data, tmp_path):
    """A rate that ruins the weights after the first epochs: the run ends before its time, with its best weights."""
    options = ["epochs=30", "eval_every=1", "patience=2", "keep=best"]
    options += ["optimizer={name: sgd, lr: 3.0, schedule: constant}"]
    said = []
    result = train(tiny("teacher", *options), tmp_path / "run", said.append)
    evals = lines(tmp_path / "run", "eval")
    best = max(evals, key=lambda line: (line["top1"], -line["loss"]))
    assert result["epochs"] == evals[-1]["epoch"] == best["epoch"] + 2 < 30
    assert result["best"] == {name: best[name] for name in ("epoch", "top1", "loss")}
    assert any("no better top-1 for 2 evaluations" in text for text in said)
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text()) == result["best"]
    found = recognition.evaluate_weights(tmp_path / "run", data.path, clips=1, device="cpu")
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-5)
    checkpoints.load_recognizer(tmp_path / "run" / "best")
    for wrong in (["eval_every=0", "patience=1"], ["eval_every=0", "keep=best"]):
        with pytest.raises(UserError, match="need evaluations"):
            tiny("teacher", *wrong)


def test_fixed_views_come_again_and_their_teacher_is_asked_once(tiny, teachers, tmp_path, monkeypatch):
    """Two views a video, four epochs: the teacher sees 20 clips, the losses are those of a run without the cache."""
    asked = []
    original = frozen.FrozenTeacher._run

    def counting(self, clips, wanted):
        asked.append(len(clips))
        return original(self, clips, wanted)

    monkeypatch.setattr(frozen.FrozenTeacher, "_run", counting)
    # Batches of one size, in fp32: a batch's values depend on its size by rounding.
    options = [f"teacher={teachers}", "epochs=4", "data.fixed_views=2", "batch_size=5"]
    train(tiny("distill", *options), tmp_path / "plain", quiet)
    assert sum(asked) == 40
    asked.clear()
    cache = f"distill.teacher_cache={tmp_path / 'cache'}"
    train(tiny("distill", *options, cache), tmp_path / "first", quiet)
    assert sum(asked) == 20
    after = len(asked)
    train(tiny("distill", *options, cache), tmp_path / "second", quiet)
    assert len(asked) == after, "the second run finds everything"
    for run in ("first", "second"):
        for got, want in zip(lines(tmp_path / run, "train"), lines(tmp_path / "plain", "train"), strict=True):
            assert got["recognizer/att"] == pytest.approx(want["recognizer/att"], rel=1e-3)
    train(tiny("distill", *options, cache, "seed=1"), tmp_path / "third", quiet)
    assert len(asked) > after, "another seed has other clips"
    with pytest.raises(UserError, match=r"data\.fixed_views"):
        tiny("distill", f"teacher={teachers}", cache)


@pytest.mark.parametrize("method", ["logits", "generative"])
def test_the_teacher_keeps_no_gradients_and_stays_in_eval_mode(tiny, teachers, data, method):
    from genkd.pipelines.loader import Loader
    from genkd.trainers import phases
    from genkd.trainers.metrics import Meter

    config = tiny("distill", f"teacher={teachers}", f"method={method}")
    phase, place = phases.build(config, tuple(data.classes)), Ranks(0, 1, torch.device("cpu"))
    phase.place(place)
    before = {name: value.clone() for name, value in phase.teacher.recognizer.state_dict().items()}
    stepper = Stepper(config, phase, place, 3)
    phase.train()
    with Loader(data, "train", config.data, batch_size=4, training=True) as loader:
        for number, batch in enumerate(loader):
            stepper.take(batch, 0, number, Meter(place))
    assert phase.network.training and not phase.teacher.recognizer.training
    assert all(p.grad is None and not p.requires_grad for p in phase.teacher.recognizer.parameters())
    after = phase.teacher.recognizer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def flow(shard_sets, tmp_path_factory):
    """The flow of the synthetic videos."""
    out = tmp_path_factory.mktemp("flow") / "flow"
    convert(dataset_sources(shard_sets("vp9"), None), out, FlowSettings("farneback", codec="vp9", gop=8), workers=2)
    return Dataset.open(out)


def test_flow_trains_and_is_not_mixed_up_with_rgb(tiny, teachers, flow, tmp_path):
    options = [f"data.dataset={flow.path}", "epochs=1"]
    train(tiny("representation", *options), tmp_path / "rep", quiet)
    train(tiny("distill", *options, f"teacher={tmp_path / 'rep'}"), tmp_path / "student", quiet)
    model, card = checkpoints.load_recognizer(tmp_path / "student")
    assert card.modality == "flow" and model.in_channels == 2
    assert model.backbone.Conv3d_1a_7x7.conv3d.weight.shape[1] == 2
    found = recognition.evaluate_weights(tmp_path / "student", flow.path, clips=1, device="cpu")
    assert np.isfinite(found["loss"]) and found["videos"] == 40
    with pytest.raises(UserError, match="is for rgb clips, this data set holds flow"):
        train(tiny("distill", *options, f"teacher={teachers}"), tmp_path / "other", quiet)


def test_divergence_names_step_term_and_last_good_state(tiny, teachers, tmp_path, monkeypatch):
    """The reconstruction of step 5 is made infinite: the log step after it says so."""
    from genkd.trainers.phases import representation

    calls = []
    original = representation.losses.weigh

    def broken(*arguments):
        calls.append(1)
        terms = original(*arguments)
        if len(calls) < 5:
            return terms
        return {**terms, "total": terms["total"] * torch.inf, "rec": terms["rec"] * torch.inf}

    monkeypatch.setattr(representation.losses, "weigh", broken)
    with pytest.raises(UserError, match=r"at step 5: recognizer/rec not finite.*step-00000004\.pt\)") as caught:
        config = tiny("distill", f"teacher={teachers}", "epochs=3", "log_every=7", "checkpoint_every=4")
        train(config, tmp_path / "run", quiet)
    assert "class" not in str(caught.value)


def test_weights_that_broke_are_not_saved(tiny, tmp_path, monkeypatch):
    """The losses of the step before are finite, and no evaluation comes between."""
    original = Stepper.take

    def breaking(self, *arguments):
        original(self, *arguments)
        self.phase.network.logits.weight.data[0, 0] = torch.nan

    monkeypatch.setattr(Stepper, "take", breaking)
    with pytest.raises(UserError, match=r"by step 1: the recognizer's weights are not finite.*no state had been saved"):
        train(tiny("teacher"), tmp_path / "run", quiet)
    assert not list((tmp_path / "run").glob("checkpoints/*.pt"))


def test_scores_that_are_not_finite_are_a_divergence_too(tiny, tmp_path):
    """Losses of batch statistics stay finite while the running ones overflow: the evaluation finds out, and the
    checkpoint that leads there is put aside."""
    options = ["optimizer={name: sgd, lr: 1.0e+4, schedule: constant}", "log_every=100", "checkpoint_every=100",
               "eval_every=1"]  # fmt: skip
    with pytest.raises(UserError, match=r"the run diverged by step 3: \d+ of 40 videos have scores that are nan"):
        train(tiny("teacher", *options), tmp_path / "run", quiet)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003.pt.diverged"]


def test_a_teacher_that_changed_meanwhile_is_refused(tiny, data, teachers, tmp_path):
    shutil.copytree(teachers, tmp_path / "rep")
    arguments = [f"teacher={tmp_path / 'rep'}", "epochs=2"]
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genkd.trainers.loop._Trainer.finish", lambda self: {})  # as if killed just before
        train(tiny("distill", *arguments), run, quiet)
    train(tiny("representation", "epochs=1", "seed=9"), tmp_path / "other", quiet)
    for name in ("recognizer", "cvae"):
        shutil.copy(tmp_path / "other" / "weights" / f"{name}.safetensors", tmp_path / "rep" / "weights")
    with pytest.raises(UserError, match="has other weights than when"):
        train(tiny("distill", *arguments), run, quiet)


def test_a_run_goes_on_without_what_it_started_from(tiny, teachers, tmp_path):
    shutil.copytree(teachers, tmp_path / "rep")
    config = tiny("representation", f"init={tmp_path / 'rep'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genkd.trainers.loop._Trainer.finish", lambda self: {})
        train(config, tmp_path / "run", quiet)
    shutil.rmtree(tmp_path / "rep")
    assert train(config, tmp_path / "run", quiet)["steps"] == 6
    with pytest.raises(UserError, match="neither a training run"):
        train(config, tmp_path / "another", quiet)


def test_a_full_disk_under_the_teachers_cache_gives_one_sentence(tiny, teachers, tmp_path, small_disk):
    disk = small_disk("16k")
    options = [f"teacher={teachers}", "method=features", "data.fixed_views=2"]
    with pytest.raises(UserError, match=r"no space left .* distill.teacher_cache"):
        train(tiny("distill", *options, f"distill.teacher_cache={disk / 'cache'}"), tmp_path / "run", quiet)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"distill.teacher_cache=.*file"):
        train(tiny("distill", *options, f"distill.teacher_cache={tmp_path / 'file'}"), tmp_path / "two", quiet)


def test_a_description_that_a_crash_left_empty_is_written_again(tiny, teachers, tmp_path):
    options = [f"teacher={teachers}", "epochs=1", "data.fixed_views=1", f"distill.teacher_cache={tmp_path / 'cache'}"]
    train(tiny("distill", *options), tmp_path / "one", quiet)
    (description,) = (tmp_path / "cache").glob("*/attention.json")
    description.write_bytes(b"")
    train(tiny("distill", *options), tmp_path / "two", quiet)
    assert (
        lines(tmp_path / "two", "train")[0]["recognizer/att"] == lines(tmp_path / "one", "train")[0]["recognizer/att"]
    )
    assert json.loads(description.read_text()) == [64, 2]
