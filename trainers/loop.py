"""The one training loop: every phase, device and number of ranks runs through it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..configs import load as configs
from ..configs.schema import TrainConfig
from ..errors import UserError, explain_os_error
from ..evaluation import recognition
from ..models import checkpoints as weights
from ..pipelines import plan
from ..pipelines.loader import Batch, Loader
from ..preprocessing.shards import Dataset, write_json
from . import checkpoint, optimizers, phases
from .distributed import Ranks, precision, ranks
from .metrics import Clock, Meter, MetricsLog, console_line

log = logging.getLogger(__name__)

# Keys that may change between a run and its resumption: they do not touch what is computed.
_FREE_KEYS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "data.decoder_threads",
    "data.prefetch",
)


class Stopped(Exception):
    """The run was asked to stop and has saved its state. exit_code: 130 after Ctrl-C, 0 after SIGTERM (preemption)."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


def train(config: TrainConfig, run: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains one phase in the run folder, or continues what is there; returns the content of its result.json.

    A run that was killed continues from its newest checkpoint with the same samples and, on a CPU, the same losses bit
    for bit. Raises UserError for bad input, before anything is written where it can be known then; Stopped after a
    Ctrl-C or SIGTERM, when the state has been saved.
    """
    dataset = Dataset.open(config.data.dataset)
    with ranks(config.device) as place:
        torch.set_float32_matmul_precision("high")
        # Whatever is wrong with the input shows here, before the run folder is touched.
        phase = phases.build(config, tuple(dataset.classes))
        with contextlib.closing(_Trainer(config, run, dataset, phase, place, say)) as trainer:
            with _run_folder(run, config, place) as finished:
                if finished is not None:
                    say(f"{run} is finished; remove it to train again")
                    return finished
                try:
                    return trainer.fit()
                except OSError as error:
                    raise UserError(explain_os_error(error, f"writing {run}")) from None


class _Trainer:
    """State of a run between steps."""

    def __init__(self, config: TrainConfig, run: Path, dataset: Dataset, phase: phases.Phase, place: Ranks, say):
        self.config, self.run, self.phase, self.place, self.say = config, run, phase, place, say
        common = {"seed": config.seed, "rank": place.rank, "world_size": place.world_size, "device": place.device}
        self.loader = Loader(
            dataset, config.data.train_split, config.data, batch_size=config.batch_size, training=True, **common
        )
        self.eval_loader = None
        if config.eval_every:
            self.eval_loader = Loader(
                dataset, config.data.eval_split, config.data, batch_size=config.batch_size, training=False,
                views=(config.data.eval_clips, 1), **common,
            )  # fmt: skip
        phase.place(place)
        self.optimizers = {
            name: optimizers.build(self._optimizer_config(name), module, place.device)
            for name, module in phase.modules.items()
        }
        self.dtype = precision(config.precision, place.device)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=self.dtype == torch.float16)
        self.meter = Meter(place)
        self.step = 0
        self.unevaluated = 0
        self.total_steps = config.epochs * len(self.loader)
        self._since: dict[str, float] = {"clips": 0, "wait_s": 0.0}

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch and writes weights and result.json."""
        config, loader = self.config, self.loader
        self.resume()
        with _stop_signals() as stop, self._metrics() as metrics:
            self.clock = Clock(self.step, self.total_steps)
            if self.unevaluated:
                self.evaluate(metrics, self.unevaluated)
            while loader.epoch < config.epochs:
                epoch = loader.epoch + 1
                self.phase.train()
                for batch in loader:
                    self.step_on(batch, epoch)
                    if self.step % config.log_every == 0 or loader.batch == 0:
                        self.log(metrics, epoch)
                    if self._stops(stop):
                        self.save(evaluated=epoch - 1)
                        code = 0 if stop.number == signal.SIGTERM else 130
                        raise Stopped(f"stopped at step {self.step} of {self.total_steps}, state saved", code)
                    if self.step % config.checkpoint_every == 0 and loader.batch:
                        self.save(evaluated=epoch - 1)
                if self._evaluates(epoch):
                    self.evaluate(metrics, epoch)
                self.save(evaluated=epoch)
            return self.finish()

    def step_on(self, batch: Batch, epoch: int) -> None:
        """All optimizer steps of one batch."""
        config, device = self.config, self.place.device
        torch.manual_seed(_mix(config.seed, self.step, self.place.rank))  # dropout's; makes resuming exact
        # Every clip of the global batch weighs the same however unevenly its ranks share it.
        weight = batch.count * self.place.world_size / batch.total
        stages = self.phase.stages(batch, epoch, self._noise(batch, epoch))
        while True:
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                stage = next(stages, None)
            if stage is None:
                break
            optimizer = self.optimizers[stage.module]
            settings = self._optimizer_config(stage.module)
            for group in optimizer.param_groups:
                group["lr"] = optimizers.learning_rate(settings, self.step, len(self.loader), self.total_steps)
            optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(stage.terms["total"] * weight).backward()
            if config.grad_clip:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.phase.modules[stage.module].parameters(), config.grad_clip)
            self.scaler.step(optimizer)
            self.meter.update(stage.module, stage.terms, batch.count)
        self.scaler.update()
        self.step += 1
        self._since["clips"] += batch.total

    def log(self, metrics: MetricsLog | None, epoch: int) -> None:
        """Losses and speed since the last log step; stops a run that has diverged."""
        values = self.meter.take()
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise UserError(
                f"the run diverged by step {self.step}: {', '.join(wrong)} is not finite; lower optimizer.lr or set "
                f"grad_clip, and continue from the checkpoints in {self.run / 'checkpoints'}"
            )
        values["lr"] = self.optimizers["recognizer"].param_groups[0]["lr"]
        waited = self.loader.stats.wait_s
        values |= self.clock.read(self.step, int(self._since["clips"]), waited - self._since["wait_s"])
        self._since = {"clips": 0, "wait_s": waited}
        if metrics:
            metrics.write("train", self.step, {"epoch": epoch, **values})
            self.say(console_line(epoch, self.config.epochs, self.step, self.total_steps, values))

    def evaluate(self, metrics: MetricsLog | None, epoch: int) -> None:
        result = recognition.evaluate(self.phase.modules["recognizer"], self.eval_loader, self.place, self.dtype)
        if metrics:
            metrics.write(
                "eval", self.step, {"epoch": epoch, "top1": result.top1, "top5": result.top5, "loss": result.loss}
            )
            self.say(
                f"epoch {epoch}/{self.config.epochs}  {self.config.data.eval_split}: top-1 {100 * result.top1:.1f} %"
            )

    def save(self, evaluated: int) -> None:
        """A checkpoint of everything that decides the steps to come; evaluated: epochs evaluated so far."""
        meters = self.place.gather({name: value.cpu() for name, value in self.meter.state_dict().items()})
        if not self.place.is_main:
            return
        state = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "modules": {name: module.state_dict() for name, module in self.phase.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "meters": meters,
            "evaluated": evaluated,
        }
        checkpoint.save(self.run / "checkpoints", self.step, state, self.config.keep_checkpoints)

    def resume(self) -> None:
        """Continues from the newest checkpoint, if there is one."""
        checkpoint.remove_leftovers(self.run / "checkpoints") if self.place.is_main else None
        self.place.barrier()
        state = checkpoint.load_newest(self.run / "checkpoints")
        if state is None:
            return
        for name, module in self.phase.modules.items():
            module.load_state_dict(state["modules"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        if len(state["meters"]) == self.place.world_size:
            self.meter.load_state_dict(state["meters"][self.place.rank])
        self.step = state["step"]
        # A run that was stopped in an epoch's last step has not evaluated that epoch.
        if state["evaluated"] < self.loader.epoch and self._evaluates(self.loader.epoch):
            self.unevaluated = self.loader.epoch
        if self.place.is_main:
            self.say(f"continuing {self.run} from step {self.step} of {self.total_steps}")

    def finish(self) -> dict[str, Any]:
        """Weights for others to load, and result.json, whose presence says that the run is finished."""
        result = {"phase": self.config.phase, "steps": self.step, "weights": str(self.run / "weights")}
        if self.place.is_main:
            weights.save_weights(self.run / "weights", self.phase.card, self.phase.modules)
            write_json(self.run / "result.json", result)
        self.place.barrier()
        return result

    def _optimizer_config(self, module: str):
        return self.config.cvae_optimizer if module == "cvae" else self.config.optimizer

    def _noise(self, batch: Batch, epoch: int) -> torch.Tensor | None:
        if "cvae" not in self.phase.modules:
            return None
        channels, time, _, _ = self.phase.card.feature_shape
        drawn = plan.noise(self.config.seed, epoch, batch.ids.tolist(), (time, channels))
        return torch.from_numpy(drawn).to(self.place.device, non_blocking=True)

    def _stops(self, stop: _StopRequest) -> bool:
        """Whether any rank was told to stop; with several ranks they agree at log steps, where they wait anyway."""
        if self.place.world_size > 1 and self.step % self.config.log_every == 0:
            stop.number = max(self.place.gather(stop.number))
            return bool(stop.number)
        return self.place.world_size == 1 and bool(stop.number)

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[MetricsLog | None]:
        if not self.place.is_main:
            yield None
            return
        metrics = MetricsLog(self.run, self.step, tensorboard=self.config.tensorboard)
        try:
            yield metrics
        finally:
            metrics.close()

    def close(self) -> None:
        """Ends the loaders' threads."""
        self.loader.close()
        if self.eval_loader:
            self.eval_loader.close()

    def _evaluates(self, epoch: int) -> bool:
        every, last = self.config.eval_every, self.config.epochs
        return self.eval_loader is not None and (epoch % every == 0 or epoch == last)


@contextlib.contextmanager
def _run_folder(run: Path, config: TrainConfig, place: Ranks) -> Iterator[dict[str, Any] | None]:
    """Locks the folder, checks that it belongs to this configuration; gives its result if it is finished."""
    handle = None
    try:
        if place.is_main:
            handle = _locked(run)
            _adopt(run, config)
        place.barrier()
        done = run / "result.json"
        yield json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
    finally:
        if handle is not None:
            os.close(handle)


def _locked(run: Path) -> int:
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(explain_os_error(error, f"creating {run}")) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is training in {run}; wait for it, or choose another --out") from None
    return handle


def _adopt(run: Path, config: TrainConfig) -> None:
    begun = (run / "metrics.jsonl").is_file() or (run / "checkpoints").is_dir()
    if begun and (run / "config.yaml").is_file():
        changed = [
            line for line in configs.differences(configs.read_run(run), config) if not line.startswith(_FREE_KEYS)
        ]
        if changed:
            raise UserError(
                f"{run} was begun with another configuration ({'; '.join(changed[:4])}); choose another --out, "
                "or use the same configuration to continue it"
            )
        return
    strangers = [entry.name for entry in run.iterdir() if entry.name not in (".lock", "config.yaml")]
    if strangers:
        raise UserError(f"{run} is not empty and holds no training run (found {strangers[0]!r}); choose another --out")
    (run / "config.yaml").write_text(configs.dump(config), encoding="utf-8")


class _StopRequest:
    """The signal that asked the loop to stop; 0 for none."""

    number = 0


@contextlib.contextmanager
def _stop_signals() -> Iterator[_StopRequest]:
    """SIGINT and SIGTERM ask the loop to stop after its step; a second one interrupts at once."""
    stop = _StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        if stop.number:
            raise KeyboardInterrupt
        stop.number = number

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _mix(*values: int) -> int:
    """One 63-bit seed out of several numbers (FNV-1a)."""
    state = 0xCBF29CE484222325
    for value in values:
        state = ((state ^ value) * 0x100000001B3) & 0x7FFFFFFFFFFFFFFF
    return state
