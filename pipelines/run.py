"""A loader's way from one place on: batches that are read ahead, decoded ahead, and inside DALI's pipelines."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from nvidia.dali.pipeline import Pipeline

from ..preprocessing.shards import Corrupt
from . import graph, plan
from .store import Slice
from .streams import Media, Stream

if TYPE_CHECKING:
    from .loader import Loader


@dataclass
class Item:
    """A sample on its way. skip: how many places later its item stands in the epoch's order, where the right one cannot
    be used; encoded: whether DALI decodes it; reads, media: of each stream; resolved: the media once they are known to
    be good, the same for every lane."""

    epoch: int
    position: int
    sample: plan.Sample
    encoded: bool
    reads: list[Future[Slice] | None]
    media: list[Future[Media]]
    skip: int = 0
    resolved: list[Media] | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """What decides the sample, on any rank and in any run."""
        return self.epoch, self.position, self.skip


@dataclass(frozen=True)
class _Planned:
    """A rank's share of a batch. count: its own items; total: of all ranks; lanes: of each stream, those that carry
    it, in order."""

    items: list[Item]
    count: int
    total: int
    lanes: list[list[_Lane]]


class Run:
    """The batches of a loader from its current place on.

    Batches take turns with the groups of lanes; of a group, each stream has one lane or, where DALI and PyAV share a
    batch, two.
    """

    def __init__(self, loader: Loader):
        self._loader = loader
        self._place: tuple[int, int] | None = (loader.epoch, loader.batch)
        share = -(-loader.batch_size // loader.world_size)
        groups = loader.config.pipelines_per_gpu if loader.device.type == "cuda" else 1
        self._groups = [[_lanes(self, loader, stream, share) for stream in loader.streams] for _ in range(groups)]
        self._number = 0  # of the next batch that is given to a group
        self._reading: deque[tuple[list[Item], int, int]] = deque()
        self._inside: deque[_Planned] = deque()  # batches that lanes have

    def next(self) -> tuple[list[torch.Tensor], list[Item], int, int]:
        """The next batch: of each stream (N,T,size,size,C) on the device; the items; this rank's own; of all ranks.

        Raises what reading and decoding raised, RuntimeError for DALI.
        """
        while not self._inside:
            self.advance()
        planned = self._inside[0]
        parts = [[lane.run() for lane in lanes] for lanes in planned.lanes]
        self._inside.popleft()
        outputs = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
        for stream, output in zip(self._loader.streams, outputs, strict=True):
            for clip, item in zip(output, planned.items, strict=True):
                stream.fill_up(clip, item.sample)
        return outputs, planned.items, planned.count, planned.total

    def advance(self) -> bool:
        """Gives one more batch to the lanes whose turn it is; False at the end of the plan."""
        depth = 1 + (self._loader.config.read_ahead if self._loader.readers else 0)
        while len(self._reading) < depth and self._place is not None:
            self._reading.append(self._read(*self._place))
        if not self._reading:
            return False
        items, count, total = self._reading.popleft()
        group = self._groups[self._number % len(self._groups)]
        self._number += 1
        for item in items:
            self._decode(item)
        used = [[lane for lane in lanes if lane.takes(items)] for lanes in group]
        self._inside.append(_Planned(items, count, total, used))
        return True

    def resolve(self, item: Item) -> list[Media]:
        """A sample's media, of each stream; one that cannot be read is replaced by the next that can of the epoch's
        order, if that is allowed. That depends on nothing that the loader has met before, so it can be repeated."""
        loader = self._loader
        while item.resolved is None:
            if item.place not in loader.undecodable:
                try:
                    item.resolved = [future.result() for future in item.media]
                    break
                except Corrupt as problem:
                    loader.bad_payload(item.sample.row, problem)
            item.skip += 1
            if item.skip >= loader.plan.count:
                raise Corrupt(f"no video of {loader.dataset.storage} can be decoded")
            item.sample = loader.sample(*item.place)
            item.reads = [None] * len(item.reads)
            self._decode(item)
            loader.meter.replaced += 1
        return item.resolved

    def find_undecodable(self) -> dict[tuple[int, int, int], tuple[int, Corrupt]]:
        """Of what the pipelines have, the places and rows that cannot be decoded, and why: by what PyAV says or, where
        it decodes all of them, by what DALI says of each alone."""
        inside = [item for planned in self._inside for item in planned.items if item.resolved is not None]
        for refusal in (_by_pyav, self._by_dali):
            found = {}
            for item in inside:
                for stream in self._loader.streams:
                    problem = refusal(stream, item.sample)
                    if problem is not None:
                        found[item.place] = item.sample.row, problem
            if found:
                return found
        return {}

    def _by_dali(self, stream: Stream, sample: plan.Sample) -> Corrupt | None:
        loader, decoder = self._loader, stream.decoder
        if decoder == "pyav":
            return None
        media = stream.prepare(sample, stream.read(sample), encoded=True)
        spec = graph.Spec(True, stream.is_flow, stream.jitters_colour, 1, 1)
        pipeline = graph.build(lambda: stream.feed([sample], [media], True), loader.config, spec, loader.device)
        try:
            pipeline.run()
        except RuntimeError as error:
            return stream.blamed(sample, f"DALI does not decode it ({graph.reason(error)})")
        return None

    def close(self) -> None:
        """Takes back what has not begun, and frees the pipelines, which hold references to this object."""
        waiting = [item for items, *_ in self._reading for item in items]
        waiting += [item for planned in self._inside for item in planned.items]
        for item in waiting:
            for future in (*item.reads, *item.media):
                if future is not None:
                    future.cancel()
        for group in self._groups:
            for lanes in group:
                for lane in lanes:
                    lane.close()

    def _read(self, epoch: int, batch: int) -> tuple[list[Item], int, int]:
        """Plans a batch and, where reading takes a network's time, begins to read it."""
        loader = self._loader
        positions, total = loader.positions(batch)
        places = list(positions) or [batch * loader.batch_size]  # a stand-in where nothing is left for this rank
        by_dali = {"dali": len(places), "pyav": 0}.get(
            loader.decoder, round(len(places) * (1 - loader.config.hybrid_share))
        )
        items = []
        for number, position in enumerate(places):
            sample = loader.sample(epoch, position)
            reads = [
                loader.readers.submit(stream.read, sample) if loader.readers and stream.store.is_remote else None
                for stream in loader.streams
            ]
            items.append(Item(epoch, position, sample, number < by_dali, reads, []))
        if batch + 1 < len(loader):
            self._place = epoch, batch + 1
        else:
            self._place = (epoch + 1, 0) if loader.training else None
        return items, len(positions), total

    def _decode(self, item: Item) -> None:
        item.media = [
            self._loader.pool.submit(_prepare, stream, item.sample, read, _by_dali(stream, item))
            for stream, read in zip(self._loader.streams, item.reads, strict=True)
        ]


