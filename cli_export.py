"""The command that hands trained weights on to other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .cli_options import FOLDER, PLACE, examples, refuse_ranks

_FORMATS = ("safetensors", "onnx", "torch-export")


@click.command()
@click.argument("run", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option(
    "--format", "formats", multiple=True, default=("safetensors",), show_default=True, type=click.Choice(_FORMATS),
    help="What to write; may be repeated. onnx needs the packages of genkd[export].",
)  # fmt: skip
@click.option("--data", type=PLACE, help="Shard data set whose clips the export is checked on  [default: the run's]")
@click.option("--split", help="Split of that data set  [default: the run's evaluation split]")
@click.option("--clips", default=4, show_default=True, type=click.IntRange(2), help="How many clips to check on.")
@click.option("--name", help="Title of the model card  [default: the run's folder]")
@click.option("--force", is_flag=True, help="Replace an earlier export in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the card, OUT/model.json.")
@examples(
    "genkd export runs/student export\n"
    "genkd export runs/student export --format safetensors --format onnx --format torch-export\n"
    "genkd export weights/recognizer.safetensors export --data data/ucf101 --json | jq .flops"
)
def export(run: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write the recognizer of RUN (a run folder or a weights file) for other programs into the folder OUT.

    A card goes with it: model.json and README.md. Every file is loaded back and compared with the network on a few
    clips of the run's data set; if they differ, nothing is written.
    """
    from .evaluation.export import export as write
    from .progress import bar
    from .tables import export_tables, show

    refuse_ranks("export")
    with bar("exporting", "steps") as progress:
        values = write(run, out, on_start=progress.start, on_step=progress.add, **options)
    if not values["check"]["real"]:
        click.echo(f"checked on random clips only: {values['check']['reason']}; name a data set with --data", err=True)
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    show(export_tables(values))
    click.echo(f"{out}: see README.md there")


COMMANDS = (export,)
