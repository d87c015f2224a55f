import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from genkd import files
from genkd.errors import UserError
from genkd.models import checkpoints
from genkd.preprocessing import shards
from genkd.tests.support import processes
from genkd.tests.support.processes import TORCHRUN, wait_until
from genkd.trainers import metrics
from genkd.trainers.loop import train

_SPEED = ("clips_per_s", "frames_per_s", "data_wait", "eta_s", "decoded_per_used", "read_mb_per_s")


def quiet(text):
    pass


def losses(run):
    """metrics.jsonl without what depends on the machine's speed."""
    return [{key: value for key, value in line.items() if key not in _SPEED} for line in metrics.read(run)]


def test_all_phases_follow_each_other(tiny, tmp_path):
    said = []
    train(tiny("teacher"), tmp_path / "teacher", said.append)
    train(tiny("representation", f"init={tmp_path / 'teacher'}"), tmp_path / "rep", quiet)
    train(tiny("distill", f"teacher={tmp_path / 'rep'}", "eval_every=1"), tmp_path / "student", quiet)
    train(tiny("distill", "method=none", "eval_every=2"), tmp_path / "plain", quiet)
    for line in ("loss", "clips/s", "wait", "ETA"):
        assert any(line in text for text in said)
    terms = {
        run: set(losses(tmp_path / run)[0]) - {"kind", "step", "epoch", "lr"}
        for run in ("teacher", "rep", "student", "plain")
    }
    assert terms["teacher"] == terms["plain"] == {"recognizer/total", "recognizer/class"}
    assert terms["rep"] == {
        "recognizer/total",
        "recognizer/class",
        "recognizer/rec",
        "cvae/total",
        "cvae/mse",
        "cvae/kl",
    }
    assert terms["student"] == terms["rep"] | {"recognizer/att", "cvae/kd"}
    kinds = [(line["kind"], line["step"]) for line in losses(tmp_path / "student")]
    assert kinds == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("eval", 3),
        ("train", 4),
        ("train", 5),
        ("train", 6),
        ("eval", 6),
    ]
    for run, parts in (("student", {"recognizer", "cvae"}), ("plain", {"recognizer"})):
        folder = tmp_path / run
        assert {path.name for path in folder.iterdir()} == {
            ".lock",
            "config.yaml",
            "metrics.jsonl",
            "checkpoints",
            "weights",
            "best",
            "result.json",
        }
        assert {path.stem for path in (folder / "weights").iterdir()} == parts
    # Attention weighting aside, the same seed gives both students the same first weights and first batch.
    assert losses(tmp_path / "student")[0]["recognizer/class"] == losses(tmp_path / "plain")[0]["recognizer/class"]
    _, card = checkpoints.load_recognizer(tmp_path / "student")
    assert card.model.temporal == "top_heavy" and card.attention and len(card.classes) == 10
    teacher = checkpoints.load_recognizer(tmp_path / "teacher")[1]
    assert not teacher.attention


def test_stage_b_changes_no_vae_weight_and_stage_a_no_backbone_weight(tiny, tmp_path):
    from genkd.pipelines.loader import Batch
    from genkd.trainers import phases
    from genkd.trainers.distributed import Ranks

    phase = phases.build(tiny("representation"), tuple("abcdefghij"))
    phase.place(Ranks(0, 1, torch.device("cpu")))
    phase.train()
    batch = Batch(torch.randn(2, 3, 16, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1]), 2, 2)
    touched = []
    noise = phases.Noise(*[torch.randn(2, 2, 64)] * 3)
    for stage in phase.stages(batch, phases.Turn(1, 0, noise, None)):
        for module in phase.modules.values():
            module.zero_grad(set_to_none=True)
        stage.terms["total"].backward()
        touched.append(
            (
                stage.module,
                {name for name, m in phase.modules.items() if any(p.grad is not None for p in m.parameters())},
            )
        )
    assert touched == [("cvae", {"cvae"}), ("recognizer", {"recognizer"})]


