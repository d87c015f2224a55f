"""`genkd synth`: motion data sets of trimmed and of untrimmed videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_options import FOLDER, WORKERS, examples, with_options
from .errors import UserError

_BOTH = (
    click.option("--seconds", metavar="S", help="Length of a video; with --untrimmed also a range.  [default: 2; "
                 "untrimmed: 45-75]"),
    click.option("--fps", type=int, help="Frames a second.  [default: 25; untrimmed: 10]"),
    click.option("--size", metavar="WxH", help="Frame size in pixels.  [default: 160x120; untrimmed: 112x112]"),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1)),
    WORKERS,
)  # fmt: skip
_TRIMMED = (
    click.option("--videos-per-class", type=int, help="Videos of each of the ten classes.  [default: 40]"),
    click.option("--test-share", type=float, help="Share of the groups that make the test list.  [default: 0.3]"),
)
_UNTRIMMED = (
    click.option("--untrimmed", is_flag=True, help="Videos with motions between stretches of background, and their "
                 "times, in THUMOS14's layout."),
    click.option("--validation-videos", type=int, help="Untrimmed: videos to train on.  [default: 20]"),
    click.option("--test-videos", type=int, help="Untrimmed: videos to test on.  [default: 10]"),
    click.option("--classes", metavar="NAME,NAME", help="Untrimmed: only these.  [default: all ten]"),
    click.option("--actions-per-minute", type=float, help="Untrimmed: how many.  [default: 6]"),
    click.option("--action-seconds", metavar="S-S", help="Untrimmed: range of their lengths.  [default: 1-8]"),
    click.option("--gap-seconds", type=float, help="Untrimmed: at least so long between two.  [default: 1]"),
    click.option("--mixed-share", type=float, help="Untrimmed: share of videos with several classes.  [default: 0.15]"),
)  # fmt: skip


@click.command()
@click.argument("out", type=FOLDER)
@with_options(*_TRIMMED, *_UNTRIMMED, *_BOTH)
@examples(
    "genkd synth motion\n"
    "genkd synth motion --videos-per-class 100 --size 320x240 --seed 7\n"
    "genkd synth untrimmed --untrimmed        for: genkd shard thumos14 untrimmed data/untrimmed\n"
    "genkd synth untrimmed --untrimmed --validation-videos 16 --test-videos 8 --seconds 60 --classes Slide,Spin,Pulse"
)
def synth(out: Path, untrimmed: bool, workers: int, **options: Any) -> None:
    """Write a motion data set to OUT: real video files, ten classes that differ only by motion.

    Trimmed videos are AVI files in UCF101's layout. With --untrimmed: MP4 files in THUMOS14's layout, each with
    actions between background, in which nothing moves or moves in no class's way, and OUT/thumos_annotations with
    their times.
    """
    from .preprocessing.synthetic import CLASSES, SynthSettings, synthesize
    from .progress import bar

    given = {name: value for name, value in options.items() if value is not None}
    if "size" in given:
        given["width"], given["height"] = _size(given.pop("size"))
    if "seconds" in given:
        given["seconds"] = _span("seconds", given["seconds"])
    if untrimmed:
        _refuse(given, ("videos_per_class", "test_share"), "trimmed videos; leave it out with --untrimmed")
        return _synth_untrimmed(out, workers, given)
    _refuse(
        given, ("validation_videos", "test_videos", "classes", "actions_per_minute", "action_seconds", "gap_seconds",
        "mixed_share"), "untrimmed videos; it needs --untrimmed",
    )  # fmt: skip
    if "seconds" in given:
        shortest, longest = given["seconds"]
        if shortest < longest:
            raise UserError(f"--seconds {options['seconds']}: trimmed videos have one length; give one number")
        given["seconds"] = shortest
    chosen = SynthSettings(**given)
    with bar("rendering", "videos") as progress:
        progress.start(len(CLASSES) * chosen.videos_per_class)
        counts = synthesize(out, chosen, workers=workers, on_video=progress.add)
    click.echo(f"{out}: {len(CLASSES)} classes, {counts['train']} train and {counts['test']} test videos")
    return None


def _synth_untrimmed(out: Path, workers: int, given: dict[str, Any]) -> None:
    from .preprocessing.untrimmed import SPLITS, UntrimmedSettings, synthesize_untrimmed
    from .progress import bar

    if "classes" in given:
        given["classes"] = tuple(name.strip() for name in given["classes"].split(","))
    if "action_seconds" in given:
        given["action_seconds"] = _span("action-seconds", given["action_seconds"])
    chosen = UntrimmedSettings(**given)
    with bar("rendering", "videos") as progress:
        progress.start(chosen.validation_videos + chosen.test_videos)
        videos = synthesize_untrimmed(out, chosen, workers=workers, on_video=progress.add)
    parts, notes = [], []
    for split, (name, _) in SPLITS.items():
        actions = [action for video in videos if video.split == split for action in video.actions]
        parts.append(f"{sum(video.split == split for video in videos)} {name} videos with {len(actions)} actions")
        if lacking := [known for known in chosen.class_numbers if known not in {action.name for action in actions}]:
            notes.append(f"note: no {name} video has {', '.join(lacking)}")
    click.echo(f"{out}: {len(chosen.classes)} classes, {' and '.join(parts)}")
    for note in notes:
        click.echo(note)


def _refuse(given: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    for name in names:
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} is for {what}")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--size {text!r} is not of the form WIDTHxHEIGHT, e.g. 160x120") from None
    return width, height


def _span(name: str, text: str) -> tuple[float, float]:
    """A number of seconds, or a range of them as SHORTEST-LONGEST."""
    try:
        parts = [float(part) for part in text.split("-")]
        shortest, longest = parts if len(parts) == 2 else (*parts, *parts)
    except ValueError:
        raise UserError(f"--{name} {text!r} is neither a number of seconds nor a range such as 1.5-8") from None
    return shortest, longest
