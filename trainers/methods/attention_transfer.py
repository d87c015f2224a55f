"""Attention transfer: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...configs.schema import LossConfig
from .base import Method, Outputs


def loss(config: LossConfig, student: Outputs, teacher: Outputs) -> Tensor:
    """w * ||Q_s - Q_t||^2, averaged over the batch; Q is a sample's normalized map, see attention_map."""
    own, taught = (attention_map(outputs["features"]) for outputs in (student, teacher))
    return config.attention_transfer * (own - taught).square().sum(1).mean()


def attention_map(features: Tensor) -> Tensor:
    """Features (N,C,T,H,W) -> (N,T*H*W): squares summed over the channels, scaled to length 1. Zeros stay zeros."""
    return F.normalize(features.float().square().sum(1).flatten(1), dim=1)


METHOD = Method("attention transfer", teacher=("features",), loss=loss)
