"""What the commands share: argument types, options, help sections."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .errors import UserError

FOLDER = click.Path(path_type=Path)
CORES = len(os.sched_getaffinity(0))
WORKERS = click.option(
    "--workers", default=CORES, type=click.IntRange(0), show_default="cores", help="Processes; 0: none but this one."
)
DEVICE = click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
PRECISION = click.option(
    "--precision", default="auto", show_default=True, type=click.Choice(["auto", "fp32", "bf16", "fp16"])
)


class _Place(click.ParamType):
    """A path, or an fsspec URL such as s3://bucket/folder."""

    name = "path or url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        return value if "://" in str(value) else Path(value)


class _Source(click.ParamType):
    """A path of this machine."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if "://" in str(value):
            self.fail(f"{value} is a URL; sources are read from a local or mounted folder", param, ctx)
        return Path(value)


PLACE, SOURCE = _Place(), _Source()


def examples(text: str) -> Callable:
    """Appends an Examples section, line breaks kept, to a command's help."""

    def add(function: Callable) -> Callable:
        about = inspect.cleandoc(function.__doc__ or "")
        lines = "\n".join(f"  {line}" for line in text.strip().splitlines())
        function.__doc__ = f"{about}\n\n\b\nExamples:\n{lines}\n"
        return function

    return add


def refuse_ranks(command: str) -> None:
    """Raises UserError under torchrun with several ranks, each of which would do all the work and write the files."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1:
        raise UserError(
            f"`genkd {command}` works in one process, but torchrun started {size}; start it without torchrun"
        )


def with_options(*options: Callable) -> Callable:
    """One decorator of several click options, shown in this order."""

    def add(function: Callable) -> Callable:
        return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)

    return add
