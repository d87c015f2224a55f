"""Gaussian soft-NMS of temporal segments (Bodla et al., "Soft-NMS", ICCV 2017), for one class, many, or any groups."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:  # results are evaluated without it, and it takes seconds to import
    import torch

SIGMA, TOP_K, SCORE_THRESHOLD = 0.5, 1000, 0.001
_SHORTEST = 1e-5  # seconds or whatever the segments are in, that a kept segment counts as at the least
_Array = TypeVar("_Array", np.ndarray, "torch.Tensor")


def soft_nms(
    segments: _Array, sigma: float = SIGMA, top_k: int = TOP_K, score_threshold: float = SCORE_THRESHOLD,
    compat: str = "none",
) -> _Array:  # fmt: skip
    """The segments (N,3) start, end, score of one class that are kept (n,3), in their order, with decayed scores.

    Again and again the segment with the highest score, of equal ones the first, is kept, and the scores of all others
    are multiplied by exp(-tIoU^2 / sigma); what falls below score_threshold is dropped, and top_k are kept at most. A
    segment that ends before it starts overlaps none. Starts and ends in any unit; dtype, kind (numpy or torch) and
    device of the result are those of `segments`, which are not changed.

    compat "reference": the original implementation's softnms_v2, which never keeps the last segment that is left, so
    that a lone detection is lost; "none" keeps it.
    Raises UserError for other shapes, values that are nan or infinite, sigma <= 0, top_k < 1, a negative threshold.
    """
    if segments.ndim != 2 or segments.shape[1] != 3:
        raise UserError(f"soft-NMS takes segments (N,3) of start, end, score, not {tuple(segments.shape)}")
    array = _numpy(segments)
    order, offsets = np.argsort(array[:, 0]), np.array([0, len(array)])
    rows, scores = _suppress(array, order, offsets, sigma, top_k, score_threshold, compat)
    return _like(segments, array[rows], scores)


def soft_nms_classes(
    segments: _Array, sigma: float = SIGMA, top_k: int = TOP_K, score_threshold: float = SCORE_THRESHOLD,
    compat: str = "none",
) -> list[_Array]:  # fmt: skip
    """soft_nms() of each class of a video: (K,N,3) -> K arrays (n,3). Rows that only fill up have score 0, so they are
    dropped (unless score_threshold is 0)."""
    if segments.ndim != 3 or segments.shape[2] != 3:
        raise UserError(f"soft-NMS of classes takes segments (K,N,3), not {tuple(segments.shape)}")
    array = _numpy(segments)
    classes, count = array.shape[:2]
    offsets = np.arange(classes + 1) * count
    order = np.argsort(array[..., 0], axis=1) + offsets[:-1, None]
    array = array.reshape(-1, 3)
    rows, scores = _suppress(array, order.ravel(), offsets, sigma, top_k, score_threshold, compat)
    kept, bounds = _like(segments, array[rows], scores), np.searchsorted(rows, offsets)
    return [kept[bounds[number] : bounds[number + 1]] for number in range(classes)]


def soft_nms_groups(
    segments: np.ndarray, groups: np.ndarray, sigma: float = SIGMA, top_k: int = TOP_K,
    score_threshold: float = SCORE_THRESHOLD, compat: str = "none",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """soft_nms() of every group of segments (N,3) by itself, such as each class of each video; groups (N,) integers.

    Returns the rows (n,) that are kept, in order, and their decayed scores (n,).
    """
    array = _numpy(segments)
    order = np.lexsort((array[:, 0], groups))
    offsets = np.concatenate([[0], np.flatnonzero(np.diff(groups[order])) + 1, [len(array)]])
    return _suppress(array, order, offsets, sigma, top_k, score_threshold, compat)


def _suppress(
    array: np.ndarray, order: np.ndarray, offsets: np.ndarray, sigma: float, top_k: int, score_threshold: float,
    compat: str,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """order (N,): rows by group, group g is order[offsets[g]:offsets[g+1]], in each by start, for speed."""
    from .detection_loops import suppress

    _refuse_settings(sigma, top_k, score_threshold, compat)
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(1))[0])
        shown = ", ".join(f"{value:g}" for value in array[row])
        raise UserError(f"segment {row} ({shown}) is not finite; soft-NMS takes finite starts, ends and scores")
    starts, ends, scores = (np.ascontiguousarray(column) for column in array[order].T)
    kind = array.dtype.type
    kept, decayed = suppress(
        starts, ends, scores, order.copy(), offsets, kind(sigma), kind(score_threshold), kind(_SHORTEST), top_k,
        2 if compat == "reference" else 1,
    )  # fmt: skip
    rows = order[kept]
    back = np.argsort(rows)
    return rows[back], decayed[kept][back]


def _numpy(segments: Any) -> np.ndarray:
    """float32 where the input is that or shorter, so that scores decay as the original's do; otherwise float64."""
    if not isinstance(segments, np.ndarray):
        import torch

        short = segments.is_floating_point() and segments.dtype != torch.float64
        segments = segments.detach().to("cpu", torch.float32 if short else torch.float64).numpy()
    short = segments.dtype.kind == "f" and segments.dtype.itemsize <= 4
    return segments.astype(np.float32 if short else np.float64, copy=False)


def _like(segments: Any, kept: np.ndarray, scores: np.ndarray) -> Any:
    """Starts and ends of `kept` (n,3) with the scores (n,), as what came in."""
    result = np.concatenate([kept[:, :2], scores[:, None]], 1)
    if not isinstance(segments, np.ndarray):
        import torch

        kind = segments.dtype if segments.is_floating_point() else torch.float64
        return torch.from_numpy(result).to(segments.device, kind)
    return result.astype(segments.dtype if segments.dtype.kind == "f" else np.float64, copy=False)


def _refuse_settings(sigma: float, top_k: int, score_threshold: float, compat: str) -> None:
    if not (math.isfinite(sigma) and sigma > 0):
        raise UserError(f"soft-NMS needs a sigma above 0, not {sigma:g}")
    if top_k < 1:
        raise UserError(f"soft-NMS keeps at least one segment, so top_k must be 1 or more, not {top_k}")
    if not (math.isfinite(score_threshold) and score_threshold >= 0):
        raise UserError(f"the score threshold of soft-NMS must be 0 or more, not {score_threshold:g}")
    if compat not in ("none", "reference"):
        raise UserError(f"unknown compat {compat!r} of soft-NMS; there are none and reference")
