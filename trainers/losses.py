"""The losses of both phases: pure functions of tensors that return named scalar terms and their weighted `total`.

F = features (N,C,T,H,W); a = attention (N,C,T); R = reconstruction (N,C,T,H,W); mean, logvar (N,T,C).
"Generative Model-based Feature Knowledge Distillation for Action Recognition", AAAI 2024.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..configs.schema import LossConfig

Terms = dict[str, Tensor]


def classification(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, compat: str = "none") -> Tensor:
    """Cross entropy of time-averaged logits (N,K,T') with labels (N,).

    compat "reference" takes the softmax of every time step, sums them and puts the sums through another softmax.
    """
    scores = logits.float().softmax(1).sum(2) if compat == "reference" else logits.float().mean(2)
    return F.cross_entropy(scores, labels, label_smoothing=label_smoothing)


def kl_to_attention(mean: Tensor, logvar: Tensor, attention: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from the prior N(a, I), averaged over all elements."""
    mean, logvar = mean.float(), logvar.float()
    shift = mean - attention.float().transpose(1, 2)
    return -0.5 * (1 + logvar - shift.square() - logvar.exp()).mean()


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
    terms = {"mse": _mse(reconstruction, features), "kl": kl_to_attention(mean, logvar, attention)}
    total = terms["mse"] + config.kl * terms["kl"]
    if teacher_reconstruction is not None:
        terms["kd"] = _mse(reconstruction, teacher_reconstruction)
        total = total + config.generative * terms["kd"]
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
    """Stage B, for backbone and attention: class + w * rec [+ attention weight * att].

    epoch counts from 1; w grows linearly to the reconstruction weight over reconstruction_ramp epochs (by default
    min(epoch, 20) / 40). features are not detached: they too move towards what the generative model expects.
    """
    terms = {"class": class_loss, "rec": _mse(reconstruction, features)}
    total = class_loss + reconstruction_weight(config, epoch) * terms["rec"]
    if teacher_attention is not None:
        terms["att"] = _mse(attention, teacher_attention)
        total = total + config.attention * terms["att"]
    return {"total": total, **terms}


def reconstruction_weight(config: LossConfig, epoch: int) -> float:
    """w of stage B in an epoch, counted from 1."""
    return config.reconstruction * min(epoch, config.reconstruction_ramp) / config.reconstruction_ramp


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a.float(), b.float())
