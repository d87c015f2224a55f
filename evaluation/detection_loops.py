"""The loops of soft-NMS and of detection's metrics, compiled by numba when they are first called.

Import this file where the loops are needed, not at the top of a file: importing numba takes half a second. What was
compiled is kept on disk, beside this file or, where that is read-only, in the user's cache folder.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import numba
import numpy as np

log = logging.getLogger(__name__)

_BLOCK = 64  # rows


def _compiled(function: Callable) -> Callable:
    try:
        return numba.njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder that it may write
        _say_uncached()
        return numba.njit(error_model="numpy")(function)


@functools.cache
def _say_uncached() -> None:
    log.info("loops are compiled anew in every process, as no cache folder can be written; set NUMBA_CACHE_DIR to one")


@_compiled
def _highest(scores, order, first, last):  # type: ignore[no-untyped-def]
    """Of rows [first, last) the one with the highest score, of equal ones the first in `order`."""
    best, most = first, scores[first]
    for row in range(first + 1, last):
        if scores[row] >= most and (scores[row] > most or order[row] < order[best]):
            best, most = row, scores[row]
    return best


@_compiled
def _closed_up(starts, ends, scores, order, rows, best, bounds, count):  # type: ignore[no-untyped-def]
    """Moves the rows that still wait, scores >= 0, of the first `count` together, and gives their number. Sets the best
    row of each block, and the earliest start and latest end in it, bounds (blocks, 2)."""
    size = 0
    for row in range(count):
        if scores[row] >= 0:
            starts[size], ends[size], scores[size] = starts[row], ends[row], scores[row]
            order[size], rows[size] = order[row], rows[row]
            size += 1
    for block in range((size + _BLOCK - 1) // _BLOCK):
        first, last = block * _BLOCK, min(size, (block + 1) * _BLOCK)
        best[block] = _highest(scores, order, first, last)
        bounds[block, 0], bounds[block, 1] = starts[first], ends[first]
        for row in range(first + 1, last):
            bounds[block, 0] = min(bounds[block, 0], starts[row])
            bounds[block, 1] = max(bounds[block, 1], ends[row])
    return size


@_compiled
def suppress(starts, ends, scores, order, offsets, sigma, threshold, shortest, top_k, least):  # type: ignore[no-untyped-def]
    """Gaussian soft-NMS of every group by itself. Returns which rows (N,) are kept, and their decayed scores (N,).

    Rows [offsets[g], offsets[g+1]) are group g, in any order, but fastest in that of their starts. order (N,): their
    places in the input, which decide between equal scores. shortest: the least length that a kept segment counts as.
    least: how many segments must be left for another to be kept. sigma, threshold and shortest have the dtype of the
    segments. The arrays are used as scratch.

    A segment decays only those that overlap it, so only the blocks of rows that it reaches are looked at, and in them
    who overlaps is found without a branch before any score decays. A row that no longer waits has score -1, until a
    quarter are such; then the others close up.
    """
    count = len(starts)
    kept, decayed, rows = np.zeros(count, np.bool_), np.zeros_like(scores), np.arange(count)
    best, bounds = np.empty(count // _BLOCK + 1, np.int64), np.empty((count // _BLOCK + 1, 2), starts.dtype)
    near = np.empty(_BLOCK, np.int64)
    for group in range(len(offsets) - 1):
        first, last = offsets[group], offsets[group + 1]
        start, end, score = starts[first:last], ends[first:last], scores[first:last]
        place, row_of = order[first:last], rows[first:last]
        for row in range(last - first):
            if score[row] < threshold:
                score[row] = -1
        size = waiting = _closed_up(start, end, score, place, row_of, best, bounds, last - first)
        done = 0
        while waiting >= least and done < top_k:
            blocks = (size + _BLOCK - 1) // _BLOCK
            top = best[0]
            for block in range(1, blocks):
                row = best[block]
                if score[row] > score[top] or (score[row] == score[top] and place[row] < place[top]):
                    top = row
            kept[row_of[top]], decayed[row_of[top]] = True, score[top]
            done += 1
            waiting -= 1
            score[top] = -1
            top_start, top_end, width = start[top], end[top], max(end[top] - start[top], shortest)
            for block in range(blocks):
                held = score[best[block]]
                if bounds[block, 0] < top_end and bounds[block, 1] > top_start:
                    reached = 0
                    for row in range(block * _BLOCK, min(size, (block + 1) * _BLOCK)):
                        near[reached] = row
                        reached += (score[row] >= 0) & (start[row] < top_end) & (end[row] > top_start)
                    for number in range(reached):
                        row = near[number]
                        shared = min(top_end, end[row]) - max(top_start, start[row])
                        if shared > 0:
                            overlap = shared / (width + (end[row] - start[row]) - shared)
                            score[row] *= np.exp(-(overlap * overlap) / sigma)
                            if score[row] < threshold:
                                score[row] = -1
                                waiting -= 1
                if held < 0 or score[best[block]] != held:
                    best[block] = _highest(score, place, block * _BLOCK, min(size, (block + 1) * _BLOCK))
            if 4 * waiting < 3 * size and size > _BLOCK:
                size = _closed_up(start, end, score, place, row_of, best, bounds, size)
    return kept, decayed


@_compiled
def _overlap(start, end, other_start, other_end):  # type: ignore[no-untyped-def]
    """tIoU of two segments; 0 where they do not overlap, as for one that ends before it starts."""
    shared = min(end, other_end) - max(start, other_start)
    if shared <= 0:
        return 0.0
    return shared / ((other_end - other_start) + (end - start) - shared)


@_compiled
def match(starts, ends, groups, true_starts, true_ends, offsets, tious):  # type: ignore[no-untyped-def]
    """Assigns predictions, highest score first, to instances: for each tIoU (T,) and prediction (N,) the row of the
    instance, -1 for none.

    groups (N,): of each prediction; rows [offsets[g], offsets[g+1]) of the instances are group g. A prediction takes
    the instance of its group with the largest tIoU that reaches the threshold and is not taken; of equal ones the last.
    """
    taken = np.zeros((len(tious), len(true_starts)), np.bool_)
    found = np.full((len(tious), len(starts)), -1, np.int64)
    for row in range(len(starts)):
        first, last = offsets[groups[row]], offsets[groups[row] + 1]
        if first == last:
            continue
        overlaps = np.empty(last - first)
        for other in range(first, last):
            overlaps[other - first] = _overlap(starts[row], ends[row], true_starts[other], true_ends[other])
        for level in range(len(tious)):
            best, most = -1, tious[level]
            for other in range(first, last):
                if overlaps[other - first] >= most and not taken[level, other]:
                    best, most = other, overlaps[other - first]
            if best >= 0:
                found[level, row] = best
                taken[level, best] = True
    return found


@_compiled
def nearest(starts, ends, groups, true_starts, true_ends, offsets):  # type: ignore[no-untyped-def]
    """Of each prediction (N,) the row of its group's instance with the largest tIoU, of equal ones the first, and that
    tIoU; -1 and 0 where the group has no instance. offsets: as for match()."""
    rows, overlaps = np.full(len(starts), -1, np.int64), np.zeros(len(starts))
    for row in range(len(starts)):
        for other in range(offsets[groups[row]], offsets[groups[row] + 1]):
            overlap = _overlap(starts[row], ends[row], true_starts[other], true_ends[other])
            if rows[row] < 0 or overlap > overlaps[row]:
                rows[row], overlaps[row] = other, overlap
    return rows, overlaps


@_compiled
def best_overlaps(true_starts, true_ends, groups, starts, ends, offsets, numbers):  # type: ignore[no-untyped-def]
    """Of each instance (G,) the largest tIoU with any of the first numbers (V,M) proposals of its group: (G,M).

    Rows [offsets[g], offsets[g+1]) of the proposals are group g, best first; numbers rise along M.
    """
    found = np.zeros((len(true_starts), numbers.shape[1]))
    for row in range(len(true_starts)):
        group = groups[row]
        best, other = 0.0, offsets[group]
        for column in range(numbers.shape[1]):
            stop = offsets[group] + numbers[group, column]
            while other < stop:
                best = max(best, _overlap(starts[other], ends[other], true_starts[row], true_ends[row]))
                other += 1
            found[row, column] = best
    return found
