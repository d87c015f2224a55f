"""Stage A in one op: the three losses of the conditional VAE.

"Generative Model-based Feature Knowledge Distillation for Action Recognition", AAAI 2024. With R the reconstruction of
features F, a the attention, and the latent's distribution N(mean, exp(logvar)):

    mse = mean (R - F)^2,   kl = KL( N(mean, exp(logvar)) || N(a, I) ) / elements,   kd = mean (R - teacher's R)^2
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backend
from . import compile as compiler
from .tensors import TYPES, aligned, layout_of, same_device, takes

_LOSSES, _MAX_BLOCKS = 3, 2048


class GenerativeKD(NamedTuple):
    """The losses, (), float32; kd is None without a teacher's reconstruction."""

    mse: Tensor
    kl: Tensor
    kd: Tensor | None


def kl_to_attention(mean: Tensor, logvar: Tensor, attention: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)), (N,T,C), from the prior N(a, I), a (N,C,T), averaged over all elements."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    shift = mean - attention.to(dtype).transpose(1, 2)
    return -0.5 * (1 + logvar - shift.square() - logvar.exp()).mean()


def generative_kd(
    features: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    attention: Tensor,
    teacher_reconstruction: Tensor | None = None,
) -> GenerativeKD:
    """features and reconstructions (N,C,T,H,W), mean and logvar (N,T,C), attention (N,C,T).

    Gradients go to reconstruction, mean and logvar; the other inputs are constants. float32, bfloat16 or float16 in any
    mixture, contiguous or channels_last_3d; sums are float32. float64 runs in torch. What lies otherwise in memory than
    reconstruction is copied. Raises ValueError for shapes that do not fit, and for constants that require a gradient.
    """
    taught = teacher_reconstruction
    if backend.formulas_wanted():
        return reference(features, reconstruction, mean, logvar, attention, taught)
    for name, tensor in (("features", features), ("attention", attention), ("teacher_reconstruction", taught)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"generative_kd has no gradient for {name}; detach it")
    if mean.dtype != logvar.dtype:
        common = torch.promote_types(mean.dtype, logvar.dtype)
        mean, logvar = mean.to(common), logvar.to(common)
    layout = layout_of(reconstruction)  # once, so that the backward pass finds them in order
    features = features.contiguous(memory_format=layout)
    taught = None if taught is None else taught.contiguous(memory_format=layout)
    mse, kl, kd = torch.ops.genkd.generative_kd(features, reconstruction, taught, mean, logvar, attention)
    return GenerativeKD(mse, kl, None if taught is None else kd)


def reference(
    features: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    attention: Tensor,
    teacher_reconstruction: Tensor | None = None,
) -> GenerativeKD:
    """generative_kd as its formula reads, differentiable by autograd; for tests and timings."""
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    made, taught = reconstruction.to(dtype), teacher_reconstruction
    kd = None if taught is None else F.mse_loss(made, taught.to(dtype))
    return GenerativeKD(F.mse_loss(made, features.to(dtype)), kl_to_attention(mean, logvar, attention), kd)


@torch.library.custom_op("genkd::generative_kd", mutates_args=())
def _op(
    features: Tensor, reconstruction: Tensor, taught: Tensor | None, mean: Tensor, logvar: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> mse, kl, kd (0 without taught)"""
    _check(features, reconstruction, taught, mean, logvar, attention)
    arguments = (features, reconstruction, taught, mean, logvar, attention)
    return backend.run(
        reconstruction,
        lambda: _forward_kernels(*arguments),
        lambda: _forward_torch(*arguments),
        fits=takes(*arguments) and mean.dtype == logvar.dtype,
    )


@_op.register_fake
def _(features, reconstruction, taught, mean, logvar, attention):  # type: ignore[no-untyped-def]
    _check(features, reconstruction, taught, mean, logvar, attention)
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    return tuple(features.new_empty((), dtype=dtype) for _ in range(_LOSSES))


@torch.library.custom_op("genkd::generative_kd_backward", mutates_args=())
def _backward(
    grad_mse: Tensor | None,
    grad_kl: Tensor | None,
    grad_kd: Tensor | None,
    features: Tensor,
    reconstruction: Tensor,
    taught: Tensor | None,
    mean: Tensor,
    logvar: Tensor,
    attention: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of reconstruction, mean and logvar"""
    arguments = (grad_mse, grad_kl, grad_kd, features, reconstruction, taught, mean, logvar, attention)
    return backend.run(
        reconstruction,
        lambda: _backward_kernels(*arguments),
        lambda: _backward_torch(*arguments),
        fits=takes(*arguments[3:]) and mean.dtype == logvar.dtype,
    )


@_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_mse, grad_kl, grad_kd, features, reconstruction, taught, mean, logvar, attention
):
    of_latent = (torch.empty_like(value, memory_format=torch.contiguous_format) for value in (mean, logvar))
    return torch.empty_like(reconstruction, memory_format=layout_of(reconstruction)), *of_latent


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, mse, kl, kd):  # type: ignore[no-untyped-def]
    made, mean, logvar = torch.ops.genkd.generative_kd_backward(mse, kl, kd, *ctx.saved_tensors)
    return None, made, None, mean, logvar, None


_op.register_autograd(_differentiate, setup_context=_setup_context)


