"""Temporal action detector: I3D, attention on two feature levels, and an anchor-free pyramid with boundary pooling.

Lin et al., "Learning Salient Boundary Feature for Anchor-free Temporal Action Localization", CVPR 2021 (AFSD), with the
attention of "Generative Model-based Feature Knowledge Distillation", AAAI 2024. Teacher and student are this class with
two configs.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from ..errors import UserError
from ..kernels.attention_kd import foreground
from ..kernels.boundary_max_pool import boundary_max_pool
from .attention import AttentionHead, group_norm
from .cvae import ConditionalVAE, CVAEOutput
from .i3d import I3D, STRIDE_SPACE, STRIDE_TIME, feature_shape, same_padding
from .recognizer import build_cvae

COARSE, FINE = "Mixed_5c", "Mixed_4f"
ENDPOINTS = (FINE, COARSE)
LEVELS = 6
FRAMES_A_STEP = 4  # of the finest level
Features = dict[str, Tensor]


class DetectorOutput(NamedTuple):
    """For the A anchors of all levels: loc (N,A,2), frames from an anchor to the start and to the end; conf (N,A,K+1)
    logits, background first; prop_loc (N,A,2) and prop_conf (N,A,K+1), the refinement's offsets, in halves of the
    coarse segment's length, and logits; center (N,A,1), logit of the quality; priors (A,1), anchors as shares of the
    clip. Boundary features: start, end (N,T,C/2) of every frame, and of every step of the finest level those of the
    two proposal branches (N,T/4,C)."""

    loc: Tensor
    conf: Tensor
    prop_loc: Tensor
    prop_conf: Tensor
    center: Tensor
    priors: Tensor
    start: Tensor
    end: Tensor
    start_loc_prop: Tensor
    end_loc_prop: Tensor
    start_conf_prop: Tensor
    end_conf_prop: Tensor


class Represented(NamedTuple):
    """Both endpoints' features (N,C,T,H,W) and attention (N,C,T), None without attention heads."""

    features: Features
    attention: Features | None


class Conv1dSame(nn.Module):
    """Convolution over time with SAME padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv1d = nn.Conv1d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        padding = same_padding(x.shape[2], self.kernel, self.stride)
        return self.conv1d(F.pad(x, padding) if any(padding) else x)


def _block(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(Conv1dSame(inputs, outputs, kernel, stride), group_norm(outputs), nn.ReLU())


class ScaleExp(nn.Module):
    """exp(scale * x): a level's segments are as long as its scale learns."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x * self.scale)


