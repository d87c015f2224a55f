"""Predicts training on 8 to 1024 GPUs from what one rank does here, and says how far off the same model is for two.

Measured on this machine, each in a process of its own: a rank's step by part, the bytes of gradients that DDP reduces,
processor time and bytes of a clip in the loader, and for the check all-reduces of two gloo ranks. The model and what it
assumes are in scaling_model.py. The check trains 1 rank and 2 ranks for real, each rank on a core of its own with one
thread, the global batch the same, and compares with the model under this machine's assumptions; nothing is fitted to
it. Ranks of which nothing is exchanged show which part of an error is the exchange's. All of it is told by the wall's
clock and in processor time, which a busy machine disturbs less; the rows say how busy others kept it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs.load import load
from ..errors import UserError
from ..files import prepare_file
from ..models.checkpoints import save_weights
from ..pipelines.streams import is_flow
from ..preprocessing import sources
from ..preprocessing.convert import convert
from ..preprocessing.shards import Dataset
from ..preprocessing.synthetic import SynthSettings, synthesize
from ..preprocessing.video import VideoSettings
from ..trainers import phases
from . import scaling_model as model
from .common import compare, machine, named, versions
from .process import run_measured
from .scaling_rank import CASES, CLOCKS, SIZES, count

log = logging.getLogger(__name__)

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
_LOADED = 8  # clips a batch of the predicted preset's loader, whose real batches may be of several GB
CLASSES = 101  # of the counted networks: UCF101's
_ONE, _TWO, _APART = "1 rank", "2 ranks", "2 ranks side by side, nothing exchanged"
_OTHERS = "others' share of the cores"
_STEP = "1 rank, half the batch, random clips"


def run(
    data: Path | None,
    repeats: int,
    *,
    preset: str | None = None,
    target: str | None = None,
    names: Sequence[str] = (),
    assume: Sequence[str] = (),
    plot: Path | None = None,
    batches: int | None = None,
) -> dict[str, Any]:
    """Measures and checks `preset` (default `small`), predicts `target` (default `ucf101-modern`).

    On a GPU, the target's step is measured on it; elsewhere it is assumed from the FLOPs. data: a shard data set for
    the loaders; None for synthetic videos. names: texts in the names of CASES, default: distilled, student alone; the
    first one is predicted. assume: "name=value" texts; plot: a PNG to write. batches: timed ones of each measurement.
    Raises UserError for unknown names or values, before anything is measured.
    """
    values = model.parse(assume)
    chosen = named(list(CASES), names, "case") if names else ["distilled", "student alone"]
    if plot is not None:
        prepare_file(plot)
    preset, target, batches = preset or "small", target or "ucf101-modern", batches or 6
    for name in (preset, target):
        if load(name, "representation").passes > 1:
            raise UserError(f"{name} has alternate=epoch, a stage at a time; the model is of alternate=step")
    with tempfile.TemporaryDirectory(prefix="genkd-bench-") as folder:
        bench = _Bench(Path(folder), data, preset, target, repeats, batches)
        base, gradients, measured = bench.target_assumptions(chosen[0])
        assumptions = model.assume(base, values)
        prediction = {
            "case": chosen[0],
            "preset": target,
            "assumptions": assumptions.table(),
            "rows": [asdict(model.predict(assumptions, gradients, gpus)) for gpus in GPUS],
            "rows_bf16": [
                asdict(model.predict(assumptions.but("bf16", gradient_bytes=2), gradients, gpus)) for gpus in GPUS
            ],
        }
        result: dict[str, Any] = {
            "benchmark": "scaling", "unit": "clips/s", "machine": machine(), "versions": versions(), "rows": [],
            "about": {
                "preset": preset, "target": target, "batches": batches, "data": str(data) if data else "synthetic",
                "skipped": {},
            },
            "measured": {"target": measured}, "prediction": prediction, "validation": [],
        }  # fmt: skip
        if len(os.sched_getaffinity(0)) < 2:
            result["about"]["skipped"]["two ranks beside the model"] = "this process may use one core only"
        else:
            bench.validate(chosen, result)
    if plot is not None:
        from .scaling_plot import draw  # only who asks for a plot needs matplotlib

        draw(prediction, plot)
    return result


class _Bench:
    """Runs the processes and turns what they find into assumptions."""

    def __init__(self, root: Path, data: Path | None, preset: str, target: str, repeats: int, batches: int):
        self.root, self.data, self.preset, self.target = root, data, preset, target
        self.repeats, self.batches = repeats, batches

    def target_assumptions(self, case: str) -> tuple[model.Assumptions, dict[str, list[float]], dict[str, Any]]:
        """Of the predicted preset: assumptions, gradients by module, and all that was found."""
        batch = min(_LOADED, load(self.target, "distill", ["method=none"]).batch_size)
        place = self._videos(self.target, batch)
        counted = count(self.target, case, [f"class {number}" for number in range(CLASSES)], self.root)
        loaded = self._loads(self.target, place, batch, pin=False)
        found: dict[str, Any] = {"counted": _in_mb(counted), "loader": loaded}
        shares, source, step_s = counted["shares"], "counted: of the FLOPs", 0.0
        # Resizing, colours and normalization are the GPU's, where there is one.
        how, cpu_s = "reading, and decoding by PyAV", loaded["decoding_cpu_s_per_clip"]
        if torch.cuda.is_available():
            clips = counted["clips"]
            job = self._job("step", self.target, place, case=case, clips=[clips], steps=20, pin=False, device="cuda")
            step = self._spawn(job)[0]
            own = step["by_clips"][str(clips)]
            found["step"] = _in_mb(step)
            shares, source, step_s = own["shares"], f"measured on {machine()['gpu']}", own["step_s"]["wall"]
            how, cpu_s = f"the loader, {loaded['decoder']}", loaded["cpu_s_per_clip"]
        videos = "synthetic" if self.data is None else self.data.name
        assumptions = (
            _counted(counted, shares, source)
            .but(source, step_s=step_s)
            .but("preset", clips_per_gpu=counted["clips"])
            .but("counted: student and teacher, forward and backward", gflop_per_clip=counted["gflop_per_clip"])
            .but(f"measured here: {how}, {videos} videos", cpu_s_per_clip=cpu_s)
            .but(f"measured here: {videos} videos", mb_per_clip=loaded["mb_per_clip"])
        )
        return assumptions, counted["gradients"], found

    def validate(self, cases: Sequence[str], result: dict[str, Any]) -> None:
        """Trains one and two ranks of each case and adds to the result what they reach and what the model says."""
        batch = load(self.preset, "distill", ["method=none"]).batch_size // 2 * 2
        if not batch:
            raise UserError(
                f"{self.preset} has batches of one clip, which two ranks cannot share; name another --preset"
            )
        place = self._videos(self.preset, batch)
        links = [self._spawn(self._job("all_reduce", self.preset, place), 2)[0] for _ in range(self.repeats)]
        seconds = {
            clock: {size: _median(link[str(size)][clock] for link in links) for size in SIZES} for clock in CLOCKS
        }
        loaded = self._loads(self.preset, place, batch, pin=True)
        result["measured"]["here"] = {"loader": loaded, "all_reduce_s": seconds, "batch": batch, "cases": {}}
        for case in cases:
            steps: list[dict[str, Any]] = []
            taken: dict[str, list[dict[str, float]]] = {_ONE: [], _TWO: [], _APART: []}
            contenders: dict[str, Callable[[], tuple[float, dict]]] = {
                _ONE: partial(self._trains, place, case, batch, 1, True, taken[_ONE]),
                _TWO: partial(self._trains, place, case, batch, 2, True, taken[_TWO]),
                _APART: partial(self._trains, place, case, batch, 2, False, taken[_APART]),
                _STEP: partial(self._steps, place, case, batch, steps),
            }
            rows = compare(case, "clips/s", contenders, self.repeats, {})["rows"]
            result["rows"] += [{**row, "workload": f"{case}, {self.preset}, batch {batch}"} for row in rows]
            for clock in CLOCKS:
                used = _here(steps, batch, clock, seconds[clock], loaded)
                measured = {name: _median(entry[clock] for entry in entries) for name, entries in taken.items()}
                compared = _compared(used, steps, batch, clock, measured)
                result["validation"].append({"case": case, "clock": clock, "assumptions": used.table(), **compared})
            result["measured"]["here"]["cases"][case] = _in_mb(steps[-1])

    def _trains(
        self, place: Path, case: str, batch: int, ranks: int, exchange: bool, taken: list[dict[str, float]]
    ) -> tuple[float, dict]:
        job = self._job("train", self.preset, place, case=case, batch=batch, exchange=exchange)
        found, others = self._spawn(job, ranks)
        taken.append(found["step_s"])
        seconds = {f"{clock} s a step": value for clock, value in found["step_s"].items()}
        return batch / found["step_s"]["wall"], {**seconds, _OTHERS: others}

    def _steps(self, place: Path, case: str, batch: int, steps: list[dict[str, Any]]) -> tuple[float, dict]:
        found, others = self._spawn(self._job("step", self.preset, place, case=case, clips=[batch // 2, batch]))
        steps.append(found)
        half = found["by_clips"][str(batch // 2)]
        return batch / 2 / half["step_s"]["wall"], {"shares": half["shares"], _OTHERS: others}

    def _loads(self, preset: str, place: Path, batch: int, *, pin: bool) -> dict[str, Any]:
        job = self._job("loader", preset, place, batch=batch, pin=pin, device="auto" if not pin else "cpu")
        found = [self._spawn(job)[0] for _ in range(self.repeats)]
        # The least, as what else runs can only add to processor time, by what it takes from the caches.
        return {
            "cpu_s_per_clip": min(one["cpu_s_per_clip"] for one in found),
            "decoding_cpu_s_per_clip": min(one["decoding_cpu_s_per_clip"] for one in found),
            "mb_per_clip": _median(one["mb_per_clip"] for one in found), "decoder": found[0]["decoder"],
        }  # fmt: skip

    def _job(self, mode: str, preset: str, place: Path, **more: Any) -> dict[str, Any]:
        return {
            "mode": mode, "preset": preset, "data": str(place), "teacher": str(self._folder(preset, "teacher")),
            "device": "cpu", "pin": True, "steps": self.batches, **more,
        }  # fmt: skip

    def _spawn(self, job: Mapping[str, Any], ranks: int = 1) -> tuple[dict[str, Any], float | None]:
        """What a job finds, and the share of the cores that other processes took meanwhile."""
        what = job["preset"], job.get("case", ""), job["mode"], f"with {ranks} ranks" if ranks > 1 else ""
        log.info("%s", " ".join(filter(None, what)))
        if "case" in job:
            self._teacher(job["preset"], Path(job["data"]))
        wanted, out = self.root / "job.json", self.root / "out.json"
        wanted.write_text(json.dumps(job), encoding="utf-8")
        out.unlink(missing_ok=True)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, "-m", "genkd.benchmarks.scaling_rank", str(wanted), str(out)]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if job.get("pin"):
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        before = _busy_s()
        usage = run_measured(command, environment, self.root / "log.txt")
        others = None if before is None else (_busy_s() or 0) - before - usage.cpu_seconds
        share = None if others is None else max(0.0, others / usage.seconds / (os.cpu_count() or 1))
        return json.loads(out.read_text(encoding="utf-8")), share

    def _teacher(self, preset: str, place: Path) -> None:
        folder = self._folder(preset, "teacher")
        if not folder.exists():
            teacher = phases.build(load(preset, "representation"), tuple(Dataset.open(place).classes))
            save_weights(folder, teacher.card, teacher.modules)

    def _folder(self, preset: str, what: str) -> Path:
        return self.root / f"{what}-of-{'target' if preset == self.target else 'preset'}"

    def _videos(self, preset: str, batch: int) -> Path:
        """A shard data set with a batch of a preset's clips or more: the user's, or synthetic videos, somewhat larger
        and longer."""
        config = load(preset, "distill", ["method=none"])
        if self.data is not None:
            dataset = Dataset.open(self.data)
            videos = len(dataset.rows(config.data.train_split))
            if is_flow(dataset):
                raise UserError(f"{self.data} holds flow; the scaling benchmark measures with RGB clips")
            if videos < batch:
                raise UserError(f"{self.data} has {videos} videos to train on, less than a batch of {batch}")
            return self.data
        out, videos_at = self._folder(preset, f"data-{batch}"), self._folder(preset, f"videos-{batch}")
        if not out.exists():
            side = (config.data.size * 8 // 7 + 15) // 16 * 16
            length = config.data.clip_length * config.data.stride / 25
            each = 4 + -(-batch // 10)  # of ten classes; all but one group of at most four to train on
            settings = SynthSettings(each, max(2.0, 1.25 * length), 25, side * 4 // 3 // 2 * 2, side, test_share=0.25)
            synthesize(videos_at, settings, workers=len(os.sched_getaffinity(0)))
            convert(sources.ucf101(videos_at), out, VideoSettings("h264", short_side=side), workers=2)
        return out


def _busy_s() -> float | None:
    """Seconds that all cores of the machine together have worked; None where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text(encoding="ascii").split()[1:]
        return sum(map(int, (user, nice, system, irq, softirq))) / os.sysconf("SC_CLK_TCK")
    return None


