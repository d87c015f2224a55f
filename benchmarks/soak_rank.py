"""A rank of the soak test: `genkd` with a line in a file for what each step has seen.

`python -m genkd.benchmarks.soak_rank RECORD ARGUMENTS...`: RECORD gets a JSON list a step and rank: the number of its
start, step, the loader's epoch, rank, rows of the index.
"""

from __future__ import annotations

import json
import os
import sys
import time

from ..cli import main
from ..pipelines.loader import Batch
from ..trainers.metrics import Meter
from ..trainers.step import Stepper


def record(path: str) -> None:
    """From here on, every step of this process is written down."""
    take, attempt = Stepper.take, float(os.environ.get("GENKD_SOAK_ATTEMPT", time.time()))
    attempt += int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) / 1000

    def recorded(self: Stepper, batch: Batch, draw: int, step: int, meter: Meter) -> None:
        take(self, batch, draw, step, meter)
        line = json.dumps([attempt, step, draw, self.place.rank, batch.ids[: batch.count].tolist()])
        with open(path, "a", encoding="ascii") as file:
            file.write(line + "\n")

    Stepper.take = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    record(sys.argv.pop(1))
    main()
