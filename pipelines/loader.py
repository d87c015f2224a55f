"""Loader: plan + store + graph as an iterator of batches whose whole state is (epoch, batch)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch

from ..configs.schema import DataConfig
from ..errors import UserError
from ..preprocessing.shards import Corrupt, Dataset
from . import plan
from .graph import reason
from .run import Item, Run
from .stats import Meter
from .streams import Stream, is_flow, shapes
from .windows import actions_inside, boundary_targets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    clips: (N,C,T,H,W) in channels_last_3d on the device, of config.dtype; C is 3 for RGB, 2 for flow. labels: (N,)
    int64 there; ids: (N,) rows of the index on the CPU. count: how many of the N samples are this rank's own; 0 where
    the batch is too small to give it one (N is then 1, a stand-in that must get no weight). total: samples of the
    batch over all ranks. flow: (N,2,T,H,W), the flow of the same windows, where the loader has a flow data set.
    windows: for detection.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    count: int
    total: int
    flow: torch.Tensor | None = None
    windows: Windows | None = None

    def split(self, size: int) -> list[Batch]:
        """Its samples in turn, `size` at the most in each part; of clips and flow alone, not of windows."""
        if not size or len(self.clips) <= size:
            return [self]
        assert self.windows is None
        flows = [None] * -(-len(self.clips) // size) if self.flow is None else list(self.flow.split(size))
        parts = zip(self.clips.split(size), self.labels.split(size), self.ids.split(size), flows, strict=True)
        return [Batch(clips, labels, ids, len(ids), self.total, flow) for clips, labels, ids, flow in parts]


@dataclass(frozen=True)
class Windows:
    """Where a batch's windows come from and, in training, what they hold.

    offsets: (N,) int64, each window's first frame, on the CPU; actions: N tensors (A,3) float32, start and end in
    frames of the window, then the label; boundaries: (N,2,T) float32, 1 where an action starts and where one ends.
    spliced: clips with a stretch of background moved into an action, flow_spliced the same of the flow; segments:
    (N,3,2) float32, the action's first part, its second part and the stretch, in frames; has_splice: (N,) bool, false
    where nothing could be moved: the clip is then unchanged and its segments are 0. All but offsets on the device.
    with_splice: the numbers of the samples that have one, known without asking the device.
    """

    offsets: torch.Tensor
    actions: tuple[torch.Tensor, ...] = ()
    boundaries: torch.Tensor | None = None
    spliced: torch.Tensor | None = None
    flow_spliced: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    has_splice: torch.Tensor | None = None
    with_splice: tuple[int, ...] = ()


class Loader:
    """Clips of one split, in the plan's order.

    training: shuffled epochs of random clips, every video once an epoch; iterating gives the rest of the current epoch
    and moves on to the next. Otherwise one pass over views = (clips, crops) of every video, in key order, views of a
    video next to each other. detection: windows of untrimmed videos instead, in training all that hold an action, with
    targets and splices; else those that cover each video; a video that ends before its window is padded, never played
    in a loop. flow: a flow data set with the same keys, for Batch.flow.
    batch_size counts clips over all ranks; rows: these rows of the index instead of the whole split. Close it, or use
    it as a context manager.
    Raises UserError for a bad split, shards that are missing or not those of the index, a decoder that cannot take the
    codec, a batch that the ranks cannot share; while iterating, Corrupt (which names key and shard) for a payload that
    cannot be decoded or whose checksum is wrong, unless config.on_error is "replace".
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        config: DataConfig,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        views: tuple[int, int] = (1, 1),
        rows: np.ndarray | None = None,
        detection: bool = False,
        flow: Dataset | None = None,
    ):
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"batch size {batch_size}, rank {rank}, world size {world_size}: no such share of a batch")
        if training and batch_size % world_size:
            near = max(1, batch_size // world_size) * world_size
            raise UserError(f"batch size {batch_size} cannot be shared evenly by {world_size} ranks; use {near}")
        if views[0] < 1 or views[1] not in (1, 3):
            raise UserError(f"views {views}: clips must be 1 or more, crops 1 or 3")
        self.dataset, self.config, self.training, self.seed = dataset, config, training, seed
        self.batch_size, self.rank, self.world_size, self.views = batch_size, rank, world_size, views
        self.detection, self.device = detection, _placed(torch.device(device))
        self.rows = dataset.rows(split) if rows is None else rows
        self._refuse_unsuitable(flow)
        self.plan = self._plan()
        if training and self.plan.count < world_size:
            what = "windows with an action" if detection else "videos"
            raise UserError(
                f"{dataset.storage} has {self.plan.count} {what} in {split!r}, fewer than {world_size} ranks"
            )
        self.meter = Meter()
        self.streams = [Stream(dataset, self.rows, config, self.device, self.meter)]
        if flow is not None:
            self.streams.append(Stream(flow, self.rows, config, self.device, self.meter, of=dataset))
        self.decoder = self.streams[0].decoder
        self.threads = config.decoder_threads or min(8, len(os.sched_getaffinity(0)))
        self.epoch, self.batch = 0, 0
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="genkd-decode")
        remote = any(stream.store.is_remote for stream in self.streams)
        self.readers = ThreadPoolExecutor(32, thread_name_prefix="genkd-read") if remote else None
        self.undecodable: set[tuple[int, int, int]] = set()  # places of samples; see run.Item
        self._run: Run | None = None
        self._told: set[int] = set()  # rows whose payload was named as bad
        self._restored = self._closed = False

    @property
    def count(self) -> int:
        """Clips of an epoch over all ranks."""
        return self.plan.count

    def __len__(self) -> int:
        return plan.batches_per_epoch(self.count, self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """Where the consumer is; JSON. Restoring it on another world size goes on with the samples not yet seen."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError for a place that this loader does not have, as with another data set or batch size."""
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch <= len(self):
            raise UserError(f"epoch {epoch}, batch {batch}: an epoch of {self.dataset.storage} has {len(self)} batches")
        self._go_to(epoch, batch)
        self._restored = True

    def stats(self) -> dict[str, float]:
        """Clips, frames and MB a second, decoded frames for each used one, the share of the time that the consumer
        waited, all since the first batch was asked for; see stats.Meter."""
        return self.meter.read_out()

    def __iter__(self) -> Iterator[Batch]:
        if not self.training and not self._restored:
            self._go_to(0, 0)  # a pass is a whole one, wherever the one before was left
        self._restored = False
        while self.batch < len(self):
            batch = self._timed_next()
            self.batch += 1
            if self.training and self.batch == len(self):
                self.epoch, self.batch = self.epoch + 1, 0
                yield batch
                return
            yield batch
        if self.training:  # restored at an epoch's end: the next one is to come
            self.epoch, self.batch = self.epoch + 1, 0
        else:
            self._drop_run()  # an evaluation is over: its memory is free until the next one

    def close(self) -> None:
        """Ends the threads and frees the pipelines' memory; a remote read under way ends by itself."""
        self._closed = True
        self._drop_run()
        if self.readers is not None:
            self.readers.shutdown(wait=False, cancel_futures=True)
        self.pool.shutdown(wait=self.readers is None, cancel_futures=True)
        for stream in self.streams:
            stream.store.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def positions(self, batch: int) -> tuple[range, int]:
        """This rank's positions in a global batch, and that batch's size over all ranks."""
        return plan.rank_positions(batch, self.batch_size, self.count, self.rank, self.world_size)

    def sample(self, epoch: int, position: int, skip: int = 0) -> plan.Sample:
        """The clip at a position of an epoch; skip: of the item that many places later, in training."""
        return self.plan.sample(epoch, position, skip)

    def bad_payload(self, row: int, problem: Corrupt) -> None:
        """Raises Corrupt for a bad payload, saying what can be done, or notes that a neighbour takes its place."""
        if not self.training:
            raise Corrupt(f"{problem}; an evaluation takes no other video in its place: make the data set again")
        if self.config.on_error == "fail":
            raise Corrupt(f"{problem}; `genkd verify` lists all such videos, data.on_error=replace trains without them")
        if row not in self._told:
            log.warning("%s; a neighbour in the epoch's order takes its place", problem)
            self._told.add(row)

    def _plan(self) -> plan.Plan:
        config, dataset, rows, of_all = self.config, self.dataset, self.rows, shapes(self.dataset)
        shards = None
        if self.training and config.shuffle_shards:
            shards = dataset.table["shard"].combine_chunks().dictionary_encode().indices.to_numpy()
        if not self.detection:
            if self.training:
                return plan.TrainingClips(config, self.seed, rows, of_all, shards)
            return plan.EvaluationClips(config, rows, of_all, self.views)
        if not self.training:
            return plan.EvaluationWindows(config, rows, of_all)
        fps = dataset.column("fps")[rows]
        annotations = dataset.table["annotations"].take(pa.array(rows)).to_pylist()
        actions = []
        for own, rate, frames in zip(annotations, fps.tolist(), dataset.num_frames[rows].tolist(), strict=True):
            # Rounded, so that tenths of a second are whole frames at 10 a second: 1.1 * 10 is more than 11.
            found = [(round(e["start_s"] * rate, 6), round(e["end_s"] * rate, 6), e["label"]) for e in own]
            actions.append(actions_inside(frames, found))
        return plan.TrainingWindows(config, self.seed, rows, of_all, shards, actions)

    def _refuse_unsuitable(self, flow: Dataset | None) -> None:
        config, storage = self.config, self.dataset.storage
        if flow is not None and (not is_flow(flow) or is_flow(self.dataset)):
            raise UserError(f"a pair is an RGB data set and a flow data set, not {storage} and {flow.storage}")
        if is_flow(self.dataset) and config.jitters_colour:
            raise UserError(
                f"{storage} holds flow, which has no colour; set brightness, contrast, saturation, hue to 0"
            )
        if self.detection and (config.stride != 1 or config.frame_jitter):
            raise UserError(f"windows have every frame: set data.stride=1, not {config.stride}, and no frame_jitter")
        if self.detection and self.views != (1, 1):
            raise UserError(f"windows have one view each, not {self.views[0]} clips and {self.views[1]} crops")
        frames = self.dataset.num_frames[self.rows]
        needed = (config.clip_length - 1) * config.stride + 1
        short = int((frames < needed).sum())
        if short and config.padding == "fail":
            row = int(self.rows[int(frames.argmin())])
            raise UserError(
                f"{short} videos of {storage} are shorter than a clip of {needed} frames, e.g. "
                f"{self.dataset.table['key'][row].as_py()} with {frames.min()}; lower data.clip_length or data.stride, "
                "or say with data.padding how to fill clips up"
            )
        if short and self.detection and config.padding == "loop":
            raise UserError(
                f"{short} videos of {storage} are shorter than a window of {needed} frames and would be played in a "
                "loop, with actions that no annotation tells: set data.padding=zero, or lower data.clip_length"
            )
        if short and self.rank == 0:
            how = "played in a loop" if config.padding == "loop" else "filled up"
            _say_once(f"{short} of {len(frames)} videos are shorter than a clip of {needed} frames and are {how}")

    def _timed_next(self) -> Batch:
        self.meter.start()
        started = time.perf_counter()
        batch = self._next()
        self.meter.batch(batch.count, batch.count * self.config.clip_length, time.perf_counter() - started)
        return batch

    def _next(self) -> Batch:
        if self._closed:
            raise UserError("the loader is closed; make another one")
        while True:
            if self._run is None:
                self._run = Run(self)
            try:
                outputs, items, count, total = self._run.next()
                break
            except RuntimeError as error:  # DALI's; its pipeline is unusable from here on
                run, self._run = self._run, None
                found = run.find_undecodable()
                run.close()
                if not found.keys() - self.undecodable:
                    raise UserError(f"the DALI pipeline failed: {reason(error)}") from error
                self.undecodable.update(found)
                for row, problem in found.values():
                    self.bad_payload(row, problem)
            except BaseException:
                self._drop_run()  # its lanes no longer stand at the same batch
                raise
        return self._batch(outputs, items, count, total)

    def _batch(self, outputs: list[torch.Tensor], items: list[Item], count: int, total: int) -> Batch:
        """outputs: of each stream, (N,T,H,W,C)."""
        samples = [item.sample for item in items]
        ids = torch.tensor([sample.row for sample in samples])
        labels = torch.from_numpy(self.dataset.labels[ids.numpy()].astype(np.int64))
        clips, *flow = (output.permute(0, 4, 1, 2, 3) for output in outputs)
        return Batch(
            clips, labels.to(self.device, non_blocking=True), ids, count, total, flow[0] if flow else None,
            self._windows(samples, outputs) if self.detection else None,
        )  # fmt: skip

    def _windows(self, samples: list[plan.Sample], outputs: list[torch.Tensor]) -> Windows:
        windows = [sample.window for sample in samples if sample.window is not None]
        offsets = torch.tensor([window.offset for window in windows])
        if not self.training:
            return Windows(offsets)
        length = self.config.clip_length
        order = np.tile(np.arange(length), (len(samples), 1))
        segments, has_splice = np.zeros((len(samples), 3, 2), np.float32), np.zeros(len(samples), bool)
        for number, sample in enumerate(samples):
            if sample.splice is not None:
                order[number], segments[number], has_splice[number] = *sample.splice, True
        boundaries = np.stack([boundary_targets(window.actions, length) for window in windows])
        picked = torch.arange(len(samples), device=self.device)[:, None], torch.from_numpy(order).to(self.device)
        clips, *flow = (output[picked].permute(0, 4, 1, 2, 3) for output in outputs)
        flat = np.array([action for window in windows for action in window.actions], np.float32).reshape(-1, 3)
        return Windows(
            offsets,
            torch.from_numpy(flat).to(self.device).split([len(window.actions) for window in windows]),
            torch.from_numpy(boundaries).to(self.device, torch.float32),
            clips,
            flow[0] if flow else None,
            torch.from_numpy(segments).to(self.device),
            torch.from_numpy(has_splice).to(self.device),
            tuple(np.flatnonzero(has_splice).tolist()),
        )

    def _go_to(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch
        self._drop_run()

    def _drop_run(self) -> None:
        if self._run is not None:
            self._run.close()
        self._run = None


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    log.info(text)


def _placed(device: torch.device) -> torch.device:
    """A GPU with its number: DALI has to be told which one torch means."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
