"""Runs a function over tasks on local processes or a Ray cluster and reports progress while it does."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

from ..errors import UserError

Report = Callable[[Any], None]
Lost = Callable[[Any, str, str], Any]
Run = Callable[..., Iterator[Any]]

PATIENCE = 5.0  # seconds that workers have to stop, before they are made to
OUTSIDE = "a kill from outside"  # how a worker ended, where its signal is not known
# How worker processes start: a fork would copy the locks of threads as they are.
CONTEXT: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
LOSSES = 3  # of workers on one task without a note of what it was doing, before the run is given up


@dataclass(frozen=True)
class Note:
    """A report of what a task does now, for the case that its worker dies of it."""

    text: str


class _Cancelled(BaseException):
    """Raised inside a worker when the run is being stopped."""


def engine(kind: str, workers: int | None, address: str | None = None) -> Run:
    """A function (function, tasks, on_report, on_lost=None) -> results as they finish, on "local" processes or "ray".

    workers: at the most so many tasks at once; None takes every core. Raises UserError for another kind.
    """
    if kind == "local":
        cores = len(os.sched_getaffinity(0)) if workers is None else workers
        return lambda function, tasks, on_report, on_lost=None: run_local(
            function, tasks, min(cores, len(tasks)), on_report, on_lost
        )
    if kind == "ray":
        from .ray_engine import run_ray

        return lambda function, tasks, on_report, on_lost=None: run_ray(
            function, tasks, on_report, on_lost, address=address, workers=workers
        )
    raise UserError(f"unknown engine {kind!r}; there are local and ray")


def run_local(
    function: Callable[[Any, Report], Any], tasks: Sequence[Any], workers: int, on_report: Report,
    on_lost: Lost | None = None,
) -> Iterator[Any]:  # fmt: skip
    """Yields function(task, report) for every task as they finish, in no fixed order.

    workers: processes; 0 runs everything in this one. What a task reports reaches on_report here. An exception of a
    task stops the others at their next report and is raised here; so does Ctrl-C. When a worker dies, its reports are
    taken back (they have to support `-event`) and the task runs again, as on_lost(task, note, reason) returns it.
    Raises UserError when workers die again and again.
    """
    if workers == 0:
        for task in tasks:
            yield function(task, lambda event: None if isinstance(event, Note) else on_report(event))
        return
    waiting, losses = deque(enumerate(tasks)), [0] * len(tasks)
    crew: list[_Worker] = []
    with _interrupts_held_back() as raise_interrupt:
        try:
            while waiting or any(worker.busy for worker in crew):
                while waiting and len(crew) < workers:
                    crew.append(_Worker(function))
                for worker in crew:
                    if waiting and not worker.busy:
                        worker.begin(*waiting.popleft())
                multiprocessing.connection.wait([worker.connection for worker in crew if worker.busy], timeout=0.1)
                raise_interrupt()
                for worker in list(crew):
                    yield from worker.listen(on_report)
                    if worker.dead:
                        crew.remove(worker)
                        number, task = worker.lost(on_report)
                        losses[number] += 1
                        if on_lost and worker.note:
                            task = on_lost(task, worker.note, worker.reason())
                        elif losses[number] >= LOSSES:
                            raise UserError(
                                f"worker processes are killed again and again ({worker.reason()}, often by the system "
                                "for lack of memory); what is finished is kept: run the same command again, perhaps "
                                "with fewer --workers"
                            )
                        waiting.appendleft((number, task))
        finally:
            for worker in crew:
                worker.connection.close()  # which cancels what it does at its next report
            patience = time.monotonic() + PATIENCE
            for worker in crew:
                worker.process.join(max(0.0, patience - time.monotonic()))
                if worker.process.is_alive():
                    worker.process.terminate()
                    worker.process.join()


class _Worker:
    """A process that works off one task at a time, with a pipe of its own: its death can harm no other."""

    def __init__(self, function: Callable[[Any, Report], Any]):
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_serve, args=(theirs, function), daemon=True)
        # Starting the first process starts multiprocessing's resource tracker too, which lifts the block below.
        multiprocessing.resource_tracker.ensure_running()
        with _interrupts_blocked():  # the process inherits it: Ctrl-C is the parent's alone
            self.process.start()
        theirs.close()
        self.busy, self.dead, self.note = False, False, ""
        self._task: tuple[int, Any] = (0, None)
        self._reported: list[Any] = []

    def begin(self, number: int, task: Any) -> None:
        self.busy, self.note, self._task, self._reported = True, "", (number, task), []
        with contextlib.suppress(ConnectionError):  # a worker that died while idle: listen() finds out
            self.connection.send(task)

    def listen(self, on_report: Report) -> Iterator[Any]:
        """Takes what has arrived and yields the task's result if it is among it; sets `dead` where it has died."""
        while self.busy:
            try:
                if not self.connection.poll():
                    return
                kind, content = self.connection.recv()
            except (EOFError, OSError):  # also in the middle of a message
                self.dead = True
                return
            if kind == "report" and isinstance(content, Note):
                self.note = content.text
            elif kind == "report":
                self._reported.append(content)
                on_report(content)
            elif kind == "failed":
                error, text = content
                raise error from RuntimeError(text)
            else:
                self.busy = False
                yield content

    def lost(self, on_report: Report) -> tuple[int, Any]:
        """Takes back what the dead worker reported of its task, which is returned with its number."""
        for event in self._reported:
            on_report(-event)
        self.connection.close()
        self.process.join()
        return self._task

    def reason(self) -> str:
        """How the process ended."""
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve(connection: multiprocessing.connection.Connection, function: Callable[[Any, Report], Any]) -> None:
    """A worker's life: tasks in, reports and results out, until the pipe is closed."""
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def report(event: Any) -> None:
        try:
            connection.send(("report", event))
        except ConnectionError:
            raise _Cancelled from None

    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[str, Any]
        try:
            answer = "done", function(task, report)
        except _Cancelled:
            return
        except BaseException as error:
            answer = "failed", (_portable(error), traceback.format_exc())
        try:
            connection.send(answer)
        except ConnectionError:
            return


def _portable(error: BaseException) -> BaseException:
    """The error, or what it says where it does not survive the way to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever pickling runs into
        return RuntimeError(repr(error))


def _die_with_parent() -> None:
    """A parent that is killed outright leaves no orphan writing behind a later run's back."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only worker processes wait for their parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[Callable[[], None]]:
    """Gives a function that raises the KeyboardInterrupt of a Ctrl-C since the block began.

    Raised anywhere else it could tear a message from a worker in two, or leave a worker half started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = threading.Event()
    old = signal.signal(signal.SIGINT, lambda number, frame: asked.set())

    def raise_interrupt() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    try:
        yield raise_interrupt
    finally:
        signal.signal(signal.SIGINT, old)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
