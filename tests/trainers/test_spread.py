import os

import pytest
import torch

from genkd.tests.support import processes
from genkd.tests.support.processes import TORCHRUN
from genkd.trainers import metrics, spread
from genkd.trainers.distributed import Ranks
from genkd.trainers.spread import Row, StepTimes

# Rank 1 waits for its data in step 6, rank 0 has a slow forward pass in step 9; each is the last of its epoch. In step
# 3 DDP agrees on its buckets for good, in the forward pass.
SLOWED = """
import os
import time
from genkd.cli import main
from genkd.pipelines.loader import Loader
from genkd.trainers.phases.teacher import Teacher

rank, fetch, stages, calls = int(os.environ["RANK"]), Loader._next, Teacher.stages, []

def slow_fetch(loader):
    if rank == 1 and (loader.epoch, loader.batch) == (1, 2):
        time.sleep(SECONDS)
    return fetch(loader)

def slow_stages(phase, batch, turn):
    calls.append(turn)
    if rank == 0 and len(calls) == 9:
        time.sleep(SECONDS)
    return stages(phase, batch, turn)

Loader._next, Teacher.stages = slow_fetch, slow_stages
main()
"""


def test_the_rank_that_others_wait_for_is_named(tiny, data, tmp_path):
    """Both ranks' steps take as long as the slow one's; only its own time tells which one that is."""
    seconds = 1.2
    script = tmp_path / "slowed.py"
    script.write_text(SLOWED.replace("SECONDS", str(seconds)))
    run = tmp_path / "run"
    done = processes.run(
        *TORCHRUN, 2, script, "train", "teacher", "--config", tiny.path, "--out", run, f"data.dataset={data.path}",
        "eval_every=0", "epochs=3", f"prometheus={tmp_path / 'x.prom'}", check=True,
    )  # fmt: skip
    lines = metrics.read(run)
    first, second = lines[5], lines[8]
    for line, rank in ((first, 1), (second, 0)):
        assert line["step_s_min"] > seconds and line["own_s_max"] > seconds
        assert line["own_s_min"] < seconds / 2
        slow = line["straggler"]
        assert slow["rank"] == rank and slow["own_s"] == line["own_s_max"] and slow["others_s"] == line["own_s_min"]
        assert slow["host"] == os.uname().nodename
    assert first["wait_s_max"] > seconds > 2 * first["wait_s_min"] and second["wait_s_max"] < seconds / 2
    told = [text for text in done.stdout.splitlines() if "ranks " in text]
    assert f"straggler: rank 1 on {os.uname().nodename}" in told[5] and "straggler: rank 0 on" in told[8]


def rows(*own, step=1.0):
    return [Row(rank, f"node{rank}", step, seconds, 0.0, None, None) for rank, seconds in enumerate(own)]


def test_a_summary_is_of_all_ranks():
    values = spread.summary(
        [
            Row(0, "a", 1.0, 0.2, 0.0, None, None),
            Row(1, "b", 3.0, 0.3, 0.1, None, None),
            Row(2, "c", 1.5, 0.9, 0.8, 1, 2),
        ]
    )
    assert values == {
        "step_s_min": 1.0, "step_s_median": 1.5, "step_s_max": 3.0, "own_s_min": 0.2, "own_s_median": 0.3,
        "own_s_max": 0.9, "wait_s_min": 0.0, "wait_s_median": 0.1, "wait_s_max": 0.8,
        "straggler": {"rank": 2, "host": "c", "own_s": 0.9, "others_s": 0.25},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "rank"),
    [
        ((0.2, 0.2, 0.2, 0.2), None),
        ((0.2, 0.29), None),  # 1.45 times the other's
        ((0.2, 0.31), 1),
        ((0.31, 0.2), 0),
        ((0.2, 0.2, 0.2, 0.35), 3),
        ((0.3, 0.3, 0.2, 0.2), None),  # two slow ones: neither is far from the median of the others
        ((0.01, 0.05), None),  # five times as much, but a twenty-fifth of a step
        ((0.01, 0.07), 1),
    ],
)
def test_a_straggler_exceeds_the_others_and_costs_them_time(own, rank):
    assert spread.summary(rows(*own)).get("straggler", {}).get("rank") == rank


def test_a_rank_alone_is_not_compared():
    assert spread.text({"clips_per_s": 1.0}) == ""


@pytest.mark.gpu
def test_a_gpus_times_are_the_devices():
    """Of each step's cycles a quarter is outside of what the ranks share; the host only launches them."""
    times = StepTimes(Ranks(0, 1, torch.device("cuda", 0)), active=True)
    for _ in range(3):
        times.ask()
        times.arrived()
        torch.cuda._sleep(20_000_000)
        with times.shared():
            torch.cuda._sleep(60_000_000)
        times.done()
    assert times.gather() == {}
    (row,) = times.rows
    assert row.own == pytest.approx(row.step / 4, rel=0.1) and row.wait < row.own / 10
    assert row.allocated is not None and row.reserved is not None
