"""Recognizer: I3D, attention head and classifier. Teacher and student are this class with two configs."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from ..kernels.attention_kd import attention_kd
from .attention import AttentionHead
from .cvae import ConditionalVAE
from .i3d import I3D, STRIDE_SPACE, STRIDE_TIME, feature_shape

ENDPOINT = "Mixed_5c"
STRIDES = (STRIDE_TIME, STRIDE_SPACE, STRIDE_SPACE)


class RecognizerOutput(NamedTuple):
    """features {endpoint: (N,C,T,H,W)}; attention (N,C,T), None without a head; logits (N,K,T'); scores (N,K).

    The last two are None where the forward pass was asked not to classify.
    """

    features: dict[str, Tensor]
    attention: Tensor | None
    logits: Tensor | None
    scores: Tensor | None


class Recognizer(nn.Module):
    """Clips (N,in_channels,T,H,W) -> RecognizerOutput. With an attention head the classifier sees the foreground F*a*r.

    shape: (C,T,H,W) of Mixed_5c, from models.i3d.feature_shape. compat "reference" sums r over the batch, makes scores
    as the sum of each time step's softmax, and does not weight the features of flow in eval mode; otherwise r is per
    sample and scores are the softmax of the time-averaged logits.
    forward raises ValueError for clips of another shape than the network was built for.
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
        self.compat, self.in_channels, self.shape = compat, in_channels, shape
        self.backbone = I3D(
            in_channels,
            temporal=config.temporal,
            stem=config.stem,
            width=config.width,
            bn_momentum=config.bn_momentum,
            endpoints=(ENDPOINT,),
        )
        self.attention = AttentionHead(channels, time, height, width) if attention else None
        self.pool = (min(2, time), height, width)
        self.dropout = nn.Dropout(config.dropout)
        self.logits = nn.Conv3d(channels, num_classes, 1)
        _initialize(self)

    def forward(self, clips: Tensor, classify: bool = True, dropped: Tensor | None = None) -> RecognizerOutput:
        self._check(clips)
        features = self.backbone(clips)
        last = features[ENDPOINT]
        attention = None if self.attention is None else self.attention(last)
        if not classify:
            return RecognizerOutput(features, attention, None, None)
        if attention is None or (not self.training and self.compat == "reference" and self.in_channels == 2):
            pooled = F.avg_pool3d(last, self.pool, stride=1)
        else:
            pooled = attention_kd(last, attention, per_batch=self.compat == "reference").foreground
        logits = self.classify(pooled, dropped)
        return RecognizerOutput(features, attention, logits, self.scores(logits))

    def classify(self, pooled: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Logits (N,K,T') of features averaged over space and two steps of time, (N,C,T',1,1).

        dropped (N,C,T'): what they are multiplied with in training, in place of dropout that PyTorch draws.
        """
        if dropped is None or not self.training:
            pooled = self.dropout(pooled)
        else:
            pooled = pooled * dropped[..., None, None].to(pooled.dtype)
        return self.logits(pooled).flatten(2)

    @property
    def pooled_shape(self) -> tuple[int, int]:
        """Of what is classified: C, T'."""
        return self.shape[0], self.shape[1] - self.pool[0] + 1

    def _check(self, clips: Tensor) -> None:
        _, time, height, width = self.shape
        steps = [math.ceil(size / stride) for size, stride in zip(clips.shape[2:], STRIDES, strict=True)]
        if clips.shape[1] != self.in_channels or steps != [time, height, width]:
            raise ValueError(
                f"clips {tuple(clips.shape)} do not fit this network: it takes (N,{self.in_channels},T,H,W) that give "
                f"{time} x {height} x {width} features, so up to {time * STRIDES[0]} x {height * STRIDES[1]} x "
                f"{width * STRIDES[2]}; these give {' x '.join(map(str, steps))}"
            )

    def scores(self, logits: Tensor) -> Tensor:
        """Class scores (N,K) of logits (N,K,T')."""
        if self.compat == "reference":
            return logits.float().softmax(1).sum(2)
        return logits.float().mean(2).softmax(1)


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
