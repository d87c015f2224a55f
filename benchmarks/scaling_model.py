"""What limits training on many GPUs: a model of one synchronous data-parallel step, and the assumptions it stands on.

A step takes one GPU's own time, plus what of the exchange of gradients the backward passes do not hide. Gradients go in
DDP's buckets, each by a ring all-reduce: 2 (n-1)/n x bytes / bandwidth + 2 (n-1) x latency (Patarasuk and Yuan, 2009).
A bucket may go when its gradients are there and the one before is through; gradients arrive evenly, byte by byte, along
their module's backward pass. Loaders and storage cap the rate. Not in the model: stragglers, other jobs on the links,
checkpoints and evaluations, what reducing takes from the GPU's own work, and what larger global batches do to learning.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError

MODULES = ("cvae", "recognizer")  # in the order in which a step reduces their gradients
LIMITS = ("compute", "communication", "loader", "storage")


def _of(
    default: float, unit: str, source: str, *, low: float = 0.0, high: float = math.inf, above: bool = False,
    whole: bool = False,
) -> Any:  # fmt: skip
    """A field: low <= value <= high, or low < value where `above`; whole numbers only where `whole`."""
    about = {"unit": unit, "source": source, "low": low, "high": high, "above": above, "whole": whole}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Assumptions:
    """Everything that a prediction stands on. sources: where values come from that are not the stated defaults.

    MB and GB are 10^6 and 10^9 bytes. Bandwidths are of one direction; a single ring of all GPUs is paced by its
    slowest link. step_s 0: from FLOPs, see assume().
    """

    clips_per_gpu: float = _of(32, "clips", "preset", low=1, whole=True)
    gflop_per_clip: float = _of(0, "GFLOP", "counted: student and teacher, forward and backward")
    gpu_tflops: float = _of(989, "TFLOP/s", "stated: H100 SXM, dense bf16", above=True)
    utilization: float = _of(0.4, "of peak", "stated", above=True, high=1)
    step_s: float = _of(0, "s", "see utilization", above=True)
    cvae_backward_share: float = _of(0, "of step_s", "counted: of the FLOPs", high=1)
    recognizer_backward_share: float = _of(0, "of step_s", "counted: of the FLOPs", high=1)
    cvae_gradient_mb: float = _of(0, "MB, as fp32", "counted from the parameters")
    recognizer_gradient_mb: float = _of(0, "MB, as fp32", "counted from the parameters")
    gradient_bytes: float = _of(4, "bytes each", "DDP reduces in the parameters' type, fp32", above=True, high=8)
    first_bucket_mib: float = _of(1, "MiB", "DDP's default", above=True)
    bucket_mib: float = _of(25, "MiB", "DDP's default", above=True)
    overlap: float = _of(1, "of backward", "stated: how much of it exchange may hide under", high=1)
    gpus_per_host: float = _of(8, "GPUs", "stated", low=1, whole=True)
    hierarchical: float = _of(1, "1 or 0", "stated: rings in and between hosts, or one of all", high=1, whole=True)
    nvlink_gb_s: float = _of(450, "GB/s a GPU", "stated: NVLink 4", above=True)
    nvlink_latency_us: float = _of(5, "us a hop", "stated")
    inter_host_gb_s: float = _of(400, "GB/s a host", "stated: InfiniBand, 8 x 400 Gbit/s", above=True)
    inter_host_latency_us: float = _of(10, "us a hop", "stated")
    link_utilization: float = _of(0.8, "of line rate", "stated", above=True, high=1)
    cores_per_host: float = _of(112, "cores", "stated", above=True)
    cpu_s_per_clip: float = _of(0, "s", "measured here", above=True)
    loader_overlap: float = _of(1, "of its work", "stated: on cores that do not train", high=1)
    storage_gb_s: float = _of(40, "GB/s", "stated: of all hosts together", above=True)
    mb_per_clip: float = _of(0, "MB", "measured here", above=True)
    sources: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> list[dict[str, Any]]:
        """name, value, unit and source of each."""
        return [
            {"name": entry.name, "value": getattr(self, entry.name), "unit": entry.metadata["unit"],
             "source": self.sources.get(entry.name, entry.metadata["source"])}
            for entry in _FIELDS.values()
        ]  # fmt: skip

    def but(self, source: str, **values: float) -> Assumptions:
        """These with other values, from that source."""
        return dataclasses.replace(self, **values, sources={**self.sources, **dict.fromkeys(values, source)})


_FIELDS = {entry.name: entry for entry in dataclasses.fields(Assumptions) if entry.name != "sources"}


def parse(texts: Sequence[str]) -> dict[str, float]:
    """The values of "name=value" texts. Raises UserError for an unknown name or a value that cannot be."""
    values: dict[str, float] = {}
    for text in texts:
        name, separator, written = text.partition("=")
        if not separator:
            raise UserError(f"--assume {text!r} is not of the form name=value, e.g. inter_host_gb_s=25")
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_FIELDS)}"
            raise UserError(f"--assume {text}: there is no assumption {name!r}; {hint}")
        try:
            values[name] = float(written)
        except ValueError:
            raise UserError(f"--assume {text}: {written!r} is not a number") from None
        about = _FIELDS[name].metadata
        low, high, value = about["low"], about["high"], values[name]
        fits = low <= value <= high and value < math.inf and (value > low or not about["above"])
        if not fits or (about["whole"] and value % 1):
            what = "a whole number" if about["whole"] else "a number"
            where = f"{'above' if about['above'] else 'from'} {low:g}{f' up to {high:g}' if high < math.inf else ''}"
            raise UserError(f"--assume {text}: {name} is {what} {where}")
    return values


def assume(base: Assumptions, values: Mapping[str, float]) -> Assumptions:
    """base with the user's values. Where neither measured nor given, step_s follows from the FLOPs; a measured one
    follows the clips of a GPU, and gives way where FLOPs are given."""
    found = base.but("--assume", **values)
    if "step_s" in values:
        return found
    if not base.step_s or values.keys() & {"gflop_per_clip", "gpu_tflops", "utilization"}:
        seconds = found.clips_per_gpu * found.gflop_per_clip / (found.utilization * found.gpu_tflops * 1e3)
        return found.but("assumed: clips_per_gpu x gflop_per_clip / (utilization x gpu_tflops)", step_s=seconds)
    if "clips_per_gpu" in values:
        seconds = base.step_s * found.clips_per_gpu / base.clips_per_gpu
        return found.but(f"{base.sources['step_s']}, scaled to clips_per_gpu", step_s=seconds)
    return found


@dataclass(frozen=True)
class Prediction:
    """One number of GPUs. exposed_s: exchange that is not hidden; exchange_s: all of it; efficiency: rate beside ideal;
    without_limits: clips/s if loaders and storage kept up; ideal, loader, storage: clips/s; limit: one of LIMITS."""

    gpus: int
    clips_per_s: float
    efficiency: float
    limit: str
    step_s: float
    exposed_s: float
    exchange_s: float
    without_limits: float
    ideal: float
    loader: float
    storage: float


def predict(a: Assumptions, gradients: Mapping[str, Sequence[float]], gpus: int) -> Prediction:
    """The model. gradients: of each module the bytes of its parameters' gradients, in the order in which they come.

    The limit is what caps the rate or, where nothing does, what most of the step is spent on.
    """
    exposed = exchange = 0.0
    for module in MODULES:
        if not gradients.get(module):
            continue
        scale = getattr(a, f"{module}_gradient_mb") * 1e6 / sum(gradients[module])
        sizes = buckets([size * scale for size in gradients[module]], a.first_bucket_mib * 2**20, a.bucket_mib * 2**20)
        times = [all_reduce_s(a, gpus, size * a.gradient_bytes / 4) for size in sizes]
        backward = a.step_s * getattr(a, f"{module}_backward_share")
        exchange += sum(times)
        exposed += exposed_s(backward, sizes, times, a.overlap)
    own = a.step_s + (1 - a.loader_overlap) * a.clips_per_gpu * a.cpu_s_per_clip
    clips, hosts = gpus * a.clips_per_gpu, math.ceil(gpus / a.gpus_per_host)
    rates = {
        "communication" if exposed > own else "compute": clips / (own + exposed),
        "loader": hosts * a.cores_per_host / a.cpu_s_per_clip,
        "storage": a.storage_gb_s * 1e9 / (a.mb_per_clip * 1e6),
    }
    limit = min(rates, key=rates.__getitem__)
    ideal = clips / own
    return Prediction(
        gpus, rates[limit], rates[limit] / ideal, limit, own + exposed, exposed, exchange, clips / (own + exposed),
        ideal, rates["loader"], rates["storage"],
    )  # fmt: skip


def ring_s(ranks: float, size: float, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes: bandwidth in bytes/s, latency in s a hop."""
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency


