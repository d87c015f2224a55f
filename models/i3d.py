"""Inflated 3D Inception-v1 (Carreira and Zisserman, CVPR 2017), full or top-heavy, at any width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import UserError

# Branch channels (1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool) of each Inception block, as published.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Top-heavy: no temporal extent up to and including Mixed_4c, 3D from Mixed_4d on.
FLAT_IN_TOP_HEAVY = ("Mixed_3b", "Mixed_3c", "Mixed_4b", "Mixed_4c")
STRIDE_TIME, STRIDE_SPACE = 8, 32
Extent = tuple[int, int, int]  # time, height, width


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis (before, after): output size = ceil(size / stride)."""
    total = max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)
    return total // 2, total - total // 2


def _pad(x: Tensor, kernel: Extent, stride: Extent) -> Tensor:
    before_after = [same_padding(x.shape[2 + axis], kernel[axis], stride[axis]) for axis in (2, 1, 0)]
    flat = [value for pair in before_after for value in pair]
    return F.pad(x, flat) if any(flat) else x


class Unit3D(nn.Module):
    """Convolution with SAME padding, batch norm (eps 1e-3) and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Extent, stride: Extent = (1, 1, 1), *, momentum: float):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(inputs, outputs, self.kernel, self.stride, bias=False)
        self.bn: nn.Module = nn.BatchNorm3d(outputs, eps=1e-3, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_pad(x, self.kernel, self.stride))), inplace=True)

    def fold(self) -> None:
        """Makes the batch norm, with its running statistics, part of the convolution: for networks that only run."""
        if isinstance(self.bn, nn.BatchNorm3d):
            self.conv3d, self.bn = fuse_conv_bn_eval(self.conv3d, self.bn), nn.Identity()


class MaxPool3dSame(nn.Module):
    """Max pooling with SAME padding by zeros; its inputs are outputs of a ReLU, so a zero never wins wrongly."""

    def __init__(self, kernel: Extent, stride: Extent):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_pad(x, self.kernel, self.stride), self.kernel, self.stride)


class Inception(nn.Module):
    """Four branches, concatenated over channels: 1x1, 1x1-3x3, 1x1-3x3 (the 5x5 of the paper), pool-1x1."""

    def __init__(self, inputs: int, channels: tuple[int, ...], *, flat: bool, momentum: float):
        super().__init__()
        c0, c1a, c1b, c2a, c2b, c3b = channels
        point, cube = (1, 1, 1), (1 if flat else 3, 3, 3)
        self.b0 = Unit3D(inputs, c0, point, momentum=momentum)
        self.b1a = Unit3D(inputs, c1a, point, momentum=momentum)
        self.b1b = Unit3D(c1a, c1b, cube, momentum=momentum)
        self.b2a = Unit3D(inputs, c2a, point, momentum=momentum)
        self.b2b = Unit3D(c2a, c2b, cube, momentum=momentum)
        self.b3a = MaxPool3dSame(cube, (1, 1, 1))
        self.b3b = Unit3D(inputs, c3b, point, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class FrameMean(nn.Module):
    """Clips (N,C,T,H,W) -> the means of frames 0 and 1, 2 and 3, ...: (N,C,T/2,H,W), rounded up."""

    def forward(self, clips: Tensor) -> Tensor:
        return F.avg_pool3d(clips, (2, 1, 1), ceil_mode=True)


class I3D(nn.Module):
    """The trunk up to Mixed_5c. Endpoints carry their published names.

    temporal: "full", or "top_heavy" for 1xkxk kernels (the pooling branch's too) up to Mixed_4c. stem: what the first
    convolution of a top-heavy net sees of the two frames that it halves time by: "strided", the first one alone, as
    published; "mean", their mean; "paired", both, with weights for each. width: factor on every channel count.
    forward: clips (N,C,T,H,W) -> {endpoint: features}; Mixed_4f is (N, 832*width, T/8*2, H/16, W/16) and Mixed_5c
    (N, 1024*width, T/8, H/32, W/32), sizes rounded up.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        temporal: str = "full",
        stem: str = "strided",
        width: float = 1.0,
        bn_momentum: float = 0.01,
        endpoints: tuple[str, ...] = ("Mixed_5c",),
    ):
        super().__init__()
        top_heavy = temporal == "top_heavy"
        self.endpoints = endpoints

        def scaled(channels: int) -> int:
            return max(1, round(channels * width))

        first, middle = scaled(64), scaled(192)
        kernel, stride = ((7, 7, 7), (2, 2, 2)) if not top_heavy else ((2 if stem == "paired" else 1, 7, 7), (2, 2, 2))
        if top_heavy and stem == "mean":
            self.frames = FrameMean()
            stride = (1, 2, 2)
        self.Conv3d_1a_7x7 = Unit3D(in_channels, first, kernel, stride, momentum=bn_momentum)
        self.MaxPool3d_2a_3x3 = MaxPool3dSame((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(first, first, (1, 1, 1), momentum=bn_momentum)
        self.Conv3d_2c_3x3 = Unit3D(first, middle, (1 if top_heavy else 3, 3, 3), momentum=bn_momentum)
        self.MaxPool3d_3a_3x3 = MaxPool3dSame((1, 3, 3), (1, 2, 2))
        channels = middle
        for name, published in MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = MaxPool3dSame((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = MaxPool3dSame((2, 2, 2), (2, 2, 2))
            branches = tuple(scaled(value) for value in published)
            flat = top_heavy and name in FLAT_IN_TOP_HEAVY
            self.add_module(name, Inception(channels, branches, flat=flat, momentum=bn_momentum))
            channels = branches[0] + branches[2] + branches[4] + branches[5]
        self.out_channels = channels

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        found, x = {}, clips
        for name, module in self.named_children():
            x = module(x)
            if name in self.endpoints:
                found[name] = x
        return found


def fold_batch_norm(network: nn.Module) -> None:
    """Folds every batch norm of a network in eval mode into its convolution. The outputs stay, but for rounding."""
    for module in network.modules():
        if isinstance(module, Unit3D):
            module.fold()


def feature_shape(clip_length: int, size: int, width: float) -> tuple[int, int, int, int]:
    """(C, T, H, W) of Mixed_5c for clips of clip_length frames of size x size pixels.

    Raises UserError for clips too small to leave anything to look at.
    """
    if clip_length < STRIDE_TIME or size < STRIDE_SPACE:
        raise UserError(
            f"clips of {clip_length} frames of {size} pixels are too small: I3D needs {STRIDE_TIME} frames of "
            f"{STRIDE_SPACE} pixels at least (data.clip_length, data.size)"
        )
    channels = sum(max(1, round(MIXED["Mixed_5c"][index] * width)) for index in (0, 2, 4, 5))
    side = math.ceil(size / STRIDE_SPACE)
    return channels, math.ceil(clip_length / STRIDE_TIME), side, side
