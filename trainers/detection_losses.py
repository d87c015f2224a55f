"""The losses of temporal action detection: pure functions of the detector's output and padded targets.

Lin et al., "Learning Salient Boundary Feature for Anchor-free Temporal Action Localization", CVPR 2021 (AFSD), and
"Generative Model-based Feature Knowledge Distillation", AAAI 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.detector import FRAMES_A_STEP, DetectorOutput

_EPSILON = torch.finfo(torch.float32).eps


class Targets(NamedTuple):
    """Actions of a batch, padded to M: segments (N,M,2), start and end as shares of the clip; labels (N,M) int64, from
    1 on, 0 for padding."""

    segments: Tensor
    labels: Tensor


class Matched(NamedTuple):
    """What each anchor (N,A) should say: loc (N,A,2), frames to its action's start and end; conf (N,A), its label or 0
    for background; prop_loc (N,A,2) and prop_conf (N,A), the refinement's."""

    loc: Tensor
    conf: Tensor
    prop_loc: Tensor
    prop_conf: Tensor


def targets_of(actions: Sequence[Tensor], clip_length: int) -> Targets:
    """actions: N tensors (M,3), start and end in frames of the window, then the label, from 1 on: 0 is background."""
    padded = torch.nn.utils.rnn.pad_sequence(list(actions), batch_first=True)
    if not padded.shape[1]:  # no action in any window: one place, of padding
        padded = padded.new_zeros((len(actions), 1, 3))
    return Targets(padded[..., :2] / clip_length, padded[..., 2].long())


def match(output: DetectorOutput, targets: Targets, clip_length: int, overlap: float) -> Matched:
    """Gives every anchor the shortest action around it, or background.

    The refinement of an anchor whose coarse segment overlaps its action by less than `overlap` (IoU) is background.
    """
    with torch.no_grad():
        loc, priors = output.loc.float(), output.priors[None]
        start, end = (boundary[:, None] for boundary in targets.segments.unbind(2))  # (N,1,M)
        left, right = (priors - start) * clip_length, (end - priors) * clip_length  # (N,A,M)
        none = 2.0 * clip_length
        outside = (left < 0) | (right < 0) | (targets.labels == 0)[:, None]
        length, best = torch.where(outside, none, left + right).min(2)
        wanted = torch.stack([side.gather(2, best[..., None])[..., 0] for side in (left, right)], 2)
        conf = torch.where(length >= none, 0, targets.labels.gather(1, best))
        prop_conf = torch.where(_overlap(loc, wanted) < overlap, 0, conf)
        prop_loc = (wanted - loc) / (0.5 * loc.sum(2, keepdim=True))
    return Matched(wanted, conf, prop_loc, prop_conf)


def one_at_least(counts: Tensor) -> Tensor:
    """What sums are divided by: the counts themselves, but 1 for none."""
    return counts.clamp(min=1)