def all_reduce_s(a: Assumptions, gpus: int, size: float) -> float:
    """Of `size` bytes over all GPUs. Hierarchical: reduce-scatter in each host, all-reduce between hosts of a share a
    GPU, all at once over the host's links, then all-gather in each host; the first and last make up one ring."""
    hosts, local = math.ceil(gpus / a.gpus_per_host), min(gpus, a.gpus_per_host)
    inside, between = (gb_s * 1e9 * a.link_utilization for gb_s in (a.nvlink_gb_s, a.inter_host_gb_s))
    if hosts > 1 and not a.hierarchical:
        return ring_s(gpus, size, min(inside, between), a.inter_host_latency_us / 1e6)
    seconds = ring_s(local, size, inside, a.nvlink_latency_us / 1e6)
    return seconds + (ring_s(hosts, size, between, a.inter_host_latency_us / 1e6) if hosts > 1 else 0.0)


def buckets(sizes: Sequence[float], first: float, cap: float) -> list[float]:
    """Bytes of DDP's buckets: one is closed when it holds at least its limit, `first` bytes and then `cap`."""
    found, held, limit = [], 0.0, first
    for size in sizes:
        held += size
        if held >= limit:
            found.append(held)
            held, limit = 0.0, cap
    return [*found, held] if held else found


def exposed_s(backward_s: float, sizes: Sequence[float], times: Sequence[float], overlap: float) -> float:
    """Seconds of the exchange behind the end of a backward pass. sizes and times: of the buckets, in order; overlap: 1,
    it runs beside the backward pass; 0, both need the same thing, so all of it adds up; between: in proportion."""
    total, seen, done = sum(sizes), 0.0, 0.0
    for size, seconds in zip(sizes, times, strict=True):
        seen += size
        done = max(done, backward_s * seen / total) + seconds
    return overlap * max(0.0, done - backward_s) + (1 - overlap) * sum(times)
