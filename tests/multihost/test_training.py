"""Training over three hosts: that they learn what one process does, and what happens when one is lost."""

import json
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file

# What a rank does on the hosts: genkd train, with notes, before each step, of the attempt (a number that all its ranks
# share), the world size, the step, the epoch and the videos.
RANK = """
import datetime, json, os, time
import torch.distributed as dist
from genkd.cli import main
from genkd.trainers.step import Stepper

join, take, attempt = dist.init_process_group, Stepper.take, [time.time()]

def joined(*arguments, **options):
    options["timeout"] = datetime.timedelta(seconds=float(os.environ["PATIENCE"]))
    join(*arguments, **options)
    dist.broadcast_object_list(attempt)

def noted(self, batch, draw, step, meter):
    line = {"attempt": attempt[0], "world_size": self.place.world_size, "step": step, "epoch": draw,
            "ids": batch.ids[:batch.count].tolist()}
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps(line) + "\\n")
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    take(self, batch, draw, step, meter)

dist.init_process_group, Stepper.take = joined, noted
main()
"""
# Detects a silent host within 3 s instead of 15, and waits 3 s instead of 30 for more hosts than are needed.
CONF = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,join_timeout=120"


@pytest.fixture
def script(tmp_path, tiny_yaml):
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


def arguments(tmp_path, data, run, *overrides):
    return ["train", "teacher", "--config", tmp_path / "tiny.yaml", "--out", tmp_path / run,
            f"data.dataset={data.path}", "model.freeze_bn=always",  # whose statistics are a rank's own
            *overrides]  # fmt: skip


def notes(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lines(run, kind):
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if line["kind"] == kind]


