"""Ranks: one process a device under torchrun, or a single process without it."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import inspect
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..configs.schema import RanksConfig
from ..errors import Stopped, UserError, explain_os_error
from . import affinity, rendezvous
from .watchdog import Watchdog

_T = TypeVar("_T")

# Each rank keeps its own buffers; PyTorch 2.13 has a new name for that and calls the old one deprecated.
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}  # fmt: skip

# What PyTorch says in a rank whose peer is gone.
_LOST = re.compile(
    r"connection (was likely )?(closed|reset|refused|aborted)|pair closure|timed out|broken pipe|failed to recv"
    r"|no route to host|network is (unreachable|down)|NCCL communicator was aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ranks:
    """This process's place: rank of world_size, and its device.

    control: a group on CPUs for words between ranks, beside that of the gradients; watchdog: what names a rank that
    the others wait for. Both are none in a process of its own.
    """

    rank: int
    world_size: int
    device: torch.device
    config: RanksConfig = field(default_factory=RanksConfig)
    control: Any = None
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own_folder(self, shared: Path) -> Path:
        """A folder for what the ranks of a host write together; hosts of several have one each below it, as pages of a
        file that two of them map are not kept apart."""
        one_host = _number("LOCAL_WORLD_SIZE", self.world_size) >= self.world_size
        return shared if one_host else shared / socket.gethostname()

    def wrap(self, module: nn.Module, *, static: bool = False) -> nn.Module:
        """The module under DDP where there is more than one rank. static: each step uses the same parameters.

        Batch norm's statistics stay each rank's own until same_buffers(): training does not read them, and giving all
        ranks the main one's in every forward pass would make them wait for each other once more.
        Raises UserError for sync_bn without GPUs, for which PyTorch has none.
        """
        if self.world_size == 1:
            return module
        on_gpu = self.device.type == "cuda"
        if self.config.sync_bn:
            if not on_gpu:
                raise UserError("ranks.sync_bn=true needs GPUs; on CPUs use model.freeze_bn=always, or leave it")
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        wrapped = DistributedDataParallel(
            module, device_ids=[self.device.index] if on_gpu else None, gradient_as_bucket_view=True,
            static_graph=static, **_OWN_BUFFERS,
        )  # fmt: skip
        if self.config.compression == "bf16":
            wrapped.register_comm_hook(self.world_size, _in_bf16)
        return wrapped

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """values added up over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        self.alive()  # as all have just been, also where none has gone on to another place, as at the start
        return values

    def on_main(self, action: Callable[[], _T]) -> _T:
        """What action gives on the main rank, picklable, on every rank, while the others wait; what a user can mend is
        raised on every rank."""
        found: Any = None
        problem = None
        if self.is_main:
            try:
                found = action()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = explain_os_error(error, "writing")
        else:
            self.waits("waits for the main rank")
        if self.world_size > 1:
            problem, found = self.gather((problem, found))[0]
        if problem is not None:
            raise UserError(problem)
        return found

    def same_buffers(self, module: nn.Module) -> None:
        """Gives every rank the main rank's buffers, such as batch norm's running statistics."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def progress(self, doing: str, step: int, order: int) -> None:
        """Tells the watchdog what this rank goes on with; order: of the things between step and the next, below 10."""
        if self.watchdog:
            self.watchdog.progress(f"{doing} (step {step + 1})", 10 * step + order)

    def waits(self, doing: str) -> None:
        """Tells the watchdog that this rank has done its part where it is, and waits for others."""
        if self.watchdog:
            self.watchdog.waits(doing)

    def alive(self) -> None:
        """Tells the watchdog that this rank is not stuck, in a part whose length is a rank's own."""
        if self.watchdog:
            self.watchdog.alive()

    def patient(self, times: int) -> None:
        """Has the watchdog wait so many times as long, as while networks are compiled."""
        if self.watchdog:
            self.watchdog.patience = times

    def ended(self) -> None:
        """Tells the watchdog that there is nothing left that ranks wait for."""
        if self.watchdog:
            self.watchdog.end()


def _in_bf16(world_size, bucket):  # type: ignore[no-untyped-def]
    """Reduces a bucket of gradients in bfloat16: half the bytes. PyTorch's own hook of this kind refuses gloo.

    DDP looks at a hook's annotations, and does not understand those that are kept as text.
    """
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(world_size)

    def received(future: torch.futures.Future) -> torch.Tensor:
        return gradients.copy_(future.value()[0])

    return dist.all_reduce(sent, async_op=True).get_future().then(received)


