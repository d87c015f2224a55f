"""A run's folder, and the signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..configs import load as configs
from ..configs.schema import TrainConfig
from ..errors import UserError
from ..files import locked, read_json, remove_leftovers, write_atomically

# Keys that may change between a run and its resumption: what is computed stays the same, but for rounding, and under
# `compile` for dropout's masks.
FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "wandb",
    "prometheus",
    "profile",
    "compile",
    "cuda_graphs",
    "distill.teacher_cache",
    "kernels.backend",
    "ranks.timeout_s",
    "ranks.affinity",
    "data.decoder_threads",
    "data.pipelines_per_gpu",
    "data.prefetch",
    "data.read_ahead",
    "data.cache_dir",
    "data.cache_gb",
    "data.retries",
)


def adopt(lock: contextlib.ExitStack, run: Path, config: TrainConfig) -> None:
    """Locks the folder; begins it with this configuration, or checks that it was begun with it."""
    lock.enter_context(locked(run, f"another process is training in {run}; wait for it, or choose another --out"))
    for folder in (run, run / "checkpoints", run / "weights", run / "best"):
        remove_leftovers(folder)
    begun = (run / "metrics.jsonl").is_file() or (run / "checkpoints").is_dir()
    if begun and (run / "config.yaml").is_file():
        changed = [
            line for line in configs.differences(configs.read_run(run), config) if not line.startswith(FREE_KEYS)
        ]
        if changed:
            raise UserError(
                f"{run} was begun with another configuration ({'; '.join(changed[:4])}); choose another --out, "
                "or use the same configuration to continue it"
            )
        return
    strangers = [entry.name for entry in run.iterdir() if entry.name not in (".lock", "config.yaml")]
    if strangers:
        raise UserError(f"{run} is not empty and holds no training run (found {strangers[0]!r}); choose another --out")
    write_atomically(run / "config.yaml", configs.dump(config).encode())


def result_of(run: Path) -> dict[str, Any] | None:
    """The content of a finished run's result.json; None for a run that is not finished."""
    path = run / "result.json"
    return read_json(path) if path.is_file() else None


def exit_code(number: int) -> int:
    """What a process that a signal has stopped exits with."""
    return 0 if number == signal.SIGTERM else 130


class StopRequest:
    """number: the signal that asks this process to stop; 0 for none."""

    number = 0

    def ask(self, number: int, frame: object) -> None:
        """The handler. A second Ctrl-C interrupts at once; SIGTERM may come twice, from a scheduler and torchrun."""
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask the loop to stop."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
