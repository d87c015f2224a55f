"""How tensors lie in memory, and which of them the kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

# The names of element types in the CUDA sources.
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels know the types of all tensors."""
    return all(tensor is None or tensor.dtype in TYPES for tensor in tensors)


def layout_of(features: Tensor) -> torch.memory_format:
    """How features (N,C,T,H,W) lie in memory; contiguous if in neither way, or in both."""
    last = not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all tensors begin at a multiple of 16 bytes."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def same_device(first: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError, with the name, for a tensor that is not where the first one is."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, the features on {first.device}; move it there")
