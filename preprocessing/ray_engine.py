"""Runs a function over tasks on a Ray cluster: lost workers and nodes are made good by running their tasks again."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import signal
import socket
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import process_lives
from .engines import LOSSES, OUTSIDE, Lost, Note

_SEND_SECONDS = 0.5
_ASK_SECONDS = 60.0
_CRASH_FILE = "genkd-crash-"  # then the process, in the folder for temporary files
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


@dataclass(frozen=True)
class _Begun:
    """A worker's first letter: the node it is on, and the file there that a crash would be noted in."""

    node: str
    file: str


class Mailbox:
    """Takes the workers' reports. An actor on the node of the run, so that it dies only with the run."""

    def __init__(self):
        self._letters: list[tuple[int, int, list[Any]]] = []

    def put(self, task: int, attempt: int, events: list[Any]) -> None:
        self._letters.append((task, attempt, events))

    def take(self) -> list[tuple[int, int, list[Any]]]:
        letters, self._letters = self._letters, []
        return letters


def run_ray(
    function: Callable[[Any, Callable[[Any], None]], Any],
    tasks: Sequence[Any],
    on_report: Callable[[Any], None],
    on_lost: Lost | None = None,
    *,
    address: str | None,
    workers: int | None = None,
) -> Iterator[Any]:
    """Yields function(task, report) for every task as they finish, in no fixed order.

    address: of a running cluster, as ray.init takes it ("auto", "ray://HOST:10001", "HOST:6379"); None starts one on
    this machine. workers: at the most so many tasks at once. A task whose worker or node is lost runs again, as
    on_lost(task, note, reason) returns it, its reports taken back (they have to support `-event`). reason: the signal
    of a crash, OUTSIDE for any other end of a worker, of which Ray does not tell the cause. genkd has to be
    installed on every node, and what tasks write has to be a file system or URL that all of them see.
    Raises UserError.
    """
    ray = _ray(address)
    run = _RayRun(ray, function, tasks, on_report, on_lost)
    waiting = list(range(len(tasks)))[::-1]
    try:
        while waiting or run.running:
            while waiting and (workers is None or len(run.running) < max(1, workers)):
                run.begin(waiting.pop())
            done, _ = ray.wait(list(run.running), timeout=0.2)
            run.listen()
            for future in done:
                task = run.running.pop(future)
                try:
                    yield run.result(future, task)
                except _Lost:
                    waiting.append(task)
        run.listen()
    except ray.exceptions.RayError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the Ray cluster failed ({reason}); what is finished is kept: run the same command again"
        ) from error
    finally:
        run.end()


class _Lost(Exception):
    """A task's worker or node is gone; the task is to run again."""


