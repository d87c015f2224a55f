"""Runs a function over tasks on a Ray cluster: lost workers and nodes are made good by running their tasks again."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import UserError
from .engines import LOSSES, Lost, Note

_SEND_SECONDS = 0.5


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
    on_lost(task, note, reason) returns it, its reports taken back (they have to support `-event`). genkd has to be
    installed on every node, and what tasks write has to be a file system or URL that all of them see.
    Raises UserError.
    """
    ray = _ray(address)
    placed = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), False
    )
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=placed)(Mailbox).remote()
    remote = ray.remote(num_cpus=1, max_retries=0, max_calls=0)(_call)
    heard: dict[tuple[int, int], list[Any]] = defaultdict(list)
    tasks, attempts, losses, notes = list(tasks), [0] * len(tasks), [0] * len(tasks), [""] * len(tasks)
    waiting = list(range(len(tasks)))[::-1]
    running: dict[Any, int] = {}
    lost = (
        ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError,
        ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError,
    )  # fmt: skip

    def listen() -> None:
        for task, attempt, events in ray.get(mailbox.take.remote()):
            if attempt == attempts[task]:  # else from a worker that was given up
                for event in events:
                    if isinstance(event, Note):
                        notes[task] = event.text
                    else:
                        heard[task, attempt].append(event)
                        on_report(event)

    try:
        while waiting or running:
            while waiting and (workers is None or len(running) < max(1, workers)):
                task = waiting.pop()
                attempts[task] += 1
                notes[task] = ""
                running[remote.remote(function, tasks[task], mailbox, task, attempts[task])] = task
            done, _ = ray.wait(list(running), timeout=0.2)
            listen()
            for future in done:
                task = running.pop(future)
                try:
                    result = ray.get(future)
                    heard.pop((task, attempts[task]), None)
                    yield result
                except lost as error:
                    for event in heard.pop((task, attempts[task]), []):
                        on_report(-event)
                    losses[task] += 1
                    # A lost node says nothing against what was worked on there.
                    innocent = (ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
                    if on_lost and notes[task] and not isinstance(error, innocent):
                        tasks[task] = on_lost(tasks[task], notes[task], type(error).__name__)
                    elif losses[task] >= LOSSES:
                        raise UserError(
                            f"a worker was lost {LOSSES} times on the same task ({type(error).__name__}); what is "
                            "finished is kept: run the same command again, with more memory a worker"
                        ) from None
                    waiting.append(task)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
        listen()
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the Ray cluster failed ({reason}); what is finished is kept: run the same command again"
        ) from error
    finally:
        for future in running:
            with contextlib.suppress(Exception):  # the cluster may be gone; what stopped the run is raised already
                ray.cancel(future, force=True)
        with contextlib.suppress(Exception):
            ray.kill(mailbox)


def _ray(address: str | None) -> Any:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError:
        raise UserError("--engine ray needs the package ray: pip install 'genkd[ray]'") from None
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
        if isinstance(event, Note) or time.monotonic() - sent > _SEND_SECONDS:
            send()

    def send() -> None:
        nonlocal sent
        ray.get(mailbox.put.remote(number, attempt, list(waiting)))
        waiting.clear()
        sent = time.monotonic()

    result = function(task, report)
    send()
    return result
