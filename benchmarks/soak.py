"""A long run that is disturbed again and again, beside the same run left alone.

    python -m genkd.benchmarks.soak OUT [--minutes 120] [--at-once] [--every 120] [--ranks 2] [--seed 0]

Trains a small recognizer on synthetic videos with torchrun, undisturbed and with a fault every `--every`
seconds, each kind in turn, and compares: every video exactly once an epoch, the same weights, no growth of memory,
threads, open files or temporary files. OUT/soak.json says what happened; the exit code is 1 where anything differs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..files import write_json
from ..preprocessing import sources
from ..preprocessing.convert import convert
from ..preprocessing.shards import Dataset
from ..preprocessing.synthetic import SynthSettings, synthesize
from ..preprocessing.video import VideoSettings
from .common import machine, versions
from .soak_findings import Sample, compare_weights, count_samples, growth, growth_from_start_to_start, look_at, read

CONFIG = """
batch_size: 8
log_every: 5
checkpoint_every: 10
keep_checkpoints: 3
eval_every: 0
tensorboard: false
precision: fp32
data: {clip_length: 16, size: 32, scales: [1.0, 0.875]}
model: {width: 0.25, bn_momentum: 0.1}
optimizer: {name: adamw, lr: 0.001}
"""
BATCH = 8  # as in CONFIG
TIMEOUT = 20.0  # ranks.timeout_s
LOOK = 2.0  # seconds from one look at the processes to the next
SPAN = click.FloatRange(0, min_open=True)
RECENT = 1 << 16  # bytes of a record that surely hold its newest step


class Run:
    """One training in a folder, started again as often as it takes."""

    def __init__(self, root: Path, name: str, data: Path, epochs: int, ranks: int):
        self.folder, self.data, self.epochs, self.ranks = root / name, data, epochs, ranks
        self.last = epochs * -(-len(Dataset.open(data).rows("train")) // BATCH)  # its last step
        self.record, self.log = root / f"{name}.jsonl", root / f"{name}.log"
        self.config = root / "config.yaml"
        self.config.write_text(CONFIG, encoding="utf-8")
        self.process: subprocess.Popen | None = None
        self.samples: dict[int, list[Sample]] = {}
        self.starts = 0

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def ending(self) -> bool:
        """Whether a fault might come too late for it."""
        return self.steps + 1 >= self.last - 10

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*.pt"))

    @property
    def steps(self) -> int:
        """The step that was written down last."""
        return max((line[1] for line in read(self.record, self.written - RECENT)), default=-1)

    @property
    def attempt(self) -> float:
        """The newest start that took a step."""
        return max((line[0] for line in read(self.record, self.written - RECENT)), default=0.0)

    @property
    def written(self) -> int:
        """Bytes of its record so far."""
        return self.record.stat().st_size if self.record.exists() else 0

    def start(self) -> None:
        self.starts += 1
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks),
            "--max-restarts", "1000", "-m", "genkd.benchmarks.soak_rank", str(self.record), "train", "representation",
            "--config", str(self.config), "--out", str(self.folder), f"data.dataset={self.data}",
            f"epochs={self.epochs}", f"ranks.timeout_s={TIMEOUT}",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GENKD_SOAK_ATTEMPT": str(self.starts)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def rank_processes(self) -> list[int]:
        """Process numbers of the ranks that run."""
        assert self.process is not None
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                fields = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
                line = Path("/proc", name, "cmdline").read_bytes()
                if int(fields[1]) == self.process.pid and b"soak_rank" in line:
                    found.append(int(name))
        return sorted(found)

    def look(self) -> None:
        """Takes a sample of every rank."""
        for number in self.rank_processes():
            if (sample := look_at(number)) is not None:
                self.samples.setdefault(number, []).append(sample)

    def stop(self) -> None:
        """Ends whatever still runs of it, at once."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGSTOP)  # or torchrun might start ranks anew in between
        for number in [*self.rank_processes(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.wait()

    def says(self, words: bytes, before: int, limit: float = 120.0) -> bool:
        """Waits until the log says so behind its first `before` bytes; whether it does within `limit` seconds."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if words in self.log.read_bytes()[before:]:
                return True
            time.sleep(0.5)
        return False


def kill_a_rank(run: Run, chance: random.Random) -> bool | None:
    """One rank by SIGKILL; torchrun starts all again. Like all faults it returns whether what should be said was said,
    or nothing where nothing should be."""
    os.kill(chance.choice(run.rank_processes()), signal.SIGKILL)
    return None


def preempt(run: Run, chance: random.Random) -> bool | None:
    """SIGTERM to every rank, as a scheduler gives it; they save and end."""
    before = run.log.stat().st_size
    for number in run.rank_processes():
        os.kill(number, signal.SIGTERM)
    return run.says(b"state saved", before)


def cut_power(run: Run, chance: random.Random) -> bool | None:
    """SIGKILL to torchrun and all ranks at once."""
    run.stop()
    return None


def damage(run: Run, chance: random.Random) -> bool | None:
    """The same, and a part of the newest checkpoint is overwritten."""
    run.stop()
    newest = run.checkpoints[-1]
    content = bytearray(newest.read_bytes())
    at = chance.randrange(len(content) // 2)
    content[at : at + 64] = bytes(255 - byte for byte in content[at : at + 64])
    newest.write_bytes(content)
    before = run.log.stat().st_size
    run.start()
    return run.says(b"is damaged", before)


def hang(run: Run, chance: random.Random) -> bool | None:
    """One rank stands still for longer than ranks.timeout_s; the others name it and all begin again."""
    number = chance.choice(run.rank_processes())
    os.kill(number, signal.SIGSTOP)
    named = run.says(b"nothing is heard of rank", run.log.stat().st_size, 4 * TIMEOUT)
    with suppress(ProcessLookupError):
        os.kill(number, signal.SIGCONT)
    return named


def hide_a_shard(run: Run, chance: random.Random) -> bool | None:
    """Power is cut, and a shard is away when the run is started again, which says so and ends."""
    run.stop()
    shard = chance.choice(sorted((run.data / "shards").glob("train-*.tar")))
    away = shard.with_suffix(".away")
    shard.rename(away)
    try:
        before = run.log.stat().st_size
        run.start()
        named = run.says(shard.name.encode(), before)
        run.stop()
    finally:
        away.rename(shard)
    return named


FAULTS: tuple[Callable[[Run, random.Random], bool | None], ...] = (
    kill_a_rank, preempt, cut_power, hang, damage, hide_a_shard,
)  # fmt: skip


def undisturbed(run: Run) -> float:
    """Seconds it takes."""
    began = time.monotonic()
    run.start()
    assert run.process is not None
    while run.process.poll() is None:
        time.sleep(LOOK)
        run.look()
    if not run.finished:
        raise UserError(f"the undisturbed run failed; see {run.log}")
    return time.monotonic() - began


def disturbed(run: Run, every: float, chance: random.Random, limit: float) -> list[dict[str, Any]]:
    """Faults in turn until the run has ended; of each its kind, and the steps and seconds that it cost."""
    told: list[dict[str, Any]] = []
    run.start()
    due, deadline = time.monotonic() + every, time.monotonic() + limit
    while not run.finished:
        if time.monotonic() > deadline:
            run.stop()
            raise UserError(f"the disturbed run did not end within {limit:.0f} s; see {run.log}")
        assert run.process is not None
        if run.process.poll() is not None and not run.finished:
            run.start()
        run.look()
        if time.monotonic() >= due and run.checkpoints and not run.ending and len(run.rank_processes()) == run.ranks:
            fault = FAULTS[len(told) % len(FAULTS)]
            before, began, written, attempt = run.steps, time.monotonic(), run.written, run.attempt
            said = fault(run, chance)
            click.echo(f"{time.strftime('%H:%M:%S')} {fault.__name__} at step {before + 1}", err=True)
            again = _first_step_after(run, attempt, written, deadline)
            told.append(
                {"fault": fault.__name__, "told": said is not False, "step": before,
                 "steps_repeated": max(0, before + 1 - again),
                 "seconds": round(time.monotonic() - began, 1)}
            )  # fmt: skip
            due = time.monotonic() + every
        time.sleep(LOOK)
    return told


def _first_step_after(run: Run, attempt: float, written: int, deadline: float) -> int:
    """The step with which training went on in a later attempt than this one, of which `written` bytes tell; the run is
    started again where it has ended."""
    while time.monotonic() < deadline and not run.finished:
        assert run.process is not None
        if run.process.poll() is not None and not run.finished:
            run.start()
        fresh = [line[1] for line in read(run.record, written) if line[0] > attempt]
        if fresh:
            return min(fresh)
        time.sleep(0.5)
    return run.steps


def soak(out: Path, *, minutes: float, every: float, ranks: int, seed: int, at_once: bool = False) -> dict[str, Any]:
    """Runs both, one after the other or `at_once`, and returns what OUT/soak.json says. Raises UserError for a folder
    that is not empty."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    synthesize(out / "videos", SynthSettings(videos_per_class=8, seconds=1.6, width=64, height=48), workers=2)
    convert(sources.ucf101(out / "videos"), out / "data", VideoSettings("vp9", short_side=48, gop=8), workers=2)
    rows = Dataset.open(out / "data").rows("train").tolist()
    trial = Run(out, "trial", out / "data", 2, ranks)
    undisturbed(trial)
    lines = sorted(os.stat(path).st_mtime for path in (trial.folder / "checkpoints").glob("step-*.pt"))
    begun = trial.record.stat().st_ctime if len(lines) < 2 else lines[0]
    an_epoch = max(0.5, lines[-1] - begun) if len(lines) > 1 else 5.0
    epochs = max(4, round(0.5 * 60 * minutes / an_epoch))  # shared or disturbed, they take twice as long
    click.echo(f"{epochs} epochs of {len(rows)} videos; one takes {an_epoch:.1f} s", err=True)
    alone, other = (Run(out, name, out / "data", epochs, ranks) for name in ("undisturbed", "disturbed"))
    with ThreadPoolExecutor(1) as beside:
        try:
            left_alone = beside.submit(undisturbed, alone)
            if not at_once:
                left_alone.result()
            began = time.monotonic()
            faults = disturbed(other, every, random.Random(seed), 60 * (20 * minutes + 30))
            assert other.process is not None
            other.process.wait(60)
            disturbed_s = round(time.monotonic() - began)
            seconds = left_alone.result()
        finally:  # here, as the executor waits for the run left alone
            for run in (alone, other):
                run.stop()
    leftovers = [str(path.relative_to(out)) for path in out.rglob("*.tmp*")]
    result: dict[str, Any] = {
        "benchmark": "soak", "machine": machine(), "versions": versions(),
        "about": {"ranks": ranks, "epochs": epochs, "videos": len(rows), "every_s": every, "seed": seed,
                  "at_once": at_once, "checkpoint_every": 10, "timeout_s": TIMEOUT},
        "undisturbed_s": round(seconds), "disturbed_s": disturbed_s, "faults": faults,
        "by_kind": {
            fault.__name__: {
                "injected": sum(entry["fault"] == fault.__name__ for entry in faults),
                "steps_repeated": sum(entry["steps_repeated"] for entry in faults if entry["fault"] == fault.__name__),
            }
            for fault in FAULTS
        },
        "samples": count_samples(other.record, epochs, rows),
        "samples_undisturbed": count_samples(alone.record, epochs, rows),
        "largest_difference_of_weights": compare_weights(alone.folder, other.folder),
        "growth": {
            "undisturbed": growth(alone.samples), "disturbed": growth(other.samples),
            "from_start_to_start": growth_from_start_to_start(other.samples),
        },
        "leftovers": leftovers,
    }  # fmt: skip
    grown = [value for values in result["growth"].values() for value in values.values()]
    result["passed"] = (
        not any((*result["samples"].values(), *result["samples_undisturbed"].values()))
        and all(entry["told"] for entry in faults)
        and result["largest_difference_of_weights"] == 0
        and not leftovers
        and all(value <= 1.1 for value in grown)
    )
    write_json(out / "soak.json", result)
    shutil.rmtree(out / "videos")
    return result


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--minutes", default=120.0, show_default=True, type=SPAN, help="About as long as the disturbed run takes."
)
@click.option("--at-once", is_flag=True, help="Run both at the same time, which shares the processor between them.")
@click.option("--every", default=120.0, show_default=True, type=SPAN, help="Seconds from one fault to the next.")
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
def main(out: Path, minutes: float, at_once: bool, every: float, ranks: int, seed: int) -> None:  # noqa: D103
    try:
        result = soak(out, minutes=minutes, every=every, ranks=ranks, seed=seed, at_once=at_once)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps({key: value for key, value in result.items() if key != "faults"}, indent=2))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
