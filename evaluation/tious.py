"""Thresholds of temporal intersection over union."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UserError

THUMOS14 = (0.1, 0.2, 0.3, 0.4, 0.5)
_REMEDY = "give thresholds above 0 and up to 1, such as 0.5 or 0.3,0.5 or 0.1:0.5:0.1 (first:last:step)"


def check_tious(tious: Sequence[float] | np.ndarray) -> np.ndarray:
    """Thresholds as float64 (T,). Raises UserError for none, and for any that is not above 0 and up to 1."""
    levels = np.array(tious, np.float64)
    if levels.ndim != 1 or not len(levels):
        raise UserError(f"no list of tIoU thresholds: {tious!r}; {_REMEDY}")
    for level in levels[~((levels > 0) & (levels <= 1))]:
        raise UserError(f"a tIoU threshold of {level:g}: {_REMEDY}")
    return levels


def parse_tious(text: str) -> np.ndarray:
    """Thresholds of their text: 0.5, 0.3,0.5, or first:last:step with the last one included. Raises UserError."""
    try:
        if ":" not in text:
            return check_tious([float(part) for part in text.split(",")])
        first, last, step = (float(part) for part in text.split(":"))
        steps = (last - first) / step
        if not 0 <= steps < 1000 or step <= 0:
            raise ValueError
    except UserError:
        raise
    except (ValueError, ZeroDivisionError):
        raise UserError(f"tIoU thresholds {text!r}: {_REMEDY}") from None
    # Rounded, so that 0.1:0.5:0.1 has 0.3 and not the next number above it.
    return check_tious(np.round(first + step * np.arange(int(steps + 1e-6) + 1), 9))
