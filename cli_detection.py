"""Commands of temporal action detection."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .cli_options import DEVICE, FOLDER, PLACE, PRECISION, examples
from .errors import UserError, explain_os_error
from .files import prepare_file, write_json


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

    main_rank = int(os.environ.get("RANK", "0")) == 0
    if main_rank:
        prepare_file(out)
    with bar("detecting", "windows") as progress:
        values = detect_weights(
            weights, dataset, flow=flow, split=split, batch_size=batch_size, precision=precision, device=device,
            progress=progress,
        )  # fmt: skip
    if main_rank:
        try:
            write_json(out, values)
        except OSError as error:
            raise UserError(explain_os_error(error, f"writing {out}")) from None
        found = sum(map(len, values["results"].values()))
        click.echo(f"{out}: {found} actions in {len(values['results'])} videos")


@click.command("fuse-detections")
@click.argument("files", nargs=-1, required=True, type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="Results file to write.")
@click.option("--weights", help="One a file, e.g. 1,0.8  [default: all 1]")
@click.option("--sigma", default=0.5, show_default=True, type=click.FloatRange(0, min_open=True), help="Of soft-NMS.")
@examples(
    "genkd fuse-detections rgb.json flow.json --out both.json\n"
    "genkd fuse-detections rgb.json flow.json --out both.json --weights 1,0.8 --sigma 0.3"
)
def fuse_detections(files: tuple[Path, ...], out: Path, weights: str | None, sigma: float) -> None:
    """Fuse the results FILES of two or more detectors late: all their actions together, then soft-NMS by class.

    `genkd detect --flow` averages the outputs of two networks instead, before there are actions.
    """
    from .cli_evaluate import parse_weights
    from .evaluation.proposals import fuse_proposals, write_proposals

    prepare_file(out)
    fused = fuse_proposals(files, parse_weights(weights), sigma)
    try:
        write_proposals(out, fused)
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {out}")) from None
    click.echo(f"{out}: {len(fused.scores)} actions in {len(fused.videos)} videos")


COMMANDS = (detect, fuse_detections)
