"""Progress on the terminal: a live bar where there is one, a line now and then where there is none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Everything about progress goes to standard error, so that standard output stays machine-readable.
console = Console(stderr=True, highlight=False)
_LINE_SECONDS = 10.0


class Bar:
    """A counter of finished items with their rate, and the rate of a second unit such as frames."""

    def __init__(self, what: str, unit: str, second_unit: str | None = None):
        self._what, self._unit, self._second_unit = what, unit, second_unit
        self._started = self._said = time.monotonic()
        self._total, self._done, self._begun, self._second = 0, 0, 0, 0
        columns = [
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
        ]  # fmt: skip
        self._live = Progress(*columns, console=console) if console.is_terminal else None
        self._task: TaskID | None = None

    def start(self, total: int, done: int = 0) -> None:
        """Sets the number of items, and how many an earlier run finished."""
        self._total, self._done, self._begun = total, done, done
        self._started = time.monotonic()
        if self._live:
            self._live.start()
            self._task = self._live.add_task(self._what, total=total, completed=done, rates="")

    def add(self, items: int = 0, second: int = 0) -> None:
        """Counts finished items and second units."""
        self._done += items
        self._second += second
        if self._live and self._task is not None:
            self._live.update(self._task, completed=self._done, rates=self._rates())
        elif time.monotonic() - self._said > _LINE_SECONDS:
            self._said = time.monotonic()
            left = (self._total - self._done) * (self._said - self._started) / max(1, self._done - self._begun)
            console.print(f"{self._what}: {self._done}/{self._total} {self._unit}, {self._rates()}, ETA {left:.0f} s")

    def stop(self) -> None:
        if self._live:
            self._live.stop()

    def _rates(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        text = f"{(self._done - self._begun) / elapsed:.1f} {self._unit}/s"
        return f"{text}, {self._second / elapsed:.0f} {self._second_unit}/s" if self._second_unit else text


@contextlib.contextmanager
def bar(what: str, unit: str, second_unit: str | None = None) -> Iterator[Bar]:
    """A Bar that is taken off the screen at the end, whatever happens."""
    shown = Bar(what, unit, second_unit)
    try:
        yield shown
    finally:
        shown.stop()
