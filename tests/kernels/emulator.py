"""The kernels' own source as C++ on a CPU: blocks, threads, barriers and shuffles, through cpu.hpp."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from genkd.kernels import compile as compiler

HERE = Path(__file__).parent
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="genkd-emulator-")


class Emulated:
    """kernels.compile.Kernels on the CPU. launches: what ran. only: blocks (first, last) to run instead of all."""

    def __init__(self, name, defines):
        text = compiler.source(name)
        flags = [f"-D{key}={value}" for key, value in sorted(defines.items())]
        key = hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]
        file, library = (Path(_folder().name, f"{Path(name).name}-{key}.{end}") for end in ("cpp", "so"))
        file.write_text(text)
        # -ffp-contract=fast as on a GPU, where products and sums are fused.
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=fast", "-Wno-unknown-pragmas"]
        done = subprocess.run(
            [*command, f"-I{HERE}", *flags, str(file), "-o", str(library)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self.library = ctypes.CDLL(str(library))
        self.library.launch.restype = ctypes.c_char_p
        self.launches, self.only = [], None

    def launch(self, name, blocks, threads, *arguments):
        assert 0 < blocks < 2**31 and threads <= 1024
        values = [
            value.data_ptr() if isinstance(value, torch.Tensor) else 0 if value is None else value
            for value in arguments
        ]
        first, last = self.only or (0, blocks - 1)
        self.launches.append((name, blocks))
        problem = self.library.launch(
            ctypes.cast(getattr(self.library, name), ctypes.c_void_p), ctypes.c_int64(first), ctypes.c_int64(last),
            ctypes.c_int64(blocks), threads, (ctypes.c_int64 * len(values))(*values), len(values),
        )  # fmt: skip
        assert problem is None, f"{name}: {problem.decode()}"


@functools.cache
def _emulated(name, defines):
    return Emulated(name, dict(defines))


def library(name, defines, device):
    """Stands in for kernels.compile.library."""
    return _emulated(name, tuple(sorted(defines.items())))
