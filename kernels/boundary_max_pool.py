"""Boundary max pooling: the largest feature of every channel in a stretch of time around a boundary.

"Learning Salient Boundary Feature for Anchor-free Temporal Action Localization", CVPR 2021. A segment has two
stretches, one around its start, for the first half of the channels, and one around its end, for the other half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backend
from . import compile as compiler
from .tensors import TYPES, same_device, takes

_LONG = 512  # steps from which a stretch may be long enough for several threads


def boundary_max_pool(features: Tensor, segments: Tensor) -> Tensor:
    """Features (N,C,T), C even, and segments (N,K,4) in steps of T -> maxima (N,C,K) of the features' type.

    A segment is (from, to, from, to), both ends included, cut off to whole steps and clamped into 0..T-1; where `to`
    comes before `from`, the step `from` alone counts. Not-a-number counts as step 0 in segments, and in features as
    larger than every number. Of equal features the first is chosen, and it gets the gradient; segments have none.
    float32, bfloat16 or float16. Raises ValueError for shapes that do not fit.
    """
    if backend.formulas_wanted():
        return reference(features, segments)
    return torch.ops.genkd.boundary_max_pool(features, segments.detach())[0]


def reference(features: Tensor, segments: Tensor) -> Tensor:
    """boundary_max_pool as its formula reads, differentiable by autograd: what the op is tested against."""
    time, half = features.shape[2], features.shape[1] // 2
    steps = torch.arange(time, device=features.device)
    halves = []
    for number, channels in enumerate((features[:, :half], features[:, half:])):
        first, last = _stretches(segments[..., 2 * number : 2 * number + 2], time)
        inside = (steps >= first[..., None]) & (steps <= last[..., None])  # (N,K,T)
        chosen = torch.where(inside[:, None], channels[:, :, None], -math.inf).argmax(3)
        chosen = chosen.clamp(first[:, None], last[:, None])  # where all are minus infinity
        halves.append(channels.gather(2, chosen))
    return torch.cat(halves, 1)


@torch.library.custom_op("genkd::boundary_max_pool", mutates_args=())
def _op(features: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """-> maxima, and the step of each, (N,C,K) int32"""
    _check(features, segments)
    return backend.run(
        features,
        lambda: _forward_kernels(features, segments),
        lambda: _forward_torch(features, segments),
        fits=takes(features, segments),
    )


@_op.register_fake
def _(features, segments):  # type: ignore[no-untyped-def]
    _check(features, segments)
    shape = (features.shape[0], features.shape[1], segments.shape[1])
    return features.new_empty(shape), features.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("genkd::boundary_max_pool_backward", mutates_args=())
def _backward(grad: Tensor, arguments: Tensor, time: int) -> Tensor:
    """Gradient (N,C,K) and steps (N,C,K) of T = time -> gradient (N,C,T)"""
    return backend.run(
        grad,
        lambda: _backward_kernels(grad, arguments, time),
        lambda: _backward_torch(grad, arguments, time),
        fits=takes(grad),
    )


@_backward.register_fake
def _(grad, arguments, time):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:2], time))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.time = inputs[0].shape[2]


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    (arguments,) = ctx.saved_tensors
    return torch.ops.genkd.boundary_max_pool_backward(grad, arguments, ctx.time), None


_op.register_autograd(_differentiate, setup_context=_setup_context)


def _check(features: Tensor, segments: Tensor) -> None:
    if features.dim() != 3 or features.shape[1] % 2 or 0 in features.shape:
        raise ValueError(f"features must be (N,C,T) with an even number of channels, not {tuple(features.shape)}")
    if segments.dim() != 3 or segments.shape[0] != features.shape[0] or segments.shape[2] != 4:
        raise ValueError(f"segments must be (N,K,4) for features {tuple(features.shape)}, not {tuple(segments.shape)}")
    same_device(features, segments=segments)
    if not segments.is_floating_point():
        raise ValueError(f"segments must be floating point, not {segments.dtype}")


def _stretches(pairs: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """First and last step of (..., 2) boundaries."""
    steps = pairs.to(torch.promote_types(pairs.dtype, torch.float32)).nan_to_num(0.0, time, -1).clamp(0, time - 1)
    first, last = steps.long().unbind(-1)
    return first, torch.maximum(first, last)


def _forward_torch(features: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """A sparse table: the maxima of all stretches of 1, 2, 4, ... steps; any stretch is two of them that overlap."""
    n, channels, time = features.shape
    if segments.shape[1] == 0:
        shape = (n, channels, 0)
        return features.new_empty(shape), features.new_empty(shape, dtype=torch.int32)
    steps = torch.arange(time, device=features.device, dtype=torch.int32)
    values, chosen = [features], [steps.expand(n, channels, time)]
    width = 1
    while 2 * width <= time:
        value, step = _better(values[-1], chosen[-1], width)
        values.append(value)
        chosen.append(step)
        width *= 2
    table, table_steps = torch.cat(values, 2), torch.cat(chosen, 2)
    half, found = channels // 2, []
    for number in range(2):
        first, last = _stretches(segments[..., 2 * number : 2 * number + 2], time)
        level = torch.log2((last - first + 1).double()).long()
        width_of_level = 1 << level
        begins = level * (time + 1) - (width_of_level - 1)  # of the level in the table
        places = torch.stack([first, last + 1 - width_of_level], 2) + begins[..., None]  # (N,K,2)
        own = slice(0, half) if number == 0 else slice(half, None)
        places = places.flatten(1)[:, None].expand(n, half, -1)
        value = table[:, own].gather(2, places).unflatten(2, (-1, 2))
        step = table_steps[:, own].gather(2, places).unflatten(2, (-1, 2))
        found.append(_first(value[..., 0], step[..., 0], value[..., 1], step[..., 1]))
    maxima, arguments = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return maxima, arguments


def _better(values: Tensor, steps: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """From all stretches of width steps to all of twice that."""
    return _first(values[..., :-width], steps[..., :-width], values[..., width:], steps[..., width:])


def _first(a: Tensor, a_steps: Tensor, b: Tensor, b_steps: Tensor) -> tuple[Tensor, Tensor]:
    """The larger; of equals, a, which begins earlier."""
    take = (b > a) | (b.isnan() & ~a.isnan())
    return torch.where(take, b, a), torch.where(take, b_steps, a_steps)


def _backward_torch(grad: Tensor, arguments: Tensor, time: int) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if grad.device.type == "cpu":
        result = grad.new_zeros((*grad.shape[:2], time), dtype=dtype)
        return result.scatter_add_(2, arguments.long(), grad.to(dtype)).to(grad.dtype)
    return _sum_in_order(grad.to(dtype), arguments, time).to(grad.dtype)  # scatter_add_ has no fixed order on a GPU


def _sum_in_order(grad: Tensor, arguments: Tensor, time: int) -> Tensor:
    """scatter_add_ of (N,C,K) into (N,C,T), bitwise the same each time; 32 channels at a time, (N,K,T) each."""
    steps = torch.arange(time, device=grad.device)
    parts = [
        torch.where(own[..., None] == steps, value[..., None], 0).sum(2)
        for own, value in zip(arguments.split(32, 1), grad.split(32, 1), strict=True)
    ]
    return torch.cat(parts, 1)


def _forward_kernels(features: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    features, segments = features.contiguous(), segments.contiguous()
    n, channels, time = features.shape
    shape = (n, channels, segments.shape[1])
    maxima, arguments = features.new_empty(shape), features.new_empty(shape, dtype=torch.int32)
    if maxima.numel():
        count, lanes = segments.shape[1], 1 if time <= _LONG else 8
        _library(features.dtype, segments.dtype, features.device, lanes).launch(
            "boundary_max_pool", n * channels, _threads(count * lanes),
            features, segments, maxima, arguments, channels, time, count,
        )  # fmt: skip
    return maxima, arguments


def _backward_kernels(grad: Tensor, arguments: Tensor, time: int) -> Tensor:
    grad, arguments = grad.contiguous(), arguments.contiguous()
    n, channels, count = grad.shape
    result = grad.new_empty((n, channels, time))
    _library(grad.dtype, torch.float32, grad.device).launch(
        "boundary_max_pool_grad", n * channels, _threads(time), grad, arguments, result, time, count
    )
    return result


def _threads(wanted: int) -> int:
    """Of a block: whole warps, no more than it can use."""
    return min(compiler.THREADS, 32 * math.ceil(wanted / 32))


def _library(dtype: torch.dtype, segments: torch.dtype, device: torch.device, lanes: int = 1) -> compiler.Kernels:
    defines: compiler.Defines = {
        "WIDTH": 1, "ELEMENT": TYPES[dtype], "SEGMENT": TYPES[segments], "LANES": lanes,
    }  # fmt: skip
    return compiler.library("boundary_max_pool", defines, device)
