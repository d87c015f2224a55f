"""Looks over a machine: what genkd needs, what it can use, and one clip through the whole chain."""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import av
import torch

from .errors import UserError

_PYTHONS = ((3, 10), (3, 13))
_TORCH = (2, 10)
# What shards are written with, and synthetic and annotated videos; then what shards, UCF101, HMDB51, Kinetics and
# THUMOS14 are read with.
_ENCODERS = ("libx264", "libx265", "libvpx-vp9", "mjpeg", "mpeg4")
_DECODERS = ("h264", "hevc", "vp9", "vp8", "mjpeg", "mpeg4", "av1")

Finding = tuple[bool, str]


def examine() -> list[dict[str, Any]]:
    """{"what": what was looked at, "ok": whether it is as genkd needs it, "found": in words} of each check.

    What is missing and only optional, such as a GPU or Apex, is fine.
    """
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("gpu", _gpu),
        ("cudnn", _cudnn),
        ("nccl", _nccl),
        ("dali", _dali),
        ("nvdec", _nvdec),
        ("encoders", lambda: _codecs(_ENCODERS, "w")),
        ("decoders", lambda: _codecs(_DECODERS, "r")),
        ("apex", _apex),
        ("kernels", _kernels),
        ("disk", lambda: _space(Path.cwd(), 1)),
        ("shared memory", lambda: _space(Path("/dev/shm"), 0.06)),
        ("one clip", _one_clip),
    ]
    findings = []
    for what, check in checks:
        try:
            ok, found = check()
        except (ImportError, OSError, RuntimeError, UserError, av.FFmpegError) as error:
            ok, found = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        findings.append({"what": what, "ok": ok, "found": found})
    return findings


def _python() -> Finding:
    lowest, highest = (".".join(map(str, version)) for version in _PYTHONS)
    fine = _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]
    return fine, platform.python_version() + ("" if fine else f"; genkd runs on {lowest} to {highest}")


def _torch() -> Finding:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    found = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    fine = (major, minor) >= _TORCH
    return fine, found if fine else f"{found}; genkd needs {'.'.join(map(str, _TORCH))} or newer"


def _gpu() -> Finding:
    if torch.cuda.is_available():
        return True, ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    if Path("/dev/nvidia0").exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        why = "its driver is too old for it" if torch.version.cuda else "it was built without CUDA"
        return False, f"there is one (/dev/nvidia0), but PyTorch does not see it: {why}"
    return True, "none; everything runs on the CPU"


def _cudnn() -> Finding:
    return of_cudnn(torch.backends.cudnn.version() if torch.cuda.is_available() else None)


def of_cudnn(version: int | None) -> Finding:
    """What is known of a version of cuDNN, numbered as 10,000 * major + 100 * minor + patch from 9 on.

    Wrong results are not fine; what is slow in a layout that genkd does not train in is.
    """
    if version is None:
        return True, "not used"
    name = f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version >= 90000 else str(version)
    if 90800 <= version < 91300:
        return False, (
            f"{name}: bf16 conv3d is wrong on very large inputs from 9.8 to 9.12 (pytorch issue 163539); install "
            "nvidia-cudnn of 9.15 or newer for your CUDA"
        )
    slow = "; before 9.15 bf16 conv3d is slow in NCDHW (pytorch issue 166643), genkd trains in NDHWC"
    return True, name + (slow if version < 91500 else "")


def _nccl() -> Finding:
    if not torch.cuda.is_available():
        return True, "not used"
    if not torch.distributed.is_nccl_available():
        alone = torch.cuda.device_count() == 1
        return alone, "not in this PyTorch" + ("" if alone else ", so several GPUs cannot train together")
    return True, ".".join(map(str, torch.cuda.nccl.version()))


def _dali() -> Finding:
    dali = importlib.import_module("nvidia.dali")
    return True, dali.__version__


def _nvdec() -> Finding:
    if not torch.cuda.is_available():
        return True, "not used"
    library = ctypes.util.find_library("nvcuvid")
    return library is not None, library or "libnvcuvid is missing: the driver's video capability is not exposed here"


def _codecs(names: tuple[str, ...], mode: Literal["r", "w"]) -> Finding:
    missing = []
    for name in names:
        try:
            av.Codec(name, mode)
        except av.codec.codec.UnknownCodecError:
            missing.append(name)
    told = f"without {', '.join(missing)}" if missing else ", ".join(names)
    return not missing, f"PyAV {av.__version__}, {told}"


def _apex() -> Finding:
    if importlib.util.find_spec("apex") is None:
        return True, "not installed (optional)"
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        return True, "another project of that name, as PyPI's; optimizer.backend=apex needs NVIDIA's (optional)"
    fused = hasattr(optimizers, "FusedSGD")
    return True, f"NVIDIA's, {'with' if fused else 'built without'} fused optimizers"


def _kernels() -> Finding:
    from .kernels import backend
    from .kernels import compile as compiler
    from .kernels.boundary_max_pool import boundary_max_pool

    if not torch.cuda.is_available():
        return True, "not used; without a GPU their ops run in torch"
    with backend.selected("cuda"):
        found = boundary_max_pool(torch.eye(4, device="cuda")[None], torch.full((1, 1, 4), 2.5, device="cuda"))
    version = ".".join(map(str, compiler.nvrtc_version()))
    return found.flatten().tolist() == [0, 0, 1, 0], f"compiled by NVRTC {version}, kept in {compiler.cache_folder()}"


def _space(path: Path, needed_gb: float) -> Finding:
    free = shutil.disk_usage(path).free / 1e9
    return free >= needed_gb, f"{free:.1f} GB free at {path}"


def _one_clip() -> Finding:
    from .configs.schema import DataConfig
    from .pipelines.loader import Loader
    from .preprocessing import sources
    from .preprocessing.convert import convert
    from .preprocessing.shards import Dataset
    from .preprocessing.synthetic import SynthSettings, render, write_video
    from .preprocessing.video import VideoSettings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="genkd-doctor-") as folder:
        settings = SynthSettings(seconds=1, width=192, height=144)
        path = Path(folder, "videos", "Spin", "one.avi")
        os.makedirs(path.parent)
        write_video(path, render(settings, "Spin", 0, 0), settings.fps)
        codec = "h264" if device == "cuda" else "vp9"
        convert(sources.folder(path.parent.parent), Path(folder, "data"), VideoSettings(codec, 128), workers=0)
        spreads = {}
        for decoder in ("dali", "pyav"):
            config = DataConfig(clip_length=8, size=64, decoder=decoder)
            with Loader(
                Dataset.open(Path(folder, "data")), "train", config, batch_size=1, training=True, device=device
            ) as loader:
                spreads[decoder] = float(next(iter(loader)).clips.std())
        told = ", ".join(f"{decoder} {spread:.2f}" for decoder, spread in spreads.items())
        return all(0.1 < spread < 10 for spread in spreads.values()), f"{codec} on {device}, spread by decoder: {told}"
