"""Ranks: one process a device under torchrun, or a single process without it."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError, explain_os_error


@dataclass(frozen=True)
class Ranks:
    """This process's place: rank of world_size, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module under DDP where there is more than one rank.

        Batch norm's statistics stay each rank's own until same_buffers(): training does not read them, and giving all
        ranks the main one's in every forward pass would make them wait for each other once more.
        """
        if self.world_size == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            module, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )

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
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], object]) -> None:
        """Runs action on the main rank while the others wait; what a user can mend is raised on every rank."""
        problem = None
        if self.is_main:
            try:
                action()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = explain_os_error(error, "writing")
        if self.world_size > 1:
            problem = self.gather(problem)[0]
        if problem is not None:
            raise UserError(problem)

    def same_buffers(self, module: nn.Module) -> None:
        """Gives every rank the main rank's buffers, such as batch norm's running statistics."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


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
    """The autocast type for "auto", "fp32", "bf16" or "fp16". Raises UserError for fp16 without a GPU."""
    if wanted == "auto":
        capable = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if capable else torch.float32
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU; use fp32 or bf16 on a CPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


@contextlib.contextmanager
def ranks(wanted_device: str) -> Iterator[Ranks]:
    """Joins the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), if any, and leaves it after."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(wanted_device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    yield Ranks(rank, world_size, device)
    # Not after an exception: leaving is collective, and the other ranks may be waiting elsewhere. torchrun ends them.
    dist.destroy_process_group()
