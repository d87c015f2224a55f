"""Commands of temporal action detection."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .cli_options import DEVICE, FOLDER, PLACE, PRECISION, examples
from .errors import UserError, explain_os_error
from .files import write_json


@click.command()
@click.argument("weights", type=FOLDER)
@click.argument("dataset", type=PLACE)
@click.argument("out", type=FOLDER)
@click.option("--flow", type=(FOLDER, PLACE), help="WEIGHTS and DATASET of a flow detector to average outputs with.")
@click.option("--split", default="test", show_default=True)
@click.option("--batch-size", default=4, show_default=True, type=click.IntRange(1), help="Windows over all ranks.")
@PRECISION
@DEVICE
@examples(
    "genkd detect runs/student data/thumos14 rgb.json\n"
    "genkd detect runs/student data/thumos14 fused.json --flow runs/student-flow data/thumos14-flow\n"
    "genkd evaluate detection rgb.json --ground-truth thumos_gt.json"
)
def detect(weights: Path, dataset: str | Path, out: Path, flow: tuple[Path, str | Path] | None, split: str,
           batch_size: int, precision: str, device: str) -> None:  # fmt: skip
    """Find the actions in untrimmed videos: the detector WEIGHTS (a run folder) on a shard DATASET, to the file OUT.

    Windows cover every video; OUT is a results file in ActivityNet's layout.
    """
    from .evaluation.detect import detect_weights
    from .progress import bar

    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file to write the results to")
    with bar("detecting", "windows") as progress:
        values = detect_weights(
            weights, dataset, flow=flow, split=split, batch_size=batch_size, precision=precision, device=device,
            progress=progress,
        )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, values)
        except OSError as error:
            raise UserError(explain_os_error(error, f"writing {out}")) from None
        found = sum(map(len, values["results"].values()))
        click.echo(f"{out}: {found} actions in {len(values['results'])} videos")


COMMANDS = (detect,)
