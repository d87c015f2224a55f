"""Arrays that are used again: a fresh one costs a page fault for every 4 KB, which may take longer than decoding."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np


class Buffers:
    """uint8 arrays by shape, for any number of threads. What is never given back is simply collected."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of that shape with any content."""
        with self._lock:
            free = self._free[shape]
            return free.pop() if free else np.empty(shape, np.uint8)

    def give(self, array: np.ndarray) -> None:
        """Takes back an array of take() that nothing reads any more."""
        with self._lock:
            self._free[array.shape].append(array)
