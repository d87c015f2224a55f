"""Loader: plan + store + graph as an iterator of batches whose whole state is (epoch, batch)."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
import torch
from nvidia.dali.pipeline import Pipeline

from ..configs.schema import DataConfig
from ..errors import UserError
from ..preprocessing.shards import Corrupt, Dataset
from . import graph, plan
from .store import ClipStore, decode_rgb, require_readable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    clips: (N,3,T,H,W) float32 in channels_last_3d on the device; labels: (N,) int64 there; ids: (N,) rows of the index
    on the CPU. count: how many of the N samples are this rank's own; 0 where the batch is too small to give it one (N
    is then 1, a stand-in that must get no weight). total: samples of the batch over all ranks.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    count: int
    total: int


@dataclass
class Stats:
    """What a loader has delivered. wait_s: seconds that its consumer waited for batches."""

    batches: int = 0
    clips: int = 0
    wait_s: float = 0.0
    replaced: int = 0


@dataclass
class _Item:
    """A sample on its way to the graph; the future gives its media and frame numbers."""

    epoch: int
    position: int
    sample: plan.Sample
    future: Future


class Loader:
    """Clips of one split, in the plan's order.

    training: shuffled epochs of random clips, every video once an epoch; iterating gives the rest of the current epoch
    and moves on to the next. Otherwise one pass over views = (clips, crops) of every video, in key order, views of a
    video next to each other. batch_size counts clips over all ranks; rows: these rows of the index instead of the whole
    split. Close it, or use it as a context manager.
    Raises UserError for a bad split, a missing shard or a decoder that cannot take the codec; while iterating,
    Corrupt (which names key and shard) for a payload that cannot be decoded, unless config.on_error is "replace".
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
    ):
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"batch size {batch_size}, rank {rank}, world size {world_size}: no such share of a batch")
        if training and batch_size < world_size:
            raise UserError(f"batch size {batch_size} gives the {world_size} ranks less than one clip each")
        self.dataset, self.config, self.training, self.seed = dataset, config, training, seed
        self.batch_size, self.rank, self.world_size, self.views = batch_size, rank, world_size, views
        self.device = torch.device(device)
        self.rows = dataset.rows(split) if rows is None else rows
        require_readable(dataset, np.unique(dataset.table["shard"].take(self.rows).to_numpy(zero_copy_only=False)))
        codecs = pc.unique(dataset.table["codec"].take(self.rows)).to_pylist()
        self.decoder = graph.choose_decoder(config.decoder, codecs, self.device.type)
        self.threads = config.decoder_threads or min(8, len(os.sched_getaffinity(0)))
        self.stats = Stats()
        self.epoch, self.batch = 0, 0
        self.store = ClipStore(dataset)
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="genkd-decode")
        self.bad_rows: set[int] = set()
        self._run: _Run | None = None

    @property
    def count(self) -> int:
        """Clips of an epoch over all ranks."""
        return len(self.rows) * (1 if self.training else self.views[0] * self.views[1])

    def __len__(self) -> int:
        return plan.batches_per_epoch(self.count, self.batch_size)

    def state_dict(self) -> dict[str, int]:
        """Where the consumer is; JSON. Restoring it on another world size goes on with the samples not yet seen."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self._drop_run()

    def __iter__(self) -> Iterator[Batch]:
        if not self.training and self.batch >= len(self):
            self.load_state_dict({"epoch": 0, "batch": 0})
        while self.batch < len(self):
            started = time.perf_counter()
            batch = self._next()
            self.stats.wait_s += time.perf_counter() - started
            self.stats.batches += 1
            self.stats.clips += batch.count
            self.batch += 1
            if self.training and self.batch == len(self):
                self.epoch, self.batch = self.epoch + 1, 0
                yield batch
                return
            yield batch
        self._drop_run()  # an evaluation is over: its memory is free until the next one

    def close(self) -> None:
        """Ends the threads and frees the pipeline's memory."""
        self._drop_run()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.store.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def positions(self, batch: int) -> tuple[range, int]:
        """This rank's positions in a global batch, and that batch's size over all ranks."""
        return plan.rank_positions(batch, self.batch_size, self.count, self.rank, self.world_size)

    def sample(self, epoch: int, position: int, skip: int = 0) -> plan.Sample:
        """The clip at a position of an epoch; skip: of the video that many places later, in training."""
        if self.training:
            row = int(self.rows[self._order(epoch)[(position + skip) % len(self.rows)]])
            video = self._shape(row)
            return plan.train_sample(self.config, self.seed, epoch, row, *video)
        views = self.views[0] * self.views[1]
        row = int(self.rows[position // views])
        return plan.eval_samples(self.config, row, *self._shape(row), *self.views)[position % views]

    def _shape(self, row: int) -> tuple[int, int, int]:
        frames, width, height = (int(self.dataset.column(name)[row]) for name in ("num_frames", "width", "height"))
        return frames, width, height

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_order_of", None) != epoch:
            self._order_of, self._epoch_order = epoch, plan.epoch_order(len(self.rows), self.seed, epoch)
        return self._epoch_order

    def _next(self) -> Batch:
        while True:
            if self._run is None:
                self._run = _Run(self)
            try:
                return self._run.next()
            except RuntimeError as error:  # DALI's; its pipeline is unusable from here on
                run, self._run = self._run, None
                found = run.undecodable()
                run.close()
                if not found:
                    raise UserError(f"the DALI pipeline failed: {_first_line(error)}") from error
                for row, problem in found.items():
                    self.bad_payload(row, problem)

    def bad_payload(self, row: int, problem: Corrupt) -> None:
        """Raises Corrupt with the key and shard of a bad payload, or notes that a neighbour takes its place."""
        video = self.dataset.video(row)
        message = f"{video.key} in {self.dataset.path / 'shards' / video.shard}: {problem}"
        if not self.training:
            raise Corrupt(f"{message}; an evaluation takes no other video in its place: make the data set again")
        if self.config.on_error == "fail":
            raise Corrupt(f"{message}; `genkd verify` lists all such videos, data.on_error=replace trains without them")
        if row not in self.bad_rows:
            log.warning("%s; a neighbour in the epoch's order takes its place", message)
            self.bad_rows.add(row)

    def _drop_run(self) -> None:
        if self._run is not None:
            self._run.close()
        self._run = None


class _Run:
    """One DALI pipeline and the samples on their way through it, from the loader's current place on."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._place: tuple[int, int] | None = (loader.epoch, loader.batch)
        self._ahead: deque = deque()  # batches whose samples are being read
        self._inside: deque = deque()  # batches that the pipeline has
        share = -(-loader.batch_size // loader.world_size)
        self._pipeline: Pipeline | None = graph.build(
            self._feed, loader.config, loader.decoder, loader.device, share, loader.threads
        )
        self._fill()

    def next(self) -> Batch:
        stream = torch.cuda.current_stream(self._loader.device) if self._loader.device.type == "cuda" else None
        assert self._pipeline is not None, "a closed run gives no more batches"
        (output,) = self._pipeline.run(stream)
        clips = torch.from_dlpack(output.as_tensor())  # (N,T,H,W,3)
        items, count, total = self._inside.popleft()
        ids = torch.tensor([item.sample.row for item in items])
        labels = torch.from_numpy(self._loader.dataset.labels[ids.numpy()].astype(np.int64))
        return Batch(clips.permute(0, 4, 1, 2, 3), labels.to(self._loader.device, non_blocking=True), ids, count, total)

    def close(self) -> None:
        """Takes back the reads that have not begun, and frees the pipeline, which holds a reference to this object."""
        self._pipeline = None
        for items, *_ in self._ahead:
            for item in items:
                item.future.cancel()

    def undecodable(self) -> dict[int, Corrupt]:
        """Rows inside the pipeline that PyAV cannot decode either, with what it says."""
        found: dict[int, Corrupt] = {}
        for items, *_ in self._inside:
            for item in items:
                try:
                    self._media(item.sample, "pyav")
                except Corrupt as problem:
                    found[item.sample.row] = problem
        return found

    def _feed(self) -> tuple:
        self._fill()
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft()
        self._fill()
        items = batch[0]
        media, frames = zip(*[self._resolve(item) for item in items], strict=True)
        self._inside.append(batch)
        crops = np.array([item.sample.crop for item in items], np.float32)
        flips = [np.array(item.sample.flip, np.int32) for item in items]
        given = (list(media), list(crops[:, :2]), list(crops[:, 2:]), flips)
        # PyAV has already picked the frames.
        return (*given, list(frames)) if self._loader.decoder == "dali" else given

    def _fill(self) -> None:
        loader = self._loader
        while len(self._ahead) < loader.config.prefetch and self._place is not None:
            epoch, batch = self._place
            positions, total = loader.positions(batch)
            items = [self._submit(epoch, position) for position in positions or [batch * loader.batch_size]]
            self._ahead.append((items, len(positions), total))
            self._place = self._after(epoch, batch)

    def _after(self, epoch: int, batch: int) -> tuple[int, int] | None:
        if batch + 1 < len(self._loader):
            return epoch, batch + 1
        return (epoch + 1, 0) if self._loader.training else None

    def _submit(self, epoch: int, position: int, skip: int = 0) -> _Item:
        sample = self._loader.sample(epoch, position, skip)
        return _Item(epoch, position, sample, self._loader.pool.submit(self._media, sample, self._loader.decoder))

    def _resolve(self, item: _Item) -> tuple[np.ndarray, np.ndarray]:
        """The sample's media; a bad payload is replaced by the next readable one of the epoch's order, if allowed."""
        loader, skip = self._loader, 0
        while True:
            if item.sample.row not in loader.bad_rows:
                try:
                    return item.future.result()
                except Corrupt as problem:
                    loader.bad_payload(item.sample.row, problem)
            skip += 1
            if skip == len(loader.rows):
                raise Corrupt(f"no video of {loader.dataset.path} can be decoded")
            replacement = self._submit(item.epoch, item.position, skip)
            item.sample, item.future = replacement.sample, replacement.future
            loader.stats.replaced += 1

    def _media(self, sample: plan.Sample, decoder: str) -> tuple[np.ndarray, np.ndarray]:
        video = self._loader.dataset.video(sample.row)
        data, base = self._loader.store.read(video, int(sample.frames.min()), int(sample.frames.max()))
        frames = (sample.frames - base).astype(np.int32)
        return (decode_rgb(data, frames), frames) if decoder == "pyav" else (data, frames)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [
        line
        for line in lines
        if not line.startswith(("Critical error", "Error in", "which was", "encountered", "File "))
    ]
    return (told or lines or [type(error).__name__])[0]
