"""CUDA C++ to machine code at first use: NVRTC through cuda-core, a cache on disk, launches on torch's stream."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..files import write_atomically

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
THREADS = 256  # of a block, as in common.cuh
MINIMUM_CAPABILITY = (8, 0)
_DIGEST = hashlib.sha256().digest_size
_OPTIONS = {"std": "c++17", "ptxas_options": ["-v"]}

Defines = Mapping[str, str | int]


class Failed(RuntimeError):
    """A kernel cannot be had here; the text says why, with the compiler's log where there is one."""


class Resources(NamedTuple):
    """What ptxas says of one kernel: registers a thread, bytes of local memory it spills to, and of shared memory."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


class Kernels(Protocol):
    """The kernels of one source, as compiled for one set of macros and one device."""

    def launch(self, name: str, blocks: int, threads: int, *arguments: Tensor | int | None) -> None:
        """Runs a kernel on the current stream of the device; tensors are passed as pointers, None as a null one."""


def source(name: str) -> str:
    """The text of kernels/NAME.cu (a path from there) with its header put in: all that decides the machine code."""
    text = (HERE / f"{name}.cu").read_text(encoding="utf-8")
    header = (HERE / "common.cuh").read_text(encoding="utf-8").replace("#pragma once\n", "\n")
    before, include, after = text.partition('#include "common.cuh"\n')
    line = before.count("\n") + 2
    return f'{before}#line 1 "common.cuh"\n{header}#line {line} "{name}.cu"\n{after}' if include else text


def build(name: str, defines: Defines, arch: str) -> tuple[bytes, dict[str, Resources]]:
    """Compiles kernels/NAME.cu for an architecture such as "sm_90", no GPU needed: the cubin, and what ptxas says.

    Raises Failed with the compiler's log.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise Failed(f"the package cuda-core cannot be imported ({error}); {_remedy()}") from None
    options = ProgramOptions(name=f"{name}.cu", arch=arch, define_macro=_macros(defines), **_OPTIONS)
    said = io.StringIO()
    try:
        code = Program(source(name), "c++", options).compile("cubin", logs=said).code
    except Exception as error:  # cuda-core raises types of its own, and RuntimeError where NVRTC is missing
        text = f"{said.getvalue()}\n{error}".strip("\0\n ")
        raise Failed(f"kernels/{name}.cu does not compile for {arch} with {dict(defines)}: {text}") from error
    return bytes(code), _resources(said.getvalue())


