"""Commands around weights that were trained elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .cli_options import FOLDER, SOURCE, examples
from .errors import UserError


class _Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers with commas, such as 0.5,0.5,0.5", param, ctx)


@click.command()
@click.argument("file", type=SOURCE)
@click.argument("out", type=FOLDER)
@click.option("--classes", "names", type=SOURCE, help="Names in the order of the classifier: a shard data set, a file "
              "with one name a line, or UCF101's classInd.txt  [default: numbers]")  # fmt: skip
@click.option(
    "--clip-length",
    type=click.IntRange(1),
    help="Frames  [default: what the module is made for, else 64; detection 256]",
)
@click.option("--size", type=click.IntRange(1), help="Pixels  [default: what the module is made for, else 224]")
@click.option("--compat", type=click.Choice(["reference", "none"]), default="reference", show_default=True,
              help="reference: sums and scores as the original makes them; only they give its numbers.")  # fmt: skip
@click.option("--mean", type=_Numbers(), help="Of pixels in 0..1  [default: ImageNet's; flow, detection: 0.5]")
@click.option("--std", type=_Numbers(), help="Of pixels in 0..1  [default: ImageNet's; flow 0.226; detection 0.5]")
@click.option("--force", is_flag=True, help="Write over what an earlier import wrote.")
@click.option("--verbose", is_flag=True, help="List the keys that were used, unused and missing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report, all keys included, as JSON.")
@examples(
    "genkd import-checkpoint rgb_imagenet.pt weights/kinetics --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5\n"
    "genkd import-checkpoint teacher.ckpt weights/teacher --classes data/ucf101\n"
    "genkd import-checkpoint teacher_cvae.ckpt weights/teacher\n"
    "genkd train distill --config ucf101 --out runs/student data.dataset=data/ucf101 teacher=weights/teacher"
)
def import_checkpoint(file: Path, out: Path, names: Path | None, verbose: bool, as_json: bool, **options: Any) -> None:
    """Turn weights of the original implementation, or of the public Kinetics I3D, into a folder of genkd's own.

    FILE (.pt, .pth, .ckpt or .safetensors) is told by its keys and shapes: a plain I3D (its classifier included), a
    teacher or student of recognition or detection, or the CVAE of one. OUT is then taken where weights are asked for:
    `genkd evaluate`, `genkd detect`, init= and teacher=. A teacher and its CVAE go into one folder, one after the
    other. Nothing in FILE is executed.

    The public Kinetics files were trained on pixels in -1..1, which is --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5; the
    original implementation feeds ImageNet's normalization to them.
    """
    from .models.importing import import_weights

    done = import_weights(file, out, classes=class_names(names) if names else (), **options)
    report, card = done.report, done.card
    lists = {"used": report.used, "unused": report.unused, "missing": report.missing}
    if as_json:
        about = {"clip_length": card.clip_length, "size": card.size, "modality": card.modality, "compat": card.compat}
        click.echo(
            json.dumps(
                {
                    "kind": report.kind, "file": str(done.path), "parameters": done.parameters,
                    "classes": len(card.classes), **about,
                    "counts": {name: len(keys) for name, keys in lists.items()}, **lists,
                },
                indent=2,
            )
        )  # fmt: skip
        return
    counts = ", ".join(f"{len(keys)} {name}" for name, keys in lists.items())
    click.echo(f"{report.kind}: {counts}" + (" (left at 0)" if report.missing else ""))
    if verbose:
        for name, keys in lists.items():
            for key in keys:
                click.echo(f"  {name:<8}{key}")
    made_for = f"{card.clip_length} frames of {card.size} px"
    classes = f"{len(card.classes)} classes, {card.modality} clips of " if done.path.stem != "cvae" else "for "
    click.echo(f"{done.path}: {done.parameters:,} parameters, {classes}{made_for}")
    if done.path.stem != "cvae" and names is None:
        click.echo(
            "its classes are numbers, as no --classes were given: enough to start from, but `genkd evaluate` and "
            "teacher= want the data set's names"
        )


def class_names(place: Path) -> tuple[str, ...]:
    """Class names of a shard data set, of a file with one a line, or with lines of `number name` from 1 (classInd.txt).

    Raises UserError for anything else, and for a name that comes twice.
    """
    from .files import numbered_lines
    from .preprocessing.shards import Dataset

    if place.is_dir():
        return tuple(Dataset.open(place).classes)
    names = tuple(line for _, line in numbered_lines(place))
    pairs = [name.split(maxsplit=1) for name in names]
    if all(len(pair) == 2 and pair[0].isdigit() for pair in pairs):
        by_number = {int(number): name for number, name in pairs}
        if sorted(by_number) == list(range(1, len(names) + 1)):
            names = tuple(by_number[number] for number in sorted(by_number))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not names:
        raise UserError(f"{place}: {'no class names in it' if not names else f'class {twice!r} comes twice'}")
    return names


COMMANDS = (import_checkpoint,)
