"""Runs a function over tasks on local processes or a Ray cluster and reports progress while it does."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..errors import UserError

Report = Callable[[Any], None]
Run = Callable[[Callable[[Any, Report], Any], "list[Any]", Report], Iterator[Any]]


class _Cancelled(BaseException):
    """Raised inside a worker when the run is being stopped."""


def engine(kind: str, workers: int | None, address: str | None = None) -> Run:
    """A function (function, tasks, on_report) -> results as they finish, on "local" processes or a "ray" cluster.

    workers: at the most so many tasks at once; None takes every core. Raises UserError for another kind.
    """
    if kind == "local":
        cores = len(os.sched_getaffinity(0)) if workers is None else workers
        return lambda function, tasks, on_report: run_local(function, tasks, min(cores, len(tasks)), on_report)
    if kind == "ray":
        from .ray_engine import run_ray

        return lambda function, tasks, on_report: run_ray(function, tasks, on_report, address, workers)
    raise UserError(f"unknown engine {kind!r}; there are local and ray")


def run_local(
    function: Callable[[Any, Report], Any], tasks: Iterable[Any], workers: int, on_report: Report
) -> Iterator[Any]:
    """Yields function(task, report) for every task as they finish, in no fixed order.

    workers: processes; 0 runs everything in this one. What a task reports reaches on_report here. An exception of a
    task stops the others at their next report and is raised here; so does Ctrl-C. Raises UserError when a worker
    process dies.
    """
    if workers == 0:
        for task in tasks:
            yield function(task, on_report)
        return
    context = multiprocessing.get_context("spawn")
    events, stop = context.Queue(), context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (events, stop))
    with _interrupts_held_back() as raise_interrupt:
        try:
            with _interrupts_blocked():  # the processes that this starts inherit it: Ctrl-C is the parent's alone
                pending = {pool.submit(_run, function, task) for task in tasks}
            while pending:
                done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                _drain(events, on_report)
                raise_interrupt()
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (often by the system for lack of memory); what is finished is kept: "
                "run the same command again, perhaps with fewer --workers"
            ) from None
        finally:
            stop.set()
            # Workers end only when their last reports are taken, so these are read while the pool shuts down.
            closing = threading.Thread(target=pool.shutdown, kwargs={"wait": True, "cancel_futures": True})
            closing.start()
            while closing.is_alive():
                _drain(events, on_report)
                closing.join(0.02)
            _drain(events, on_report)
            events.close()
            events.cancel_join_thread()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[Callable[[], None]]:
    """Gives a function that raises the KeyboardInterrupt of a Ctrl-C since the block began.

    Raised anywhere else it could tear a message from a worker in two, or leave the pool half shut down.
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


def _drain(events, on_report: Report) -> None:
    while True:
        try:
            on_report(events.get_nowait())
        except (queue.Empty, OSError):
            return


_worker: dict[str, Any] = {}


def _start_worker(events, stop) -> None:
    _worker.update(events=events, stop=stop)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A parent that is killed outright leaves no orphan writing behind a later run's back."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only worker processes wait for their parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(function: Callable[[Any, Report], Any], task: Any) -> Any:
    def report(event: Any) -> None:
        if _worker["stop"].is_set():
            raise _Cancelled
        _worker["events"].put(event)

    try:
        return function(task, report)
    except _Cancelled:
        return None
