"""Logit distillation: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...configs.schema import LossConfig
from .base import Method, Outputs


def loss(config: LossConfig, student: Outputs, teacher: Outputs) -> Tensor:
    """w * t^2 * KL(teacher || student) of the classes' distributions at temperature t, averaged over the batch.

    Both are softmaxes of time-averaged logits (N,K,T') / t; t^2 keeps the gradients' size when t changes.
    """
    t = config.temperature
    own, taught = ((outputs["logits"].float().mean(2) / t).log_softmax(1) for outputs in (student, teacher))
    return config.logits * t * t * F.kl_div(own, taught, reduction="batchmean", log_target=True)


METHOD = Method("logit distillation (Hinton)", teacher=("logits",), loss=loss)
