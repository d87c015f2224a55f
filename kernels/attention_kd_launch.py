"""How attention_kd's kernels are launched: geometry, buffers, and the order of the kernels of attention_kd.cu."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import compile as compiler
from .tensors import TYPES, aligned, layout_of

_TILE, _MAX_ROWS, _WARP, _PARTIALS, STATS = 4096, 1024, 32, 5, 6  # as in attention_kd.cu
_ROWS_A_BLOCK = 8 * compiler.THREADS  # where one value a row is computed


class _Geometry(NamedTuple):
    """How a launch cuts the samples: see attention_kd.cu."""

    width: int
    own: int  # rows of a block, contiguous only
    chunks: int  # blocks a sample

    @property
    def sizes(self) -> tuple[int, int]:
        return self.own, self.chunks


def _geometry(features: Tensor, *others: Tensor | None) -> _Geometry:
    """others: what is read or written beside the features, of their shape and layout."""
    _, channels, time, height, width = features.shape
    positions, rows = height * width, channels * time
    fits = aligned(features, *others)
    if layout_of(features) == torch.channels_last_3d:
        wide = 8 if fits and channels % 8 == 0 else 1
        return _Geometry(wide, 0, time * math.ceil(channels / (_WARP * wide)))
    own = min(max(_TILE // positions, 1), _MAX_ROWS, rows)
    # Blocks begin where a thread's 8 elements begin.
    if fits and rows * positions % 8 == 0 and own * positions % 8 and own >= 8:
        own = own // 8 * 8
    wide = 8 if fits and rows * positions % 8 == 0 and own * positions % 8 == 0 else 1
    return _Geometry(wide, own, math.ceil(rows / own))


def _library(
    width: int, maps: bool, features: Tensor, attention: Tensor, reconstruction: Tensor | None
) -> compiler.Kernels:
    defines: compiler.Defines = {
        "WIDTH": width,
        "LAST": int(layout_of(features) == torch.channels_last_3d),
        "MAPS": int(maps),
        "HAS_RECONSTRUCTION": int(reconstruction is not None),
        "FEATURE": TYPES[features.dtype],
        "ATTENTION": TYPES[attention.dtype],
        "RECONSTRUCTION": TYPES[features.dtype if reconstruction is None else reconstruction.dtype],
    }
    return compiler.library("attention_kd", defines, features.device)


def _arranged(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the memory layout of `like`."""
    layout = layout_of(like)
    return [None if tensor is None else tensor.contiguous(memory_format=layout) for tensor in tensors]


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward_kernels(
    features: Tensor, attention: Tensor, taught: Tensor | None, reconstruction: Tensor | None, maps: bool, logits: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """genkd::attention_kd, see attention_kd.py, on the device of features. Raises compile.Failed."""
    layout = layout_of(features)
    features = features.contiguous(memory_format=layout)
    (reconstruction,) = _arranged(features, reconstruction)
    attention, taught = attention.contiguous(), _plain(taught)
    n, channels, time, height, width = features.shape
    window = min(2, time)
    if maps:
        foreground = torch.empty_like(features, memory_format=layout)
        background = torch.empty_like(features, memory_format=layout)
    else:
        foreground = features.new_empty((n, channels, time - window + 1, 1, 1))
        background = features.new_empty((0,))
    plan = _geometry(features, reconstruction, *((foreground, background) if maps else ()))
    kernels = _library(plan.width, maps, features, attention, reconstruction)
    sums = features.new_empty((n, channels, time), dtype=torch.float32)
    stats = features.new_empty((n, STATS), dtype=torch.float32)
    att, rec = features.new_empty((), dtype=torch.float32), features.new_empty((), dtype=torch.float32)
    partial = features.new_empty((n * plan.chunks, _PARTIALS), dtype=torch.float32)
    shape = (channels, time, height * width)
    kernels.launch(
        "attention_kd_sums", n * plan.chunks, compiler.THREADS,
        features, reconstruction, attention, taught, sums, partial, *shape, *plan.sizes, int(logits),
    )  # fmt: skip
    blocks = 1 if maps else math.ceil(channels * (time - window + 1) / _ROWS_A_BLOCK)
    kernels.launch(
        "attention_kd_finish", n * blocks, compiler.THREADS,
        sums, partial, attention, stats, att, rec, foreground, n, *shape, window, plan.chunks, blocks, int(logits),
    )  # fmt: skip
    if n > 1:
        kernels.launch("attention_kd_losses", 1, compiler.THREADS, stats, att, rec, n, *shape)
    if maps:
        kernels.launch(
            "attention_kd_maps", n * plan.chunks, compiler.THREADS,
            features, attention, stats, foreground, background, *shape, *plan.sizes, int(logits),
        )  # fmt: skip
    return foreground, background, att, rec, sums, stats


def backward_kernels(
    grad_foreground: Tensor | None, grad_background: Tensor | None, grad_att: Tensor | None, grad_rec: Tensor | None,
    features: Tensor, attention: Tensor, taught: Tensor | None, reconstruction: Tensor | None, sums: Tensor,
    stats: Tensor, maps: bool, logits: bool, of_reconstruction: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """genkd::attention_kd_backward on the device of features. Raises compile.Failed."""
    layout = layout_of(features)
    features = features.contiguous(memory_format=layout)
    attention, taught = attention.contiguous(), _plain(taught)
    if grad_rec is None:
        reconstruction = None  # its loss is not asked about, so it need not be read
    (reconstruction,) = _arranged(features, reconstruction)
    if maps:
        grad_foreground, grad_background = _arranged(features, grad_foreground, grad_background)
    else:
        grad_foreground = _plain(grad_foreground)
    n, channels, time, height, width = features.shape
    window = min(2, time)
    grad_features = torch.empty_like(features, memory_format=layout)
    grad_attention = torch.empty_like(attention)
    made = None
    if of_reconstruction and reconstruction is not None:
        made = torch.empty_like(reconstruction, memory_format=layout)
    maps_only = (grad_foreground, grad_background) if maps else ()
    plan = _geometry(features, reconstruction, grad_features, made, *maps_only)
    kernels = _library(plan.width, maps, features, attention, reconstruction)
    shape = (channels, time, height * width)
    dots = None
    if maps:
        dots = features.new_empty((2, n, channels, time), dtype=torch.float32)
        kernels.launch(
            "attention_kd_dots", n * plan.chunks, compiler.THREADS,
            features, grad_foreground, grad_background, dots, n, *shape, *plan.sizes,
        )  # fmt: skip
    blocks = math.ceil(channels * time / _ROWS_A_BLOCK)
    partial = features.new_empty((n * blocks, 2), dtype=torch.float32)
    slopes = features.new_empty((n, 2), dtype=torch.float32)
    kernels.launch(
        "attention_kd_slopes", n * blocks, compiler.THREADS,
        sums, dots, grad_foreground, attention, partial, n, *shape, window, blocks, int(logits),
    )  # fmt: skip
    kernels.launch(
        "attention_kd_attention_grad", n * blocks, compiler.THREADS,
        sums, dots, grad_foreground, attention, taught, stats, grad_att, partial, grad_attention, slopes, n, *shape,
        window, blocks, int(logits),
    )  # fmt: skip
    kernels.launch(
        "attention_kd_grad", n * plan.chunks, compiler.THREADS,
        features, reconstruction, attention, stats, slopes, grad_foreground, grad_background, grad_rec, grad_features,
        made, n, *shape, window, *plan.sizes, int(logits),
    )  # fmt: skip
    return grad_features, grad_attention, features.new_empty((0,)) if made is None else made
