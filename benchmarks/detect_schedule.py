"""The original implementation's loops over windows on genkd's networks, to measure ours against.

Written down from what its test.py and train.py for THUMOS14 do ("Generative Model-based Feature Knowledge Distillation
for Action Recognition", AAAI 2024, detection), with the circumstances that cost time: one window at a time; float32 in
NCDHW; an epoch is a pass over the windows for the VAEs and another one for the detector; the background view goes
through the whole detector, of whose losses two are used; the spliced window has a pass of its own; targets are matched
a sample at a time; losses are fetched from the device in every step. One is left out: in the spliced window's pass, the
finest level's proposals, which are computed and not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.boundary_max_pool import boundary_max_pool
from ..models.detector import COARSE, FINE, Detector, DetectorOutput, EndpointVAEs, Features

_LEVELS = (COARSE, FINE)


class Seen(NamedTuple):
    """All windows of a video: segments (W,A,2) in frames of the window, scores (W,A,K), and by class what is above the
    threshold, (n,3) each: start, end in seconds, score."""

    segments: Tensor
    scores: Tensor
    by_class: list[Tensor]


def slide(
    detector: Detector, frames: np.ndarray, size: int, stride: int, fps: float, threshold: float, device: torch.device
) -> Seen:  # fmt: skip
    """A detector with attention on frames (T,height,width,3), uint8, as test.py runs it: the centre of size x size
    pixels, scaled to -1..1, a window at a time, up to soft-NMS. The video is no shorter than a window."""
    length = detector.clip_length
    top, left = ((side - size) // 2 for side in frames.shape[1:3])
    video = torch.from_numpy(frames.transpose(3, 0, 1, 2)[:, :, top : top + size, left : left + size])
    offsets = list(range(0, len(frames) - length + 1, stride))
    if (len(frames) - length) % stride:
        offsets.append(len(frames) - length)
    classes = detector.pyramid.outputs
    found: list[list[Tensor]] = [[] for _ in range(classes)]
    every: list[tuple[Tensor, Tensor]] = []
    for offset in offsets:
        clip = (video[:, offset : offset + length].float() / 255.0 * 2.0 - 1.0)[None].to(device)
        with torch.no_grad():
            features = detector.represent(clip)
            attention = detector.attend(features)
            output = detector.pyramid({name: _weighted(features[name], attention[name]) for name in _LEVELS})
        loc, refinement = output.loc[0], output.prop_loc[0]
        loc = 0.5 * (loc[:, :1] + loc[:, 1:]) * refinement + loc
        center = output.priors * length
        segments = torch.cat([center - loc[:, :1], center + loc[:, 1:]], 1).clamp(0, length)
        scores = (output.conf[0].softmax(1) + output.prop_conf[0].softmax(1)) / 2 * output.center[0].sigmoid()
        every.append((segments, scores[:, 1:]))
        for label in range(1, classes):
            above = scores[:, label] > threshold
            if above.any():
                rows = torch.cat([(segments[above] + offset) / fps, scores[above, label, None]], 1)
                found[label].append(rows)
    by_class = [torch.cat(rows).cpu() if rows else torch.zeros(0, 3) for rows in found[1:]]
    segments, scores = (torch.stack(values).cpu() for values in zip(*every, strict=True))
    return Seen(segments, scores, by_class)


class Window(NamedTuple):
    """A training window: clip (1,C,T,H,W); actions (M,3), start and end as shares of it, sorted, and label; boundaries
    (1,2,T); its spliced twin and that one's segments (3,2) in frames, None without a splice."""

    clip: Tensor
    actions: Tensor
    boundaries: Tensor
    spliced: Tensor | None
    segments: Tensor | None


