"""What a run reports: metrics.jsonl, TensorBoard and a console line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomically
from .distributed import Ranks
from .losses import Terms


class Meter:
    """Sums of loss terms since the last log step, kept on the device so that no step waits for it."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._sums: dict[str, Tensor] = {}

    def update(self, stage: str, terms: Terms, count: int) -> None:
        """Adds the terms (means over `count` clips) of one stage."""
        values = {**{f"{stage}/{name}": value for name, value in terms.items()}, f"{stage}/clips": None}
        for name, value in values.items():
            amount = torch.as_tensor(1.0, device=self._ranks.device) if value is None else value.detach().float()
            # A rank without a clip of its own adds nothing, not even a NaN of its stand-in.
            part = amount * count if count else torch.zeros_like(amount)
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def take(self) -> dict[str, float]:
        """The means over all ranks since the last call; the one place that waits for the device."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = dict(
            zip(names, self._ranks.sum(torch.stack([self._sums[name] for name in names])).tolist(), strict=True)
        )
        self._sums = {}
        return {name: sums[name] / sums[f"{name.split('/')[0]}/clips"] for name in names if not name.endswith("/clips")}

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's sums, so that a resumed run logs the same means."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sums = {name: value.to(self._ranks.device) for name, value in state.items()}


class MetricsLog:
    """metrics.jsonl and TensorBoard of a run; only the main rank writes."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool, evaluates_again: bool = False):
        self._path = run / "metrics.jsonl"
        self._drop_after(step, evaluates_again)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line {kind, step, ...values}; numbers also go to TensorBoard."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _drop_after(self, step: int, evaluates_again: bool) -> None:
        """Lines after the checkpoint that a run resumes from will be written again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the half line of a killed run
                continue
            again = evaluates_again and entry["kind"] == "eval" and entry["step"] == step
            if entry["step"] <= step and not again:
                kept.append(line + "\n")
        write_atomically(self._path, "".join(kept).encode())


def read(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Clock:
    """Speed since the last reading, and what is left."""

    def __init__(self, step: int, total_steps: int):
        self._total, self._step, self._time = total_steps, step, time.perf_counter()
        self._first_step, self._first_time = step, self._time

    def read(self, step: int, clips: int, wait_s: float) -> dict[str, float]:
        """clips/s, share of the time spent waiting for data, seconds left."""
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        self._step, self._time = step, now
        pace = (now - self._first_time) / max(1, step - self._first_step)
        return {"clips_per_s": clips / elapsed, "data_wait": wait_s / elapsed, "eta_s": pace * (self._total - step)}


def console_line(epoch: int, epochs: int, step: int, total: int, values: dict[str, float]) -> str:
    """epoch, step, losses, rate, clips/s, data-wait share and time left, in one line."""
    losses = " ".join(
        f"{name.removeprefix('recognizer/').replace('total', 'loss')} {value:.4g}"
        for name, value in sorted(
            values.items(), key=lambda item: (not item[0].startswith("recog"), not item[0].endswith("total"))
        )
        if "/" in name
    )
    minutes, seconds = divmod(int(values["eta_s"]), 60)
    return (
        f"epoch {epoch}/{epochs}  step {step}/{total}  {losses}  lr {values['lr']:.3g}  "
        f"{values['clips_per_s']:.1f} clips/s  wait {100 * values['data_wait']:.0f} %  ETA {minutes}:{seconds:02d}"
    )