def command(tiny, data, run, phase="representation", *overrides):
    return ["-m", "genkd", "train", phase, "--config", str(tiny.path), "--out", str(run),
            f"data.dataset={data.path}", "epochs=3", *overrides]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_continues_with_the_same_losses_bit_for_bit(tiny, data, tmp_path, number):
    train(tiny("representation", "epochs=3", "eval_every=2"), tmp_path / "undisturbed", quiet)
    run = tmp_path / "disturbed"
    random = np.random.default_rng(int(number))
    stops = 0
    for goal in (2, 5):
        process = processes.start(*command(tiny, data, run, "representation", "eval_every=2"))
        wait_until(lambda goal=goal: len(metrics_lines(run)) >= goal, pause=0.002, process=process)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        stops += process.returncode != 0 or number == signal.SIGTERM
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode == (130 if number == signal.SIGINT else 0)
            assert "run the same command to continue" in told and "Traceback" not in told
    assert stops == 2 and not (run / "result.json").exists()
    train(tiny("representation", "epochs=3", "eval_every=2"), run, quiet)
    assert losses(run) == losses(tmp_path / "undisturbed")
    for name in ("recognizer", "cvae"):
        file = f"weights/{name}.safetensors"
        assert (run / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def metrics_lines(run):
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_finished_run_is_left_and_another_configuration_is_refused(tiny, tmp_path, content):
    train(tiny("teacher"), tmp_path / "run", quiet)
    before = content(tmp_path / "run")
    assert train(tiny("teacher"), tmp_path / "run", quiet)["steps"] == 6
    assert content(tmp_path / "run") == before
    train(tiny("teacher", "log_every=7", "data.prefetch=1"), tmp_path / "run", quiet)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.001 -> 0\.1"):
        train(tiny("teacher", "optimizer.lr=0.1"), tmp_path / "run", quiet)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not empty.*thesis\.tex"):
        train(tiny("teacher"), tmp_path / "other", quiet)


def test_another_process_in_the_same_run_is_refused(tiny, tmp_path):
    with files.locked(tmp_path / "run", ""), pytest.raises(UserError, match="another process is training"):
        train(tiny("teacher"), tmp_path / "run", quiet)


def test_bad_input_is_refused_before_anything_is_written(tiny, data, tmp_path):
    train(tiny("teacher", "epochs=1"), tmp_path / "teacher", quiet)
    train(tiny("representation", "epochs=1"), tmp_path / "rep", quiet)
    wrong = checkpoints.ModelCard(
        **{**checkpoints.read_card(tmp_path / "rep").__dict__, "classes": tuple("abcdefghij")}
    )
    checkpoints.save_weights(tmp_path / "foreign", wrong, {"recognizer": wrong.build()})
    run = tmp_path / "run"
    for phase, overrides, words in (
        ("teacher", ["data.dataset=nowhere"], "nowhere is no genkd data set"),
        ("teacher", ['data.dataset=""'], "data.dataset is not set"),
        ("teacher", ["data.train_split=val"], "split 'val'"),
        ("teacher", ["data.eval_split=val", "eval_every=1"], "eval_every=0"),
        ("distill", [f"teacher={tmp_path / 'rep'}", "data.mean=[0,0,0]"], "data.mean=[0.485, 0.456, 0.406]"),
        ("teacher", ["data.size=16"], "too small"),
        ("distill", [], "needs teacher=RUN"),
        ("distill", [f"teacher={tmp_path / 'none'}"], "neither a training run"),
        ("distill", [f"teacher={tmp_path / 'teacher'}"], "no attention head"),
        ("distill", [f"teacher={tmp_path / 'rep'}", "data.size=64"], "16 frames of 32 px"),
        ("distill", [f"teacher={tmp_path / 'rep'}", "model.width=0.5"], "set model.width=0.0625"),
        ("distill", [f"teacher={tmp_path / 'foreign'}"], "other classes"),
        ("representation", [f"init={tmp_path / 'teacher'}", "model.width=0.5"], "does not fit"),
        ("teacher", ["teacher=x"], "starts from init="),
        ("teacher", ["precision=fp16", "device=cpu"], "fp16 needs a GPU"),
    ):
        with pytest.raises(UserError) as caught:
            train(tiny(phase, *overrides), run, quiet)
        assert words in str(caught.value), (phase, overrides)
        assert not run.exists()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            train(tiny("teacher", "device=cuda"), run, quiet)


def test_a_diverging_run_stops_and_names_step_and_term(tiny, tmp_path):
    """The first step leaves huge weights, which are saved, as they are finite; the second one shows it."""
    with pytest.raises(UserError, match=r"diverged at step 2: recognizer/class not finite.*step-00000001\.pt"):
        train(tiny("teacher", "optimizer={name: sgd, lr: 1.0e+30}", "epochs=3"), tmp_path / "run", quiet)


def test_a_full_disk_gives_one_sentence_and_keeps_the_checkpoints(tiny, data, small_disk, genkd_process):
    disk = small_disk("1m")
    told = genkd_process(*command(tiny, data, disk / "run")[2:], check=False)
    assert told.returncode == 1
    assert "no space left" in told.stderr and "Traceback" not in told.stderr
    subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
    assert "finished" in genkd_process(*command(tiny, data, disk / "run")[2:]).stdout


@pytest.mark.parametrize("phase, options", [
    pytest.param("teacher", ["eval_every=2"], marks=pytest.mark.slow), ("distill", [
    "alternate=epoch", "eval_every=1", "ema=0.9", "keep=best", "data.fixed_views=1",
    "distill.teacher_cache={tmp_path}/cache",
])])  # fmt: skip
def test_two_ranks_train_and_evaluate_together(tiny, data, tmp_path, phase, options, genkd):
    train(tiny("representation", "epochs=1"), tmp_path / "rep", quiet)
    options = [option.format(tmp_path=tmp_path) for option in options]
    overrides = [f"teacher={tmp_path / 'rep'}", *options] if phase == "distill" else options
    passes = 2 if phase == "distill" else 1
    run = tmp_path / "run"
    processes.run(*TORCHRUN, 2, *command(tiny, data, run, phase, *overrides), check=True)
    steps = [line["step"] for line in losses(run) if line["kind"] == "train"]
    assert steps == list(range(1, 9 * passes + 1))
    assert json.loads((run / "result.json").read_text())["steps"] == 9 * passes
    arguments = ["evaluate", "recognition", run, "--data", data.path, "--clips", 2, "--batch-size", 6, "--json"]
    alone = json.loads(genkd(*arguments).stdout)
    together = processes.run(*TORCHRUN, 2, "-m", "genkd", *arguments, check=True)
    both = json.loads(together.stdout)
    assert both["videos"] == alone["videos"] == 40
    assert both["confusion"] == alone["confusion"] and both["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_bf16_follows_fp32_on_the_cpu(tiny, tmp_path):
    for precision in ("fp32", "bf16"):
        train(tiny("representation", f"precision={precision}", "epochs=1"), tmp_path / precision, quiet)
    exact, fast = (losses(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert exact[0]["recognizer/class"] != fast[0]["recognizer/class"]
    # The first step's losses precede any update, so only rounding separates them; later ones grow apart.
    for name in ("recognizer/class", "cvae/mse", "cvae/kl"):
        assert fast[0][name] == pytest.approx(exact[0][name], rel=0.02)
    assert all(np.isfinite(list(line.values())[1:]).all() for line in fast)


def test_two_ranks_reach_the_weights_of_one(tiny, data, tmp_path):
    """Batches of 4, 4 and 2, with dropout. Batch norm keeps its statistics, which are a rank's own."""
    for world_size in (1, 2):
        options = ["batch_size=4", "eval_every=0", "optimizer={name: sgd, lr: 0.01}", "model.freeze_bn=always"]
        assert tiny("representation", *options).model.dropout == 0.5
        arguments = command(tiny, data, tmp_path / f"run{world_size}", "representation", *options)
        processes.run(*TORCHRUN, world_size, *arguments, check=True)
    for name in ("recognizer", "cvae"):
        one, two = (load_file(tmp_path / f"run{n}" / "weights" / f"{name}.safetensors") for n in (1, 2))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)


def test_what_the_main_rank_finds_wrong_ends_every_rank(tiny, data, tmp_path):
    """A run folder of another configuration: one sentence, no rank left waiting."""
    train(tiny("teacher", "epochs=1"), tmp_path / "run", quiet)
    done = processes.run(*TORCHRUN, 2, *command(tiny, data, tmp_path / "run", "teacher", "seed=5"))
    assert done.returncode != 0
    assert "was begun with another configuration (epochs: 1 -> 3; seed: 0 -> 5)" in done.stderr


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_clips_of_half_precision_train_too(tiny, tmp_path, dtype):
    config = tiny("teacher", "epochs=1", f"data.dtype={dtype}", "precision=fp32")
    train(config, tmp_path / "run", quiet)
    assert np.isfinite(losses(tmp_path / "run")[0]["recognizer/class"])


def relabelled(data, folder, change):
    """A copy of a data set with other content of its index and dataset.json."""
    shutil.copytree(data.path, folder)
    info, table = change(json.loads((folder / "dataset.json").read_text()), data.table)
    content = shards.parquet_bytes(table.replace_schema_metadata(None))
    (folder / "index.parquet").write_bytes(content)
    info["index_digest"] = shards.digest_of(content)
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


@pytest.mark.parametrize("label, words", [(-1, "without a class"), (10, "with labels outside 0..9")])
def test_labels_outside_the_classes_are_refused(tiny, data, tmp_path, label, words):
    labels = data.table["label"].to_numpy().copy()
    labels[-1] = label
    change = lambda info, table: (info, table.set_column(2, "label", pa.array(labels, pa.int32())))  # noqa: E731
    place = relabelled(data, tmp_path / "odd", change)
    key = data.table["key"][len(labels) - 1].as_py()
    with pytest.raises(UserError, match=rf"1 of the \d+ videos in split '\w+' of .*{words}, e.g. {key}"):
        train(tiny("teacher", f"data.dataset={place}"), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_changed_is_refused(tiny, data, tmp_path):
    shutil.copytree(data.path, tmp_path / "data")
    options = ["epochs=3", f"data.dataset={tmp_path / 'data'}"]
    run = tmp_path / "run"
    process = processes.start(*command(tiny, data, run, "teacher", *options))
    wait_until(lambda: len(metrics_lines(run)) >= 3, process=process)
    process.kill()
    process.wait()
    # As after a conversion from other sources: the index and its digest are others.
    table = data.table.slice(1).combine_chunks()
    (tmp_path / "data" / "index.parquet").write_bytes(shards.parquet_bytes(table))
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    info["index_digest"] = shards.digest_of((tmp_path / "data" / "index.parquet").read_bytes())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"not the data set that .* was begun with"):
        train(tiny("teacher", *options), run, quiet)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_all_phases_train_on_a_gpu(tiny, tmp_path, precision):
    options = ["device=cuda", f"precision={precision}", "epochs=3"]
    train(tiny("representation", *options), tmp_path / "rep", quiet)
    train(tiny("distill", f"teacher={tmp_path / 'rep'}", *options), tmp_path / "student", quiet)
    values = [line["recognizer/total"] for line in losses(tmp_path / "student") if line["kind"] == "train"]
    assert len(values) == 9 and np.isfinite(values).all()
