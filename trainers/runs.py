"""A run's folder, and the signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..configs import load as configs
from ..configs.schema import TrainConfig
from ..errors import UserError
from ..files import locked, read_json, remove_leftovers, write_atomically
from ..preprocessing.shards import Dataset
from .distributed import Ranks
from .phases import Phase

# Keys that may change between a run and its resumption: what is computed stays the same, but for rounding.
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
    # The file server of a cluster may keep a dead node's lock for a while.
    patience = 120.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
    busy = f"another process is training in {run}; wait for it, or choose another --out"
    lock.enter_context(locked(run, busy, patience=patience))
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


def refuse_differences(place: Ranks, config: TrainConfig, dataset: Dataset, phase: Phase) -> None:
    """Raises UserError on every rank where ranks do not train the same thing on the same data."""
    about = {
        "genkd": __version__, "torch": torch.__version__, "index of the data set": dataset.info["index_digest"],
        "teacher": phase.teacher.digest if phase.teacher else "",
    }  # fmt: skip
    (main, known, expected), *others = place.gather((socket.gethostname(), config, about))
    for rank, (host, other, found) in enumerate(others, 1):
        changed = [line for line in configs.differences(known, other) if not line.startswith(FREE_KEYS)]
        changed += [
            f"{name}: {expected[name][:20]} -> {found[name][:20]}" for name in about if expected[name] != found[name]
        ]
        if changed:
            raise UserError(
                f"rank {rank} on {host} differs from rank 0 on {main} ({'; '.join(changed[:4])}); start all nodes with "
                "the same command, data and versions"
            )


@contextlib.contextmanager
def out_of_memory(config: TrainConfig, place: Ranks) -> Iterator[None]:
    """Raises as UserError that the GPU's memory is not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        share = -(-config.batch_size // place.world_size)
        at_once = min(share, config.micro_batch or share)
        raise UserError(
            f"rank {place.rank} on {socket.gethostname()}: the memory of {place.device} does not hold {at_once} clips "
            f"at once ({str(error).strip().splitlines()[0][:200]}); begin with a smaller batch_size, with micro_batch "
            f"below {at_once}, or with more GPUs"
        ) from None


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
