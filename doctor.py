"""Looks over a machine: what genkd needs, what it can use, and one clip through the whole chain."""

from __future__ import annotations

import ctypes.util
import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import torch

from .errors import UserError

_ENCODERS = ("libx264", "libvpx-vp9", "mjpeg", "mpeg4")


def examine() -> list[dict[str, Any]]:
    """One finding a line: what was looked at, whether it is fine, what was found. A missing GPU is fine."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("python", lambda: (True, platform.python_version())),
        ("torch", _torch),
        ("gpu", _gpu),
        ("cudnn", _cudnn),
        ("dali", _dali),
        ("nvdec", _nvdec),
        ("encoders", _encoders),
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


def _torch() -> tuple[bool, str]:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 10), f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}"


def _gpu() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return True, "none; everything runs on the CPU"
    return True, ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))


def _cudnn() -> tuple[bool, str]:
    version = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if version is None:
        return True, "not used"
    # pytorch issue 166643: bf16 conv3d of NCDHW tensors is slow and hungry before 9.15; genkd keeps channels_last_3d.
    return True, f"{version}{' (before 9.15: bf16 conv3d is slow in NCDHW)' if version < 91500 else ''}"


def _dali() -> tuple[bool, str]:
    dali = importlib.import_module("nvidia.dali")
    return True, dali.__version__


def _nvdec() -> tuple[bool, str]:
    if not torch.cuda.is_available():
        return True, "not used"
    library = ctypes.util.find_library("nvcuvid")
    return library is not None, library or "libnvcuvid is missing: the driver's video capability is not exposed here"


def _encoders() -> tuple[bool, str]:
    missing = [name for name in _ENCODERS if name not in av.codecs_available]
    return not missing, f"PyAV {av.__version__}, " + (
        f"without {', '.join(missing)}" if missing else ", ".join(_ENCODERS)
    )


def _apex() -> tuple[bool, str]:
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        return True, "not installed (optional)"
    return True, "with fused optimizers" if hasattr(optimizers, "FusedSGD") else "without fused optimizers"


def _kernels() -> tuple[bool, str]:
    from .kernels import backend
    from .kernels import compile as compiler
    from .kernels.boundary_max_pool import boundary_max_pool

    if not torch.cuda.is_available():
        return True, "not used; without a GPU their ops run in torch"
    with backend.selected("cuda"):
        found = boundary_max_pool(torch.eye(4, device="cuda")[None], torch.full((1, 1, 4), 2.5, device="cuda"))
    version = ".".join(map(str, compiler.nvrtc_version()))
    return found.flatten().tolist() == [0, 0, 1, 0], f"compiled by NVRTC {version}, kept in {compiler.cache_folder()}"


def _space(path: Path, needed_gb: float) -> tuple[bool, str]:
    free = shutil.disk_usage(path).free / 1e9
    return free >= needed_gb, f"{free:.1f} GB free at {path}"


def _one_clip() -> tuple[bool, str]:
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
