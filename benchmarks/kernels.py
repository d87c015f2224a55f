"""The fused ops beside eager torch and torch.compile of the same formulas: microseconds, bandwidth, peak memory.

On a GPU every contender is a replayed CUDA graph, with the L2 cache flushed before, timed by events. On a CPU the ops
run in torch, and what is compared is their way of computing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from ..kernels import attention_kd, backend, boundary_max_pool, generative_kd
from ..kernels import compile as compiler
from .common import machine, named, versions

log = logging.getLogger(__name__)

EAGER, COMPILED, GENKD, ORIGINAL = "torch eager", "torch.compile", "genkd", "original algorithm"
IN_TORCH = "genkd's steps in torch"  # what runs where the kernels cannot
MODES = ("forward", "backward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_Function = Callable[..., Any]


@dataclass
class Case:
    """One op on one shape. leaves: inputs with gradients; constants: the others; moved: bytes that must be read and
    written at least, forward and backward."""

    kernel: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    leaves: list[Tensor]
    contenders: dict[str, _Function]  # of the leaves -> outputs
    moved: tuple[int, int]
    functions: dict[str, _Function] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return _case_name(self.kernel, self.shape, self.dtype, self.layout)


def _case_name(kernel: str, shape: tuple[int, ...], dtype: str, layout: str = "") -> str:
    return f"{kernel} {'x'.join(map(str, shape))} {dtype}{' ' + layout if layout else ''}"


def run(
    repeats: int = 20, *, on_gpu: bool | None = None, small: bool = False, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Measures every case, or those with one of `names` in theirs. repeats: of each timing. small: two small cases.

    Raises UserError for a name that no case has.
    """
    on_gpu = torch.cuda.is_available() if on_gpu is None else on_gpu
    device = torch.device("cuda" if on_gpu else "cpu")
    clock = _GpuClock() if on_gpu else _CpuClock()
    used = None if small else resources()
    rows: list[dict[str, Any]] = []
    # A backward pass is timed again and again on one graph.
    with clock.running(), functorch_config.patch(donated_buffer=False):
        copy = _copy_bandwidth(clock, device, repeats, small)
        plans = _plans(device, small)
        for name in named(list(plans), names, "case"):
            case = plans[name]()
            log.info("%s", case.name)
            torch._dynamo.reset()  # each case is one more shape of the same functions
            rows += _measure(case, clock, repeats, copy)
    return {
        "benchmark": "kernels", "unit": "us", "machine": machine(), "versions": versions(), "rows": rows,
        "about": {
            "copy_gb_per_s": copy,
            "ratio": "times as fast as torch eager",
            "timing": "CUDA graph replays, L2 flushed" if on_gpu else "calls",
            "implementation": "CUDA kernels" if on_gpu else "torch",
        },
        "resources": used,
    }  # fmt: skip


def resources() -> dict[str, dict[str, Any]]:
    """Registers, shared memory and spills of every kernel by architecture, for the types that autocast gives; under
    "failed", why an architecture has none."""
    types = {"FEATURE": "bf16", "RECONSTRUCTION": "float", "TAUGHT": "float", "LATENT": "bf16", "ATTENTION": "bf16"}
    sources: list[tuple[str, str, compiler.Defines]] = [
        ("boundary_max_pool", "", {"WIDTH": 1, "LANES": 1, "ELEMENT": "bf16", "SEGMENT": "float"}),
        ("generative_kd", "", {"WIDTH": 8, "HAS_TEACHER": 1, **types}),
    ]
    for last in (0, 1):
        for maps in (0, 1):
            said = f" ({'maps' if maps else 'pooled'}, {'channels_last_3d' if last else 'contiguous'})"
            sources.append(
                ("attention_kd", said, {"WIDTH": 8, "LAST": last, "MAPS": maps, "HAS_RECONSTRUCTION": 1, **types})
            )
    found: dict[str, dict[str, Any]] = {}
    for arch in ARCHITECTURES:
        try:
            for source, said, defines in sources:
                for kernel, used in compiler.build(source, defines, arch)[1].items():
                    found.setdefault(kernel + said, {})[arch] = used._asdict()
        except compiler.Failed as problem:
            found.setdefault("failed", {})[arch] = str(problem)
    return found


