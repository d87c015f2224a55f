"""What a distillation method is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...configs.schema import LossConfig

# What a network gives for a batch: "logits" (N,K,T'), "features" (N,C,T,H,W), "attention" (N,C,T).
Outputs = dict[str, Tensor]
Loss = Callable[[LossConfig, Outputs, Outputs], Tensor]


@dataclass(frozen=True)
class Method:
    """title: a few words for reports. teacher: the outputs of the teacher that it compares with; none for no teacher.

    vae: the student has a conditional VAE and learns in the two stages of the paper; follows_vae: stage A follows the
    teacher's VAE. loss: (config, student, teacher) -> a scalar that is added to the class loss, already weighted, for
    methods without a VAE.
    """

    title: str
    teacher: tuple[str, ...]
    vae: bool = False
    follows_vae: bool = False
    loss: Loss | None = None

    @property
    def needs_teacher(self) -> bool:
        return bool(self.teacher) or self.follows_vae
