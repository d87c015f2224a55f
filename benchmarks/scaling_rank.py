"""A process of the scaling benchmark: JOB.json in, OUT.json out. Under torchrun, one of its ranks.

mode "step": seconds of a step on random clips, and of its parts; "train": of steps fed by the loader; "loader":
processor time and bytes of a clip; "all_reduce": of two ranks, by size. Seconds are told by two clocks: CLOCKS[0], the
wall's, and CLOCKS[1], the processor time of all threads of the process. On a core of its own, where nothing overlaps,
both tell the same but for waiting; what else the machine does disturbs the second less.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..configs.load import load
from ..models.checkpoints import save_weights
from ..pipelines.loader import Batch, Loader
from ..preprocessing.shards import Dataset
from ..trainers import phases
from ..trainers.distributed import Ranks, ranks
from ..trainers.metrics import Meter
from ..trainers.phases import Noise, Phase, Stage, Turn
from ..trainers.step import Stepper
from .scaling_model import MODULES
from .train_contender import wait

# What can be measured: phase and overrides.
CASES: dict[str, tuple[str, list[str]]] = {
    "distilled": ("distill", []),
    "student alone": ("distill", ["method=none"]),
    "representation": ("representation", []),
    "teacher": ("teacher", []),
}
SIZES = (4, 2**20, 25 * 2**20, 200 * 2**20)  # bytes that are all-reduced
CLOCKS = ("wall", "processor")
WARM_UP = 2  # steps; DDP arranges its buckets anew after the first


class _Parts:
    """Seconds of a phase's parts: what its generator of stages does is forward, what happens to a stage is not."""

    def __init__(self, phase: Phase, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self.active, self._inside, self._device, self._stages = False, False, device, phase.stages
        phase.part = self.part
        phase.stages = self.stages  # type: ignore[method-assign]

    def part(self, name: str) -> contextlib.AbstractContextManager:
        if self._inside or not self.active:
            return contextlib.nullcontext()
        names = {"cvae": "cvae_backward", "student": "recognizer_backward"}
        return self._timed(names.get(name, name))

    def stages(self, batch: Batch, turn: Turn) -> Iterator[Stage]:
        found = self._stages(batch, turn)
        while True:
            self._inside = True
            with self._timed("forward") if self.active else contextlib.nullcontext():
                stage = next(found, None)
            self._inside = False
            if stage is None:
                return
            yield stage

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        wait(self._device)
        started = time.perf_counter()
        yield
        wait(self._device)
        self.seconds[name] += time.perf_counter() - started


class _Training:
    """A phase and its stepper, as the training loop has them."""

    def __init__(self, job: dict[str, Any], place: Ranks):
        phase, overrides = CASES[job["case"]]
        options = [f"teacher={job['teacher']}"] if phase == "distill" else []
        self.config = load(job["preset"], phase, [*options, *overrides])
        self.place, self.number = place, 0
        self.phase = phases.build(self.config, tuple(Dataset.open(job["data"]).classes))
        self.phase.place(place)
        self.stepper, self.meter = Stepper(self.config, self.phase, place, 1000), Meter(place)
        self.phase.train()

    def step(self, batch: Batch) -> None:
        self.stepper.take(batch, 0, self.number, self.meter)
        self.number += 1

    def random_batch(self, clips: int) -> Batch:
        data, device = self.config.data, self.place.device
        shape = (clips, 3, data.clip_length, data.size, data.size)
        values = torch.randn(shape, device=device).to(memory_format=torch.channels_last_3d)
        labels = torch.arange(clips, device=device) % len(self.phase.card.classes)
        return Batch(values, labels, torch.arange(clips), clips, clips)


def _step(job: dict[str, Any], place: Ranks) -> dict[str, Any]:
    """By clips a step: its seconds, and shares of it; and what DDP would exchange."""
    training = _Training(job, place)
    parts = _Parts(training.phase, place.device)
    found: dict[str, Any] = {"dtype": str(training.stepper.dtype).removeprefix("torch."), "by_clips": {}}
    for clips in job["clips"]:
        batch = training.random_batch(clips)
        for _ in range(WARM_UP):
            training.step(batch)
        parts.active = False
        seconds = _seconds(partial(training.step, batch), job["steps"], place.device)
        parts.seconds.clear()
        parts.active = True
        whole = _seconds(partial(training.step, batch), max(2, job["steps"] // 2), place.device)
        shares = {name: value / sum(wall for wall, _ in whole) for name, value in parts.seconds.items()}
        shares["rest"] = max(0.0, 1 - sum(shares.values()))
        found["by_clips"][clips] = {"step_s": _medians(seconds), "shares": shares}
        parts.active = False
    return {**found, **_exchanged(training.phase.modules)}


def _seconds(call: Callable[[], object], count: int, device: torch.device) -> list[tuple[float, float]]:
    """Of each call, by both clocks."""
    found = []
    for _ in range(count):
        wait(device)
        started, cpu = time.perf_counter(), time.process_time()
        call()
        wait(device)
        found.append((time.perf_counter() - started, time.process_time() - cpu))
    return found


def _medians(seconds: Sequence[tuple[float, float]]) -> dict[str, float]:
    return dict(zip(CLOCKS, np.median(seconds, axis=0).tolist(), strict=True))


def _exchanged(modules: dict[str, nn.Module]) -> dict[str, Any]:
    """gradients: of each module the bytes of its parameters' gradients, last layer first, as a backward pass gives
    them; types: in which they are reduced."""
    trained = {name: [p for p in module.parameters() if p.requires_grad] for name, module in modules.items()}
    return {
        "gradients": {
            name: [p.numel() * p.element_size() for p in reversed(trained[name])] for name in MODULES if name in trained
        },
        "types": sorted({str(p.dtype).removeprefix("torch.") for own in trained.values() for p in own}),
    }


def _train(job: dict[str, Any], place: Ranks) -> dict[str, Any]:
    """Seconds of a step; processor time of the rank that takes the most. Without exchange, ranks train side by side
    and wait for each other at the ends."""
    training = _Training(job, place if job["exchange"] else Ranks(0, 1, place.device))
    with _loader(job, place) as loader:
        batches = _endless(loader)
        for _ in range(WARM_UP):
            training.step(next(batches))
        _together(place)
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(job["steps"]):
            training.step(next(batches))
        _together(place)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - started
        spent = [wall, max(place.gather(cpu))]
        return {"step_s": {clock: value / job["steps"] for clock, value in zip(CLOCKS, spent, strict=True)}}


def _load(job: dict[str, Any], place: Ranks) -> dict[str, Any]:
    """Processor time of the whole process and bytes read, a clip, while batches go by; and the processor time of what
    stays on the cores where there is a GPU: reading, decoding and converting by PyAV, at the size of the clip."""
    with _loader(job, place) as loader:
        batches = _endless(loader)
        for _ in range(WARM_UP + 1):
            next(batches)
        before, cpu = loader.stats(), time.process_time()
        clips = sum(next(batches).total for _ in range(job["steps"]))
        cpu, after = time.process_time() - cpu, loader.stats()
        # Bytes are counted when they are read, ahead of the clips that are handed out; so are the frames that are used.
        read, used = (after[name] - before[name] for name in ("read_mb", "used_frames"))
        mb, decoder = read / used * loader.config.clip_length, loader.decoder
    with _loader(job, place) as idle:  # another one, whose threads do not decode ahead meanwhile
        decoding = _decoding_s(idle, clips)
    return {"cpu_s_per_clip": cpu / clips, "decoding_cpu_s_per_clip": decoding, "mb_per_clip": mb, "decoder": decoder}


def _decoding_s(loader: Loader, clips: int) -> float:
    stream, seconds = loader.streams[0], []
    for number in range(clips + WARM_UP):
        cpu = time.process_time()
        sample = loader.sample(0, number % loader.count)
        media = stream.prepare(sample, stream.read(sample), encoded=False)
        seconds.append(time.process_time() - cpu)
        stream.release([media], encoded=False)
    return float(np.mean(seconds[WARM_UP:]))


def _loader(job: dict[str, Any], place: Ranks) -> Loader:
    """Whole batches only, so that every step is the same work."""
    config = load(job["preset"], "teacher")
    dataset = Dataset.open(job["data"])
    rows = dataset.rows(config.data.train_split)
    rows = rows[: len(rows) // job["batch"] * job["batch"]]
    return Loader(
        dataset, config.data.train_split, config.data, batch_size=job["batch"], training=True, rank=place.rank,
        world_size=place.world_size, device=place.device, rows=rows,
    )  # fmt: skip


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _together(place: Ranks) -> None:
    wait(place.device)
    if place.world_size > 1:
        dist.barrier()


def _all_reduce(job: dict[str, Any], place: Ranks) -> dict[str, Any]:
    """Median seconds by bytes, by both clocks."""
    found: dict[Any, Any] = {}
    for size in SIZES:
        values = torch.ones(size // 4)
        dist.barrier()
        call = partial(dist.all_reduce, values)
        found[size] = _medians(_seconds(call, 200 if size < 2**16 else 10, place.device))
    return found


def count(preset: str, case: str, classes: Sequence[str], folder: Path) -> dict[str, Any]:
    """GFLOP of a clip, in all and of the backward passes (a multiply-add is 2), and what DDP would exchange. Tensors
    have shapes only; folder: for the weights of a teacher, which has fresh ones."""
    phase, overrides = CASES[case]
    options = []
    if phase == "distill" and "method=none" not in overrides:
        teacher = phases.build(load(preset, "representation"), tuple(classes))
        save_weights(folder / "counted-teacher", teacher.card, teacher.modules)
        options.append(f"teacher={folder / 'counted-teacher'}")
    config = load(preset, phase, [*options, *overrides])
    built = phases.build(config, tuple(classes))
    device = torch.device("meta")
    built.place(Ranks(0, 1, device))
    built.train()
    data, number = config.data, 2
    clips = torch.empty((number, 3, data.clip_length, data.size, data.size), device=device)
    labels = torch.zeros(number, dtype=torch.long, device=device)
    batch = Batch(clips, labels, torch.arange(number), number, number)
    channels, steps, _, _ = built.card.feature_shape
    noise = torch.empty((number, steps, channels), device=device)
    stages = built.stages(batch, Turn(1, 0, Noise(noise, noise, noise), None))
    total, backward = 0.0, dict.fromkeys(MODULES, 0.0)
    while True:
        with FlopCounterMode(display=False) as forward_flops:
            stage = next(stages, None)
        total += forward_flops.get_total_flops()
        if stage is None:
            break
        with FlopCounterMode(display=False) as backward_flops:
            stage.terms["total"].backward()
        backward[stage.module] += backward_flops.get_total_flops()
    total += sum(backward.values())
    shares = {f"{name}_backward": flops / total for name, flops in backward.items()}
    return {
        "gflop_per_clip": total / number / 1e9, "shares": shares, "clips": config.batch_size,
        **_exchanged(built.modules),
    }  # fmt: skip


def main(job: dict[str, Any]) -> dict[str, Any] | None:
    """What a job finds, on its main rank."""
    if job["pin"]:
        # Before there are threads, which inherit it: gloo's, the loader's.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0"))]})
    work = {"step": _step, "train": _train, "loader": _load, "all_reduce": _all_reduce}[job["mode"]]
    with ranks(job["device"]) as place:
        if job["pin"]:
            torch.set_num_threads(1)
        found = work(job, place)
        return found if place.is_main else None


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if result is not None:
        Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
