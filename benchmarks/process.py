"""Runs a command and measures it as a whole: wall time, processor time and peak memory of all its processes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

INTERVAL = 0.1  # seconds between two looks at the memory, at the least
SHARE = 0.01  # of one core, that the looks may take from what is measured


@dataclass(frozen=True)
class Usage:
    """seconds: wall time from start to exit; cpu_seconds: user and system time of all processes it waited for.

    peak_mb: the largest sum of PSS (/proc/PID/smaps_rollup) seen, or None where the system does not tell. PSS divides
    a page among the processes that share it, so forked workers and shared libraries are not counted twice.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float | None


def run_measured(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Usage:
    """Runs a command to its end, output to `log`, and looks at the memory of its session's processes meanwhile.

    Raises UserError with the end of the output when it fails.
    """
    before = _children_cpu()
    with open(log, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        memory = _SessionMemory(process.pid)
        try:
            with memory:
                code = process.wait()
                seconds = time.perf_counter() - started
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(f"{' '.join(command[:4])} ended with {code}: {' / '.join(lines[-3:])}")
    return Usage(seconds, _children_cpu() - before, memory.peak / 1e6 if memory.peak else None)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _SessionMemory:
    """Watches the processes of a session from a thread while the block runs. peak: bytes."""

    def __init__(self, session: int):
        self._session, self._stop, self.peak = session, threading.Event(), 0
        # What another session's process is need not be read again ten times a second.
        self._ours: dict[int, bool] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        cost = 0.0
        while not self._stop.wait(max(INTERVAL, cost / SHARE)):
            started = time.thread_time()
            running = {int(name) for name in os.listdir("/proc") if name.isdigit()} if os.path.isdir("/proc") else set()
            self._ours = {pid: self._ours[pid] if pid in self._ours else self._is_ours(pid) for pid in running}
            self.peak = max(self.peak, sum(_pss(pid) for pid, ours in self._ours.items() if ours))
            cost = time.thread_time() - started

    def _is_ours(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self._session
        except OSError:
            return False


def _pss(pid: int) -> int:
    """Bytes; 0 for a process that is gone."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    return 0
