"""The `genkd` command: one verb a function of the packages below."""

from __future__ import annotations

import functools
import inspect as introspection
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import Stopped, UserError, explain_os_error
from .files import write_json

_FOLDER = click.Path(path_type=Path)
_CORES = len(os.sched_getaffinity(0))
_WORKERS = click.option(
    "--workers", default=_CORES, type=click.IntRange(0), show_default="cores", help="Processes; 0: none but this one."
)


class _Group(click.Group):
    """Turns what users can mend into one sentence and exit code 1, and Ctrl-C into one and 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from None
        except Stopped as stopped:
            click.echo(f"{stopped}; run the same command to continue", err=True)
            sys.exit(stopped.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; what is finished is kept, run the same command to continue", err=True)
            sys.exit(130)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(explain_os_error(error, "running")) from None


def _examples(text: str) -> Callable:
    """Appends an Examples section, line breaks kept, to a command's help."""

    def add(function: Callable) -> Callable:
        about = introspection.cleandoc(function.__doc__ or "")
        lines = "\n".join(f"  {line}" for line in text.strip().splitlines())
        function.__doc__ = f"{about}\n\n\b\nExamples:\n{lines}\n"
        return function

    return add


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Convert video data sets to shards, feed them through DALI, and distil action recognition networks.

    \b
    Start with:  genkd demo             everything once, on synthetic videos, with a report page
                 genkd COMMAND --help   what a command does, with examples
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@main.command()
@click.argument("out", type=_FOLDER)
@click.option("--videos-per-class", default=40, show_default=True, help="Videos of each of the ten classes.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of a video.")
@click.option("--fps", default=25, show_default=True)
@click.option("--size", default="160x120", show_default=True, metavar="WxH", help="Frame size in pixels.")
@click.option("--test-share", default=0.3, show_default=True, help="Share of the groups that make the test list.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
@click.option(
    "--workers", default=_CORES, type=click.IntRange(0), show_default="cores", help="Processes; 0: none but this one."
)
@_examples("genkd synth motion\ngenkd synth motion --videos-per-class 100 --size 320x240 --seed 7")
def synth(out: Path, size: str, workers: int, **settings: Any) -> None:
    """Write a motion data set to OUT: real AVI files in UCF101's layout, ten classes that differ only by motion."""
    from .preprocessing.synthetic import CLASSES, SynthSettings, synthesize
    from .progress import bar

    try:
        width, height = (int(part) for part in size.lower().split("x"))
    except ValueError:
        raise UserError(f"--size {size!r} is not of the form WIDTHxHEIGHT, e.g. 160x120") from None
    chosen = SynthSettings(width=width, height=height, **settings)
    with bar("rendering", "videos") as progress:
        progress.start(len(CLASSES) * chosen.videos_per_class)
        counts = synthesize(out, chosen, workers=workers, on_video=progress.add)
    click.echo(f"{out}: {len(CLASSES)} classes, {counts['train']} train and {counts['test']} test videos")


def _shard_options(function: Callable) -> Callable:
    options = [
        click.argument("root", type=_FOLDER),
        click.argument("out", type=_FOLDER),
        click.option("--codec", default="h264", show_default=True, help="h264, vp9 or mjpeg. DALI decodes vp9 and "
                     "mjpeg on CPUs too."),
        click.option("--short-side", default=256, show_default=True, help="Pixels; 0 keeps the source's size."),
        click.option("--fps", type=float, help="Frames a second  [default: the source's]"),
        click.option("--gop", default=16, show_default=True, help="Frames of a GOP; the unit in which clips are read."),
        click.option("--crf", type=int, help="Quality, lower is better  [default: h264 23, vp9 33, mjpeg 4]"),
        click.option("--preset", default="medium", show_default=True, help="x264's preset."),
        _WORKERS,
        click.option("--on-error", type=click.Choice(["skip", "fail"]), default="skip", show_default=True,
                     help="A source that cannot be converted: record it and go on, or stop."),
        click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
    ]  # fmt: skip
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


@main.group()
def shard() -> None:
    """Convert a data set of videos to shards. A killed run continues when the same command is run again."""


@shard.command()
@_shard_options
@click.option("--test-fold", metavar="K/N", help="Make every N-th group of videos, from the K-th, the test split.")
@click.option("--group-by", metavar="REGEX", help="Videos whose keys give the same captured text stay together.")
@_examples(
    "genkd shard folder videos/ data/videos                             ROOT/CLASS/VIDEO, or ROOT/SPLIT/CLASS/VIDEO\n"
    "genkd shard folder videos/ data/videos --test-fold 1/5             every fifth video is for testing\n"
    "genkd shard folder fights/ data/fights --test-fold 1/5 --group-by '(\\d+)\\d$'   blocks of ten numbers together"
)
def folder(root: Path, out: Path, test_fold: str | None, group_by: str | None, **options: Any) -> None:
    """Convert a folder with one subfolder a class.

    The key of a video is its path below ROOT without the extension. Without --test-fold and without split folders all
    videos go to the split `train`.
    """
    from .preprocessing import sources

    _convert(sources.folder(root, test_fold=test_fold, group_by=group_by), out, **options)


@shard.command()
@_shard_options
@click.option("--fold", default=1, show_default=True, type=click.IntRange(1), help="Which of the official splits.")
@click.option("--annotations", type=_FOLDER, help="Folder of classInd.txt, trainlist01.txt, testlist01.txt ...")
@_examples("genkd shard ucf101 UCF101/ data/ucf101 --fold 1\ngenkd shard ucf101 UCF-101/ data/ucf101-cpu --codec vp9")
def ucf101(root: Path, out: Path, fold: int, annotations: Path | None, **options: Any) -> None:
    """Convert UCF101, or anything in its layout, with its official train and test lists."""
    from .preprocessing import sources

    _convert(sources.ucf101(root, fold=fold, annotations=annotations), out, **options)


def _convert(source, out: Path, workers: int, on_error: str, as_json: bool, **settings: Any) -> None:
    from .preprocessing.convert import Progress, convert
    from .preprocessing.video import VideoSettings
    from .progress import bar

    with bar("converting", "videos", "frames") as progress:

        def on_progress(event: Progress) -> None:
            progress.add(event.videos, event.frames)

        summary = convert(
            source, out, VideoSettings(**settings), workers=workers, on_error=on_error,
            on_start=progress.start, on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        click.echo(json.dumps({**summary.info, "rejections": [vars(entry) for entry in summary.rejected]}, indent=2))
        return
    splits = ", ".join(f"{name} {entry['videos']}" for name, entry in summary.info["splits"].items())
    size = sum(entry["bytes"] for entry in summary.info["splits"].values())
    click.echo(f"{out}: videos {splits}; {len(summary.info['classes'])} classes; {size / 1e6:.1f} MB")
    if summary.rejected:
        click.echo(f"{len(summary.rejected)} sources were rejected, listed in {out / 'errors.parquet'}:")
        for entry in summary.rejected[:10]:
            click.echo(f"  {entry.path}: {entry.stage}: {entry.reason}")
        if len(summary.rejected) > 10:
            click.echo(f"  and {len(summary.rejected) - 10} more")
    for name in summary.unused_classes:
        click.echo(f"note: no video of class {name} could be used")
    if list(summary.info["splits"]) == ["train"]:
        click.echo("note: there is no test split; --test-fold makes one")


@main.command()
@click.argument("dataset", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@_examples("genkd inspect data/ucf101\ngenkd inspect data/ucf101 --json | jq .splits")
def inspect(dataset: Path, as_json: bool) -> None:
    """Show what a data set holds: splits, classes, counts, durations, sizes, codecs."""
    from .preprocessing.inspection import inspect as look
    from .tables import inspection_tables, show

    found = look(dataset)
    click.echo(json.dumps(found, indent=2)) if as_json else show(inspection_tables(found))


@main.command()
@click.argument("dataset", type=_FOLDER)
@click.option(
    "--workers", default=_CORES, type=click.IntRange(0), show_default="cores", help="Processes; 0: none but this one."
)
@click.option("--json", "as_json", is_flag=True, help="Print the problems as JSON.")
@_examples("genkd verify data/ucf101")
def verify(dataset: Path, workers: int, as_json: bool) -> None:
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


@main.command()
@click.argument("phase", type=click.Choice(["teacher", "representation", "distill"]))
@click.option("--config", "source", required=True, help="A preset's name or a YAML file.")
@click.option("--out", required=True, type=_FOLDER, help="Run folder; an unfinished run in it is continued.")
@click.argument("overrides", nargs=-1)
@_examples(
    "genkd train teacher --config ucf101 --out runs/teacher data.dataset=data/ucf101\n"
    "genkd train representation --config ucf101 --out runs/rep data.dataset=data/ucf101 init=runs/teacher\n"
    "genkd train distill --config ucf101 --out runs/student data.dataset=data/ucf101 teacher=runs/rep\n"
    "torchrun --nproc-per-node 8 -m genkd train teacher --config ucf101 --out runs/teacher data.dataset=data/ucf101"
)
def train(phase: str, source: str, out: Path, overrides: tuple[str, ...]) -> None:
    """Train one phase: teacher, representation (init=RUN names the teacher), distill (needs teacher=RUN).

    OVERRIDES are key=value pairs over the configuration, dotted keys and YAML values: optimizer.lr=0.05. A run that
    was stopped or killed continues from its newest checkpoint when the same command is run again.
    """
    from .configs.load import load
    from .trainers.loop import train as run

    config = load(source, phase, overrides)
    result = run(config, out, say=click.echo)
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo(f"finished; weights are in {result['weights']}")


@main.group()
def evaluate() -> None:
    """Measure trained weights on a data set."""


@evaluate.command()
@click.argument("weights", type=_FOLDER)
@click.option("--data", "dataset", required=True, type=_FOLDER, help="Shard data set.")
@click.option("--split", default="test", show_default=True)
@click.option("--clips", default=10, show_default=True, type=click.IntRange(1), help="Uniform clips a video.")
@click.option("--crops", default="1", show_default=True, type=click.Choice(["1", "3"]), help="Crops a clip.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Clips over all ranks.")
@click.option("--precision", default="auto", show_default=True, type=click.Choice(["auto", "fp32", "bf16", "fp16"]))
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--out", type=_FOLDER, help="Write results.json and scores.parquet into this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
@_examples(
    "genkd evaluate recognition runs/student --data data/ucf101 --clips 10 --crops 3\n"
    "genkd evaluate recognition runs/student --data data/ucf101 --json | jq .top1"
)
def recognition(weights: Path, dataset: Path, out: Path | None, as_json: bool, crops: str, **options: Any) -> None:
    """Top-1, top-5 and mean class accuracy of WEIGHTS (a run folder or a weights file)."""
    from .evaluation.recognition import evaluate_weights
    from .progress import bar
    from .tables import recognition_tables, show

    with bar("scoring", "clips") as progress:
        values = evaluate_weights(
            weights, dataset, out, crops=int(crops), on_start=progress.start, on_batch=progress.add, **options
        )
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo(json.dumps(values, indent=2)) if as_json else show(recognition_tables(values))


@main.command()
@click.option("--out", default="demo-run", show_default=True, type=_FOLDER, help="Folder; finished steps are kept.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
@_examples("genkd demo\ngenkd demo --out /tmp/demo --seed 1")
def demo(out: Path, device: str, seed: int) -> None:
    """Everything once: synthetic videos, shards, teacher, representation, two students, evaluation, report.html."""
    from .demo import run

    report = run(out, device=device, seed=seed, say=click.echo)
    click.echo(f"open {report}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_FOLDER)
@click.option("--out", type=_FOLDER, help="File to write  [default: report.html in the first run]")
@_examples("genkd report runs/student\ngenkd report runs/teacher runs/plain runs/student --out report.html")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained HTML page about training runs: curves, accuracies, confusion, attention."""
    from .evaluation.report import write_report

    path = out or runs[0] / "report.html"
    write_report(path, list(runs))
    click.echo(f"open {path}")


@main.command()
@click.argument("what", type=click.Choice(["loader", "shard", "train"]))
@click.option("--data", type=_FOLDER, help="loader: shard data set; shard: folder of videos  [default: synthetic]")
@click.option("--out", type=_FOLDER, help="Write the JSON result to this file.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_examples("genkd bench loader\ngenkd bench loader --data data/ucf101 --json\ngenkd bench train --out result.json")
def bench(what: str, data: Path | None, out: Path | None, repeats: int, as_json: bool) -> None:
    """Measure side by side in one run: loader against PyTorch's DataLoader, sharding, training steps."""
    from .benchmarks import run_benchmark
    from .tables import benchmark_tables, show

    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    result = run_benchmark(what, data, repeats)
    if out:
        write_json(out, result)
    click.echo(json.dumps(result, indent=2)) if as_json else show(benchmark_tables(result))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Look over this machine: Python, PyTorch, GPUs, DALI, codecs, and one clip through the whole loader."""
    from .doctor import examine
    from .tables import doctor_tables, show

    findings = examine()
    click.echo(json.dumps(findings, indent=2)) if as_json else show(doctor_tables(findings))
    sys.exit(0 if all(entry["ok"] for entry in findings) else 1)
