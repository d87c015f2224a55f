"""The one training loop: every phase, device and number of ranks runs through it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..configs.schema import TrainConfig
from ..errors import Stopped, UserError, explain_os_error
from ..evaluation import detect, recognition
from ..evaluation.metrics import NotFinite
from ..files import write_atomically, write_json
from ..kernels import backend
from ..models import checkpoints as weights
from ..pipelines.loader import Loader
from ..pipelines.streams import is_flow
from ..preprocessing.shards import Dataset
from . import checkpoint, phases, runs
from .distributed import Agreement, Ranks, ranks, round_products
from .metrics import Clock, Diverged, Meter, MetricsLog, console_line
from .observers import Observers, require
from .selection import Selection
from .step import Stepper

log = logging.getLogger(__name__)

_PATIENCE = 10  # times ranks.timeout_s that compiling may take


def train(config: TrainConfig, run: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains one phase in the run folder, or continues what is there; returns the content of its result.json.

    A run that was killed continues from its newest checkpoint with the same samples and, on a CPU, the same losses bit
    for bit. Raises UserError for bad input, before anything is written where it can be known then; Stopped after a
    Ctrl-C or SIGTERM, when the state has been saved.
    """
    if not config.data.dataset:
        raise UserError("data.dataset is not set; name a shard data set, e.g. data.dataset=data/ucf101")
    dataset = Dataset.open(config.data.dataset, cache_dir=config.data.cache_dir)
    splits = [config.data.train_split]
    if config.eval_every and config.data.eval_split in dataset.info["splits"]:
        splits.append(config.data.eval_split)
    for split in splits:
        (detect.require_actions if config.detects else recognition.require_classes)(dataset, split)
    patience = _PATIENCE if config.compile != "off" else 1
    with ranks(config.device, config.ranks, patience) as place, backend.selected(config.kernels.backend):
        backend.require(config.kernels.backend, place.device.type)
        place.on_main(lambda: require(config))
        round_products(config.precision)
        # Whatever is wrong with the input shows here, before the run folder is touched.
        resumed = checkpoint.newest(run / "checkpoints") is not None
        modality = "flow" if is_flow(dataset) else "rgb"
        phase = phases.build(config, tuple(dataset.classes), modality, resumed=resumed)
        runs.refuse_differences(place, config, dataset, phase)
        with (
            runs.out_of_memory(config, place),
            contextlib.closing(_Trainer(config, run, dataset, phase, place, say)) as trainer,
        ):
            with contextlib.ExitStack() as lock:
                place.on_main(lambda: runs.adopt(lock, run, config))
                result = place.on_main(lambda: runs.result_of(run))
                if result is not None:
                    say(f"{run} is finished; remove it to train again")
                    return result
                try:
                    return trainer.fit()
                except OSError as error:
                    raise UserError(explain_os_error(error, f"writing {run}")) from None


