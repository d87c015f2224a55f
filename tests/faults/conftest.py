"""Real runs under torchrun, with something that goes wrong in them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from genkd.preprocessing.shards import Dataset
from genkd.tests.support import processes
from genkd.tests.support.processes import TORCHRUN

# 10 training videos, 3 steps an epoch of batches of 4, 4 and 2. Nothing depends on how a batch is shared out.
CONFIG = """
epochs: 3
batch_size: 4
log_every: 1
checkpoint_every: 1
eval_every: 0
tensorboard: false
precision: fp32
data: {clip_length: 16, size: 32, scales: [1.0, 0.875]}
model: {width: 0.0625, freeze_bn: always, dropout: 0.0}
optimizer: {name: sgd, lr: 0.01}
phases: {distill: {model: {temporal: top_heavy}}}
"""

# Writes down what each step has seen, and does what a test wants to go wrong.
SCRIPT = """
import json, os, signal, sys, time
from genkd.cli import main
from genkd.trainers.step import Stepper

record, attempt = sys.argv.pop(1), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
take, finish = Stepper.take, Stepper._finish

def recorded(self, batch, draw, step, meter):
    rank = self.place.rank
    self.now = step
    before_step(rank, step, attempt)
    take(self, batch, draw, step, meter)
    with open(record, "a") as file:
        file.write(json.dumps([attempt, step, draw, rank, batch.ids[: batch.count].tolist()]) + "\\n")

def finished(self, module, own):
    in_step(self.place.rank, self.now, attempt)
    finish(self, module, own)

def before_step(rank, step, attempt): pass
def in_step(rank, step, attempt): pass
{fault}
Stepper.take, Stepper._finish = recorded, finished
main()
"""


class Runs:
    """Starts `genkd train` with ranks. fault: Python text that may define before_step and in_step."""

    def __init__(self, folder: Path, data: Dataset):
        self.folder, self.data = folder, data
        self.config = folder / "config.yaml"
        self.config.write_text(CONFIG)

    def start(self, name, *overrides, ranks=2, fault="", restarts=0, phase="representation", **options):
        script = self.folder / f"{name}.py"
        script.write_text(SCRIPT.replace("{fault}", fault))
        return processes.start(
            *TORCHRUN, ranks, "--max-restarts", restarts, script, self.folder / f"{name}.jsonl", "train", phase,
            "--config", self.config, "--out", self.folder / name, f"data.dataset={self.data.path}", *overrides,
            **options,
        )  # fmt: skip

    def run(self, name, *overrides, check=True, **options):
        """(exit code, what was said) of a finished run."""
        process = self.start(name, *overrides, **options)
        try:
            said, told = process.communicate(timeout=200)
        finally:
            process.kill()
        assert not check or process.returncode == 0, told
        return process.returncode, said + told

    def losses(self, name):
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").open())
        return [[line[key] for key in sorted(line) if key.endswith("total")] for line in lines]

    def assert_every_video_once(self, *names, epochs=3):
        """Of each step, what the last attempt saw; an epoch's steps hold each training video once."""
        last: dict[int, tuple[tuple[int, int], dict[int, tuple[int, list]]]] = {}
        for number, name in enumerate(names):
            for line in (self.folder / f"{name}.jsonl").read_text().splitlines():
                attempt, step, draw, rank, ids = json.loads(line)
                known = last.get(step)
                if known is None or known[0] < (number, attempt):
                    known = last[step] = ((number, attempt), {})
                known[1][rank] = (draw, ids)
        seen = Counter((draw, row) for _, ranks in last.values() for draw, ids in ranks.values() for row in ids)
        rows = self.data.rows("train").tolist()
        assert seen == Counter((draw, row) for draw in range(epochs) for row in rows)


@pytest.fixture
def runs(tmp_path, data):
    return Runs(tmp_path, data)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shard_sets):
    """Two ranks to whom nothing happens."""
    made = Runs(tmp_path_factory.mktemp("undisturbed"), shard_sets("vp9"))
    made.run("run")
    made.assert_every_video_once("run")
    return made