def _plans(device: torch.device, small: bool) -> dict[str, Callable[[], Case]]:
    """By name, how each case is made."""
    gpu = device.type == "cuda"
    numbers = (1, 32, 512) if gpu else (1, 16)
    recognition = [(n, 1024, 8, 7, 7) for n in numbers]
    detection = [(n, *rest) for n in ((1, 8, 64) if gpu else (1,)) for rest in ((832, 64, 6, 6), (1024, 32, 3, 3))]
    pooling = [(n, 512, 256, 126) for n in (1, 8)]
    if small:
        recognition, detection, pooling = [(1, 64, 4, 3, 3)], [], [(1, 8, 16, 5)]
    layouts = ("contiguous", "channels_last_3d") if gpu else ("channels_last_3d",)
    plans: dict[str, Callable[[], Case]] = {}
    for dtype in DTYPES:
        for layout in layouts:
            for maps, shapes in ((False, recognition), (True, detection)):
                for shape in shapes:
                    args = shape, dtype, layout, device
                    name = _case_name(f"attention_kd {'maps' if maps else 'pooled'}", *args[:3])
                    plans[name] = functools.partial(_attention, *args, maps)
                    plans[_case_name("generative_kd", *args[:3])] = functools.partial(_generative, *args)
        for sizes in pooling:
            plans[_case_name("boundary_max_pool", sizes, dtype)] = functools.partial(_pooling, *sizes, dtype, device)
    return plans