class _Lane:
    """One DALI pipeline, and the parts of batches that wait for it."""

    def __init__(self, run: Run, loader: Loader, stream: Stream, encoded: bool, share: int):
        self.encoded, self.ahead = encoded, deque[list[Item]]()
        self._fed: deque[list[Media]] = deque()  # what the pipeline may still read
        self._failure: Exception | None = None
        self._run, self._stream, self._device = run, stream, loader.device
        self._number, self._prefetch = loader.streams.index(stream), loader.config.prefetch
        spec = graph.Spec(encoded, stream.is_flow, stream.jitters_colour, share, loader.threads)
        self._pipeline: Pipeline | None = graph.build(self._feed, loader.config, spec, loader.device)

    def takes(self, items: list[Item]) -> bool:
        """Puts this lane's part of a batch into its queue; False where there is none."""
        part = [item for item in items if _by_dali(self._stream, item) == self.encoded]
        if part:
            self.ahead.append(part)
        return bool(part)

    def run(self) -> torch.Tensor:
        """The clips of the next part: (N,T,size,size,C) on the device, ready for torch's current stream."""
        assert self._pipeline is not None, "a closed run gives no more batches"
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (output,) = self._pipeline.run(stream)
        except StopIteration:
            assert self._failure is not None, "no batch is asked for behind the end"
            raise self._failure from None
        self._stream.release(self._fed.popleft(), self.encoded)
        return torch.from_dlpack(output.as_tensor())

    def close(self) -> None:
        self._pipeline = None
        self.ahead.clear()

    def _feed(self) -> Any:
        """What DALI takes in for a batch; later ones are begun before this one is waited for.

        A failure is raised when its batch is due: those before it, which the pipeline has, come first.
        """
        while len(self.ahead) <= self._prefetch and self._run.advance():
            pass
        if not self.ahead or self._failure:
            raise StopIteration
        items = self.ahead.popleft()
        try:
            media = [self._run.resolve(item)[self._number] for item in items]
        except Exception as error:
            self._failure = error
            raise StopIteration from None
        self._fed.append(media)
        return self._stream.feed([item.sample for item in items], media, self.encoded)


def _lanes(run: Run, loader: Loader, stream: Stream, share: int) -> list[_Lane]:
    kinds = {"dali": [True], "pyav": [False], "hybrid": [True, False]}[stream.decoder]
    return [_Lane(run, loader, stream, encoded, share) for encoded in kinds]


def _by_dali(stream: Stream, item: Item) -> bool:
    return stream.decoder == "dali" or (stream.decoder == "hybrid" and item.encoded)


def _prepare(stream: Stream, sample: plan.Sample, read: Future[Slice] | None, encoded: bool) -> Media:
    return stream.prepare(sample, stream.read(sample) if read is None else read.result(), encoded)


def _by_pyav(stream: Stream, sample: plan.Sample) -> Corrupt | None:
    try:
        stream.prepare(sample, stream.read(sample), encoded=False)
    except Corrupt as problem:
        return problem
    return None
