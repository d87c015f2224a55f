"""Which implementation of the ops runs: CUDA kernels, or torch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from torch import Tensor

from ..errors import UserError
from . import compile as compiler

log = logging.getLogger(__name__)

Name = Literal["auto", "cuda", "torch"]
Result = TypeVar("Result")
_selected: Name = "auto"
_formulas = False
_told: set[str] = set()


def select(name: Name) -> None:
    """Chooses for this process: auto, kernels for CUDA tensors where they can be had and else torch, with one warning;
    cuda, kernels or a UserError with the reason; torch."""
    global _selected
    if name not in ("auto", "cuda", "torch"):
        raise UserError(f"kernels.backend={name} is not known; choose auto, cuda or torch")
    _selected = name


@contextlib.contextmanager
def selected(name: Name) -> Iterator[None]:
    """select() for the block."""
    before = _selected
    select(name)
    try:
        yield
    finally:
        select(before)


@contextlib.contextmanager
def as_formulas() -> Iterator[None]:
    """In the block the ops are plain torch, as their formulas read: for graphs that run without this package."""
    global _formulas
    before, _formulas = _formulas, True
    try:
        yield
    finally:
        _formulas = before


def formulas_wanted() -> bool:
    """Whether as_formulas() is in force."""
    return _formulas


def require(name: Name, device_type: str) -> None:
    """Raises UserError, before any work, if a backend cannot run on this type of device."""
    if name == "cuda" and device_type != "cuda":
        raise UserError(f"kernels.backend=cuda needs a CUDA device, not {device_type}; use auto or torch")


def run(tensor: Tensor, kernels: Callable[[], Result], reference: Callable[[], Result], fits: bool = True) -> Result:
    """What kernels() gives, or reference() where the tensor's device, the selected backend or a problem asks for it.

    fits: whether the kernels take these inputs at all; those that they do not take are torch's, whatever is selected.
    """
    wanted = _selected == "cuda" or (_selected == "auto" and tensor.is_cuda)
    if not wanted or not fits:
        return reference()
    require(_selected, tensor.device.type)
    try:
        return kernels()
    except compiler.Failed as problem:
        if _selected == "cuda":
            raise UserError(f"kernels.backend=cuda: {problem}") from None
        if str(problem) not in _told:
            _told.add(str(problem))
            log.warning("torch runs in place of a CUDA kernel: %s", problem)
        return reference()
