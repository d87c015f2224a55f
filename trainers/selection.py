"""Which evaluation was the best one, and when there is no hope of a better."""

from __future__ import annotations

from typing import Any


class Selection:
    """Follows a run's evaluations: the best has the highest top-1, among equal ones the lowest loss.

    patience: evaluations in a row without a better one after which the run should end; 0 for never.
    """

    def __init__(self, patience: int = 0):
        self._patience = patience
        self.best: dict[str, Any] | None = None  # epoch, top1, loss
        self._since = 0

    def take(self, epoch: int, top1: float, loss: float) -> bool:
        """Notes an evaluation; whether it is the best so far. One of an epoch that is already the best is, again."""
        best = self.best
        if best is None or (top1, -loss) > (best["top1"], -best["loss"]) or best["epoch"] == epoch:
            self.best, self._since = {"epoch": epoch, "top1": top1, "loss": loss}, 0
            return True
        self._since += 1
        return False

    @property
    def exhausted(self) -> bool:
        return bool(self._patience) and self._since >= self._patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._since = state["best"], state["since"]