class ProposalBranch(nn.Module):
    """Refines anchors by the features around their segments' boundaries."""

    def __init__(self, channels: int):
        super().__init__()
        self.point = _block(channels, channels, 1)
        self.sides = _block(channels, 2 * channels, 1)
        self.frames = _block(channels, channels, 1)
        self.merge = _block(4 * channels, channels, 1)

    def forward(self, x: Tensor, frames: Tensor, segments: Tensor, frame_segments: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N,C,T) of a level, (N,C,frames) of frames, segments (N,T,4) in steps of each -> refined (N,C,T),
        and what the boundaries were pooled from, (N,2C,T)."""
        sides = self.sides(x)
        pooled = boundary_max_pool(sides, segments)
        of_frames = self.frames(boundary_max_pool(frames, frame_segments))
        return self.merge(torch.cat([of_frames, pooled, self.point(x)], 1)), sides


class Pyramid(nn.Module):
    """The detection head on features of Mixed_4f and Mixed_5c.

    channels, sizes: of the two endpoints, finest first, sizes (height, width); clip_length in frames; width: factor on
    the 512 channels.
    """

    def __init__(
        self, channels: tuple[int, int], sizes: tuple[tuple[int, int], tuple[int, int]], num_classes: int,
        clip_length: int, width: float,
    ):  # fmt: skip
        super().__init__()
        self.clip_length, self.outputs = clip_length, num_classes + 1
        hidden = round(512 * width)
        self.levels = nn.ModuleList()
        for count, size in zip(channels, sizes, strict=True):
            self.levels.append(nn.Sequential(nn.Conv3d(count, hidden, (1, *size)), group_norm(hidden), nn.ReLU()))
        for _ in range(LEVELS - 2):
            self.levels.append(_block(hidden, hidden, 3, 2))
        self.loc_tower = nn.Sequential(_block(hidden, hidden, 3), _block(hidden, hidden, 3))
        self.conf_tower = nn.Sequential(_block(hidden, hidden, 3), _block(hidden, hidden, 3))
        self.loc_head, self.conf_head = Conv1dSame(hidden, 2, 3), Conv1dSame(hidden, self.outputs, 3)
        self.loc_scales = nn.ModuleList(ScaleExp() for _ in range(LEVELS))
        self.loc_branch, self.conf_branch = ProposalBranch(hidden), ProposalBranch(hidden)
        self.prop_loc_head, self.prop_conf_head = Conv1dSame(hidden, 2, 1), Conv1dSame(hidden, self.outputs, 1)
        self.center_head = Conv1dSame(hidden, 1, 3)
        self.frames = nn.Sequential(_block(hidden, hidden, 3), _block(hidden, hidden, 3), _block(hidden, hidden, 1))

    def forward(self, features: Features) -> DetectorOutput:
        levels = self._levels(features)
        frames = self._frames(levels[0])
        found: list[tuple[Tensor, ...]] = []
        sides: list[Tensor] = []
        priors = []
        for number, level in enumerate(levels):
            prior = self._prior(level)
            loc_features, conf_features = self.loc_tower(level), self.conf_tower(level)
            with torch.autocast(loc_features.device.type, enabled=False):  # bfloat16 would round lengths by a percent
                loc = self.loc_scales[number](self.loc_head(loc_features.float())).transpose(1, 2)
            segments, frame_segments = _boundaries(loc, prior, self.clip_length)
            loc_refined, loc_sides = self.loc_branch(loc_features, frames, segments, frame_segments)
            conf_refined, conf_sides = self.conf_branch(conf_features, frames, segments, frame_segments)
            if number == 0:
                sides = [side.transpose(1, 2) for x in (loc_sides, conf_sides) for side in x.chunk(2, 1)]
            with torch.autocast(loc_refined.device.type, enabled=False):
                prop_loc = self.prop_loc_head(loc_refined.float()).transpose(1, 2)
            values = (
                loc, self.conf_head(conf_features).transpose(1, 2), prop_loc,
                self.prop_conf_head(conf_refined).transpose(1, 2), self.center_head(loc_refined).transpose(1, 2),
            )  # fmt: skip
            found.append(values)
            priors.append(prior)
        start, end = (half.transpose(1, 2) for half in frames.chunk(2, 1))
        loc, conf, prop_loc, prop_conf, center = (torch.cat(values, 1) for values in zip(*found, strict=True))
        return DetectorOutput(loc, conf, prop_loc, prop_conf, center, torch.cat(priors), start, end, *sides)

    def confidence(self, features: Features) -> Tensor:
        """conf (N,A,K+1) alone."""
        found = [self.conf_head(self.conf_tower(level)).transpose(1, 2) for level in self._levels(features)]
        return torch.cat(found, 1)

    def boundary_features(self, features: Features) -> list[Tensor]:
        """What boundaries are pooled from: of frames (N,C,T), and of both branches at the finest level (N,2C,T/4)."""
        level = self._levels(features)[0]
        return [
            self._frames(level),
            self.loc_branch.sides(self.loc_tower(level)),
            self.conf_branch.sides(self.conf_tower(level)),
        ]

    def _levels(self, features: Features) -> list[Tensor]:
        fine = self.levels[0](features[FINE]).flatten(2)
        x = self.levels[1](features[COARSE]).flatten(2)
        levels = [fine + F.interpolate(x, fine.shape[2:], mode="nearest"), x]
        for level in self.levels[2:]:
            x = level(x)
            levels.append(x)
        return levels

    def _frames(self, fine: Tensor) -> Tensor:
        return self.frames(F.interpolate(fine, self.clip_length, mode="nearest"))

    @staticmethod
    def _prior(level: Tensor) -> Tensor:
        steps = level.shape[2]
        return ((torch.arange(steps, device=level.device, dtype=torch.float32) + 0.5) / steps)[:, None]


@torch.no_grad()
def _boundaries(loc: Tensor, prior: Tensor, clip_length: int) -> tuple[Tensor, Tensor]:
    """Where the boundaries of the anchors' segments are looked for, (N,T,4) each: in steps of the level, in frames."""
    loc, steps = loc.float(), len(prior)
    center = (prior * steps - 0.5).round()
    scaled = loc / clip_length * steps
    of_level = _around(center - scaled[..., :1], center + scaled[..., 1:], scaled.sum(-1, keepdim=True))
    start, end = prior * clip_length - loc[..., :1], prior * clip_length + loc[..., 1:]
    return of_level, _around(start, end, end - start + 1)


