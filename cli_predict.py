"""The command that scores raw videos."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .cli_options import DEVICE, FOLDER, PRECISION, examples, refuse_ranks
from .errors import UserError

_LARGEST = 2160


@click.command()
@click.argument("videos", nargs=-1, required=True)
@click.option("--weights", required=True, type=FOLDER, help="A run folder or a weights file.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes to name.")
@click.option("--hop", default=0.5, show_default=True, help="From one window to the next, in clip lengths, 0 to 1.")
@click.option("--stride-seconds", type=float, help="The same in seconds; wins over --hop.")
@click.option("--fps", type=float, help="Frames a second to see  [default: as the weights' data set]")
@click.option("--short-side", type=int, help="Pixels to scale to first, 0: none  [default: as the weights' data set]")
@click.option("--flow-method", type=click.Choice(["tvl1", "dis", "farneback"]),
              help="For flow weights  [default: as their data set, else tvl1]")  # fmt: skip
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(1), help="Windows at a time.")
@PRECISION
@DEVICE
@click.option("--render", type=FOLDER, help="Write the video with what was found drawn into it: a .mp4 file, or a "
              "folder.")  # fmt: skip
@click.option("--render-side", default=720, show_default=True, type=click.IntRange(240, _LARGEST),
              help="Short side of that picture at most.")  # fmt: skip
@click.option("--out", type=FOLDER, help="Write everything as JSON into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@examples(
    "genkd predict party.mp4 --weights runs/student\n"
    "genkd predict recordings/ 'more/**/*.mkv' --weights runs/student --out found.json\n"
    "genkd predict long.mp4 --weights runs/student --stride-seconds 5 --json | jq '.videos[].segments'\n"
    "genkd predict party.mp4 --weights runs/student --render party-seen.mp4"
)
def predict(videos: tuple[str, ...], weights: Path, render: Path | None, render_side: int, out: Path | None,
            as_json: bool, **options: Any) -> None:  # fmt: skip
    """Say what raw VIDEOS show, as a whole and from when to when.

    VIDEOS are files, folders that are searched through, and quoted patterns. Each video is brought to the frame rate
    and size of the data set that the weights were trained on, where that is on this machine; otherwise it keeps its
    frame rate and is scaled to 256 pixels, as `genkd shard` does. Its windows are clips as in the evaluation; windows
    next to each other with the same best class are joined. A video shorter than a clip is filled up as in training.

    Exits with 1 if any video could not be read to its end or not be rendered; what is said about the others, and about
    what could be read of it, is complete.
    """
    from .evaluation.predict import Predictor, PredictSettings, find_videos, to_json, write
    from .files import prepare_file
    from .models.checkpoints import find_weights
    from .progress import bar

    refuse_ranks("predict")
    paths = find_videos(videos)
    targets = _targets(paths, render)
    _refuse_overwriting(paths, find_weights(weights), targets, out)
    predictor = Predictor(weights, PredictSettings(**options))
    for place in (*targets.values(), *([out] if out else [])):
        prepare_file(place)
    with bar("predicting", "windows") as progress:
        progress.start(sum(predictor.expected_windows(path) for path in paths))
        found = [predictor.predict(path, progress.add) for path in paths]
    values = to_json(predictor, found)
    for entry in values["videos"]:
        entry["rendered"] = entry["render_error"] = None
    problem = None
    if out:
        try:  # before anything is shown, as who reads it may stop reading, which ends this process
            write(out, values)
        except UserError as error:
            problem = error
    if not as_json:
        _show(values["videos"])
    problems = _render(found, predictor.card.classes, targets, render_side)
    for entry, path in zip(values["videos"], paths, strict=True):
        drawn = path in targets and entry["windows"] and path not in problems
        entry["rendered"], entry["render_error"] = str(targets[path]) if drawn else None, problems.get(path)
    if as_json:
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    for entry in values["videos"]:
        for what in (entry["error"], entry["render_error"]):
            if what:
                click.echo(f"{entry['path']}: {what}", err=True)
    if problem is not None:
        raise problem
    if out and targets:
        write(out, values)
    sys.exit(1 if values["failed"] or problems else 0)


def _render(found: Sequence[Any], classes: tuple[str, ...], targets: dict[Path, Path], side: int) -> dict[Path, str]:
    """Renders what was scored; returns what went wrong, by video."""
    from .evaluation.render import render
    from .progress import bar

    problems: dict[Path, str] = {}
    drawn = [entry for entry in found if entry.timeline is not None and entry.path in targets]
    if not drawn:
        return problems
    with bar("rendering", "frames") as progress:
        progress.start(sum(entry.frames for entry in drawn))
        for entry in drawn:
            try:
                render(entry, classes, targets[entry.path], most_side=side, on_frame=lambda: progress.add(1))
            except UserError as error:  # the other videos are rendered all the same
                problems[entry.path] = str(error)
    return problems


def _refuse_overwriting(paths: Sequence[Path], weights: Path, targets: dict[Path, Path], out: Path | None) -> None:
    """Raises UserError where a result would be written over what is read, or over another result."""
    read = {os.path.realpath(path): f"the video {path}" for path in paths}
    read[os.path.realpath(weights)] = f"the weights {weights}"
    for target in targets.values():
        if os.path.realpath(target) in read:
            raise UserError(f"--render would write over {read[os.path.realpath(target)]}; choose another place")
    if out is not None:
        taken = read | {os.path.realpath(target): f"the rendering {target}" for target in targets.values()}
        if os.path.realpath(out) in taken:
            raise UserError(f"--out {out} would write over {taken[os.path.realpath(out)]}; choose another file")


def _targets(paths: Sequence[Path], place: Path | None) -> dict[Path, Path]:
    """Where each video's rendering goes: the file `place`, or files below it that are named as the videos are."""
    from .preprocessing.lookup import video_stem

    if place is None:
        return {}
    if place.suffix.lower() == ".mp4" and not place.is_dir():
        if len(paths) > 1:
            raise UserError(f"--render {place} is one file, but there are {len(paths)} videos; name a folder")
        targets = {paths[0]: place}
    else:
        if place.is_file():
            raise UserError(f"--render {place} is a file that does not end in .mp4; name a folder or a .mp4 file")
        if not place.is_dir() and video_stem(place.name) != place.name:
            raise UserError(f"--render {place}: renderings are MP4 only; name a folder or a .mp4 file")
        whole = [Path(os.path.abspath(path)) for path in paths]
        root = os.path.commonpath([path.parent for path in whole])
        names = [os.path.relpath(path, root) for path in whole]
        stems = [os.path.splitext(name)[0] for name in names]
        targets = {
            path: place / f"{stem if stems.count(stem) == 1 else name}.mp4"
            for path, name, stem in zip(paths, names, stems, strict=True)
        }
    return targets


def _show(videos: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from .evaluation.timeline import clock
    from .tables import show

    for video in videos:
        if not video["windows"]:
            continue
        count = len(video["windows"])
        # No table's title, which would be as narrow as the table.
        click.echo(
            f"{video['path']}: {clock(video['duration_s'])} at {video['fps']:g} frames/s, {count} "
            f"window{'s' if count > 1 else ''}"
        )
        whole = Table("class")
        whole.add_column("score", justify="right")
        for entry in video["top"]:
            whole.add_row(entry["class"], f"{100 * entry['score']:.1f} %")
        parts = Table("from", "to", "class")
        parts.add_column("score", justify="right")
        parts.add_column("windows", justify="right")
        for entry in video["segments"]:
            parts.add_row(
                clock(entry["start_s"]), clock(entry["end_s"]), entry["class"],
                f"{100 * entry['score']:.1f} %", str(entry["windows"]),
            )  # fmt: skip
        show([whole, parts])


COMMANDS = (predict,)
