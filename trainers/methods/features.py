"""Feature distillation: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.

Teacher and student agree in the shape of the distilled features, so the paper's regressor is left out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ...configs.schema import LossConfig
from .base import Method, Outputs


def loss(config: LossConfig, student: Outputs, teacher: Outputs) -> Tensor:
    """w * mean((F_s - F_t)^2) / mean(F_t^2), features (N,C,T,H,W): the share of the teacher's energy that is missed.

    The division, over the batch, keeps one weight right for networks whose features differ in size.
    """
    own, taught = student["features"].float(), teacher["features"].float()
    return config.features * F.mse_loss(own, taught) / taught.square().mean().clamp_min(1e-12)


METHOD = Method("feature MSE (FitNet)", teacher=("features",), loss=loss)
