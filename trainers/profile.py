"""PyTorch's profiler over a few steps of a run."""

from __future__ import annotations

import contextlib
import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler_util import EventList

from ..errors import explained
from ..files import replacing, write_atomically
from .distributed import Ranks
from .phases import Phase

_OPS = 10


class Profile:
    """Writes RUN/profile/rankN-stepsA-B.json.gz, a Chrome trace with memory, and .txt, the most expensive ops.

    steps: first and behind the last, counted from 0 over the whole run; None: nothing is done. A run that is continued
    among them profiles the rest, and one that ends among them what there was. In the trace, the phase's parts and the
    time that data are waited for are named.
    """

    def __init__(self, steps: tuple[int, int] | None, run: Path, place: Ranks, phase: Phase):
        self._steps, self._folder, self._place, self._phase = steps, run / "profile", place, phase
        self._profiler: torch.profiler.profile | None = None
        self._first = self._next = 0
        self._part: Callable[[str], contextlib.AbstractContextManager] = phase.part

    def before(self, step: int) -> None:
        """A step begins, with its request for data."""
        if self._steps is None or self._profiler is not None or not self._steps[0] <= step < self._steps[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._place.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=False, profile_memory=True)
        self._first = self._next = step
        self._part, self._phase.part = self._phase.part, torch.profiler.record_function
        self._profiler.start()

    def part(self, name: str) -> contextlib.AbstractContextManager:
        """Names what the block does in the trace."""
        return contextlib.nullcontext() if self._profiler is None else torch.profiler.record_function(name)

    def after(self, steps: int) -> None:
        """So many steps of the run are done."""
        self._next = steps
        if self._profiler is not None and self._steps is not None and steps >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded, if anything. Raises UserError where it cannot be written."""
        profiler, self._profiler, self._steps = self._profiler, None, None
        if profiler is None:
            return
        self._phase.part = self._part
        profiler.stop()
        name = f"rank{self._place.rank}-steps{self._first}-{self._next}"
        with explained(f"writing {self._folder}"), tempfile.TemporaryDirectory() as place:
            self._folder.mkdir(parents=True, exist_ok=True)
            plain = Path(place, "trace.json")
            profiler.export_chrome_trace(str(plain))
            with replacing(self._folder / f"{name}.json.gz") as packed, open(plain, "rb") as trace:
                with gzip.open(packed, "wb") as out:
                    shutil.copyfileobj(trace, out)
            write_atomically(self._folder / f"{name}.txt", self._table(profiler).encode())

    def _table(self, profiler: torch.profiler.profile) -> str:
        on_gpu = self._place.device.type == "cuda"
        # Kernels and the names given above are no ops; an op's device time is that of the kernels it launched.
        ops = [event for event in profiler.key_averages()
               if not event.is_user_annotation and event.device_type == torch.autograd.DeviceType.CPU]  # fmt: skip
        events = EventList(ops, use_device="cuda" if on_gpu else None, profile_memory=True)
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return events.table(sort_by=order, row_limit=_OPS, max_name_column_width=60) + "\n"
