"""What a run reports: metrics.jsonl, TensorBoard and a console line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import write_atomically
from . import spread
from .distributed import Ranks
from .losses import Terms


class Meter:
    """Sums of loss terms since the last log step, kept on the device so that no step waits for it."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._stages: dict[str, _Sums] = {}

    def update(self, stage: str, terms: Terms, count: int, step: int) -> None:
        """Adds the terms (means over `count` clips) of one stage of a step, counted from 0."""
        values = torch.stack([value.detach().float() for value in terms.values()])
        if not count:  # a rank without a clip of its own adds nothing, not even a NaN of its stand-in
            values = torch.zeros_like(values)
        if stage not in self._stages:
            self._stages[stage] = _Sums(tuple(terms), torch.zeros_like(values), torch.full_like(values, math.inf), 0)
        sums = self._stages[stage]
        at = torch.where(values.isfinite(), math.inf, float(step))
        total, bad = sums.total + values * count, torch.minimum(sums.bad_since, at)
        self._stages[stage] = _Sums(sums.names, total, bad, sums.clips + count)

    def take(self) -> dict[str, float]:
        """The means over all ranks since the last call; the one place that waits for the device. Raises Diverged."""
        stages = sorted(self._stages)
        if not stages:
            return {}
        own = [torch.cat([self._stages[s].total, self._stages[s].total.new_tensor([self._stages[s].clips])])
               for s in stages]  # fmt: skip
        sums = iter(self._ranks.sum(torch.cat(own)).tolist())
        means: dict[str, float] = {}
        for stage in stages:
            totals = [next(sums) for _ in self._stages[stage].names]
            clips = next(sums)
            means |= {f"{stage}/{name}": total / clips for name, total in zip(self._stages[stage].names, totals,
                                                                              strict=True)}  # fmt: skip
        if not all(math.isfinite(mean) for mean in means.values()):
            self.refuse_divergence()
        self._stages = {}
        return {name: means[name] for name in sorted(means)}

    def refuse_divergence(self) -> None:
        """Raises Diverged, on every rank, if any of them met a term that is not finite. Waits for the device."""
        own = [
            (step, order, f"{stage}/{name}")
            for order, (stage, sums) in enumerate(self._stages.items())
            for name, step in zip(sums.names, sums.bad_since.tolist(), strict=True)
            if math.isfinite(step)
        ]
        found = [entry for entries in self._ranks.gather(own) for entry in entries]
        if found:
            # What a later stage of the step met may come from the one before.
            first = min((step, order) for step, order, _ in found)
            names = {name for step, order, name in found if (step, order) == first}
            # A total is not finite because one of its terms is not.
            terms = {name for name in names if not name.endswith("/total")} or names
            raise Diverged(int(first[0]), sorted(terms))

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums, so that a resumed run logs the same means."""
        return {
            stage: {"names": list(sums.names), "total": sums.total.cpu(), "bad": sums.bad_since.cpu(),
                    "clips": sums.clips}
            for stage, sums in self._stages.items()
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._ranks.device
        self._stages = {
            stage: _Sums(tuple(entry["names"]), entry["total"].to(device), entry["bad"].to(device), entry["clips"])
            for stage, entry in state.items()
        }


class _Sums(NamedTuple):
    """Of one stage: sums (terms,), for each term the first step that it was not finite in (inf for never), clips."""

    names: tuple[str, ...]
    total: Tensor
    bad_since: Tensor
    clips: int


class Diverged(Exception):
    """The terms that were not finite in a step, counted from 0, which is the first such one."""

    def __init__(self, step: int, terms: list[str]):
        super().__init__(f"step {step + 1}: {', '.join(terms)} not finite")
        self.step, self.terms = step, terms


class MetricsLog:
    """metrics.jsonl and TensorBoard of a run, and further sinks of the same lines; only the main rank writes."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool, evaluates_again: bool = False):
        self._path = run / "metrics.jsonl"
        self._drop_after(step, evaluates_again)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.sinks: Sequence[Any] = ()
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line {kind, step, ...values}; numbers also go to TensorBoard."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for sink in self.sinks:
            sink.write(kind, step, values)
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _drop_after(self, step: int, evaluates_again: bool) -> None:
        """Lines after the checkpoint that a run resumes from will be written again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the half line of a killed run
                continue
            again = evaluates_again and entry["kind"] == "eval" and entry["step"] == step
            if entry["step"] <= step and not again:
                kept.append(line + "\n")
        write_atomically(self._path, "".join(kept).encode())


def read(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Clock:
    """Speed since the last reading, and what is left."""

    def __init__(self, step: int, total_steps: int):
        self._total, self._step, self._time = total_steps, step, time.perf_counter()
        self._first_step, self._first_time = step, self._time

    def read(self, step: int, clips: int, wait_s: float) -> dict[str, float]:
        """clips/s, share of the time spent waiting for data, seconds left."""
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        self._step, self._time = step, now
        pace = (now - self._first_time) / max(1, step - self._first_step)
        return {"clips_per_s": clips / elapsed, "data_wait": wait_s / elapsed, "eta_s": pace * (self._total - step)}


def console_line(epoch: int, epochs: int, step: int, total: int, values: dict[str, float]) -> str:
    """epoch, step, losses, rate, clips/s, data-wait share, time left and how the ranks differ, in one line."""
    losses = " ".join(
        f"{name.removeprefix('recognizer/').replace('total', 'loss')} {value:.4g}"
        for name, value in sorted(
            values.items(), key=lambda item: (not item[0].startswith("recog"), not item[0].endswith("total"))
        )
        if "/" in name
    )
    minutes, seconds = divmod(int(values["eta_s"]), 60)
    return (
        f"epoch {epoch}/{epochs}  step {step}/{total}  {losses}  lr {values['lr']:.3g}  "
        f"{values['clips_per_s']:.1f} clips/s  wait {100 * values['data_wait']:.0f} %  ETA {minutes}:{seconds:02d}"
    ) + spread.text(values)