def multi_segment(
    output: DetectorOutput,
    targets: Targets,
    clip_length: int,
    *,
    overlap: float = 0.5,
    compat: str = "none",
    divisors: Callable[[Tensor], Tensor] = one_at_least,
) -> dict[str, Tensor]:
    """loc (GIoU), conf (focal), prop_loc (L1), prop_conf (focal) and center (quality), each a sum over the batch's
    anchors divided by the number that are an action; float32.

    divisors: from these numbers, (2,) of the anchors and of their refinements, to what is divided by, with which
    several ranks count together.

    center learns the IoU of an anchor's refined segment with its action. compat "reference" lets gradients through
    that IoU to loc and prop_loc.
    """
    matched = match(output, targets, clip_length, overlap)
    loc, prop_loc = output.loc.float(), output.prop_loc.float()
    positive, refined = (matched.conf > 0), (matched.prop_conf > 0)
    count, refined_count = divisors(torch.stack([positive.sum(), refined.sum()])).unbind()

    def total(values: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum()

    segment = 0.5 * loc.sum(2, keepdim=True) * prop_loc + loc
    quality = _overlap(segment, matched.loc).clamp(min=0)
    if compat != "reference":
        quality = quality.detach()
    center = F.binary_cross_entropy_with_logits(output.center[..., 0].float(), quality, reduction="none")
    return {
        "loc": total(1 - _generalized_overlap(loc, matched.loc), positive) / count,
        "conf": focal(output.conf, matched.conf).sum() / count,
        "prop_loc": total((prop_loc - matched.prop_loc).abs().sum(2), refined) / refined_count,
        "prop_conf": focal(output.prop_conf, matched.prop_conf).sum() / refined_count,
        "center": total(center, positive) / count,
    }


def focal(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (N,A) of logits (N,A,K+1) with labels (N,A), 0 for background, whose weight is alpha; an action's is
    1 - alpha. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, with a softmax."""
    chance = logits.float().softmax(2).gather(2, labels[..., None])[..., 0] + 1e-6
    return -torch.where(labels == 0, alpha, 1 - alpha) * (1 - chance).pow(gamma) * chance.log()


def background(conf: Tensor, *, compat: str = "none") -> Tensor:
    """Focal loss of the background view's conf (N,A,K+1): every anchor is background. The mean over anchors.

    compat "reference" sums over a batch's anchors, as the original does for its batches of one.
    """
    values = focal(conf, torch.zeros(conf.shape[:2], dtype=torch.int64, device=conf.device))
    return values.sum() if compat == "reference" else values.mean()


def boundary(start: Tensor, end: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of boundary features (N,T,C), squashed and averaged over channels, with scores (N,2,T)."""
    with torch.autocast(start.device.type, enabled=False):
        return tuple(  # type: ignore[return-value]
            F.binary_cross_entropy(features.float().tanh().mean(2), scores[:, number].float())
            for number, features in enumerate((start, end))
        )


def boundaries(output: DetectorOutput, scores: Tensor) -> tuple[Tensor, Tensor]:
    """start and end: of every frame, and a tenth of both proposal branches' at the finest level. scores (N,2,T)."""
    coarse = scores[..., ::FRAMES_A_STEP]
    start, end = boundary(output.start, output.end, scores)
    for branch_start, branch_end in (
        boundary(output.start_loc_prop, output.end_loc_prop, coarse),
        boundary(output.start_conf_prop, output.end_conf_prop, coarse),
    ):
        start, end = start + 0.1 * branch_start, end + 0.1 * branch_end
    return start, end


def triplet(features: Sequence[tuple[Tensor, Tensor, Tensor]], spliced: Tensor | None = None) -> Tensor:
    """Triplet margin loss of (anchor, positive, negative), (N,C) each: of frames, and a tenth of both branches'.

    spliced (N,) bool: the samples that have a splice, over which it is averaged; 0 without any.
    """
    total = features[0][0].new_zeros((), dtype=torch.float32)
    for weight, (anchor, positive, negative) in zip((1.0, 0.1, 0.1), features, strict=True):
        values = F.triplet_margin_loss(anchor.float(), positive.float(), negative.float(), reduction="none")
        if spliced is None:
            total = total + weight * values.mean()
        else:
            total = total + weight * torch.where(spliced, values, 0).sum() / spliced.sum().clamp(min=1)
    return total


def _sides(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of segments that share a point, (...,2) from it to the left and to the right."""
    inside = torch.minimum(a, b).sum(-1)
    return inside, a.sum(-1) + b.sum(-1) - inside


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    inside, union = _sides(a, b)
    return inside / union.clamp(min=_EPSILON)


def _generalized_overlap(a: Tensor, b: Tensor) -> Tensor:
    inside, union = _sides(a, b)
    hull = torch.maximum(a, b).sum(-1)
    return inside / union.clamp(min=_EPSILON) - (hull - union) / hull.clamp(min=_EPSILON)
