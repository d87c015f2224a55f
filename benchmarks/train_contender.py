"""One contender of the training benchmark, as a process: JOB.json in, OUT.json out.

clips_per_s: timed over whole batches after one that warms up, waiting for data included. Then, measured apart, as it
costs time itself: shares (of data, teacher, student, cvae, losses, optimizer, and the rest), each part waited for;
gflops_a_clip: convolutions and matrix products of one epoch's work on a clip (a multiply-add is 2), if not compiled;
utilization: these FLOPs a second as a share of what a large matrix product reaches on this device in the same type
(above 1 where a convolution is faster than that product, as on a noisy machine or by Winograd's way); peak_gb: of the
GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configs.load import load
from ..models import checkpoints
from ..models.cvae import ConditionalVAE
from ..pipelines.loader import Batch, Loader
from ..pipelines.streams import is_flow
from ..preprocessing.shards import Dataset
from ..trainers import phases
from ..trainers.distributed import Ranks, choose_device
from ..trainers.metrics import Meter
from ..trainers.step import Stepper
from .train import ON_GPU, OURS, REFERENCE
from .train_reference import ReferenceSchedule


class _Parts:
    """Seconds of each part, the device waited for at both ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.active = False

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.active:
            yield
            return
        wait(self.device)
        started = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[name] += time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class _Contender:
    """epochs(batches): one call of the returned function does all of an epoch's work on the batches of some passes."""

    def __init__(self, job: dict[str, Any], device: torch.device):
        self.parts, self.device, self.step = _Parts(device), device, 0
        self.dataset = Dataset.open(job["data"])
        place, classes = Ranks(0, 1, device), tuple(self.dataset.classes)
        options = [f"data.dataset={job['data']}"]
        is_reference = job["name"] == REFERENCE
        phase, overrides = ("distill", []) if is_reference else {**OURS, **ON_GPU}[job["name"]]
        if phase == "distill":
            options.append(f"teacher={job['teacher']}")
        self.config = load(job["preset"], phase, [*options, *overrides])
        self.phase = phases.build(self.config, classes, "flow" if is_flow(self.dataset) else "rgb")
        self.dtype = torch.float32
        self.work: Callable[[Iterable[Batch], int], None]
        if is_reference:
            self.passes = 2
            teacher, cvae = checkpoints.load_recognizer(job["teacher"])[0], checkpoints.load_cvae(job["teacher"])
            assert isinstance(cvae, ConditionalVAE)
            schedule = ReferenceSchedule(self.phase.network, self.phase.cvae, teacher, cvae, device, self.parts)
            self.work = lambda batches, number: (
                schedule.network_pass(batches, 1) if number else schedule.vae_pass(batches)
            )
        else:
            self.passes = self.config.passes
            self.phase.place(place)
            self.phase.part = self.parts
            self.stepper, self.meter = Stepper(self.config, self.phase, place, job["batches"] + 1), Meter(place)
            self.dtype = self.stepper.dtype
            if self.config.data.fixed_views and self.phase.teacher is not None:
                rows = self.dataset.rows(self.config.data.train_split)
                self.phase.teacher.remember(Path(job["cache"]), self.dataset.info["index_digest"], rows, self.dtype)
            self.phase.train()
            self.work = self._steps

    def _steps(self, batches: Iterable[Batch], number: int) -> None:
        for batch in batches:
            self.stepper.take(batch, number, self.step, self.meter)
            self.step += 1

    def loader(self) -> Loader:
        return Loader(
            self.dataset, self.config.data.train_split, self.config.data, batch_size=self.config.batch_size,
            training=True, device=self.device,
        )  # fmt: skip


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The columns of a contender; see above."""
    device = choose_device("auto")
    contender = _Contender(job, device)
    count = job["batches"]
    with contender.loader() as loader:
        first = next(iter(loader))
        if contender.config.data.fixed_views:  # what is timed finds its clips in the cache
            loader.load_state_dict({"epoch": 0, "batch": 0})
            contender.work(itertools.islice(loader, count), 0)
        for number in range(contender.passes):
            contender.work([first], number)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = _timed(contender, loader, count)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        contender.parts.active = True
        whole = _timed(contender, loader, max(2, count // 2))
        contender.parts.active = False
        shares = {name: value / whole for name, value in sorted(contender.parts.seconds.items())}
        flops = _flops(contender, first)
    rate = count * contender.config.batch_size / seconds
    return {
        "clips_per_s": rate,
        "shares": {**shares, "rest": max(0.0, 1 - sum(shares.values()))},
        "gflops_a_clip": flops and flops / 1e9,
        "utilization": flops and flops * rate / _matmul_rate(device, contender.dtype),
        "precision": str(contender.dtype).removeprefix("torch."),
        "peak_gb": peak,
    }


def _flops(contender: _Contender, batch: Batch) -> float | None:
    """Of an epoch's work on a clip; none of what is compiled, which the counter does not see."""
    if contender.config.compile != "off":
        return None
    with FlopCounterMode(display=False) as counter:
        for number in range(contender.passes):
            contender.work([batch], number)
    return counter.get_total_flops() / batch.count


def _timed(contender: _Contender, loader: Loader, count: int) -> float:
    """Seconds for an epoch's work on `count` batches, from asking for the first one."""
    started = time.perf_counter()
    for number in range(contender.passes):
        # Each pass begins a run of the loader, as each epoch of a training does; it is not timed.
        pause = time.perf_counter()
        loader.load_state_dict({"epoch": 1 if not contender.config.data.fixed_views else 0, "batch": 0})
        batches = iter(loader)
        first = next(batches)
        started += time.perf_counter() - pause
        contender.work([first], number)
        contender.work(_first(batches, count - 1, contender.parts), number)
    wait(contender.device)
    return time.perf_counter() - started


def _first(batches: Iterator[Batch], count: int, part: _Parts) -> Iterator[Batch]:
    for _ in range(count):
        with part("data"):
            batch = next(batches)
        yield batch


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


if __name__ == "__main__":
    result = measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
