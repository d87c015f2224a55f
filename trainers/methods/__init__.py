"""Distillation methods by name. One file each holds its pure loss; the phases and the loop are the same for all."""

from __future__ import annotations

from . import attention_transfer, features, generative, logits
from .base import Method, Outputs

METHODS: dict[str, Method] = {
    "none": Method("no distillation", teacher=()),
    "generative": generative.BOTH,
    "generative-only": generative.GENERATIVE_ONLY,
    "attention-only": generative.ATTENTION_ONLY,
    "logits": logits.METHOD,
    "features": features.METHOD,
    "attention-transfer": attention_transfer.METHOD,
}

__all__ = ["METHODS", "Method", "Outputs"]
