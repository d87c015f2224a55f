"""Commands around data sets: make, look at, check, and turn them into other formats."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .cli_options import FOLDER, PLACE, WORKERS, examples, with_options
from .cli_shard import RUNNING, run, shard
from .cli_synth import synth
from .configs import PHASES
from .errors import UserError


@click.command()
@click.argument("dataset", type=PLACE)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@examples("genkd inspect data/ucf101\ngenkd inspect data/ucf101 --json | jq .splits")
def inspect(dataset: str | Path, as_json: bool) -> None:
    """Show what a data set holds: splits, classes, counts, durations, sizes, codecs."""
    from .preprocessing.inspection import inspect as look
    from .tables import inspection_tables, show

    found = look(dataset)
    click.echo(json.dumps(found, indent=2)) if as_json else show(inspection_tables(found))


@click.command()
@click.argument("dataset", type=PLACE)
@WORKERS
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON.")
@examples("genkd verify data/ucf101")
def verify(dataset: str | Path, workers: int, as_json: bool) -> None:
    """Check every checksum and decode every GOP of a data set. Exits with 1 if anything is wrong."""
    from .preprocessing.verify import verify as check
    from .progress import bar

    with bar("verifying", "videos") as progress:
        problems = check(dataset, workers=workers, on_start=progress.start, on_videos=progress.add)
    if as_json:
        click.echo(json.dumps([vars(problem) for problem in problems], indent=2))
    else:
        for problem in problems:
            click.echo(f"{problem.file}: {problem.key + ': ' if problem.key else ''}{problem.what}")
        click.echo(f"{dataset}: {'sound' if not problems else f'{len(problems)} problems'}")
    sys.exit(1 if problems else 0)


@click.command()
@click.argument("dataset", type=PLACE)
@click.option("--key", required=True, help="The video, as the index names it.")
@click.option("--config", "source", default="ucf101", show_default=True, help="A preset's name or a YAML file.")
@click.option("--phase", type=click.Choice(PHASES), default="teacher",
              show_default=True, help="Whose settings of the configuration.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="The training run's.")
@click.option("--epoch", "epochs", type=click.IntRange(1), multiple=True, help="Repeatable  [default: 1, 2, 3]")
@click.option("--out", type=FOLDER, default="clips.png", show_default=True, help="PNG file to write.")
@click.option("--json", "as_json", is_flag=True, help="Print what was drawn as JSON.")
@click.argument("overrides", nargs=-1)
@examples(
    "genkd show data/ucf101 --key Archery/v_Archery_g01_c01 --epoch 1 --epoch 7\n"
    "genkd show data/ucf101 --key Archery/v_Archery_g01_c01 --seed 3 data.size=112 data.brightness=0.4 data.hue=0.1"
)
def show(dataset: str | Path, key: str, source: str, phase: str, seed: int, epochs: tuple[int, ...], out: Path,
         as_json: bool, overrides: tuple[str, ...]) -> None:  # fmt: skip
    """Draw the clips that a training run sees of one video, before and after augmentation, on a contact sheet.

    OVERRIDES are key=value pairs over the configuration, as for `genkd train`.
    """
    from .configs.load import load
    from .pipelines.show import contact_sheet
    from .preprocessing.shards import Dataset

    config = load(source, phase, overrides).data
    drawn = contact_sheet(Dataset.open(dataset), config, key, out, seed=seed, epochs=epochs or (1, 2, 3))
    click.echo(json.dumps(drawn, indent=2) if as_json else f"{out}: {len(drawn)} clips of {key}")


@click.command()
@click.argument("dataset", type=PLACE)
@click.argument("out", type=PLACE)
@click.option(
    "--method",
    type=click.Choice(["tvl1", "dis", "farneback"]),
    default="tvl1",
    show_default=True,
    help="tvl1 is the published choice and takes about a second a frame; dis is a hundred times as fast.",
)
@click.option("--bound", default=20.0, show_default=True, help="Pixels a frame that the values 0 and 255 stand for.")
@click.option("--split", help="Only this split.")
@click.option("--codec", default="h264", show_default=True, help="h264, hevc, vp9 or mjpeg.")
@click.option("--short-side", default=0, show_default=True, help="Scale frames to so many pixels first; 0: as stored.")
@click.option("--gop", default=16, show_default=True, help="Frames of a GOP.")
@click.option("--crf", type=int, help="Quality, lower is better  [default: h264 and hevc 18, vp9 24, mjpeg 3]")
@with_options(*RUNNING)
@examples(
    "genkd flow data/ucf101 data/ucf101-flow --method dis\ngenkd flow data/thumos14 data/thumos14-flow --slice 3/16"
)
def flow(dataset: str | Path, out: str | Path, method: str, bound: float, split: str | None, codec: str,
         short_side: int, gop: int, crf: int | None, **running: Any) -> None:  # fmt: skip
    """Compute the optical flow of a shard data set: a data set with the same keys, labels and frames.

    Each video is grey, x left and y right; frame t is the flow from frame t to t + 1, and the last one stands twice.
    """
    from .preprocessing.flow import FlowSettings
    from .preprocessing.interop import dataset_sources
    from .preprocessing.shards import Dataset

    settings = FlowSettings(method, bound, codec, gop, crf, short_side=short_side)
    opened = Dataset.open(dataset, checked=True)
    if opened.info.get("modality") == "flow":
        raise UserError(f"{dataset} holds flow already")
    run(dataset_sources(opened, split), out, settings, **running)


@click.command()
@click.argument("root", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--height", default=240, show_default=True, help="Pixels; the width follows. 0 keeps the size.")
@click.option("--quality", default=95, show_default=True, type=click.IntRange(1, 100), help="Of the JPEG files.")
@click.option("--flat", is_flag=True, help="OUT/VIDEO without the class folder, as the two-stream lists name them.")
@WORKERS
@examples("genkd frames HMDB51/ hmdb51_n_frames/\ngenkd frames data/ucf101 ucf101_frames/ --flat --height 0")
def frames(root: Path, out: Path, height: int, quality: int, flat: bool, workers: int) -> None:
    """Write every video as a folder of image_00001.jpg ... with its number of frames in n_frames.

    ROOT holds class folders, or is a shard data set. `genkd shard` reads such folders again.
    """
    from .preprocessing.interop import write_frames
    from .progress import bar

    with bar("writing frames", "videos") as progress:
        done = write_frames(
            _sources(root), out, height=height, quality=quality, flat=flat, workers=workers, on_start=progress.start,
            on_videos=progress.add,
        )  # fmt: skip
    click.echo(f"{out}: {len(done.keys)} videos, {done.frames} frames")
    _show_notes(done)


@click.group()
def lists() -> None:
    """Write the train and validation file lists that two-stream training reads."""


_LIST_OPTIONS = (
    click.argument("counts", type=FOLDER),
    click.argument("out", type=FOLDER),
    click.option("--annotations", type=FOLDER, required=True, help="Folder of the official split files."),
    click.option("--fold", "folds", type=click.IntRange(1, 3), multiple=True, help="Which splits  [default: all]"),
    click.option("--modality", type=click.Choice(["rgb", "flow"]), default="rgb", show_default=True),
    click.option("--column", type=click.Choice(["source_frames", "num_frames"]), default="source_frames",
                 show_default=True, help="Frame counts of a shard data set: before or after --fps."),
    click.option("--skip-missing", is_flag=True, help="Leave out videos that COUNTS lacks."),
)  # fmt: skip


@lists.command("ucf101")
@with_options(*_LIST_OPTIONS)
@examples("genkd lists ucf101 ucf101_frames/ settings/ --annotations ucfTrainTestlist/")
def lists_ucf101(counts: Path, out: Path, annotations: Path, folds: tuple[int, ...], **options: Any) -> None:
    """train_rgb_split1.txt, val_rgb_split1.txt ...: `video frames label` in the order of the official lists.

    COUNTS is a folder of frame folders or a shard data set.
    """
    from .preprocessing.lists import ucf101_lists

    _show_lists(ucf101_lists(_counts(counts), annotations, out, folds=folds or (1, 2, 3), **options))


@lists.command("hmdb51")
@with_options(*_LIST_OPTIONS)
@click.option("--numbered", default=1, show_default=True, type=click.IntRange(1, 3), help="Split of hmdb51_train.txt.")
@examples("genkd lists hmdb51 hmdb51_n_frames/ settings/ --annotations testTrainMulti_7030_splits/")
def lists_hmdb51(
    counts: Path, out: Path, annotations: Path, folds: tuple[int, ...], numbered: int, **options: Any
) -> None:
    """The same for HMDB51, and hmdb51_train.txt, hmdb51_test.txt and hmdb51_val.txt: `class/video label`."""
    from .preprocessing.lists import hmdb51_lists

    found = hmdb51_lists(_counts(counts), annotations, out, folds=folds or (1, 2, 3), fold=numbered, **options)
    _show_lists(found)


@click.command()
@click.argument("root", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--annotations", type=FOLDER, help="THUMOS14: folder of the annotation files  [default: below ROOT]")
@click.option("--sample-fps", default=10.0, show_default=True, help="Frames a second to keep.")
@click.option("--resolution", default=112, show_default=True, help="Width and height in pixels.")
@click.option(
    "--flow",
    "method",
    type=click.Choice(["tvl1", "dis", "farneback"]),
    help="ROOT holds such arrays already: write their optical flow by this method.",
)
@WORKERS
@examples(
    "genkd npy thumos14/ thumos14_npy/ --annotations thumos_annotations/\n"
    "genkd npy thumos14_npy/ thumos14_flow_npy/ --flow tvl1"
)
def npy(root: Path, out: Path, annotations: Path | None, sample_fps: float, resolution: int, method: str | None,
        workers: int) -> None:  # fmt: skip
    """Write THUMOS14 as arrays: uint8 (T,112,112,3) at 10 frames a second, and their video_info.csv.

    With --flow: from such arrays uint8 (T,112,112,2), x and y in [-20, 20] pixels a frame as 0 to 255.
    """
    from .preprocessing import npy as arrays
    from .preprocessing import thumos
    from .progress import bar

    with bar("writing arrays", "videos") as progress:
        running: dict[str, Any] = {"workers": workers, "on_start": progress.start, "on_videos": progress.add}
        if method:
            done = arrays.write_flow_npy(root, out, method=method, **running)
        else:
            source = thumos.thumos14(root, annotations=annotations)
            done = arrays.write_npy(source, out, sample_fps=sample_fps, resolution=resolution, **running)
    click.echo(f"{out}: {len(done.keys)} videos, {done.frames} frames")
    _show_notes(done)


@click.command("export-parquet")
@click.argument("dataset", type=PLACE)
@click.argument("out", type=PLACE)
@click.option("--split", help="Only this split.")
@WORKERS
@examples(
    "genkd export-parquet data/ucf101 data/ucf101-parquet\n"
    "python -c \"import duckdb; print(duckdb.sql(\\\"select label, count(*) from 'data/ucf101-parquet/data/*' "
    'group by 1\\"))"'
)
def export_parquet(dataset: str | Path, out: str | Path, split: str | None, workers: int) -> None:
    """Write a shard data set as Parquet files with the encoded videos and their labels.

    pyarrow, DuckDB, Ray Data and Hugging Face datasets read OUT. Every checksum is checked on the way.
    """
    from .preprocessing import export
    from .progress import bar

    with bar("exporting", "videos") as progress:
        done = export.export_parquet(
            dataset, out, split=split, workers=workers, on_start=progress.start, on_videos=progress.add
        )
    click.echo(f"{done.out}: {done.videos} videos in {done.files} files, {done.payload_bytes / 1e6:.1f} MB of video")


def _sources(root: Path):
    """A shard data set's videos, or those of a folder of class folders."""
    from .preprocessing import sources
    from .preprocessing.interop import dataset_sources
    from .preprocessing.shards import Dataset

    if (root / "dataset.json").is_file():
        opened = Dataset.open(root, checked=True)
        if opened.info.get("modality") == "flow":
            raise UserError(f"{root} holds optical flow, which is no picture")
        return dataset_sources(opened)
    return sources.folder(root)


def _counts(place: Path):
    from .preprocessing.shards import Dataset

    return Dataset.open(place, checked=True) if (place / "dataset.json").is_file() else place


def _show_lists(files) -> None:
    for entry in files:
        missing = f", {len(entry.missing)} missing" if entry.missing else ""
        click.echo(f"{entry.path}: {entry.videos} videos{missing}")


def _show_notes(done) -> None:
    if done.changed:
        named = ", ".join(done.changed[:3]) + (" ..." if len(done.changed) > 3 else "")
        click.echo(f"{len(done.changed)} sources changed since and were written again: {named}")
    if done.rejected:
        click.echo(f"{len(done.rejected)} sources were rejected, listed in {done.notes / 'errors.parquet'}:")
        for entry in done.rejected[:10]:
            click.echo(f"  {entry.path}: {entry.stage}: {entry.reason}")


COMMANDS = (synth, shard, inspect, verify, show, flow, frames, lists, npy, export_parquet)
