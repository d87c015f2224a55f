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
@click.option("--top", type=click.IntRange(1), help="Classes to name  [default: 5]; of a detector's actions in a video "
              "the best so many  [default: all]")  # fmt: skip
@click.option("--threshold", type=click.FloatRange(0, 1), help="Least score of a detector's actions  [default: 0.1]")
@click.option("--hop", type=float, help="From one window to the next, in clip lengths, 0 to 1  [default: 0.5, a "
              "detector's as in its evaluation]")  # fmt: skip
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
@click.option("--timeline", type=FOLDER, help="Draw what was found over time, classes as rows: a .png file, or a "
              "folder.")  # fmt: skip
@click.option("--out", type=FOLDER, help="Write everything as JSON into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@examples(
    "genkd predict party.mp4 --weights runs/student\n"
    "genkd predict recordings/ 'more/**/*.mkv' --weights runs/student --out found.json\n"
    "genkd predict long.mp4 --weights runs/student --stride-seconds 5 --json | jq '.videos[].segments'\n"
    "genkd predict party.mp4 --weights runs/student --render party-seen.mp4\n"
    "genkd predict match.mp4 --weights runs/thumos14/student --threshold 0.4 --timeline match.png"
)
def predict(videos: tuple[str, ...], weights: Path, render: Path | None, render_side: int, timeline: Path | None,
            out: Path | None, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Say what raw VIDEOS show, as a whole and from when to when.

    VIDEOS are files, folders that are searched through, and quoted patterns. Each video is brought to the frame rate
    and size of the data set that the weights were trained on, where that is on this machine; otherwise it keeps its
    frame rate and is scaled to 256 pixels, as `genkd shard` does. Its windows are clips as in the evaluation; windows
    next to each other with the same best class are joined. A video shorter than a clip is filled up as in training.

    With a detector's WEIGHTS: which actions there are in untrimmed VIDEOS, as `genkd detect` finds them in a data set;
    without that on this machine, at 10 frames a second and 112x112 pixels.

    Exits with 1 if any video could not be read to its end or not be rendered; what is said about the others, and about
    what could be read of it, is complete.
    """
    from .evaluation.predict import PredictSettings, find_videos, to_json, write
    from .files import prepare_file
    from .models.checkpoints import find_weights
    from .progress import bar

    refuse_ranks("predict")
    paths = find_videos(videos)
    targets, charts = _targets(paths, render, "render", ".mp4"), _targets(paths, timeline, "timeline", ".png")
    _refuse_overwriting(paths, find_weights(weights), targets, charts, out)
    predictor = _predictor(weights, PredictSettings(**options))
    for place in (*targets.values(), *charts.values(), *([out] if out else [])):
        prepare_file(place)
    with bar("predicting", "windows") as progress:
        progress.start(sum(predictor.expected_windows(path) for path in paths))
        found = [predictor.predict(path, progress.add) for path in paths]
    values = to_json(predictor, found)
    for entry in values["videos"]:
        entry["rendered"] = entry["render_error"] = entry["timeline"] = None
    problem = None
    if out:
        try:  # before anything is shown, as who reads it may stop reading, which ends this process
            write(out, values)
        except UserError as error:
            problem = error
    if not as_json:
        _show(values["videos"], values["settings"]["threshold"])
    _draw(found, predictor.card.classes, charts)
    problems = _render(found, predictor.card.classes, targets, render_side)
    for entry, path in zip(values["videos"], paths, strict=True):
        drawn = path in targets and entry["windows"] and path not in problems
        entry["rendered"], entry["render_error"] = str(targets[path]) if drawn else None, problems.get(path)
        entry["timeline"] = str(charts[path]) if path in charts and entry["windows"] else None
    if as_json:
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    for entry in values["videos"]:
        for what in (entry["error"], entry["render_error"]):
            if what:
                click.echo(f"{entry['path']}: {what}", err=True)
    if problem is not None:
        raise problem
    if out and (targets or charts):
        write(out, values)
    sys.exit(1 if values["failed"] or problems else 0)


def _predictor(weights: Path, settings: Any) -> Any:
    """What has the weights: of a recognizer or a detector."""
    from .models.checkpoints import read_card

    if read_card(weights).task == "detection":
        from .evaluation.predict_actions import ActionPredictor

        return ActionPredictor(weights, settings)
    from .evaluation.predict import Predictor

    return Predictor(weights, settings)


def _draw(found: Sequence[Any], classes: tuple[str, ...], charts: dict[Path, Path]) -> None:
    """Draws the timelines of what was scored."""
    from .evaluation.timeline_chart import write_timeline

    for entry in found:
        if entry.timeline is not None and entry.path in charts:
            write_timeline(charts[entry.path], entry.timeline, classes, title=entry.path.name)


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


def _refuse_overwriting(
    paths: Sequence[Path], weights: Path, targets: dict[Path, Path], charts: dict[Path, Path], out: Path | None
) -> None:
    """Raises UserError where a result would be written over what is read, or over another result."""
    taken = {os.path.realpath(path): f"the video {path}" for path in paths}
    taken[os.path.realpath(weights)] = f"the weights {weights}"
    results = [("--render", place, "the rendering") for place in targets.values()]
    results += [("--timeline", place, "the timeline") for place in charts.values()]
    results += [] if out is None else [("--out", out, "the results")]
    for option, place, name in results:
        if os.path.realpath(place) in taken:
            shown, choose = (f"--out {out}", "file") if place is out else (option, "place")
            raise UserError(f"{shown} would write over {taken[os.path.realpath(place)]}; choose another {choose}")
        taken[os.path.realpath(place)] = f"{name} {place}"


def _targets(paths: Sequence[Path], place: Path | None, option: str, suffix: str) -> dict[Path, Path]:
    """Where each video's result goes: the file `place`, or files below it that are named as the videos are."""
    from .preprocessing.lookup import video_stem

    if place is None:
        return {}
    if place.suffix.lower() == suffix and not place.is_dir():
        if len(paths) > 1:
            raise UserError(f"--{option} {place} is one file, but there are {len(paths)} videos; name a folder")
        return {paths[0]: place}
    if place.is_file():
        raise UserError(f"--{option} {place} is a file that does not end in {suffix}; name a folder or a {suffix} file")
    kind, other = ("renderings are MP4", video_stem(place.name) != place.name) if suffix == ".mp4" else (
        "timelines are PNG", place.suffix.lower() in (".jpg", ".jpeg", ".pdf", ".svg", ".webp"))  # fmt: skip
    if not place.is_dir() and other:
        raise UserError(f"--{option} {place}: {kind} only; name a folder or a {suffix} file")
    whole = [Path(os.path.abspath(path)) for path in paths]
    root = os.path.commonpath([path.parent for path in whole])
    names = [os.path.relpath(path, root) for path in whole]
    stems = [os.path.splitext(name)[0] for name in names]
    return {
        path: place / f"{stem if stems.count(stem) == 1 else name}{suffix}"
        for path, name, stem in zip(paths, names, stems, strict=True)
    }


def _show(videos: Sequence[dict[str, Any]], threshold: float | None) -> None:
    from rich.table import Table

    from .evaluation.timeline import clock
    from .tables import show

    for video in videos:
        if not video["windows"]:
            continue
        found = video["windows"]
        count = found if isinstance(found, int) else len(found)
        # No table's title, which would be as narrow as the table.
        click.echo(
            f"{video['path']}: {clock(video['duration_s'])} at {video['fps']:g} frames/s, {_number(count, 'window')}"
            + (f", {_number(len(video['segments']), 'action')}" if threshold is not None else "")
        )
        if threshold is not None:
            _show_actions(video, threshold)
            continue
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


def _show_actions(video: dict[str, Any], threshold: float) -> None:
    """A detector's actions in a video, and what is not among them."""
    from rich.table import Table

    from .evaluation.timeline import clock
    from .tables import show

    if video["segments"]:
        table = Table("class", "from", "to")
        table.add_column("score", justify="right")
        for entry in video["segments"]:
            table.add_row(
                entry["class"], clock(entry["start_s"]), clock(entry["end_s"]), f"{100 * entry['score']:.1f} %"
            )
        show([table])
    elif video["best_left_out"]:
        best = video["best_left_out"]
        click.echo(
            f"no action has a score of {100 * threshold:g} % (--threshold {threshold:g}); the best is {best['class']} "
            f"from {clock(best['start_s'])} to {clock(best['end_s'])} with {100 * best['score']:.1f} %"
        )
    else:
        click.echo("no action found")


def _number(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


COMMANDS = (predict,)
