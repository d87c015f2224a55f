"""Ranks that are killed, hang, are told to stop, or are other ones when a run continues."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from genkd.tests.support import processes
from genkd.tests.support.processes import wait_until

KILLED = """
def in_step(rank, step, attempt):
    if (rank, step, attempt) in WHEN:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def assert_same(one, two, tolerance):
    for name in ("recognizer", "cvae"):
        a, b = (load_file(run / "weights" / f"{name}.safetensors") for run in (one, two))
        for key, value in a.items():
            np.testing.assert_allclose(b[key], value, rtol=tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize(
    "when", [[(0, 4, 0)], pytest.param([(1, 4, 0), (0, 7, 1)], marks=pytest.mark.slow)], ids=["main", "each"]
)
def test_a_rank_killed_in_mid_step_costs_nothing_but_time(runs, undisturbed, when):
    _, told = runs.run("run", fault=KILLED.replace("WHEN", repr(when)), restarts=2)
    assert "has lost another rank" in told and told.count("continuing") == len(when)
    runs.assert_every_video_once("run")
    assert runs.losses("run") == undisturbed.losses("run")
    assert_same(undisturbed.folder / "run", runs.folder / "run", 0)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("time.sleep(1000)", ["it waits for rank 1 on HOST, which still waits for its data (step 3)"]),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSTOP)",
            ["nothing is heard of rank 1 on HOST, which last"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["asleep", "stopped"],
)
def test_a_hung_rank_is_named(runs, fault, words):
    hang = f"""
def before_step(rank, step, attempt):
    if (rank, step) == (1, 2):
        open(sys.argv[0] + ".pid", "w").write(str(os.getpid()))
        {fault}
"""
    process = runs.start("run", "ranks.timeout_s=6", fault=hang)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if "SIGSTOP" in fault and "ranks.timeout_s=6" in process.stderr.read_text():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((runs.folder / "run.py.pid").read_text()), signal.SIGCONT)  # or torchrun waits 30 s for it
        time.sleep(0.2)
    process.kill()
    process.wait(20)
    assert process.returncode not in (0, -signal.SIGKILL)
    said = process.stderr.read_text()
    assert re.search(r"rank 0 has waited \d+ s while it (computes|adds up gradients with the others) \(step 3\)", said)
    for text in words:
        assert text.replace("HOST", socket.gethostname()) in said
    assert "Traceback" not in said.split("ranks.timeout_s=6")[0]


def test_a_rank_told_to_stop_stops_all_and_another_number_of_ranks_goes_on(runs, undisturbed):
    told = """
def before_step(rank, step, attempt):
    if (rank, step) == (1, 3):
        os.kill(os.getpid(), signal.SIGTERM)
"""
    began = time.monotonic()
    code, said = runs.run("run", fault=told)
    assert code == 0 and "stopped at step 5 of 9, state saved" in said and time.monotonic() - began < 60
    assert not (runs.folder / "run" / "result.json").exists()
    os.rename(runs.folder / "run.jsonl", runs.folder / "before.jsonl")
    runs.run("run", ranks=1)
    runs.assert_every_video_once("before", "run")
    np.testing.assert_allclose(runs.losses("run"), undisturbed.losses("run"), rtol=1e-5)
    assert_same(undisturbed.folder / "run", runs.folder / "run", 1e-5)


def test_ranks_save_and_end_when_torchrun_is_killed(runs):
    slow = """
def before_step(rank, step, attempt):
    with open(record + ".pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(0.5)
"""
    process = runs.start("run", "epochs=30", fault=slow)
    pids = runs.folder / "run.jsonl.pids"
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) >= 4, process=process)
    process.kill()
    numbers = set(map(int, pids.read_text().split()))
    assert len(numbers) == 2
    wait_until(lambda: not any(os.path.exists(f"/proc/{number}") for number in numbers))
    steps = len(list(map(json.loads, (runs.folder / "run" / "metrics.jsonl").open())))
    assert 0 < steps < 60 and (runs.folder / "run" / "checkpoints" / f"step-{steps:08d}.pt").exists()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_add_up_to_those_of_a_whole_batch(runs, undisturbed, ranks):
    """Ranks that take a clip at a time."""
    runs.run("run", "micro_batch=1", ranks=ranks)
    runs.assert_every_video_once("run")
    np.testing.assert_allclose(runs.losses("run"), undisturbed.losses("run"), rtol=1e-4)
    assert_same(undisturbed.folder / "run", runs.folder / "run", 1e-5)