class _RayRun:
    """The tasks of one run, what was heard of each, and where each runs now. running: future -> task number."""

    def __init__(self, ray: Any, function: Callable, tasks: Sequence[Any], on_report: Callable, on_lost: Lost | None):
        self._ray, self._function, self._on_report, self._on_lost = ray, function, on_report, on_lost
        here = ray.get_runtime_context().get_node_id()
        placed = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, False)
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=placed)(Mailbox).remote()
        self._call = ray.remote(num_cpus=1, max_retries=0)(_call)
        self._tasks = list(tasks)
        self._attempts, self._losses, self._notes = [0] * len(tasks), [0] * len(tasks), [""] * len(tasks)
        self._places: list[_Begun | None] = [None] * len(tasks)
        self._heard: dict[int, list[Any]] = defaultdict(list)
        self.running: dict[Any, int] = {}

    def begin(self, task: int) -> None:
        """Hands a task to the cluster."""
        self._attempts[task] += 1
        self._notes[task], self._places[task] = "", None
        future = self._call.remote(self._function, self._tasks[task], self._mailbox, task, self._attempts[task])
        self.running[future] = task

    def listen(self) -> None:
        """Passes on what the workers have reported since."""
        for task, attempt, events in self._ray.get(self._mailbox.take.remote()):
            if attempt != self._attempts[task]:
                continue  # from a worker that was given up
            for event in events:
                if isinstance(event, Note):
                    self._notes[task] = event.text
                elif isinstance(event, _Begun):
                    self._places[task] = event
                else:
                    self._heard[task].append(event)
                    self._on_report(event)

    def result(self, future: Any, task: int) -> Any:
        """What a task returned. Raises what it raised, _Lost if it has to run again, UserError if that is too often."""
        errors = self._ray.exceptions
        lost = (
            errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError, errors.OutOfMemoryError,
            errors.ObjectLostError,
        )  # fmt: skip
        try:
            result = self._ray.get(future)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except lost as error:
            for event in self._heard.pop(task, []):
                self._on_report(-event)
            self._losses[task] += 1
            # A lost node, or one short of memory, says nothing against what was worked on there.
            guilty = isinstance(error, errors.WorkerCrashedError)
            if self._on_lost and self._notes[task] and guilty:
                self._tasks[task] = self._on_lost(self._tasks[task], self._notes[task], self._crash(task) or OUTSIDE)
            elif self._losses[task] >= LOSSES:
                raise UserError(
                    f"a worker was lost {LOSSES} times on the same task ({type(error).__name__}); what is finished is "
                    "kept: run the same command again, with more memory a worker"
                ) from None
            raise _Lost from None
        self._heard.pop(task, None)
        return result

    def _crash(self, task: int) -> str:
        """Of which signal a task's worker crashed, asked on the node it was on; "" if it was killed, or none knows."""
        place = self._places[task]
        if place is None:
            return ""
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place.node, False)
        try:
            ask = self._ray.remote(num_cpus=0, scheduling_strategy=there)(_crash_in)
            return self._ray.get(ask.remote(place.file), timeout=_ASK_SECONDS)
        except self._ray.exceptions.RayError:
            return ""

    def end(self) -> None:
        """Stops what still runs; the cluster may be gone, and what stopped the run is raised already."""
        for future in self.running:
            with contextlib.suppress(Exception):
                self._ray.cancel(future, force=True)
        with contextlib.suppress(Exception):
            self._ray.kill(self._mailbox)


def _ray(address: str | None) -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError:
        raise UserError("--engine ray needs the package ray: pip install ray") from None
    if not ray.is_initialized():
        try:
            if match := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address or ""):
                # Ray itself would wait for minutes where nobody answers.
                socket.create_connection((match[1], int(match[2])), timeout=10).close()
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"no Ray cluster can be used at --address {address or 'local'} ({reason})") from None
    return ray


def _call(function: Callable, task: Any, mailbox: Any, number: int, attempt: int) -> Any:
    """On a worker: runs a task and sends its reports in batches."""
    import ray

    waiting: list[Any] = []
    sent = time.monotonic()

    def report(event: Any) -> None:
        nonlocal sent
        waiting.append(event)
        if isinstance(event, (Note, _Begun)) or time.monotonic() - sent > _SEND_SECONDS:
            send()

    def send() -> None:
        nonlocal sent
        ray.get(mailbox.put.remote(number, attempt, list(waiting)))
        waiting.clear()
        sent = time.monotonic()

    file = os.path.join(tempfile.gettempdir(), f"{_CRASH_FILE}{os.getpid()}-{uuid.uuid4().hex}")
    with _noting_crashes(file):
        report(_Begun(ray.get_runtime_context().get_node_id(), file))
        result = function(task, report)
    send()
    return result


@contextlib.contextmanager
def _noting_crashes(path: str) -> Iterator[None]:
    """Lets a crash of this process leave its signal in a file, which is deleted where there was none."""
    for old in Path(tempfile.gettempdir()).glob(f"{_CRASH_FILE}*"):  # of workers that were killed
        process = old.name.removeprefix(_CRASH_FILE).split("-")[0]
        with contextlib.suppress(OSError):
            if process.isdigit() and not process_lives(int(process)) and not old.stat().st_size:
                old.unlink()
    before = faulthandler.is_enabled()
    with open(path, "w") as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()
            os.unlink(path)
    if before:
        faulthandler.enable(all_threads=False)


def _crash_in(path: str) -> str:
    """The signal that _noting_crashes left in a file, which is deleted; "" if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.readline()
        os.unlink(path)
    except OSError:
        return ""
    told = head.removeprefix("Fatal Python error: ").strip().lower().replace("-", " ")
    return next((number.name for number in _CRASHES if (signal.strsignal(number) or "").lower() == told), "")
