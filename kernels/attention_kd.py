"""Stage B in one op: features weighted by attention, pooled or as maps, with the attention and reconstruction losses.

"Generative Model-based Feature Knowledge Distillation for Action Recognition", AAAI 2024. With a the attention and R
the reconstruction of features F:

    foreground = F * a * r,         r = sum F / sum(F * a)           a sample's sums
    background = F * (1-a) * r_b,   r_b = sum F / sum(F * (1-a))
    att = mean (a - teacher's a)^2,   rec = mean (R - F)^2

The classifier starts by averaging the foreground over space and two steps of time. That is linear, so the pooled
foreground needs only F's sums over space: no map of the features' size is written, forward or backward.

A sum of weighted features of 0 (no feature is active) makes its ratio 0, and the ratio then has no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backend
from .attention_kd_launch import STATS, backward_kernels, forward_kernels
from .tensors import layout_of, same_device, takes

_TINY = torch.finfo(torch.float32).tiny


class AttentionKD(NamedTuple):
    """foreground (N,C,T',1,1) pooled, T' = T - 1 (1 for T = 1), or (N,C,T,H,W) with background, else None; attention
    and reconstruction losses (), float32, None without teacher's attention or reconstruction."""

    foreground: Tensor
    background: Tensor | None
    attention_loss: Tensor | None
    reconstruction_loss: Tensor | None


def attention_kd(
    features: Tensor,
    attention: Tensor,
    teacher_attention: Tensor | None = None,
    reconstruction: Tensor | None = None,
    *,
    maps: bool = False,
    logits: bool = False,
    per_batch: bool = False,
) -> AttentionKD:
    """Weights features (N,C,T,H,W) by attention (N,C,T), and compares both; teacher_attention (N,C,T) is a constant.

    maps: foreground and background instead of the pooled foreground. logits: both attentions are logits, of which the
    sigmoid is taken. per_batch: the ratios' sums are the whole batch's, as in the original implementation; torch only.
    Gradients go to features, attention and reconstruction. float32, bfloat16 or float16 in any mixture, contiguous or
    channels_last_3d; sums are float32. float64 runs in torch. reconstruction is copied if it lies otherwise in memory
    than features. Raises ValueError for shapes that do not fit.
    """
    if backend.formulas_wanted():
        return reference(
            features, attention, teacher_attention, reconstruction, maps=maps, logits=logits, per_batch=per_batch
        )
    if teacher_attention is not None and teacher_attention.dtype != attention.dtype:
        common = torch.promote_types(teacher_attention.dtype, attention.dtype)
        attention, teacher_attention = attention.to(common), teacher_attention.to(common)
    if teacher_attention is not None:
        teacher_attention = teacher_attention.detach()
    if reconstruction is not None:  # once, so that the backward pass finds it in order
        reconstruction = reconstruction.contiguous(memory_format=layout_of(features))
    found = torch.ops.genkd.attention_kd(
        features, attention, teacher_attention, reconstruction, maps, logits, per_batch
    )
    foreground, background, att, rec = found[:4]
    return AttentionKD(
        foreground,
        background if maps else None,
        None if teacher_attention is None else att,
        None if reconstruction is None else rec,
    )


def reference(
    features: Tensor,
    attention: Tensor,
    teacher_attention: Tensor | None = None,
    reconstruction: Tensor | None = None,
    *,
    maps: bool = False,
    logits: bool = False,
    per_batch: bool = False,
) -> AttentionKD:
    """attention_kd as its formula reads, differentiable by autograd: what the op is tested against and timed beside."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    a, values = _weights(attention, logits, dtype), features.to(dtype)
    att = rec = None
    if teacher_attention is not None:
        att = F.mse_loss(a, _weights(teacher_attention, logits, dtype))
    if reconstruction is not None:
        rec = F.mse_loss(reconstruction.to(dtype), values)
    front = foreground(values, a, per_batch=per_batch)
    if maps:
        back = foreground(values, 1 - a, per_batch=per_batch)
        return AttentionKD(front.to(features.dtype), back.to(features.dtype), att, rec)
    window = (min(2, features.shape[2]), *features.shape[3:])
    return AttentionKD(F.avg_pool3d(front, window, stride=1).to(features.dtype), None, att, rec)


def foreground(features: Tensor, attention: Tensor, *, per_batch: bool = False) -> Tensor:
    """F*a*r with r = sum F / sum(F*a), so that weighting keeps the features' scale. Sums are per sample.

    features (N,C,T,H,W), attention (N,C,T); a sample without active features stays zero.
    """
    weighted = features * attention[..., None, None]
    axes = tuple(range(0 if per_batch else 1, 5))
    return weighted * _ratio(features.sum(axes, keepdim=True), weighted.sum(axes, keepdim=True))


def _ratio(total: Tensor, kept: Tensor) -> Tensor:
    empty = kept.abs() <= _TINY
    return torch.where(empty, 0, total / torch.where(empty, 1, kept))


@torch.library.custom_op("genkd::attention_kd", mutates_args=())
def _op(
    features: Tensor,
    attention: Tensor,
    teacher_attention: Tensor | None,
    reconstruction: Tensor | None,
    maps: bool,
    logits: bool,
    per_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> foreground, background (0,) unless maps, att, rec, sums over space (N,C,T), stats (N,6) = r, sum F*a, r_b,
    sum F*(1-a), and two that the kernels keep there. The last two are for the backward pass."""
    _check(features, attention, teacher_attention, reconstruction)
    arguments = (features, attention, teacher_attention, reconstruction, maps, logits)
    return backend.run(
        features,
        lambda: forward_kernels(*arguments),
        lambda: _forward_torch(*arguments, per_batch),
        fits=not per_batch and _fits(features, attention, teacher_attention, reconstruction),
    )


@_op.register_fake
def _(features, attention, teacher_attention, reconstruction, maps, logits, per_batch):  # type: ignore[no-untyped-def]
    _check(features, attention, teacher_attention, reconstruction)
    n, channels, time = features.shape[:3]
    dtype = torch.promote_types(features.dtype, torch.float32)
    if maps:
        layout = layout_of(features)
        foreground = torch.empty_like(features, memory_format=layout)
        background = torch.empty_like(features, memory_format=layout)
    else:
        foreground = features.new_empty((n, channels, max(time - 1, 1), 1, 1))
        background = features.new_empty((0,))
    small = [features.new_empty(shape, dtype=dtype) for shape in ((), (), (n, channels, time), (n, STATS))]
    return foreground, background, *small


@torch.library.custom_op("genkd::attention_kd_backward", mutates_args=())
def _backward(
    grad_foreground: Tensor | None,
    grad_background: Tensor | None,
    grad_att: Tensor | None,
    grad_rec: Tensor | None,
    features: Tensor,
    attention: Tensor,
    teacher_attention: Tensor | None,
    reconstruction: Tensor | None,
    sums: Tensor,
    stats: Tensor,
    maps: bool,
    logits: bool,
    per_batch: bool,
    of_reconstruction: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of features, attention, and reconstruction, (0,) unless of_reconstruction."""
    grads = (grad_foreground, grad_background, grad_att, grad_rec)
    arguments = (*grads, features, attention, teacher_attention, reconstruction, sums, stats, maps, logits)
    return backend.run(
        features,
        lambda: backward_kernels(*arguments, of_reconstruction),
        lambda: _backward_torch(*arguments, per_batch, of_reconstruction),
        fits=not per_batch and _fits(features, attention, teacher_attention, reconstruction),
    )


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_foreground, grad_background, grad_att, grad_rec, features, attention, teacher_attention, reconstruction,
    sums, stats, maps, logits, per_batch, of_reconstruction,
):  # fmt: skip
    layout = layout_of(features)
    grad_features = torch.empty_like(features, memory_format=layout)
    grad_attention = torch.empty_like(attention, memory_format=torch.contiguous_format)
    if of_reconstruction:
        return grad_features, grad_attention, torch.empty_like(reconstruction, memory_format=layout)
    return grad_features, grad_attention, features.new_empty((0,))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, attention, teacher_attention, reconstruction, *flags = inputs
    ctx.save_for_backward(features, attention, teacher_attention, reconstruction, output[4], output[5])
    ctx.flags = flags
    ctx.set_materialize_grads(False)


def _differentiate(ctx, foreground, background, att, rec, sums, stats):  # type: ignore[no-untyped-def]
    maps = ctx.flags[0]
    of_reconstruction = ctx.needs_input_grad[3] and rec is not None
    grads = (foreground, background if maps else None, att, rec)
    features, attention, made = torch.ops.genkd.attention_kd_backward(
        *grads, *ctx.saved_tensors, *ctx.flags, of_reconstruction
    )
    return features, attention, None, made if of_reconstruction else None, None, None, None


_op.register_autograd(_differentiate, setup_context=_setup_context)


def _fits(features: Tensor, attention: Tensor, taught: Tensor | None, reconstruction: Tensor | None) -> bool:
    return takes(features, attention, reconstruction) and (taught is None or taught.dtype == attention.dtype)


def _check(features: Tensor, attention: Tensor, taught: Tensor | None, reconstruction: Tensor | None) -> None:
    if features.dim() != 5 or 0 in features.shape:
        raise ValueError(f"features must be (N,C,T,H,W), none of them 0, not {tuple(features.shape)}")
    for name, tensor in (("attention", attention), ("teacher_attention", taught)):
        if tensor is not None and tensor.shape != features.shape[:3]:
            raise ValueError(
                f"{name} must be (N,C,T) = {tuple(features.shape[:3])} for these features, not {tuple(tensor.shape)}"
            )
    same_device(features, attention=attention, teacher_attention=taught, reconstruction=reconstruction)
    if reconstruction is not None and reconstruction.shape != features.shape:
        raise ValueError(
            f"reconstruction must have the features' shape {tuple(features.shape)}, not {tuple(reconstruction.shape)}"
        )


# The torch implementation: what the kernels do, in the same steps.


def _forward_torch(
    features: Tensor, attention: Tensor, taught: Tensor | None, reconstruction: Tensor | None, maps: bool, logits: bool,
    per_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(features.dtype, torch.float32)
    a = _weights(attention, logits, dtype)
    sums = _over_space(features, dtype)
    axes = (0, 1, 2) if per_batch else (1, 2)
    total, kept, rest = (value.sum(axes, keepdim=True) for value in (sums, a * sums, (1 - a) * sums))
    ratio, opposite = _ratio(total, kept), _ratio(total, rest)
    of_samples = [value.flatten().expand(len(features)) for value in (ratio, kept, opposite, rest)]
    stats = torch.stack([*of_samples, *[torch.zeros_like(of_samples[0])] * (STATS - 4)], 1)
    zero = torch.zeros((), dtype=dtype, device=features.device)
    att = zero if taught is None else F.mse_loss(a, _weights(taught, logits, dtype))
    rec = zero.clone() if reconstruction is None else F.mse_loss(reconstruction.to(dtype), features.to(dtype))
    if maps:
        layout = layout_of(features)
        found = [
            (features * _beside(by, features)).to(features.dtype).contiguous(memory_format=layout)
            for by in (a * ratio, (1 - a) * opposite)
        ]
        return found[0], found[1], att, rec, sums, stats
    of_rows = a * sums * (ratio / math.prod(features.shape[3:]))
    if features.shape[2] > 1:
        of_rows = (of_rows[..., 1:] + of_rows[..., :-1]) / 2
    return of_rows.to(features.dtype)[..., None, None], features.new_empty((0,)), att, rec, sums, stats


def _backward_torch(
    grad_foreground: Tensor | None, grad_background: Tensor | None, grad_att: Tensor | None, grad_rec: Tensor | None,
    features: Tensor, attention: Tensor, taught: Tensor | None, reconstruction: Tensor | None, sums: Tensor,
    stats: Tensor, maps: bool, logits: bool, per_batch: bool, of_reconstruction: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = sums.dtype
    a = _weights(attention, logits, dtype)
    axes = (0, 1, 2) if per_batch else (1, 2)
    ratio, kept, opposite, rest = stats[:, :4, None, None].unbind(1)
    same = torch.zeros(features.shape[:3], dtype=dtype, device=features.device)  # of F's gradient, over space
    grad_features: Tensor | None = None
    grad_a = torch.zeros_like(a)

    def side(grad: Tensor, by: Tensor, ratio: Tensor, kept: Tensor, sign: int) -> None:
        """Adds the gradients through F * by * ratio."""
        nonlocal same, grad_features
        of_rows = None if maps else _spread(grad, features).to(dtype)
        dots = _over_space(grad * features, dtype) if of_rows is None else of_rows * sums
        slope = (by * dots).sum(axes, keepdim=True) * _ratio(torch.ones_like(kept), kept)
        grad_a.add_(ratio * (dots - slope * sums), alpha=sign)
        same = same + slope * (1 - by * ratio)
        if of_rows is not None:
            same = same + by * ratio * of_rows
        else:
            through = grad * _beside(by * ratio, features)
            grad_features = through if grad_features is None else grad_features + through

    if grad_foreground is not None:
        side(grad_foreground, a, ratio, kept, 1)
    if grad_background is not None:
        side(grad_background, 1 - a, opposite, rest, -1)
    if grad_att is not None and taught is not None:
        grad_a.add_((a - _weights(taught, logits, dtype)) * (2 * grad_att / a.numel()))
    if logits:
        grad_a.mul_(a * (1 - a))
    made = features.new_empty((0,))
    if grad_rec is not None and reconstruction is not None:
        pull = torch.sub(reconstruction.to(dtype), features.to(dtype)).mul_(2 * grad_rec / features.numel())
        grad_features = -pull if grad_features is None else grad_features - pull
        if of_reconstruction:
            made = pull.to(reconstruction.dtype).contiguous(memory_format=layout_of(features))
    whole = torch.empty_like(features, memory_format=layout_of(features))
    everywhere = _beside(same, features)
    whole.copy_(everywhere if grad_features is None else grad_features.add_(everywhere))
    return whole, grad_a.to(attention.dtype), made


def _over_space(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over H and W: (N,C,T), contiguous. Over the channels of channels_last_3d a CPU is ten times as fast so."""
    if layout_of(features) == torch.channels_last_3d:
        return features.permute(0, 2, 3, 4, 1).sum((2, 3), dtype=dtype).transpose(1, 2).contiguous()
    return features.sum((3, 4), dtype=dtype)


def _beside(of_rows: Tensor, features: Tensor) -> Tensor:
    """(N,C,T) as (N,C,T,1,1) that lies in memory as features do, for arithmetic with them."""
    if layout_of(features) == torch.channels_last_3d:
        of_rows = of_rows.transpose(1, 2).contiguous().transpose(1, 2)
    return of_rows[..., None, None]


def _weights(attention: Tensor, logits: bool, dtype: torch.dtype) -> Tensor:
    attention = attention.to(dtype).contiguous()
    return attention.sigmoid() if logits else attention


def _spread(grad: Tensor, features: Tensor) -> Tensor:
    """The gradient (N,C,T) that each element of the foreground gets from the pooled one's, (N,C,T',1,1)."""
    grad = grad[..., 0, 0] / math.prod(features.shape[3:])
    if features.shape[2] == 1:
        return grad
    return (F.pad(grad, (0, 1)) + F.pad(grad, (1, 0))) / 2