@pytest.mark.slow
def test_reduced_in_bf16_they_stay_close(runs, undisturbed):
    runs.run("run", "ranks.compression=bf16")
    np.testing.assert_allclose(runs.losses("run"), undisturbed.losses("run"), rtol=2e-2)
    assert runs.losses("run") != undisturbed.losses("run")


def test_other_ranks_that_never_come(runs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = processes.run(
        "-m", "genkd", "train", "teacher", "--config", runs.config, "--out", "run", f"data.dataset={runs.data.path}",
        "ranks.timeout_s=1", cwd=runs.folder, env={**os.environ, **place},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"no rendezvous with the other ranks at 127.0.0.1:{port}" in done.stderr and "Traceback" not in done.stderr
    assert not (runs.folder / "run").exists()


@pytest.mark.slow
def test_a_shard_that_vanishes_is_named_and_the_run_goes_on_when_it_is_back(runs, undisturbed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(runs.data.path, copy)
    gone = sorted((copy / "shards").glob("train-*.tar"))
    # What has been opened can still be read, so from the third step on all is opened anew.
    vanish = f"""
def before_step(rank, step, attempt):
    if step == 2:
        for path in {[str(path) for path in gone]!r}:
            os.unlink(path)
        from genkd.pipelines.store import _Mapped
        slice_of = _Mapped.slice
        def anew(self, *arguments):
            self._maps.clear()
            return slice_of(self, *arguments)
        _Mapped.slice = anew
"""
    code, told = runs.run("run", f"data.dataset={copy}", fault=vanish, ranks=1, check=False)
    assert code != 0 and "/shards/train-" in told
    assert f'File "{runs.folder / "run.py"}"' not in told  # no traceback but torchrun's own
    for path in gone:
        shutil.copyfile(runs.data.path / "shards" / path.name, path)
    runs.run("run", f"data.dataset={copy}", ranks=1)
    np.testing.assert_allclose(runs.losses("run"), undisturbed.losses("run"), rtol=1e-5)


@pytest.mark.parametrize("compared", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "compared"])
def test_a_rank_told_to_stop_in_an_evaluation_stops_all(runs, compared):
    """compared: with the measurements of a rank that trains alone, too."""
    told = """
from genkd.evaluation import recognition
evaluate = recognition.evaluate
def stopping(model, loader, place, *arguments):
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(model, loader, place, *arguments)
if not os.path.exists(record):
    recognition.evaluate = stopping
"""
    options = ("eval_every=1", "data.eval_split=test", "alternate=epoch", "ema=0.9", "grad_clip=1.0")
    code, said = runs.run("run", *options, fault=told)
    assert code == 0 and "stopped at step 6 of 18, state saved" in said and "lost another" not in said
    runs.run("run", *options)
    assert json.loads((runs.folder / "run" / "result.json").read_text())["steps"] == 18
    if not compared:
        return
    runs.run("alone", *options, ranks=1)
    one, two = (list(map(json.loads, (runs.folder / name / "metrics.jsonl").open())) for name in ("alone", "run"))
    assert [line["kind"] for line in one] == [line["kind"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert all(
            b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5) for key in a if "/" in key or key in ("top1", "loss")
        )


def test_uneven_shares_are_added_up_in_as_many_steps(runs):
    """Seven clips of ten: four and three of them to a rank, in two parts each, then two and one, in one."""
    options = ("batch_size=6", "micro_batch=2")
    for ranks in (1, 2):
        runs.run(f"run{ranks}", *options, ranks=ranks)
        runs.assert_every_video_once(f"run{ranks}")
    np.testing.assert_allclose(runs.losses("run2"), runs.losses("run1"), rtol=1e-4)


def test_not_a_number_ends_every_rank(runs):
    broken = """
def before_step(rank, step, attempt):
    if (rank, step) == (1, 4):
        import genkd.trainers.losses as losses
        weigh = losses.weigh
        losses.weigh = lambda *arguments: {name: value * float("nan") for name, value in weigh(*arguments).items()}
"""
    code, told = runs.run("run", fault=broken, check=False)
    assert code != 0 and told.count("Error: the run diverged at step 5: recognizer/") == 2
    assert "lost another rank" not in told
    steps = [json.loads(line)["step"] for line in (runs.folder / "run" / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