def cached(name: str, defines: Defines, arch: str, folder: Path | None = None) -> bytes:
    """The cubin from the cache on disk, or compiled and put there; damaged or unreadable entries are built again.

    The key is of the source, macros, options, architecture and the versions of NVRTC and cuda-core. Ranks may run this
    at the same time: an entry is whole or absent, and all of them write the same bytes. folder: see cache_folder.
    """
    about = (source(name), _macros(defines), _OPTIONS, arch, nvrtc_version(), _version("cuda-core"))
    key = hashlib.sha256(repr(about).encode()).hexdigest()
    try:
        folder = folder or cache_folder()
    except RuntimeError as error:  # no home
        log.warning("compiled kernels are not kept: %s; GENKD_CACHE names a folder for them", error)
        return build(name, defines, arch)[0]
    path = folder / f"{Path(name).name}-{arch}-{key[:32]}.cubin"
    try:
        entry = path.read_bytes()
        if len(entry) > _DIGEST and hashlib.sha256(entry[_DIGEST:]).digest() == entry[:_DIGEST]:
            return entry[_DIGEST:]
        log.warning("%s is damaged; it is compiled again", path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be read (%s); it is compiled again", path, error.strerror)
    code, _ = build(name, defines, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        log.warning("compiled kernels are not kept: %s: %s; GENKD_CACHE names another folder", path, error.strerror)
    return code


def cache_folder() -> Path:
    """$GENKD_CACHE/kernels, else genkd/kernels in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("GENKD_CACHE")
    if own:
        return Path(own, "kernels")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "genkd", "kernels")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def nvrtc_version() -> tuple[int, int]:
    """Version of the compiler's library. Raises Failed where it is missing."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except ImportError as error:
        raise Failed(f"the package cuda-bindings cannot be imported ({error}); {_remedy()}") from None
    except Exception as error:  # a missing library is a RuntimeError or one of cuda-pathfinder's
        raise Failed(f"NVRTC cannot be loaded ({_first_line(error)}); {_remedy()}") from None
    if int(status):
        raise Failed(f"NVRTC says {status}; {_remedy()}")
    return major, minor


def _remedy() -> str:
    """What installs the compiler for the CUDA version that torch is built for."""
    major = (torch.version.cuda or "13").partition(".")[0]
    package = "nvidia-cuda-nvrtc-cu12" if major == "12" else f"'nvidia-cuda-nvrtc=={major}.*'"
    return f"pip install cuda-core 'cuda-bindings=={major}.*' {package}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def driver_version() -> tuple[int, int]:
    """The newest CUDA version that the driver runs. Raises Failed where there is no driver."""
    try:
        from cuda.bindings import driver

        status, version = driver.cuDriverGetVersion()
    except Exception as error:  # as above
        raise Failed(f"the CUDA driver cannot be asked for its version ({_first_line(error)})") from None
    if int(status):
        raise Failed(f"the CUDA driver says {status}")
    return version // 1000, version % 1000 // 10


@functools.cache
def check(device: int) -> None:
    """Raises Failed if kernels cannot be compiled for this CUDA device, or their machine code not be loaded."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        least, own = (".".join(map(str, version)) for version in (MINIMUM_CAPABILITY, capability))
        raise Failed(f"the kernels need compute capability {least}; {torch.cuda.get_device_name(device)} has {own}")
    compiler, driver = nvrtc_version(), driver_version()
    if compiler[0] > driver[0]:
        raise Failed(
            f"NVRTC is of CUDA {compiler[0]}, the driver of CUDA {driver[0]}: its machine code may not load; update "
            f"the driver, or install torch, cuda-bindings and NVRTC for CUDA {driver[0]}"
        )


def library(name: str, defines: Defines, device: torch.device) -> Kernels:
    """The kernels of kernels/NAME.cu for a CUDA device, compiled at the first call. Raises Failed, each time."""
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _library(name, tuple(sorted(defines.items())), index)
    if isinstance(found, Failed):
        raise found
    return found


@functools.cache
def _library(name: str, defines: tuple[tuple[str, str | int], ...], device: int) -> Kernels | Failed:
    try:
        check(device)
        major, minor = torch.cuda.get_device_capability(device)
        return _Library(name, cached(name, dict(defines), f"sm_{major}{minor}"), device)
    except Failed as problem:
        return problem


class _Library:
    """Kernels in a GPU's memory."""

    def __init__(self, name: str, code: bytes, device: int):
        try:
            from cuda.core import Device, LaunchConfig, ObjectCode, Stream, launch

            self._launch, self._config, self._stream = launch, LaunchConfig, Stream.from_handle
            self._index, self._device = device, Device(device)
            with torch.cuda.device(device):
                self._device.set_current()
                self._code = ObjectCode.from_cubin(code, name=name)
        except Exception as error:  # cuda-core and the driver raise types of their own
            raise Failed(f"the machine code of kernels/{name}.cu cannot be loaded: {_first_line(error)}") from error
        self._kernels: dict[str, Any] = {}

    def launch(self, name: str, blocks: int, threads: int, *arguments: Tensor | int | None) -> None:
        values = [
            value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value for value in arguments
        ]
        with torch.cuda.device(self._index):
            # Autograd's thread may not have a context yet: torch makes one current only when it needs it.
            self._device.set_current()
            if name not in self._kernels:
                try:
                    self._kernels[name] = self._code.get_kernel(name)
                except Exception as error:  # as above
                    raise Failed(f"the kernel {name} cannot be loaded: {_first_line(error)}") from error
            stream = self._stream(torch.cuda.current_stream(self._index).cuda_stream)
            self._launch(stream, self._config(grid=blocks, block=threads), self._kernels[name], *values)


def _macros(defines: Defines) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in sorted(defines.items())]


def _resources(said: str) -> dict[str, Resources]:
    """Reads the output of `ptxas -v`."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:

        def number(before: str, after: str, part: str = part) -> int:
            match = re.search(rf"{before}(\d+) {after}", part)
            return int(match[1]) if match else 0

        found[part.split("'")[0]] = Resources(
            number("Used ", "registers"), number("", "bytes spill stores"), number("", "bytes spill loads"),
            number("", "bytes stack frame"), number("", "bytes smem"),
        )  # fmt: skip
    return found
