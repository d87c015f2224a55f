"""Those who look on while a run trains: W&B, Prometheus, the ranks' times, the profiler. None changes a result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..configs.schema import TrainConfig
from ..configs.values import profile_steps
from ..pipelines.loader import Batch, Loader
from . import weights_and_biases
from .distributed import Ranks
from .phases import Phase
from .profile import Profile
from .prometheus import Exporter
from .spread import StepTimes


class Sink(Protocol):
    """Takes the lines of metrics.jsonl as they are written, on the main rank."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """A line: {kind, step, **values}."""

    def close(self, finished: bool) -> None:
        """The run ends; finished: with its last step, and not by a stop or an error."""


def require(config: TrainConfig) -> None:
    """Raises UserError for a package that the configuration needs and that is missing."""
    if config.wandb != "off":
        weights_and_biases.package()


class Observers:
    """What a run's configuration asks for. Every rank has one, and calls each method at the same steps."""

    def __init__(self, config: TrainConfig, run: Path, place: Ranks, phase: Phase):
        self._config, self._run, self._place = config, run, place
        self._profile = Profile(profile_steps(config.profile), run, place, phase)
        self._times = StepTimes(place, active=place.world_size > 1 or bool(config.prometheus))
        self.shared, self.gather = self._times.shared, self._times.gather
        self._sinks: list[Sink] = []

    def open(self, step: int, steps: int) -> list[Sink]:
        """Collective, when the run folder is this run's: the sinks, none but on the main rank. step: that the run goes
        on from; steps: of the whole run. Raises UserError on every rank."""
        self._place.on_main(lambda: self._open(step, steps))
        return self._sinks

    def _open(self, step: int, steps: int) -> None:
        for target in self._config.prometheus:
            exporter = Exporter(target, self._run, steps, lambda: self._times.rows)
            self._sinks.append(exporter)
            exporter.begin(step)
        if self._config.wandb != "off":
            self._sinks.append(weights_and_biases.WandbRun(self._config, self._run))

    def steps(self, loader: Loader, step: int) -> Iterator[Batch]:
        """The rest of the loader's epoch; step: the number of its first batch, from 0. After each one's work call
        done()."""
        source = iter(loader)
        for number in range(step, step + len(loader) - loader.batch):
            self._profile.before(number)
            self._times.ask()
            with self._profile.part("data"):
                batch = next(source)
            self._times.arrived()
            yield batch
        next(source, None)  # a loader that was restored at an epoch's end goes on to the next one

    def done(self, steps: int) -> None:
        """So many steps of the run are done, the newest just now."""
        self._times.done()
        self._profile.after(steps)

    def close(self) -> None:
        """Writes what is left and ends everything."""
        finished = (self._run / "result.json").is_file()
        try:
            self._profile.close()
        finally:
            while self._sinks:
                self._sinks.pop().close(finished)