def _random(shape: tuple[int, ...], dtype: str, layout: str, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.rand(shape, generator=generator, device=device, dtype=DTYPES[dtype])
    return drawn.contiguous(memory_format=torch.channels_last_3d) if layout == "channels_last_3d" else drawn


def _attention(shape: tuple[int, ...], dtype: str, layout: str, device: torch.device, maps: bool) -> Case:
    make = functools.partial(_random, dtype=dtype, device=device)
    features, made = make(shape, layout=layout, seed=0), make(shape, layout=layout, seed=1)
    attention, taught = make(shape[:3], layout="", seed=2), make(shape[:3], layout="", seed=3)

    def call(function: _Function) -> _Function:
        def forward(features: Tensor, attention: Tensor, made: Tensor) -> list[Tensor]:
            found = function(features, attention, taught, made, maps=maps)
            return [value for value in found if value is not None]

        return forward

    size, row = features.nbytes, attention.nbytes
    out = 2 * size if maps else row
    # Backward, the pooled foreground's gradient is spread without a map of it.
    moved = (2 * size + 2 * row + out, 2 * size + 2 * size + 3 * row + out)
    name = f"attention_kd {'maps' if maps else 'pooled'}"
    contenders = {EAGER: call(attention_kd.reference), GENKD: call(attention_kd.attention_kd)}
    return Case(name, shape, dtype, layout, [features, attention, made], contenders, moved)


def _generative(shape: tuple[int, ...], dtype: str, layout: str, device: torch.device) -> Case:
    make = functools.partial(_random, dtype=dtype, device=device)
    features, made, taught = (make(shape, layout=layout, seed=seed) for seed in range(3))
    n, channels, steps = shape[:3]
    mean, logvar = (make((n, steps, channels), layout="", seed=seed) for seed in (3, 4))
    attention = make(shape[:3], layout="", seed=5)

    def call(function: _Function) -> _Function:
        return lambda made, mean, logvar: list(function(features, made, mean, logvar, attention, taught))

    size, row = features.nbytes, attention.nbytes
    contenders = {EAGER: call(generative_kd.reference), GENKD: call(generative_kd.generative_kd)}
    moved = (3 * size + 3 * row, 4 * size + 5 * row)
    return Case("generative_kd", shape, dtype, layout, [made, mean, logvar], contenders, moved)


def _pooling(n: int, channels: int, steps: int, count: int, dtype: str, device: torch.device) -> Case:
    features = _random((n, channels, steps), dtype, "", device, 0)
    generator = torch.Generator(device).manual_seed(1)
    # As around the boundaries of segments of a few to all of the steps.
    starts = torch.rand(n, count, 2, generator=generator, device=device) * steps
    lengths = 2 ** (torch.rand(n, count, 2, generator=generator, device=device) * math.log2(steps / 4))
    segments = torch.stack([starts, starts + lengths], -1).flatten(2)
    contenders: dict[str, _Function] = {
        EAGER: lambda x: [boundary_max_pool.reference(x, segments)],
        GENKD: lambda x: [boundary_max_pool.boundary_max_pool(x, segments)],
    }
    if device.type == "cuda" and dtype == "fp32":
        contenders[ORIGINAL] = lambda x: [_Original.apply(x, segments)]
    out = n * channels * count
    moved = (features.nbytes + segments.nbytes + out * (features.element_size() + 4),
             features.nbytes + out * (features.element_size() + 4))  # fmt: skip
    return Case("boundary_max_pool", (n, channels, steps, count), dtype, "", [features], contenders, moved)


class _Original(torch.autograd.Function):
    """The original implementation's pooling, see boundary_max_pool_original.cu."""

    @staticmethod
    def forward(ctx, features, segments):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(features, segments)
        (n, channels, steps), count = features.shape, segments.shape[1]
        pooled = features.new_zeros((n, channels, count))
        _original(features.device).launch(
            "pool", math.ceil(pooled.numel() / 1024), 1024, features, segments, pooled, n, channels, steps, count
        )
        return pooled

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        features, segments = ctx.saved_tensors
        (n, channels, steps), count = features.shape, segments.shape[1]
        grad, result = grad.contiguous(), torch.zeros_like(features)
        _original(features.device).launch(
            "pool_grad", math.ceil(grad.numel() / 1024), 1024,
            grad, features, segments, result, n, channels, steps, count,
        )  # fmt: skip
        return result, None


def _original(device: torch.device) -> compiler.Kernels:
    return compiler.library("../benchmarks/boundary_max_pool_original", {"WIDTH": 1}, device)


def _measure(case: Case, clock: _Clock, repeats: int, copy: float) -> list[dict[str, Any]]:
    """Rows of all contenders and modes; in each mode the contenders take turns."""
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    functions = {EAGER: case.contenders[EAGER]}
    functions[COMPILED] = torch.compile(case.contenders[EAGER], dynamic=False, fullgraph=True, mode=clock.mode)
    functions |= {name: function for name, function in case.contenders.items() if name != EAGER}
    rows = []
    for mode in MODES:
        calls = {name: _call(function, leaves, mode) for name, function in functions.items()}
        if clock.has_kernels:
            calls[IN_TORCH] = _in_torch(calls[GENKD])
        times = clock.time(calls, repeats)
        base = float(np.median(times[EAGER]))
        bytes_moved = sum(case.moved) if mode == "both" else case.moved[MODES.index(mode)]
        for name, values in times.items():
            low, middle, high = (float(value) for value in np.percentile(values, [10, 50, 90]))
            speed = bytes_moved / middle / 1e3
            extra = {"GB/s": speed, "of copy": speed / copy}
            if mode == "both":
                extra["peak MB"] = clock.peak(calls[name]) / 1e6
            rows.append(
                {"workload": f"{case.name} {mode}", "name": name, "median": middle, "p10": low, "p90": high,
                 "ratio": base / middle, "repeats": len(values), "extra": extra, "bytes": bytes_moved}
            )  # fmt: skip
    return rows


def _in_torch(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with backend.selected("torch"):
            return call()

    return run


def _call(function: _Function, leaves: list[Tensor], mode: str) -> Callable[[], Any]:
    if mode == "forward":
        return lambda: function(*leaves)
    outputs = function(*leaves)
    grads = [torch.full_like(output, 0.5) for output in outputs]
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    return lambda: torch.autograd.grad(function(*leaves), leaves, grads)


class _Clock:
    """mode: torch.compile's. has_kernels: whether the ops are kernels here. time: microseconds of each call by
    contender, which take turns. peak: bytes allocated."""

    mode: str | None = None
    has_kernels = False

    def running(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def time(self, calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        raise NotImplementedError

    def peak(self, call: Callable[[], Any]) -> int:
        raise NotImplementedError


class _CpuClock(_Clock):
    def time(self, calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(repeats + 2):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                if turn >= 2:
                    times[name].append((time.perf_counter() - started) * 1e6)
        return times

    def peak(self, call: Callable[[], Any]) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        total = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            most = max(most, total)
        return most


class _GpuClock(_Clock):
    mode = "max-autotune-no-cudagraphs"
    has_kernels = True

    def __init__(self) -> None:
        self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
        self._stream = torch.cuda.Stream()

    def running(self) -> contextlib.AbstractContextManager:
        # All on one stream: a backward pass runs where its forward pass ran, and that must be where it is captured.
        return torch.cuda.stream(self._stream)

    def time(self, calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
        graphs = {name: self._capture(call) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, graph in graphs.items():
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                before.record()
                graph.replay()
                after.record()
                after.synchronize()
                times[name].append(before.elapsed_time(after) * 1e3)
        return times

    def _capture(self, call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        return graph

    def peak(self, call: Callable[[], Any]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _copy_bandwidth(clock: _Clock, device: torch.device, repeats: int, small: bool) -> float:
    """GB/s of a copy of a large tensor, bytes read and written."""
    size = 2**20 if small else 2**30 if device.type == "cuda" else 2**27
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = clock.time({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * size / float(np.median(times)) / 1e3