class _Trainer:
    """State of a run between steps."""

    def __init__(self, config: TrainConfig, run: Path, dataset: Dataset, phase: phases.Phase, place: Ranks, say):
        self.config, self.run, self.dataset, self.phase, self.place, self.say = config, run, dataset, phase, place, say
        self.loader = self._loader(config.data.train_split, training=True)
        self.eval_loader = None
        if config.eval_every:
            if config.data.eval_split not in dataset.info["splits"]:
                raise UserError(
                    f"{dataset.storage} has no split {config.data.eval_split!r} to evaluate on: shard with "
                    "--test-fold, name another with data.eval_split, or set eval_every=0"
                )
            self.eval_loader = self._loader(config.data.eval_split, training=False)
        phase.place(place)
        self.observers = Observers(config, run, place, phase)
        self.stepper = Stepper(config, phase, place, len(self.loader), self.observers.shared)
        if config.distill.teacher_cache and phase.teacher is not None:
            folder, digest = place.own_folder(Path(config.distill.teacher_cache)), dataset.info["index_digest"]
            phase.teacher.remember(folder, digest, self.loader.rows, self.stepper.dtype)
        self.meter, self.selection = Meter(place), Selection(config.patience, self.metric)
        self.step, self.unevaluated = 0, 0
        self.total_steps = config.epochs * config.passes * len(self.loader)
        self.writer = checkpoint.Writer(run / "checkpoints", config.keep_checkpoints)
        self.agree = Agreement(place)
        self._clips, self._waited = 0, 0.0
        self._stats: dict[str, float] = {}

    @property
    def metric(self) -> str:
        """What the best weights are chosen by."""
        return "map" if self.config.detects else "top1"

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch and writes weights and result.json."""
        config, loader = self.config, self.loader
        self.resume()
        with runs.stop_signals() as self.stop, self._metrics() as metrics:
            self.clock = Clock(self.step, self.total_steps)
            self.place.patient(_PATIENCE if config.compile != "off" else 1)
            began = loader.epoch
            if self.unevaluated:
                self.evaluate(metrics, self.unevaluated)
            while loader.epoch < config.epochs * config.passes and not self.selection.exhausted:
                draw = loader.epoch
                epoch = draw // config.passes + 1
                self.phase.train()
                self.place.progress("waits for its data", self.step, 5)
                for batch in self.observers.steps(loader, self.step):
                    self.stepper.take(batch, draw, self.step, self.meter)
                    self.step += 1
                    self.observers.done(self.step)
                    self._clips += batch.total
                    if self.step % config.log_every == 0 or loader.batch == 0:
                        self.log(metrics, epoch)
                    if number := self.agree(self.stop.number):
                        self.save(evaluated=epoch - 1)
                        self.place.on_main(self.writer.finish)
                        self.agree.close()
                        raise self._stopped(number)
                    if self.step % config.checkpoint_every == 0 or loader.batch == 0:
                        self.save(evaluated=epoch - 1)
                    if loader.batch:
                        self.place.progress("waits for its data", self.step, 5)
                if (draw + 1) % config.passes == 0 and self._evaluates(epoch):
                    self.evaluate(metrics, epoch)
                if draw - began >= config.passes - 1:
                    self.place.patient(1)  # batches of every size have been compiled, each by itself
            return self.finish()

    def log(self, metrics: MetricsLog | None, epoch: int) -> None:
        """Losses and speed since the last log step; stops a run that has diverged, or whose state is not written."""
        self.place.on_main(self.writer.check)
        values = self._finite(self.meter.take)
        values["lr"] = self.stepper.optimizers[self.phase.card.network].param_groups[0]["lr"]
        waited = self.loader.meter.wait_s
        values |= self.clock.read(self.step, self._clips, waited - self._waited)
        self._clips, self._waited = 0, waited
        now, before = self.loader.stats(), self._stats
        used, decoded, megabytes, seconds = (
            now[name] - before.get(name, 0.0) for name in ("used_frames", "decoded_frames", "read_mb", "seconds")
        )
        self._stats = now
        values |= {
            "frames_per_s": values["clips_per_s"] * self.config.data.clip_length,
            "decoded_per_used": decoded / used if used else 0.0,
            "read_mb_per_s": megabytes / seconds if seconds else 0.0,
        } | self.observers.gather()
        if metrics:
            metrics.write("train", self.step, {"epoch": epoch, **values})
            self.say(console_line(epoch, self.config.epochs, self.step, self.total_steps, values))

    def evaluate(self, metrics: MetricsLog | None, epoch: int) -> None:
        """Scores the evaluation split and keeps in a checkpoint that this was done."""
        assert self.eval_loader is not None
        model = self.stepper.results[self.phase.card.network]
        self.place.same_buffers(model)
        split = self.config.data.eval_split
        self.place.on_main(self.writer.finish)  # an epoch's last step is safe before it is looked at
        self.place.progress("evaluates", self.step, 2)
        try:
            if self.config.detects:
                values = detect.evaluate(model, self.eval_loader, self.place, split, self.stepper.dtype, self._on_batch)
            else:
                result = recognition.evaluate(model, self.eval_loader, self.place, self.stepper.dtype, self._on_batch)
                values = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
        except NotFinite as problem:
            # The losses did not show it yet. The checkpoint of this step would only lead here again.
            self.place.on_main(lambda: checkpoint.set_aside(self.run / "checkpoints", self.step))
            raise self._diverged(f"by step {self.step}: {str(problem).split(';')[0]}") from None
        if metrics:
            metrics.write("eval", self.step, {"epoch": epoch, **values})
            named = "mAP" if self.config.detects else "top-1"
            self.say(f"epoch {epoch}/{self.config.epochs}  {split}: {named} {100 * values[self.metric]:.1f} %")
        if self.selection.take(epoch, values[self.metric], values.get("loss", 0.0)):

            def keep() -> None:
                weights.save_weights(self.run / "best", self.phase.card, self.stepper.results)
                write_json(self.run / "best" / "best.json", self.selection.best)

            self.place.on_main(keep)
        self.save(evaluated=epoch)

    def save(self, evaluated: int) -> None:
        """A checkpoint of everything that decides the steps to come; evaluated: epochs evaluated so far."""
        self._finite(self.meter.refuse_divergence)
        self._refuse_broken_weights()
        meters = self.place.gather(self.meter.state_dict())
        state = {
            "step": self.step,
            "index_digest": self.dataset.info["index_digest"],
            "teacher": self.phase.teacher.digest if self.phase.teacher else "",
            "loader": self.loader.state_dict(),
            "modules": {name: module.state_dict() for name, module in self.phase.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.stepper.optimizers.items()},
            "averages": self.stepper.averages.state_dict() if self.stepper.averages else None,
            "scaler": self.stepper.scaler.state_dict(),
            "selection": self.selection.state_dict(),
            "meters": meters,
            "evaluated": evaluated,
        }
        self.place.progress("saves", self.step, 3 if evaluated * self.config.passes == self.loader.epoch else 0)
        self.place.on_main(lambda: self.writer.save(self.step, state))

    def _on_batch(self, count: int) -> None:
        """After each batch of an evaluation, of which all ranks have the same number: they stop together. What there is
        to save has been saved before."""
        self.place.alive()
        if number := self.agree(self.stop.number):
            self.agree.close()
            raise self._stopped(number)

    def _stopped(self, number: int) -> Stopped:
        return Stopped(f"stopped at step {self.step} of {self.total_steps}, state saved", runs.exit_code(number))

    def resume(self) -> None:
        """Continues from the newest checkpoint, if there is one."""
        # The main rank chooses: another host may still see an older folder.
        newest = self.place.on_main(lambda: checkpoint.newest_sound(self.run / "checkpoints"))
        if newest is None:
            return
        state = checkpoint.load(newest)
        if state["index_digest"] != self.dataset.info["index_digest"]:
            raise UserError(
                f"{self.dataset.storage} is not the data set that {self.run} was begun with; use another --out"
            )
        if state["teacher"] != (self.phase.teacher.digest if self.phase.teacher else ""):
            raise UserError(
                f"teacher={self.config.teacher} has other weights than when {self.run} was begun; use another --out"
            )
        for name, module in self.phase.modules.items():
            module.load_state_dict(state["modules"][name])
            self.stepper.optimizers[name].load_state_dict(state["optimizers"][name])
        if self.stepper.averages:
            self.stepper.averages.load_state_dict(state["averages"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        self.selection.load_state_dict(state["selection"])
        self.loader.load_state_dict(state["loader"])
        if len(state["meters"]) == self.place.world_size:
            self.meter.load_state_dict(state["meters"][self.place.rank])
        self.step = state["step"]
        # A run that was stopped after an epoch's last step has not evaluated that epoch.
        epoch, half = divmod(self.loader.epoch, self.config.passes)
        if self.loader.batch == 0 and not half and state["evaluated"] < epoch and self._evaluates(epoch):
            self.unevaluated = epoch
        if self.place.is_main:
            self.say(f"continuing {self.run} from step {self.step} of {self.total_steps}")

    def finish(self) -> dict[str, Any]:
        """Weights for others to load, and result.json, whose presence says that the run is finished."""
        self.agree.close()
        epochs = self.loader.epoch // self.config.passes
        result: dict[str, Any] = {
            "phase": self.config.phase, "steps": self.step, "epochs": epochs,
            "weights": str(self.run / "weights"), "best": self.selection.best,
        }  # fmt: skip
        if epochs < self.config.epochs and self.place.is_main:
            better = "mAP" if self.config.detects else "top-1"
            self.say(f"ended after epoch {epochs}: no better {better} for {self.config.patience} evaluations")

        def write() -> None:
            self.writer.finish()
            if self.config.keep == "best":
                for name in self.stepper.results:
                    content = (self.run / "best" / f"{name}.safetensors").read_bytes()
                    (self.run / "weights").mkdir(exist_ok=True)
                    write_atomically(self.run / "weights" / f"{name}.safetensors", content)
            else:
                weights.save_weights(self.run / "weights", self.phase.card, self.stepper.results)
            write_json(self.run / "result.json", result)

        self.place.on_main(write)
        self.place.ended()
        return result

    def close(self) -> None:
        """Ends the threads of loaders and writer, and what looks on."""
        self.writer.close()
        self.loader.close()
        if self.eval_loader:
            self.eval_loader.close()
        self.observers.close()

    def _loader(self, split: str, *, training: bool) -> Loader:
        config, place = self.config, self.place
        return Loader(
            self.dataset, split, config.data, batch_size=config.batch_size, training=training, seed=config.seed,
            rank=place.rank, world_size=place.world_size, device=place.device,
            views=(1, 1) if config.detects else (config.data.eval_clips, 1), detection=config.detects,
        )  # fmt: skip

    def _evaluates(self, epoch: int) -> bool:
        every, last = self.config.eval_every, self.config.epochs
        return self.eval_loader is not None and (epoch % every == 0 or epoch == last)

    def _finite(self, check: Callable[[], Any]) -> Any:
        """check(), with what it says of terms that are not finite as a sentence for the user."""
        try:
            return check()
        except Diverged as problem:
            raise self._diverged(f"at step {problem.step + 1}: {' and '.join(problem.terms)} not finite") from None

    def _refuse_broken_weights(self) -> None:
        """A step with finite losses may still have left weights that are not; such a checkpoint would be no good."""
        for name, module in self.phase.modules.items():
            norms = torch._foreach_norm(list(module.parameters()), float("inf"))
            if not bool(torch.stack([norm.float() for norm in norms]).isfinite().all()):
                raise self._diverged(f"by step {self.step}: the {name}'s weights are not finite")

    def _diverged(self, how: str) -> UserError:
        self.writer.close()  # the newest state may still be on its way to the disk
        last = checkpoint.newest(self.run / "checkpoints")
        state = f"the last good state is {last}" if last else "no state had been saved before"
        rate = "optimizer.lr or cvae_optimizer.lr" if "cvae" in self.phase.modules else "optimizer.lr"
        return UserError(f"the run diverged {how}; begin another run with a lower {rate}, or with grad_clip ({state})")

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[MetricsLog | None]:
        tensorboard, again = self.config.tensorboard, bool(self.unevaluated)
        with contextlib.ExitStack() as stack:

            def begin() -> None:
                log = MetricsLog(self.run, self.step, tensorboard=tensorboard, evaluates_again=again)
                logs.append(stack.enter_context(contextlib.closing(log)))

            logs: list[MetricsLog] = []
            self.place.on_main(begin)
            sinks = self.observers.open(self.step, self.total_steps)
            for log in logs:
                log.sinks = sinks
            yield logs[0] if logs else None
