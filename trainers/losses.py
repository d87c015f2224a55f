"""The losses of both phases: pure functions of tensors that return named scalar terms and their weighted `total`.

F = features (N,C,T,H,W); a = attention (N,C,T); R = reconstruction (N,C,T,H,W); mean, logvar (N,T,C).
"Generative Model-based Feature Knowledge Distillation for Action Recognition", AAAI 2024.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..configs.schema import LossConfig
from ..kernels import generative_kd
from ..kernels.attention_kd import attention_kd
from ..kernels.generative_kd import kl_to_attention

__all__ = ["Terms", "classification", "distillation", "generative", "kl_to_attention", "reconstruction_weight", "weigh"]

Terms = dict[str, Tensor]


def classification(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, compat: str = "none") -> Tensor:
    """Cross entropy of time-averaged logits (N,K,T') with labels (N,).

    compat "reference" takes the softmax of every time step, sums them and puts the sums through another softmax.
    """
    scores = logits.float().softmax(1).sum(2) if compat == "reference" else logits.float().mean(2)
    return F.cross_entropy(scores, labels, label_smoothing=label_smoothing)


def generative(
    config: LossConfig,
    features: Tensor,
    attention: Tensor,
    reconstruction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    teacher_reconstruction: Tensor | None = None,
) -> Terms:
    """Stage A, for the conditional VAE: mse + kl weight * kl [+ generative weight * kd].

    kd compares the reconstruction with the teacher VAE's of the same features, attention and noise.
    """
    constants = (features, attention, teacher_reconstruction)
    fused = not any(tensor is not None and tensor.requires_grad for tensor in constants)
    function = generative_kd.generative_kd if fused else generative_kd.reference
    found = function(features, reconstruction, mean, logvar, attention, teacher_reconstruction)
    terms = {"mse": found.mse, "kl": found.kl}
    total = found.mse + config.kl * found.kl
    if found.kd is not None:
        terms["kd"] = found.kd
        total = total + config.generative * found.kd
    return {"total": total, **terms}


def distillation(
    config: LossConfig,
    class_loss: Tensor,
    epoch: int,
    features: Tensor,
    reconstruction: Tensor,
    attention: Tensor,
    teacher_attention: Tensor | None = None,
) -> Terms:
    """Stage B, for backbone and attention; see weigh().

    features are not detached: they too move towards what the generative model expects.
    """
    found = attention_kd(features, attention, teacher_attention, reconstruction)
    assert found.reconstruction_loss is not None
    return weigh(config, class_loss, epoch, found.reconstruction_loss, found.attention_loss)


def weigh(config: LossConfig, class_loss: Tensor, epoch: int, rec: Tensor, att: Tensor | None) -> Terms:
    """Stage B of losses that are there: class + w * rec [+ attention weight * att].

    epoch counts from 1; w grows linearly to the reconstruction weight over reconstruction_ramp epochs (by default
    min(epoch, 20) / 40).
    """
    total = class_loss + reconstruction_weight(config, epoch) * rec
    if att is None:
        return {"total": total, "class": class_loss, "rec": rec}
    return {"total": total + config.attention * att, "class": class_loss, "rec": rec, "att": att}


def reconstruction_weight(config: LossConfig, epoch: int) -> float:
    """w of stage B in an epoch, counted from 1."""
    return config.reconstruction * min(epoch, config.reconstruction_ramp) / config.reconstruction_ramp
