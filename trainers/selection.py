"""Which evaluation was the best one, and when there is no hope of a better."""

from __future__ import annotations

from typing import Any


class Selection:
    """Follows a run's evaluations: the best has the highest top-1 or mAP, among equal ones the lowest loss.

    patience: evaluations in a row without a better one after which the run should end; 0 for never. metric: the name
    of what is compared.
    """

    def __init__(self, patience: int = 0, metric: str = "top1"):
        self._patience, self._metric = patience, metric
        self.best: dict[str, Any] | None = None  # epoch, the metric, loss
        self._since = 0

    def take(self, epoch: int, value: float, loss: float = 0.0) -> bool:
        """Notes an evaluation; whether it is the best so far. One of an epoch that is already the best is, again."""
        best = self.best
        if best is None or (value, -loss) > (best[self._metric], -best["loss"]) or best["epoch"] == epoch:
            self.best, self._since = {"epoch": epoch, self._metric: value, "loss": loss}, 0
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