class Agreement:
    """What all ranks know of each other's numbers without waiting: each call gives the largest of the call before."""

    def __init__(self, place: Ranks):
        self._place = place
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, number: int) -> int:
        """A single process gets its own number back at once; a rank of several gets 0 from its first call."""
        if self._place.world_size == 1:
            return number
        found = self.close()
        value = torch.tensor(number)
        self._pending = dist.all_reduce(value, dist.ReduceOp.MAX, self._place.control, async_op=True), value
        return found

    def close(self) -> int:
        """Waits for what is under way, and gives its result."""
        if self._pending is None:
            return 0
        work, value = self._pending
        self._pending = None
        work.wait()
        return int(value)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda". Raises UserError for a GPU that is not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch finds no CUDA device here; use device=cpu or install a CUDA build")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank}, but there are {torch.cuda.device_count()} GPUs; start fewer ranks a node"
        )
    return torch.device("cuda", local_rank)


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """The autocast type for "auto", "fp32", "tf32", "bf16" or "fp16". Raises UserError for what needs a GPU."""
    if wanted == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    if wanted in ("fp16", "tf32") and device.type == "cpu":
        raise UserError(f"precision={wanted} needs a GPU; use fp32 or bf16 on a CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(wanted, torch.float32)


def round_products(wanted: str) -> None:
    """Lets GPUs round fp32 products to TF32, unless precision is "fp32"; one that "auto" makes fp32 has no TF32."""
    exact = wanted == "fp32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact


def _end_with_torchrun() -> None:
    """Has the system send this rank SIGTERM, on which it saves and ends, when the torchrun that started it dies."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has died in between
            os.kill(os.getpid(), signal.SIGTERM)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r} and no number; torchrun sets it")
    return int(text)


@contextlib.contextmanager
def ranks(wanted_device: str, config: RanksConfig | None = None, patience: int = 1) -> Iterator[Ranks]:
    """Joins the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), if any, and leaves it after.

    patience: the most that the watchdog will be told to have. Raises UserError when the others cannot be reached, or
    are lost on the way.
    """
    config = config or RanksConfig()
    world_size, rank, local_rank = _number("WORLD_SIZE", 1), _number("RANK", 0), _number("LOCAL_RANK", 0)
    device = choose_device(wanted_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(0, 1, device, config)
        return
    _end_with_torchrun()
    # The watchdog speaks first: PyTorch's own time limit says neither who nor where.
    limit = datetime.timedelta(seconds=2 * config.timeout_s * patience)
    store, control = rendezvous.join(device, limit)
    # Reading another rank's word must not wait behind a connection on which something else waits.
    watchdog = Watchdog(dist.PrefixStore("genkd", store.clone()), rank, world_size, config.timeout_s)
    place = Ranks(rank, world_size, device, config, control, watchdog)
    if config.affinity == "auto":
        affinity.share_out(place.gather((socket.gethostname(), affinity.of(device))), rank)
    with watchdog:
        try:
            yield place
        except Stopped:  # by all ranks together
            watchdog.end()
            dist.destroy_process_group()
            raise
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
                raise
            raise UserError(f"rank {rank} on {socket.gethostname()} {_what_failed(str(error))}") from None
    # Not after other exceptions: leaving is collective, and other ranks may be waiting elsewhere. torchrun ends them.
    dist.destroy_process_group()


def _what_failed(text: str) -> str:
    """A sentence's end for an error of PyTorch's in what ranks do together."""
    reason = (text.strip().splitlines() or ["no reason given"])[0][:200]
    again = "torchrun begins again from the newest checkpoint where --max-restarts allows it"
    if "NCCL" not in text or _LOST.search(text):
        return f"has lost another rank ({reason}); {again}"
    # NCCL's own reason comes last, and what it knows of another rank is not told apart.
    last = " ".join(text.rpartition("Last error:")[2].split())[:300] if "Last error:" in text else ""
    return (
        f"got an error from NCCL ({reason}{': ' + last if last else ''}), by its own fault or with another rank that "
        f"is lost; NCCL_DEBUG=INFO tells more; {again}"
    )