def until(condition, processes, logs, seconds):
    """Waits for a condition while processes run."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            raise AssertionError("\n".join(log.read_text() for log in logs))
        time.sleep(0.05)


def test_three_hosts_learn_what_one_process_does(hosts, script, data, tmp_path):
    options = ["epochs=3", "eval_every=3"]
    processes, logs = [], [tmp_path / f"log{number}" for number in (1, 2, 3)]
    for number, host in enumerate(hosts):
        processes.append(
            host.torchrun(
                hosts[0].address, script, arguments(tmp_path, data, "three", *options), logs[number],
                PATIENCE=60, NOTES=tmp_path / f"notes-{number}",
            )
        )  # fmt: skip
    codes = [process.wait(timeout=200) for process in processes]
    assert codes == [0, 0, 0], "\n".join(log.read_text() for log in logs)
    alone = hosts[0].start(
        [sys.executable, script, *arguments(tmp_path, data, "one", *options)], tmp_path / "log",
        PATIENCE=60, NOTES=tmp_path / "notes",
    )  # fmt: skip
    assert alone.wait(timeout=100) == 0, (tmp_path / "log").read_text()

    shares = [[len(note["ids"]) for note in notes(tmp_path / f"notes-{number}")] for number in range(3)]
    assert [sum(share) for share in zip(*shares, strict=True)] == [6, 4] * 3
    assert all(note["world_size"] == 3 for note in notes(tmp_path / "notes-1"))
    one, three = tmp_path / "one", tmp_path / "three"
    for kind, names in (("train", ("recognizer/total",)), ("eval", ("top1", "loss"))):
        first, second = lines(one, kind), lines(three, kind)
        assert len(first) == len(second) == {"train": 6, "eval": 1}[kind]
        for name in names:
            assert [line[name] for line in second] == pytest.approx([line[name] for line in first], abs=1e-5)
    first, second = (load_file(run / "weights" / "recognizer.safetensors") for run in (one, three))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(600)
def test_a_lost_host_costs_the_steps_since_the_last_checkpoint(hosts, script, data, tmp_path):
    """One of three hosts loses its network, then its power. The others notice, go on as two from the newest checkpoint,
    and as three when it is back; and every video of every epoch counts once."""
    logs = [tmp_path / f"log{number}" for number in (1, 2, 3)]
    run, patience = tmp_path / "run", 10

    def begin(number):
        return hosts[number].torchrun(
            hosts[0].address, script, arguments(tmp_path, data, "run", "epochs=30", "eval_every=0"), logs[number],
            nodes="2:3", conf=CONF, restarts=3, PATIENCE=patience, NOTES=tmp_path / f"notes-{number}", STEP_SECONDS=0.5,
        )  # fmt: skip

    def latest(number):
        return (notes(tmp_path / f"notes-{number}") or [{"step": -1, "world_size": 0, "attempt": 0}])[-1]

    processes = [begin(number) for number in range(3)]
    until(lambda: latest(2)["step"] >= 5, processes, logs, 100)
    before = latest(0)
    assert before["world_size"] == 3
    hosts[2].plug(False)
    cut = time.monotonic()
    hosts[2].kill()
    until(lambda: latest(0)["world_size"] == latest(1)["world_size"] == 2, processes[:2], logs, patience + 110)
    noticed = time.monotonic() - cut
    until(lambda: latest(0)["step"] >= before["step"] + 4, processes[:2], logs, 60)
    hosts[2].plug(True)
    processes[2] = begin(2)
    until(lambda: all(latest(number)["world_size"] == 3 for number in range(3)), processes, logs, 120)
    codes = [process.wait(timeout=200) for process in processes]
    told = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0, 0], told
    print(f"two hosts went on {noticed:.0f} s after the third was lost")
    # No fewer than what a collective waits, no more than that and a new start.
    assert patience - 1 < noticed < patience + 110

    steps = defaultdict(list)
    for number in range(3):
        for note in notes(tmp_path / f"notes-{number}"):
            steps[note["step"]].append(note)
    assert sorted(steps) == list(range(60)) and json.loads((run / "result.json").read_text())["steps"] == 60
    # Of a step that was taken again only the last attempt left a trace in the weights.
    kept = {step: [note for note in taken if note["attempt"] == max(n["attempt"] for n in taken)]
            for step, taken in steps.items()}  # fmt: skip
    sizes = [kept[step][0]["world_size"] for step in range(60)]
    changes = [size for number, size in enumerate(sizes) if not number or size != sizes[number - 1]]
    assert changes == [3, 2, 3]
    assert all(len(taken) == taken[0]["world_size"] for taken in kept.values())
    again = [step for step, taken in steps.items() if len({note["attempt"] for note in taken}) > 1]
    assert 1 <= len(again) <= 2 * 2  # at either change no more than since the last checkpoint, which every second has
    seen = defaultdict(list)
    for taken in kept.values():
        for note in taken:
            seen[note["epoch"]] += note["ids"]
    rows = sorted(data.rows("train").tolist())
    assert len(rows) == 10 and all(sorted(seen[epoch]) == rows for epoch in range(30))
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 61))


@pytest.mark.parametrize(
    ("head", "conf", "words"),
    [
        ("10.83.0.9", "read_timeout=5", "(10.83.0.9, 29400)"),  # no such host
        ("10.83.0.2", "read_timeout=5", "(10.83.0.2, 29400)"),  # nobody listens there
        ("10.83.0.1", "join_timeout=5", "Rendezvous"),  # it is this host, but the other two never come
    ],
)
def test_a_rendezvous_that_never_comes_ends_with_an_error(hosts, script, data, tmp_path, head, conf, words):
    log = tmp_path / "log"
    began = time.monotonic()
    process = hosts[0].torchrun(
        head, script, arguments(tmp_path, data, "run"), log, conf=conf, PATIENCE=5, NOTES=tmp_path / "notes"
    )  # fmt: skip
    try:
        code = process.wait(timeout=100)
    except subprocess.TimeoutExpired:
        raise AssertionError(log.read_text()) from None
    assert code != 0 and time.monotonic() - began < 60
    assert words in log.read_text(), log.read_text()
    assert not (tmp_path / "run").exists()
