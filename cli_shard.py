"""`genkd shard`: one subcommand a data set layout, and what they share."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from .cli_options import CORES, FOLDER, PLACE, SOURCE, examples, with_options
from .errors import UserError

_ENCODING = (
    click.option("--codec", default="h264", show_default=True, help="h264, hevc, vp9, mjpeg, or copy: sources that "
                 "already fit as they are, others as h264. DALI decodes vp9 and mjpeg on CPUs too."),
    click.option("--short-side", type=int, help="Pixels; 0 keeps the source's size. If 128 or more and a "
                 "multiple of 16, the long side is made one too, for NVDEC.  [default: 256; copy: 0]"),
    click.option("--size", metavar="WxH", help="Stretch to exactly this size instead, e.g. 112x112."),
    click.option("--fps", type=float, help="Frames a second  [default: the source's]"),
    click.option("--gop", type=int, help="Frames of a GOP, the unit in which clips are read; copy: the longest taken  "
                 "[default: 16; copy: 300]"),
    click.option("--crf", type=int, help="Quality, lower is better  [default: h264 23, hevc 28, vp9 33, mjpeg 4]"),
    click.option("--preset", default="medium", show_default=True, help="x264's and x265's preset."),
)  # fmt: skip
RUNNING = (
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                 help="Processes of this machine, or a Ray cluster."),
    click.option("--address", help="Of the Ray cluster: auto, HOST:6379 or ray://HOST:10001  [default: one on this "
                 "machine]"),
    click.option("--workers", type=click.IntRange(0), help="Shards at once; 0: in this process  [default: every core]"),
    click.option("--slice", "part", metavar="K/N", help="Write every N-th shard only, from the K-th: for job arrays; "
                 "`genkd shard --merge OUT` ends them."),
    click.option("--refresh", is_flag=True, help="Convert sources again that changed, add new ones, drop lost ones."),
    click.option("--repair", is_flag=True, help="Check every finished shard and rebuild those that are damaged."),
    click.option("--retry-rejected", is_flag=True, help="Try sources again that an earlier run rejected."),
    click.option("--dry-run", is_flag=True, help="Print the plan and an estimate of size and time; write nothing."),
    click.option("--on-error", type=click.Choice(["skip", "fail"]), default="skip", show_default=True,
                 help="A source that cannot be converted: record it and go on, or stop."),
    click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
)  # fmt: skip
_ROOT = (click.argument("root", type=SOURCE), click.argument("out", type=PLACE))
_SOURCE_FPS = click.option(
    "--source-fps", type=float, help="Frame rate of folders of JPEG frames and of .npy arrays."
)  # fmt: skip
_common = with_options(*_ROOT, *_ENCODING, *RUNNING, _SOURCE_FPS)


@click.group(invoke_without_command=True)
@click.option("--merge", type=PLACE, metavar="OUT", help="Write the index of a data set whose slices are finished.")
@click.pass_context
@examples(
    "genkd shard ucf101 UCF101/ data/ucf101\n"
    "genkd shard ucf101 UCF101/ s3://bucket/ucf101 --slice 3/16     one job of sixteen\n"
    "genkd shard --merge s3://bucket/ucf101                         when all sixteen are done"
)
def shard(context: click.Context, merge: str | Path | None) -> None:
    """Convert a data set of videos to shards in OUT, a folder or an fsspec URL such as s3://bucket/name.

    A killed run continues when the same command is run again, and ends with the same bytes.
    """
    if context.invoked_subcommand is not None:
        if merge:
            raise click.UsageError("--merge stands alone: genkd shard --merge OUT")
        return
    if not merge:
        click.echo(context.get_help())
        return
    from .preprocessing.convert import merge as write_index

    print_summary(write_index(merge), False)


@shard.command()
@_common
@click.option("--test-fold", metavar="K/N", help="Make every N-th group of videos, from the K-th, the test split.")
@click.option("--group-by", metavar="REGEX", help="Videos whose keys give the same captured text stay together.")
@examples(
    "genkd shard folder videos/ data/videos                             ROOT/CLASS/VIDEO, or ROOT/SPLIT/CLASS/VIDEO\n"
    "genkd shard folder videos/ data/videos --test-fold 1/5             every fifth video is for testing\n"
    "genkd shard folder fights/ data/fights --test-fold 1/5 --group-by '(\\d+)\\d$'   blocks of ten numbers together\n"
    "genkd shard folder frames/ data/frames --source-fps 25             folders of image_00001.jpg, image_00002.jpg ..."
)
def folder(root: Path, out: str | Path, test_fold: str | None, group_by: str | None, source_fps: float | None,
           **options: Any) -> None:  # fmt: skip
    """Convert a folder with one subfolder a class.

    The key of a video is its path below ROOT without the extension. Without --test-fold and without split folders all
    videos go to the split `train`.
    """
    from .preprocessing import sources

    source = sources.folder(root, test_fold=test_fold, group_by=group_by, source_fps=source_fps)
    summary = _convert(source, out, **options)
    if summary and summary.info and not options["as_json"] and list(summary.info["splits"]) == ["train"]:
        click.echo("note: there is no test split; --test-fold makes one")


@shard.command()
@_common
@click.option("--fold", default=1, show_default=True, type=click.IntRange(1, 3), help="Which of the official splits.")
@click.option("--annotations", type=FOLDER, help="Folder of classInd.txt, trainlist01.txt, testlist01.txt ...")
@examples("genkd shard ucf101 UCF101/ data/ucf101 --fold 1\ngenkd shard ucf101 UCF-101/ data/ucf101-cpu --codec vp9")
def ucf101(root: Path, out: str | Path, fold: int, annotations: Path | None, source_fps: float | None,
           **options: Any) -> None:  # fmt: skip
    """Convert UCF101, or anything in its layout, with its official train and test lists."""
    from .preprocessing import sources

    _convert(sources.ucf101(root, fold=fold, annotations=annotations, source_fps=source_fps), out, **options)


@shard.command()
@_common
@click.option("--fold", default=1, show_default=True, type=click.IntRange(1, 3), help="Which of the official splits.")
@click.option("--annotations", type=FOLDER, help="Folder of CLASS_test_split1.txt ...")
@examples(
    "genkd shard hmdb51 HMDB51/ data/hmdb51 --fold 1\n"
    "genkd shard hmdb51 hmdb51_n_frames/ data/hmdb51 --annotations testTrainMulti_7030_splits --source-fps 30"
)
def hmdb51(root: Path, out: str | Path, fold: int, annotations: Path | None, source_fps: float | None,
           **options: Any) -> None:  # fmt: skip
    """Convert HMDB51 with its official split files: 1 is train, 2 is test, 0 is left out."""
    from .preprocessing import layouts

    _convert(layouts.hmdb51(root, fold=fold, annotations=annotations, source_fps=source_fps), out, **options)


_LISTS = (
    click.option("--list", "listings", type=FOLDER, multiple=True, required=True, help="List file; may be repeated."),
    click.option("--classes", type=FOLDER, help="File of class names, one a line, in label order."),
    click.option("--split", help="Split of all videos  [default: as the lists say, by column or file name]"),
)


@shard.command("csv")
@_common
@with_options(*_LISTS)
@examples(
    "genkd shard csv kinetics400/ data/k400 --list train.csv --list validate.csv\n"
    "genkd shard csv videos/ data/mine --list mine.csv             columns path, label, start, end, split"
)
def csv_command(root: Path, out: str | Path, listings: tuple[Path, ...], classes: Path | None, split: str | None,
                source_fps: float | None, **options: Any) -> None:  # fmt: skip
    """Convert the videos of CSV files: path, label, and optionally start and end in seconds, and split.

    Kinetics' own files (youtube_id, time_start, time_end) find trimmed videos by their usual names, and cut whole
    ones.
    """
    from .preprocessing import layouts

    source = layouts.csv_list(root, listings, classes=classes, split=split, source_fps=source_fps)
    _convert(source, out, **options)


@shard.command("list")
@_common
@with_options(*_LISTS)
@examples("genkd shard list videos/ data/mine --list train.txt --list val.txt       lines of `path label`")
def list_command(root: Path, out: str | Path, listings: tuple[Path, ...], classes: Path | None, split: str | None,
                 source_fps: float | None, **options: Any) -> None:  # fmt: skip
    """Convert the videos of plain list files: a path, or a path and a class number, a line."""
    from .preprocessing import layouts

    source = layouts.list_file(root, listings, classes=classes, split=split, source_fps=source_fps)
    _convert(source, out, **options)


@shard.command()
@_common
@click.option("--annotations", type=FOLDER, help="Folder of val_Annotation.csv, test_Annotation.csv, the class index.")
@click.option("--flow", is_flag=True, help="Take the published flow arrays, validation_flow_npy/ and test_flow_npy/.")
@examples(
    "genkd shard thumos14 thumos14/ data/thumos14                       10 fps, 112x112, as the detectors use it\n"
    "genkd shard thumos14 thumos14_npy/ data/thumos14 --annotations thumos_annotations   from the published .npy"
)
def thumos14(root: Path, out: str | Path, annotations: Path | None, flow: bool, source_fps: float | None,
             **options: Any) -> None:  # fmt: skip
    """Convert THUMOS14 with its temporal annotations; label 0 is the background, Ambiguous is dropped.

    Unless told otherwise videos become 112x112 pixels at 10 frames a second.
    """
    from .preprocessing import thumos

    options["fps"] = 10.0 if options["fps"] is None else options["fps"]
    if flow:
        _refuse_scaling(options)
        options.update(short_side=0, modality="flow")
    elif options["size"] is None and options["short_side"] is None:
        options["size"] = "112x112"
    _convert(thumos.thumos14(root, annotations=annotations, flow=flow, source_fps=source_fps), out, **options)


@shard.command()
@_common
@click.option("--split", help="Only this split.")
@examples("genkd shard dataset data/ucf101 data/ucf101-cpu --codec vp9        the same videos for CPU decoding")
def dataset(root: Path, out: str | Path, split: str | None, source_fps: float | None, **options: Any) -> None:
    """Convert a shard data set again, to another codec, size or rate, with the same keys and labels.

    Without --short-side or --size the stored size is kept.
    """
    from .preprocessing.interop import dataset_sources
    from .preprocessing.shards import Dataset

    opened = Dataset.open(root, checked=True)
    if opened.info.get("modality") == "flow":
        _refuse_scaling(options)
        options["modality"] = "flow"
    options["short_side"] = options["short_side"] or 0
    _convert(dataset_sources(opened, split=split), out, **options)


def _refuse_scaling(options: dict[str, Any]) -> None:
    if options["short_side"] or options["size"]:
        raise UserError("flow cannot be scaled once it is computed; leave --short-side and --size out")


def _convert(source, out: str | Path, *, codec: str, short_side: int | None, size: str | None, fps: float | None,
             gop: int | None, crf: int | None, preset: str, modality: str = "rgb", **running: Any) -> Any:  # fmt: skip
    from .preprocessing.video import VideoSettings

    copy = codec == "copy"
    settings = VideoSettings(
        codec, (0 if copy else 256) if short_side is None else short_side, fps, (300 if copy else 16) if gop is None
        else gop, crf, preset, size, modality,
    )  # fmt: skip
    return run(source, out, settings, **running)


def run(source, out: str | Path, settings: Any, *, workers: int | None, part: str | None, dry_run: bool,
        as_json: bool, **options: Any) -> Any:  # fmt: skip
    """Converts, prints the summary and returns it; what `genkd shard` and `genkd flow` share."""
    from .preprocessing.convert import Progress, convert
    from .progress import bar

    options |= {"workers": workers, "part": _part(part)}
    if dry_run:
        return _print_estimate(source, out, settings, as_json, **options)
    with bar("converting", "videos", "frames") as progress:

        def on_progress(event: Progress) -> None:
            progress.add(event.videos, event.frames)

        summary = convert(source, out, settings, on_start=progress.start, on_progress=on_progress, **options)
    print_summary(summary, as_json)
    if options["repair"] and not summary.repaired and not as_json:
        click.echo("no finished shard was damaged")
    return summary


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--slice {text!r} is not of the form K/N with 1 <= K <= N, e.g. 3/16")
    return int(match[1]), int(match[2])


def print_summary(summary, as_json: bool) -> None:
    """What a conversion made, as text or JSON."""
    rejections = [vars(entry) for entry in summary.rejected]
    if as_json:
        about = {"repaired": list(summary.repaired), "resumed_shards": summary.resumed_shards,
                 "late_actions": summary.late_actions}  # fmt: skip
        click.echo(json.dumps({**(summary.info or {}), **about, "rejections": rejections}, indent=2))
        return
    if summary.repaired:
        click.echo(f"rebuilt {len(summary.repaired)} damaged shards: {', '.join(summary.repaired[:10])}")
    if summary.info is None:
        click.echo(f"{summary.out}: this slice is finished; when all are: genkd shard --merge {summary.out}")
    else:
        splits = ", ".join(f"{name} {entry['videos']}" for name, entry in summary.info["splits"].items())
        size = sum(entry["bytes"] for entry in summary.info["splits"].values())
        click.echo(f"{summary.out}: videos {splits}; {len(summary.info['classes'])} classes; {size / 1e6:.1f} MB")
        if summary.info["video"].get("codec") == "copy":
            total = sum(entry["videos"] for entry in summary.info["splits"].values())
            encoded = summary.info["reencoded"]
            why = "; ".join(f"{count} for {reason}" for reason, count in encoded.items())
            copied = total - sum(encoded.values())
            click.echo(
                f"{copied} of {total} videos were copied" + (f", the others encoded as h264: {why}" if why else "")
            )
    if summary.rejected:
        where = f", listed in {summary.out}/errors.parquet" if summary.info else ""
        click.echo(f"{len(summary.rejected)} sources were rejected{where}:")
        for entry in summary.rejected[:10]:
            click.echo(f"  {entry.path}: {entry.stage}: {entry.reason}")
        if len(summary.rejected) > 10:
            click.echo(f"  and {len(summary.rejected) - 10} more")
    if summary.late_actions:
        count, key = sum(summary.late_actions.values()), next(iter(summary.late_actions))
        click.echo(
            f"note: {count} annotations of {len(summary.late_actions)} videos begin after the video's end, e.g. of "
            f"{key}; training leaves them out"
        )
    for name in summary.unused_classes[:10]:
        click.echo(f"note: no video of class {name} could be used")
    if len(summary.unused_classes) > 10:
        click.echo(f"note: nor of {len(summary.unused_classes) - 10} more")


def _print_estimate(source, out: str | Path, settings: Any, as_json: bool, *, workers: int | None, address: str | None,
                    repair: bool, **options: Any) -> None:  # fmt: skip
    from .preprocessing.estimate import estimate
    from .preprocessing.preview import preview
    from .progress import bar
    from .tables import estimate_tables, show

    expected = preview(source, out, settings, workers=workers, **options)
    workers = max(1, CORES if workers is None else workers)
    with bar("sampling", "videos") as progress:
        found = estimate(
            source, settings, *expected, workers=workers, on_start=progress.start, on_video=progress.add
        )  # fmt: skip
    click.echo(json.dumps(found, indent=2)) if as_json else show(estimate_tables(found))
    sys.exit(0 if found["estimate"] else 1)
