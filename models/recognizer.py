"""Recognizer: I3D, attention head and classifier. Teacher and student are this class with two configs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from .attention import AttentionHead
from .cvae import ConditionalVAE
from .i3d import I3D, feature_shape

ENDPOINT = "Mixed_5c"


class RecognizerOutput(NamedTuple):
    """features {endpoint: (N,C,T,H,W)}; attention (N,C,T), None without a head; logits (N,K,T'); scores (N,K)."""

    features: dict[str, Tensor]
    attention: Tensor | None
    logits: Tensor
    scores: Tensor


class Recognizer(nn.Module):
    """Clips (N,3,T,H,W) -> RecognizerOutput. With an attention head the classifier sees the foreground F*a*r.

    feature_shape: (C,T,H,W) of Mixed_5c, from models.i3d.feature_shape. compat "reference" sums r over the batch and
    makes scores as the sum of each time step's softmax; otherwise r is per sample and scores are the softmax of the
    time-averaged logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        shape: tuple[int, int, int, int],
        *,
        attention: bool = True,
        compat: str = "none",
        in_channels: int = 3,
    ):
        super().__init__()
        channels, time, height, width = shape
        self.compat = compat
        self.backbone = I3D(
            in_channels,
            temporal=config.temporal,
            width=config.width,
            bn_momentum=config.bn_momentum,
            endpoints=(ENDPOINT,),
        )
        self.attention = AttentionHead(channels, time, height, width) if attention else None
        self.pool = (min(2, time), height, width)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Conv3d(channels, num_classes, 1)
        _initialize(self)

    def forward(self, clips: Tensor) -> RecognizerOutput:
        features = self.backbone(clips)
        last = features[ENDPOINT]
        attention = None if self.attention is None else self.attention(last)
        weighted = last if attention is None else foreground(last, attention, per_batch=self.compat == "reference")
        pooled = F.avg_pool3d(weighted, self.pool, stride=1)
        logits = self.logits(self.dropout(pooled)).flatten(2)
        return RecognizerOutput(features, attention, logits, self.scores(logits))

    def scores(self, logits: Tensor) -> Tensor:
        """Class scores (N,K) of logits (N,K,T')."""
        if self.compat == "reference":
            return logits.float().softmax(1).sum(2)
        return logits.float().mean(2).softmax(1)


def foreground(features: Tensor, attention: Tensor, *, per_batch: bool = False) -> Tensor:
    """F*a*r with r = sum(F) / sum(F*a), so that weighting keeps the features' scale. Sums are per sample.

    features (N,C,T,H,W) are not negative (outputs of a ReLU); a sample of zeros alone stays zero.
    """
    weighted = features * attention[..., None, None]
    axes = tuple(range(0 if per_batch else 1, 5))
    total, kept = (x.float().sum(axes, keepdim=True) for x in (features, weighted))
    tiny = torch.finfo(torch.float32).tiny
    return weighted * (total / kept.clamp_min(tiny)).to(weighted.dtype)


def build(
    config: ModelConfig, num_classes: int, clip_length: int, size: int, *, attention: bool = True, compat: str = "none"
) -> Recognizer:
    """A recognizer with fresh weights for clips of clip_length frames of size x size pixels."""
    shape = feature_shape(clip_length, size, config.width)
    return Recognizer(config, num_classes, shape, attention=attention, compat=compat)


def build_cvae(shape: tuple[int, int, int, int]) -> ConditionalVAE:
    """A conditional VAE for features of (C,T,H,W)."""
    channels, _, height, width = shape
    cvae = ConditionalVAE(channels, height, width)
    _initialize(cvae)
    return cvae


def _initialize(module: nn.Module) -> None:
    """He normal for convolutions before a ReLU, as the published nets' ancestors; the classifier starts near zero."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv3d | nn.Conv1d | nn.ConvTranspose3d):
            if name == "logits":
                nn.init.normal_(layer.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
