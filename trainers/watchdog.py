"""Names the rank that all others wait for, where PyTorch's time limit would only say that something timed out."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

_ENDED = 1e18  # a place
_REMEDY = "raise ranks.timeout_s if it only takes long"


class Word(NamedTuple):
    """What a rank last told: how often it has told something, how far it is, with what, on which host, and for how many
    seconds it had shown no life then."""

    beat: int
    place: float
    doing: str
    host: str
    idle: float


class Watchdog:
    """A thread that tells a store how far this rank is, and ends the process after `limit` seconds at one place.

    All ranks go through the same places of a run, so the one with the smallest is what the others wait for, as long as
    it takes if it is alive(). A process that was stopped or swapped out tells nothing, and is named too.
    Several nodes' ranks end at about the same time; the lowest one that is not to blame says why.
    """

    def __init__(
        self, store: Any, rank: int, world_size: int, limit: float, leave: Callable[[int], Any] = os._exit
    ):  # fmt: skip
        self._store, self._rank, self._world_size, self._limit, self._leave = store, rank, world_size, limit, leave
        self.patience = 1  # times the limit
        self._period = max(0.2, min(10.0, limit / 8))
        self._place: float = 0
        self._doing, self._since = "begins", time.monotonic()
        self._beat = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="genkd-watchdog", daemon=True)
        self._heard: dict[int, tuple[Word, float]] = {}  # the others' last words, and since when they are the same

    def __enter__(self) -> Watchdog:
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """No one is waited for any longer; the others are told so."""
        if not self._end.is_set():
            self._end.set()
            self._thread.join(timeout=5)
            self.progress("has ended", _ENDED)
            with contextlib.suppress(RuntimeError):  # whoever kept the store may be gone
                self._tell()

    def progress(self, doing: str, place: float) -> None:
        """This rank goes on to the next thing; places grow."""
        self._place, self._doing, self._since = place, doing, time.monotonic()

    def waits(self, doing: str) -> None:
        """This rank has done its part of the place where it is."""
        self.progress(doing, math.floor(self._place) + 0.5)

    def alive(self) -> None:
        """This rank is not stuck where it is."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        try:
            looked = time.monotonic()
            while not self._end.wait(self._period):
                if time.monotonic() - looked > 3 * self._period + self._limit / 4:
                    self.alive()  # it was suspended itself, maybe all were; the time does not count
                looked = time.monotonic()
                self._tell()
                waited = time.monotonic() - self._since
                if waited > self._limit / 2:
                    self._listen()
                if waited > self._limit * self.patience and self._give_up(waited):
                    return
        except RuntimeError as error:
            # Without the store, which the main rank or torchrun keeps, there is no one left to name anyone to.
            if not self._end.is_set():
                log.warning("rank %d: the watchdog has lost the ranks' store (%s)", self._rank, repr(error)[:200])

    def _tell(self) -> None:
        self._beat += 1
        idle = time.monotonic() - self._since
        word = Word(self._beat, self._place, self._doing, socket.gethostname(), idle)
        self._store.set(f"rank{self._rank}", json.dumps(word))

    def _listen(self) -> None:
        now = time.monotonic()
        keys = [f"rank{rank}" for rank in range(self._world_size)]
        if self._store.check(keys) and self._store.has_extended_api():  # two requests, however many ranks there are
            found = dict(enumerate(self._store.multi_get(keys)))
        else:
            found = {rank: self._store.get(key) for rank, key in enumerate(keys) if self._store.check([key])}
        for rank, content in found.items():
            word = Word(*json.loads(content))
            if rank not in self._heard or self._heard[rank][0] != word:
                self._heard[rank] = word, now

    def _give_up(self, waited: float) -> bool:
        """Whether this rank leaves; it does not while one that it may wait for is alive."""
        now, since = time.monotonic(), self._since
        silent = {rank for rank in range(self._world_size) if rank not in self._heard}
        silent |= {
            rank for rank, (word, since) in self._heard.items()
            if now - since > 3 * self._period and word.place < _ENDED
        }  # fmt: skip
        words = {
            rank: word for rank, (word, _) in self._heard.items() if rank not in silent and word.place < _ENDED
        }  # fmt: skip
        if any(word.place <= self._place and word.idle < self._limit / 2 for word in words.values()):
            return False
        furthest = max((word.place for word in words.values()), default=0)
        blamed = sorted(silent or {rank for rank, word in words.items() if word.place < furthest})
        speaker = min((rank for rank in words if rank not in blamed), default=self._rank)
        if self._rank != speaker:
            self._end.wait(min(1.0, self._limit / 4))  # the one who speaks must be heard before torchrun ends all
        if self._end.is_set() or self._since != since:
            return self._end.is_set()
        if self._rank == speaker:
            print(f"Error: {self._sentence(waited, blamed, bool(silent))}", file=sys.stderr, flush=True)
        self._leave(1)
        return True

    def _sentence(self, waited: float, blamed: list[int], silent: bool) -> str:
        own = f"rank {self._rank} has waited {waited:.0f} s while it {self._doing}"
        if not blamed:
            return f"{own}, and so have all others: look whether the network between them is down; {_REMEDY}"
        names = []
        for rank in blamed[:8]:
            word = self._heard[rank][0] if rank in self._heard else None
            doing = f", which last {word.doing}" if word and silent else f", which still {word.doing}" if word else ""
            names.append(f"rank {rank}{f' on {word.host}' if word else ''}{doing}")
        more = f" and {len(blamed) - 8} more" if len(blamed) > 8 else ""
        what = "nothing is heard of" if silent else "it waits for"
        return f"{own}: {what} {'; '.join(names)}{more} (ranks.timeout_s={self._limit:g}); {_REMEDY}"