def _around(start: Tensor, end: Tensor, length: Tensor) -> Tensor:
    """A tenth of the length outside of each boundary, a quarter inside, 1 step at least, rounded: (...,4)."""
    inside, outside = (length / 4).clamp(min=1), (length / 10).clamp(min=1)
    return torch.cat([start - outside, start + inside, end - inside, end + outside], -1).round()


class Detector(nn.Module):
    """Clips (N,in_channels,T,H,W) -> DetectorOutput for num_classes actions.

    shapes: (C,T,H,W) of each endpoint, from detector_shapes. With attention the pyramid sees the foreground of both
    endpoints, F*a*r with a sample's r = sum F / sum(F*a); compat "reference" divides F*a by the batch's sum of a
    (in eval mode by the sample's).
    forward raises ValueError for clips of another shape than the detector was built for.
    """

    def __init__(
        self, config: ModelConfig, num_classes: int, shapes: dict[str, tuple[int, int, int, int]], clip_length: int, *,
        attention: bool = True, compat: str = "none", in_channels: int = 3,
    ):  # fmt: skip
        super().__init__()
        self.compat, self.in_channels, self.shapes, self.clip_length = compat, in_channels, shapes, clip_length
        self.backbone = I3D(
            in_channels, temporal=config.temporal, stem=config.stem, width=config.width,
            bn_momentum=config.bn_momentum, endpoints=ENDPOINTS,
        )  # fmt: skip
        hidden = round(512 * config.width)
        heads = {name: AttentionHead(*shapes[name], hidden=hidden) for name in ENDPOINTS}
        self.attention = nn.ModuleDict(heads) if attention else None
        (fine, _, *fine_size), (coarse, _, *coarse_size) = (shapes[name] for name in ENDPOINTS)
        sizes = (tuple(fine_size), tuple(coarse_size))
        self.pyramid = Pyramid((fine, coarse), sizes, num_classes, clip_length, config.width)  # type: ignore[arg-type]
        _initialize(self)

    def forward(self, clips: Tensor, *, attend: bool = True, detect: bool = True) -> DetectorOutput | Represented:
        """attend=False: the pyramid sees the features as they are. detect=False: what there is before the pyramid."""
        features = self.represent(clips)
        attention = self.attend(features) if self.attention is not None and (attend or not detect) else None
        if not detect:
            return Represented(features, attention)
        return self.pyramid(features if attention is None else self.foreground(features, attention))

    def represent(self, clips: Tensor) -> Features:
        """The backbone's features of both endpoints."""
        steps = [math.ceil(size / stride) for size, stride in zip(clips.shape[2:], (8, 32, 32), strict=True)]
        if clips.shape[1] != self.in_channels or steps != list(self.shapes[COARSE][1:]):
            raise ValueError(
                f"clips {tuple(clips.shape)} do not fit this detector: it takes (N,{self.in_channels},"
                f"{self.clip_length},H,W) that give {self.shapes[COARSE][2]} x {self.shapes[COARSE][3]} features"
            )
        return self.backbone(clips)

    def attend(self, features: Features) -> Features:
        """Attention (N,C,T) of both endpoints' features (N,C,T,H,W)."""
        assert self.attention is not None
        return {name: self.attention[name](features[name]) for name in ENDPOINTS}

    def foreground(self, features: Features, attention: Features) -> Features:
        """Features weighted by their attention."""
        if self.compat == "reference":
            # In tests a sample's own sum, as the original's batches of one have: results must not hang on neighbours.
            axes = (0, 1, 2) if self.training else (1, 2)
            return {
                name: features[name] * (a / a.sum(axes, keepdim=True))[..., None, None] for name, a in attention.items()
            }
        return {name: foreground(features[name], attention[name]) for name in ENDPOINTS}

    def triplet(self, features: Features, segments: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What tells the halves of a spliced action from the splice: (anchor, positive, negative), (N,C) each, from
        frames and from both branches.

        segments (N,3,2), in frames: an action's part before the splice, its part behind, the splice. Anchor is the
        first part's end, positive the second's start, negative the splice's start.
        """
        around = _around(segments[..., :1], segments[..., 1:], segments[..., 1:] - segments[..., :1] + 1)
        found = []
        for values, frames_a_step in zip(
            self.pyramid.boundary_features(features), (1, FRAMES_A_STEP, FRAMES_A_STEP), strict=True
        ):
            starts, ends = boundary_max_pool(values, around / frames_a_step).chunk(2, 1)
            found.append((ends[..., 0], starts[..., 1], starts[..., 2]))
        return found


def detector_shapes(clip_length: int, size: int, width: float) -> dict[str, tuple[int, int, int, int]]:
    """(C,T,H,W) of both endpoints for clips of clip_length frames of size x size pixels.

    Raises UserError for clips whose levels would not halve evenly.
    """
    steps = STRIDE_TIME * 2 ** (LEVELS - 2)
    if clip_length % steps or size < STRIDE_SPACE:
        raise UserError(
            f"clips of {clip_length} frames of {size} pixels do not fit the detector: data.clip_length must be a "
            f"multiple of {steps}, data.size {STRIDE_SPACE} at least"
        )
    coarse = feature_shape(clip_length, size, width)
    side = math.ceil(size / (STRIDE_SPACE // 2))
    return {COARSE: coarse, FINE: (round(832 * width), 2 * coarse[1], side, side)}


class EndpointVAEs(nn.ModuleDict):
    """A ConditionalVAE for each endpoint; called with features, attention and noise by endpoint."""

    def forward(self, features: Features, attention: Features, noise: Features) -> dict[str, CVAEOutput]:
        return {name: vae(features[name], attention[name], noise[name]) for name, vae in self.items()}

    def decode_frozen(self, attention: Features, noise: Features) -> Features:
        """ConditionalVAE.decode_frozen of each endpoint."""
        vaes = {name: cast(ConditionalVAE, vae) for name, vae in self.items()}
        return {name: vae.decode_frozen(attention[name], noise[name]) for name, vae in vaes.items()}


def build_cvaes(shapes: dict[str, tuple[int, int, int, int]]) -> EndpointVAEs:
    """Conditional VAEs for features of (C,T,H,W) by endpoint."""
    return EndpointVAEs({name: build_cvae(shapes[name]) for name in ENDPOINTS})


def _initialize(module: nn.Module) -> None:
    """He normal for the backbone, as the recognizer's; uniform Glorot elsewhere; near zero in the pyramid's heads."""
    near_zero = ("tower", "head", "branch")
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Conv3d | nn.Conv1d | nn.Linear):
            continue
        if name.startswith("backbone."):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif name.startswith("pyramid.") and isinstance(layer, nn.Conv1d) and any(part in name for part in near_zero):
            nn.init.normal_(layer.weight, std=0.01)
        else:
            nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