def _median(values: Any) -> float:
    return float(np.median(list(values)))


def _in_mb(found: dict[str, Any]) -> dict[str, Any]:
    """What a process found, with its gradients as sums and DDP's buckets."""
    gradients = {}
    for name, sizes in found["gradients"].items():
        buckets = [size / 1e6 for size in model.buckets(sizes, 2**20, 25 * 2**20)]
        gradients[name] = {"mb": sum(sizes) / 1e6, "buckets_mb": buckets}
    return {**found, "gradients": gradients}


def _counted(found: dict[str, Any], shares: Mapping[str, float], source: str) -> model.Assumptions:
    """Gradients and shares of the backward passes. Raises UserError for gradients that are not all fp32."""
    if found["types"] != ["float32"]:
        raise UserError(f"gradients of {', '.join(found['types'])}: the model knows of float32")
    backward = {f"{name}_backward_share": shares.get(f"{name}_backward", 0.0) for name in model.MODULES}
    sizes = {f"{name}_gradient_mb": sum(found["gradients"].get(name, [])) / 1e6 for name in model.MODULES}
    return model.Assumptions().but(source, **backward).but("counted from the parameters", **sizes)


def _here(
    steps: Sequence[dict[str, Any]], batch: int, clock: str, seconds: Mapping[int, float], loaded: Mapping[str, Any]
) -> model.Assumptions:
    """This machine's assumptions for two gloo ranks, stated before they ran: a rank's one core computes, reduces and
    loads, so nothing overlaps."""
    half = str(batch // 2)
    shares = {
        name: float(np.mean([step["by_clips"][half]["shares"].get(name, 0.0) for step in steps]))
        for name in (f"{module}_backward" for module in model.MODULES)
    }
    small, large = min(seconds), 25 * 2**20
    return (
        _counted(steps[0], shares, "measured here")
        .but("half the batch", clips_per_gpu=batch // 2)
        .but("measured here, one rank on one core", step_s=_step_s(steps, batch // 2, clock))
        .but(
            "measured here: gloo, an all-reduce of 25 MiB", nvlink_gb_s=large / (seconds[large] - seconds[small]) / 1e9
        )
        .but("measured here: gloo, an all-reduce of 4 bytes", nvlink_latency_us=seconds[small] / 2 * 1e6)
        .but("measured as it is", link_utilization=1)
        .but("measured here", cpu_s_per_clip=loaded["cpu_s_per_clip"], mb_per_clip=loaded["mb_per_clip"])
        .but("a rank's core does everything", overlap=0, loader_overlap=0)
        .but("of the check", gpus_per_host=2, cores_per_host=2)
    )


def _step_s(steps: Sequence[dict[str, Any]], clips: int, clock: str) -> float:
    return _median(step["by_clips"][str(clips)]["step_s"][clock] for step in steps)


def _compared(
    used: model.Assumptions, steps: Sequence[dict[str, Any]], batch: int, clock: str, measured: Mapping[str, float]
) -> dict[str, Any]:
    """Seconds of a step, predicted and measured, and how far off the prediction is."""
    alone = used.but("whole batch", clips_per_gpu=batch, step_s=_step_s(steps, batch, clock))
    gradients = steps[0]["gradients"]
    two = model.predict(used, gradients, 2)
    predicted = {_ONE: model.predict(alone, gradients, 1).step_s, _TWO: two.step_s, _APART: two.step_s - two.exposed_s}
    rows = []
    for name, seconds in predicted.items():
        error = 100 * (seconds / measured[name] - 1)
        rows.append({"name": name, "predicted_s": seconds, "measured_s": measured[name], "error_percent": error})
    speedup = {"predicted": predicted[_ONE] / predicted[_TWO], "measured": measured[_ONE] / measured[_TWO]}
    return {"rows": rows, "speedup": speedup, "predicted_exchange_s": two.exchange_s}
