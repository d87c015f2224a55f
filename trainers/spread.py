"""How the ranks' step times differ, and whose own work the others wait for."""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch

from .distributed import Ranks

# A rank is a straggler when its own time is so many times the median of the others', and that costs them so much of
# a step.
FACTOR, COST = 1.5, 0.05


class Row(NamedTuple):
    """Of one rank, seconds a step, means over the steps since the last log step; peak device memory so far in bytes.

    step: from the request for data to the end of the optimizer; wait: of that, until the data are there; own: of that,
    all but the backward passes. allocated and reserved are None without a GPU.
    """

    rank: int
    host: str
    step: float
    own: float
    wait: float
    allocated: int | None
    reserved: int | None


class StepTimes:
    """Each rank's own time a step, gathered at log steps.

    Under DDP every rank's step takes as long as the slowest one's, as the ranks add up their gradients while the
    backward passes run. So a rank's *own* time is what it spends outside of them: waiting for data, copying, forward
    passes, a teacher's, losses, optimizers. On a GPU the times are those of the device, by events on its stream: data
    that arrive while it is still busy cost nothing, and launching that is too slow for it does.

    What this does not see: the counts that detectors add up in their forward passes, where the others wait for a
    straggler too, so that its share looks smaller than it is; a rank that is slow in backward passes alone, a slow link
    between ranks (the steps of all grow, nobody's own time does), and evaluations, checkpoints and log lines, which
    come between steps.
    """

    def __init__(self, place: Ranks, active: bool):
        self._place, self._active = place, active
        self._spans: dict[str, list[tuple[Any, Any]]] = {"step": [], "wait": [], "shared": []}
        self._begun: Any = None
        self.rows: list[Row] = []

    def ask(self) -> None:
        """A batch is asked for: a step begins."""
        self._begun = self._now()

    def arrived(self) -> None:
        """The batch is there."""
        self._add("wait", self._begun)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Surrounds what the ranks do together: the backward passes."""
        begun = self._now()
        yield
        self._add("shared", begun)

    def done(self) -> None:
        """The step's optimizers are through."""
        self._add("step", self._begun)

    def _add(self, name: str, begun: Any) -> None:
        if self._active:
            self._spans[name].append((begun, self._now()))

    def gather(self) -> dict[str, Any]:
        """Collective: of the steps since the last call, {"step_s_min", "step_s_median", "step_s_max", the same of own_s
        and wait_s} over the ranks, and "straggler" where there is one; {} for a single rank. Sets rows."""
        if not self._active:
            return {}
        steps = max(1, len(self._spans["step"]))
        step, wait, shared = (self._seconds(name) / steps for name in ("step", "wait", "shared"))
        for spans in self._spans.values():
            spans.clear()
        memory: tuple[int | None, int | None] = (None, None)
        if self._place.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        own = Row(self._place.rank, socket.gethostname(), step, step - shared, wait, *memory)
        self.rows = self._place.gather(own)
        return summary(self.rows) if len(self.rows) > 1 else {}

    def _now(self) -> Any:
        if not self._active:
            return None
        if self._place.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, name: str) -> float:
        spans = self._spans[name]
        if not spans or self._place.device.type != "cuda":
            return sum(end - begin for begin, end in spans)
        spans[-1][1].synchronize()  # a log step has waited for the device already
        return cast(float, sum(begin.elapsed_time(end) for begin, end in spans)) / 1e3


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What a log line tells of the ranks: {"step_s_min": ..., "straggler": {"rank", "host", "own_s", "others_s"}}."""
    values: dict[str, Any] = {}
    for name in ("step", "own", "wait"):
        seconds = [getattr(row, name) for row in rows]
        values |= {f"{name}_s_min": min(seconds), f"{name}_s_median": statistics.median(seconds),
                   f"{name}_s_max": max(seconds)}  # fmt: skip
    slow = max(rows, key=lambda row: row.own)
    others = statistics.median(row.own for row in rows if row is not slow)
    if slow.own > FACTOR * others and slow.own - others > COST * slow.step:
        values["straggler"] = {"rank": slow.rank, "host": slow.host, "own_s": slow.own, "others_s": others}
    return values


def text(values: dict[str, Any]) -> str:
    """The ranks' part of a console line; "" where there is none."""
    if "step_s_min" not in values:
        return ""
    own, step = ("-".join(f"{values[f'{name}_s_{kind}']:.3f}" for kind in ("min", "median", "max"))
                 for name in ("own", "step"))  # fmt: skip
    told = f"  ranks {step} s/step, own {own} s"
    if slow := values.get("straggler"):
        told += (f"  straggler: rank {slow['rank']} on {slow['host']}, {slow['own_s']:.3f} s of its own a step, "
                 f"the others {slow['others_s']:.3f} s")  # fmt: skip
    return told
