import importlib.util
from pathlib import Path

import pytest
import torch

from genkd.kernels import backend
from genkd.kernels import compile as compiler

spec = importlib.util.spec_from_file_location("emulator", Path(__file__).with_name("emulator.py"))
emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulator)


@pytest.fixture
def emulated(monkeypatch):
    """The ops run the kernels' own code on CPU tensors. Memory that is not written stays not-a-number."""
    if emulator.shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(compiler, "library", emulator.library)
    monkeypatch.setattr(backend, "require", lambda name, device_type: None)
    torch.use_deterministic_algorithms(True)
    with backend.selected("cuda"):
        yield emulator
    torch.use_deterministic_algorithms(False)
