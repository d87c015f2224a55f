"""Attention head: which channels matter at which time step, from the features alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, as published; of fewer, of 2 channels at least, where a narrow network needs that."""
    groups = math.gcd(32, channels)
    return nn.GroupNorm(groups if channels >= 2 * groups else groups // 2, channels)


class AttentionHead(nn.Module):
    """Features (N,C,T,H,W) -> attention (N,C,T) in (0,1).

    A 1xHxW convolution to C/2 channels, group norm, ReLU; the T steps are repeated to C positions (nearest), a
    convolution over the positions gives C channels, and a linear layer maps the positions back to T: T is therefore
    fixed when the head is built. hidden: channels in place of C/2. "Generative Model-based Feature Knowledge
    Distillation", AAAI 2024.
    """

    def __init__(self, channels: int, time: int, height: int, width: int, hidden: int | None = None):
        super().__init__()
        self.channels, self.time = channels, time
        hidden = hidden or channels // 2
        self.reduce = nn.Sequential(nn.Conv3d(channels, hidden, (1, height, width)), group_norm(hidden), nn.ReLU())
        self.conv = nn.Conv1d(hidden, channels, 3, padding=1)
        self.norm = group_norm(channels)
        self.linear = nn.Linear(channels, time)

    def forward(self, features: Tensor) -> Tensor:
        x = self.reduce(features).flatten(2)  # (N,C/2,T)
        if x.shape[2] != self.time:
            raise ValueError(f"attention head built for {self.time} time steps was given {x.shape[2]}")
        x = F.interpolate(x, size=self.channels, mode="nearest")  # (N,C/2,C)
        x = F.relu(self.norm(self.conv(x)))  # (N,C,C)
        return torch.sigmoid(self.linear(x))