def _check(
    features: Tensor, reconstruction: Tensor, taught: Tensor | None, mean: Tensor, logvar: Tensor, attention: Tensor
) -> None:
    shape = features.shape
    if len(shape) != 5 or 0 in shape:
        raise ValueError(f"features must be (N,C,T,H,W), none of them 0, not {tuple(shape)}")
    n, channels, time = shape[:3]
    same_device(
        features, reconstruction=reconstruction, teacher_reconstruction=taught, mean=mean, logvar=logvar,
        attention=attention,
    )  # fmt: skip
    for name, tensor, wanted in (
        ("reconstruction", reconstruction, tuple(shape)),
        ("teacher_reconstruction", taught, tuple(shape)),
        ("mean", mean, (n, time, channels)),
        ("logvar", logvar, (n, time, channels)),
        ("attention", attention, (n, channels, time)),
    ):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {wanted} for features {tuple(shape)}, not {tuple(tensor.shape)}")


def _forward_torch(
    features: Tensor, reconstruction: Tensor, taught: Tensor | None, mean: Tensor, logvar: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mse, kl, kd = reference(features, reconstruction, mean, logvar, attention, taught)
    return mse, kl, torch.zeros_like(mse) if kd is None else kd


def _backward_torch(
    grad_mse: Tensor | None, grad_kl: Tensor | None, grad_kd: Tensor | None, features: Tensor, reconstruction: Tensor,
    taught: Tensor | None, mean: Tensor, logvar: Tensor, attention: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(reconstruction.dtype, torch.float32)
    made, pull = reconstruction.to(dtype), None
    for grad, target in ((grad_mse, features), (grad_kd, taught)):
        if grad is not None and target is not None:
            own = torch.sub(made, target.to(dtype)).mul_(2 * grad / made.numel())
            pull = own if pull is None else pull.add_(own)
    whole = torch.empty_like(reconstruction, memory_format=layout_of(reconstruction))
    grad_made = whole.zero_() if pull is None else whole.copy_(pull)
    if grad_kl is None:
        return grad_made, mean.new_zeros(mean.shape), logvar.new_zeros(logvar.shape)
    scale = grad_kl / mean.numel()
    grad_mean = (mean.to(dtype) - attention.to(dtype).transpose(1, 2)) * scale
    grad_logvar = (logvar.to(dtype).exp() - 1) * (0.5 * scale)
    return grad_made, grad_mean.to(mean.dtype).contiguous(), grad_logvar.to(logvar.dtype).contiguous()


def _prepare(
    features: Tensor, reconstruction: Tensor, taught: Tensor | None, attention: Tensor, mean: Tensor, *written: Tensor
) -> tuple[compiler.Kernels, int, tuple[int, int, int, int]]:
    """The kernels for tensors that lie alike, the number of blocks, and (size, N, T, C)."""
    n, channels, time = features.shape[:3]
    size = features.numel()
    width = 8 if aligned(features, reconstruction, taught, *written) and size % 8 == 0 else 1
    defines: compiler.Defines = {
        "WIDTH": width,
        "HAS_TEACHER": int(taught is not None),
        "FEATURE": TYPES[features.dtype],
        "RECONSTRUCTION": TYPES[reconstruction.dtype],
        "TAUGHT": TYPES[reconstruction.dtype if taught is None else taught.dtype],
        "LATENT": TYPES[mean.dtype],
        "ATTENTION": TYPES[attention.dtype],
    }
    kernels = compiler.library("generative_kd", defines, reconstruction.device)
    blocks = min(math.ceil(size / (width * compiler.THREADS)), _MAX_BLOCKS)
    return kernels, blocks, (size, n, time, channels)


def _alike(features: Tensor, reconstruction: Tensor, taught: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    layout = layout_of(reconstruction)
    taught = None if taught is None else taught.contiguous(memory_format=layout)
    return features.contiguous(memory_format=layout), reconstruction.contiguous(memory_format=layout), taught


def _forward_kernels(
    features: Tensor, reconstruction: Tensor, taught: Tensor | None, mean: Tensor, logvar: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    features, reconstruction, taught = _alike(features, reconstruction, taught)
    mean, logvar, attention = mean.contiguous(), logvar.contiguous(), attention.contiguous()
    kernels, blocks, sizes = _prepare(features, reconstruction, taught, attention, mean)
    partial = features.new_empty((blocks, _LOSSES), dtype=torch.float32)
    mse, kl, kd = (features.new_empty((), dtype=torch.float32) for _ in range(_LOSSES))
    kernels.launch(
        "generative_kd_sums", blocks, compiler.THREADS,
        features, reconstruction, taught, mean, logvar, attention, partial, *sizes,
    )  # fmt: skip
    kernels.launch("generative_kd_finish", 1, compiler.THREADS, partial, mse, kl, kd, blocks, *sizes)
    return mse, kl, kd


def _backward_kernels(
    grad_mse: Tensor | None, grad_kl: Tensor | None, grad_kd: Tensor | None, features: Tensor, reconstruction: Tensor,
    taught: Tensor | None, mean: Tensor, logvar: Tensor, attention: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    features, reconstruction, taught = _alike(features, reconstruction, taught)
    if grad_kd is None:
        taught = None  # its loss is not asked about, so it need not be read
    mean, logvar, attention = mean.contiguous(), logvar.contiguous(), attention.contiguous()
    made = torch.empty_like(reconstruction, memory_format=layout_of(reconstruction))
    grad_mean, grad_logvar = torch.empty_like(mean), torch.empty_like(logvar)
    kernels, blocks, sizes = _prepare(features, reconstruction, taught, attention, mean, made)
    kernels.launch(
        "generative_kd_grad", blocks, compiler.THREADS,
        features, reconstruction, taught, mean, logvar, attention, grad_mse, grad_kl, grad_kd, made, grad_mean,
        grad_logvar, *sizes,
    )  # fmt: skip
    return made, grad_mean, grad_logvar