class OriginalTraining:
    """student and cvaes are trained, each with Adam; teacher and teacher_cvaes are followed.

    The reconstruction is compared with the features, which the original has overwritten by weighted ones of the same
    size when it comes to that. weights: of the segments' losses, the background, the triplet loss and the attention.
    """

    segments, background, ssl, beta = 10.0, 35.0, 0.1, 10.0

    def __init__(
        self, student: Detector, cvaes: EndpointVAEs, teacher: Detector, teacher_cvaes: EndpointVAEs,
        device: torch.device,
    ):  # fmt: skip
        self.device, self.length = device, student.clip_length
        self.student, self.cvaes = student.to(device).train(), cvaes.to(device).train()
        self.teacher, self.teacher_cvaes = teacher.to(device).eval(), teacher_cvaes.to(device).eval()
        for module in (self.teacher, self.teacher_cvaes):
            module.requires_grad_(False)
        for layer in student.modules():
            if isinstance(layer, nn.BatchNorm3d):
                layer.eval()
        self.optimizer = torch.optim.Adam(student.parameters(), 1e-6, betas=(0.9, 0.999), weight_decay=1e-3)
        self.cvae_optimizer = torch.optim.Adam(cvaes.parameters(), 1e-4, betas=(0.8, 0.999))
        self.mse = nn.MSELoss()

    def vae_pass(self, windows: Iterable[Window]) -> None:
        """The first half of an epoch: the VAEs learn the student's features, whose weights rest."""
        self.student.requires_grad_(False)
        self.cvaes.requires_grad_(True)
        for window in windows:
            loss, follow = self.vae_losses(window)
            self.cvae_optimizer.zero_grad()
            loss.backward()
            self.cvae_optimizer.step()
            for value in (loss, follow, loss, loss, follow):  # sums, and what the progress bar shows
                value.item()

    def vae_losses(self, window: Window) -> tuple[Tensor, Tensor]:
        """What the VAEs learn from a window, and how far they are from the teacher's."""
        features, attention = self._look(self.student, window.clip)
        made = {
            name: self.cvaes[name](features[name], attention[name], self.noise(attention[name])) for name in _LEVELS
        }
        loss = torch.zeros((), device=self.device)
        for name in _LEVELS:
            shift = made[name].mean - attention[name].transpose(1, 2)
            kl = -0.5 * (1 + made[name].logvar - shift.pow(2) - made[name].logvar.exp()).mean()
            loss = loss + (features[name] - made[name].reconstruction).pow(2).mean() + 0.1 * kl
        follow = torch.zeros((), device=self.device)
        for name in _LEVELS:
            taught = self.teacher_cvaes[name](features[name], attention[name], self.noise(attention[name]))
            follow = follow + self.mse(made[name].reconstruction, taught.reconstruction)
        return loss + 0.01 * follow, follow

    def detector_pass(self, windows: Iterable[Window], epoch: int) -> None:
        """The second half: the student learns to detect, what the VAEs expect, and what the teacher attends to."""
        self.student.requires_grad_(True)
        self.cvaes.requires_grad_(False)
        for window in windows:
            terms = self.detector_losses(window, epoch)
            self.optimizer.zero_grad()
            terms["total"].backward()
            self.optimizer.step()
            for value in (*terms.values(), terms["total"], terms["att"]):
                value.item()

    def detector_losses(self, window: Window, epoch: int) -> dict[str, Tensor]:
        """The losses of a window, by genkd's names, and their weighted sum `total`; epoch counts from 1."""
        features, attention = self._look(self.student, window.clip)
        front = {name: _weighted(features[name], attention[name]) for name in _LEVELS}
        back = {name: _weighted(features[name], 1 - attention[name]) for name in _LEVELS}
        terms = self._detect(front, window.actions.to(self.device), window.boundaries)
        gaps = torch.tensor(_gaps(window.actions.cpu().numpy()), device=self.device)
        behind = self._detect(back, gaps, window.boundaries)
        terms["background"] = behind["conf"]
        total = self._sum(terms) + self.background * (self.segments * behind["loc"] + behind["conf"])
        pairs = []
        if window.spliced is not None and window.segments is not None:
            other, attended = self._look(self.student, window.spliced)
            weighted = {name: _weighted(other[name], attended[name]) for name in _LEVELS}
            terms["triplet"] = self._triplet(weighted, window.segments.to(self.device))
            total = total + self.ssl * terms["triplet"]
            _, taught = self._look(self.teacher, window.spliced)
            pairs += [(taught[name], attended[name]) for name in _LEVELS]
        noise = {name: self.noise(attention[name]) for name in _LEVELS}
        recovered = self.cvaes.decode_frozen(attention, noise)  # their parameters rest in any case
        terms["rec"] = torch.stack([(recovered[name] - features[name]).pow(2).mean() for name in _LEVELS]).sum()
        _, taught = self._look(self.teacher, window.clip)
        pairs += [(taught[name], attention[name]) for name in _LEVELS]
        terms["att"] = torch.stack([self.mse(*pair) for pair in pairs]).sum()
        terms["total"] = total + min(epoch, 20) / 20 * 0.5 * terms["rec"] + self.beta * terms["att"]
        return terms

    def _look(self, net: Detector, clip: Tensor) -> tuple[Features, Features]:
        features = net.represent(clip.to(self.device))
        return features, net.attend(features)

    def noise(self, attention: Tensor) -> Tensor:
        """Standard normal (N,T,C)."""
        return torch.randn_like(attention.transpose(1, 2))

    def _detect(self, features: Features, actions: Tensor, boundaries: Tensor) -> dict[str, Tensor]:
        output = self.student.pyramid(features)
        terms = segment_losses(output, [actions], self.length)
        coarse = F.interpolate(boundaries, scale_factor=0.25)
        start, end = self._boundary(output.start, output.end, boundaries)
        for name in ("loc", "conf"):
            one, other = self._boundary(
                getattr(output, f"start_{name}_prop"), getattr(output, f"end_{name}_prop"), coarse
            )
            start, end = start + 0.1 * one, end + 0.1 * other
        return {**terms, "start": start, "end": end}

    def _boundary(self, start: Tensor, end: Tensor, scores: Tensor) -> list[Tensor]:
        return [
            F.binary_cross_entropy(side.tanh().mean(-1).view(-1), scores[:, number].reshape(-1).to(self.device))
            for number, side in enumerate((start, end))
        ]

    def _triplet(self, features: Features, segments: Tensor) -> Tensor:
        inner, outer = ((segments[:, 1:] - segments[:, :1] + 1) / part for part in (4, 10))
        inner, outer = inner.clamp(min=1), outer.clamp(min=1)
        start, end = segments[:, :1], segments[:, 1:]
        around = torch.cat([start - outer, start + inner, end - inner, end + outer], 1).round()[None]
        losses = []
        for maps, step, weight in zip(
            self.student.pyramid.boundary_features(features), (1, 4, 4), (1, 0.1, 0.1), strict=True
        ):
            pooled = boundary_max_pool(maps, around / step)
            half = pooled.shape[1] // 2
            losses.append(weight * F.triplet_margin_loss(pooled[:, half:, 0], pooled[:, :half, 1], pooled[:, :half, 2]))
        return torch.stack(losses).sum()

    def _sum(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(
            ((self.segments if name in ("loc", "prop_loc") else 1) * value for name, value in terms.items()
             if name != "background"),
            start=torch.zeros((), device=self.device),
        )  # fmt: skip


def segment_losses(output: DetectorOutput, targets: list[Tensor], length: int) -> dict[str, Tensor]:
    """loc, conf, prop_loc, prop_conf and center of a batch, each sample's targets (M,3) matched in its turn."""
    size, anchors = output.loc.shape[:2]
    wanted, further = torch.zeros_like(output.loc), torch.zeros_like(output.loc)
    label = torch.zeros(size, anchors, dtype=torch.long, device=output.loc.device)
    refined = torch.zeros_like(label)
    prior = output.priors[:, 0]
    with torch.no_grad():
        for number, target in enumerate(targets):
            left = (prior[:, None] - target[None, :, 0]) * length
            right = (target[None, :, 1] - prior[:, None]) * length
            area = left + right
            area[(left < 0) | (right < 0)] = 2 * length
            smallest, best = area.min(1)
            own = torch.stack([prior - target[best, 0], target[best, 1] - prior], 1) * length
            name = target[best, 2].long()
            name[smallest >= 2 * length] = 0
            wanted[number], label[number] = own, name
            reached = output.loc[number]
            name = name.clone()
            name[_iou(reached, own)[0] < 0.5] = 0
            refined[number] = name
            further[number] = (own - reached) / (0.5 * reached.sum(1, keepdim=True))
    positive, kept = label > 0, refined > 0
    loc, goal = output.loc[positive], wanted[positive]
    iou, union = _iou(loc, goal)
    hull = torch.maximum(loc, goal).sum(1)
    tiny = torch.finfo(torch.float32).eps
    reach = 0.5 * loc.sum(1, keepdim=True) * output.prop_loc[positive] + loc
    quality = _iou(reach, goal)[0].clamp(min=0)
    count, kept_count = positive.sum().clamp(min=1), kept.sum().clamp(min=1)
    return {
        "loc": (1 - iou + (hull - union) / hull.clamp(min=tiny)).sum() / count,
        "conf": _focal(output.conf, label) / count,
        "prop_loc": (output.prop_loc[kept] - further[kept]).abs().sum() / kept_count,
        "prop_conf": _focal(output.prop_conf, refined) / kept_count,
        "center": F.binary_cross_entropy_with_logits(output.center[positive][:, 0], quality, reduction="sum") / count,
    }


def _iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Overlap (n,) and union (n,) of segments (n,2) around the same point."""
    shared = torch.minimum(a, b).sum(1)
    union = a.sum(1) + b.sum(1) - shared
    return shared / union.clamp(min=torch.finfo(torch.float32).eps), union


def _focal(logits: Tensor, label: Tensor) -> Tensor:
    classes = logits.shape[2]
    chance = logits.reshape(-1, classes).softmax(1).gather(1, label.reshape(-1, 1))[:, 0] + 1e-6
    weight = torch.full((classes,), 0.75, device=logits.device)
    weight[0] = 0.25
    return -((1 - chance) ** 2 * weight[label.reshape(-1)] * chance.log()).sum()


def _weighted(features: Tensor, attention: Tensor) -> Tensor:
    """Features (N,C,T,H,W) by their attention (N,C,T), which is made to add up to 1 over the batch."""
    return features * attention[..., None, None] / attention.sum()


def _gaps(actions: np.ndarray) -> list[list[float]]:
    """Background between sorted actions, as shares of the window, with label 0."""
    gaps = [] if actions[0][0] == 0 else [[0.0, float(actions[0][0]), 0.0]]
    gaps += [[float(one[1]), float(other[0]), 0.0] for one, other in pairwise(actions)]
    if actions[-1][1] != 1:
        gaps.append([float(actions[-1][1]), 1.0, 0.0])
    return gaps
