"""Optimizers and their schedules, from PyTorch or NVIDIA Apex."""

from __future__ import annotations

import importlib
import math

import torch
from torch import nn

from ..configs.schema import OptimizerConfig
from ..errors import UserError


def build(config: OptimizerConfig, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of one module; biases and norm weights get no weight decay.

    adam has its decay in the gradient, as L2 regularization; adamw takes it off the weights beside the step (Loshchilov
    and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).
    """
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.backend == "apex":
        apex = _apex_optimizers()
        if config.name == "sgd":
            return apex.FusedSGD(groups, lr=config.lr, momentum=config.momentum)
        return apex.FusedAdam(groups, lr=config.lr, betas=config.betas, adam_w_mode=config.name == "adamw")
    fused = True if device.type == "cuda" else None
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=fused)


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The rate of a step (from 0): linear warm-up, then constant or half a cosine down to 0."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _apex_optimizers():
    hint = "build NVIDIA's from its source repository with its CUDA extensions, or use optimizer.backend=torch"
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        try:
            importlib.import_module("apex")
        except ImportError:
            raise UserError(f"optimizer.backend: NVIDIA Apex is not installed; {hint}") from None
        raise UserError(
            f"optimizer.backend: the installed package `apex` is another project of that name; {hint}"
        ) from None
    if not hasattr(optimizers, "FusedSGD"):
        raise UserError(f"optimizer.backend: this Apex was built without its fused optimizers; {hint}")
    return optimizers
