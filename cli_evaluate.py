"""Commands that measure trained networks and what they found, and fuse it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from .cli_options import DEVICE, FOLDER, PLACE, PRECISION, examples
from .errors import UserError


@click.group()
def evaluate() -> None:
    """Measure trained weights on a data set, or detections beside their ground truth."""


@evaluate.command()
@click.argument("weights", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--data", "datasets", required=True, multiple=True, type=PLACE,
    help="Shard data set; with several WEIGHTS one for all, or --data again for each, in their order.",
)  # fmt: skip
@click.option("--split", default="test", show_default=True)
@click.option("--clips", default=10, show_default=True, type=click.IntRange(1), help="Uniform clips a video.")
@click.option("--crops", default="1", show_default=True, type=click.Choice(["1", "3"]), help="Crops a clip.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="Clips over all ranks.")
@PRECISION
@DEVICE
@click.option("--out", type=FOLDER, help="Write results.json and scores.parquet here; several WEIGHTS: into 1, 2, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
@examples(
    "genkd evaluate recognition runs/student --data data/ucf101 --clips 10 --crops 3\n"
    "genkd evaluate recognition runs/student --data data/ucf101 --json | jq .top1\n"
    "genkd evaluate recognition runs/split1 runs/split2 runs/split3 --data data/ucf101-1 --data data/ucf101-2 \\\n"
    "      --data data/ucf101-3 --out runs/rgb-eval"
)
def recognition(weights: tuple[Path, ...], datasets: tuple[str | Path, ...], out: Path | None, device: str,
                as_json: bool, crops: str, **options: Any) -> None:  # fmt: skip
    """Top-1, top-5 and mean class accuracy, calibration error and likelihood of WEIGHTS (run folders or weights files).

    Several WEIGHTS are evaluated each on its data set; then come mean and standard deviation over them, and with --out
    a rerun keeps the ones that are finished, and evaluates again what was made from other weights, data or settings.
    A single one is evaluated anew at every run.
    """
    from .evaluation.recognition import Settings, Unwritten, evaluate_weights
    from .evaluation.splits import evaluate_splits
    from .progress import bar
    from .tables import recognition_tables, show, split_tables

    main_rank = int(os.environ.get("RANK", "0")) == 0
    problem = None
    if len(weights) == 1 and len(datasets) > 1:
        raise UserError(f"one set of weights, but {len(datasets)} data sets; give one")
    try:
        if len(weights) == 1:
            with bar("scoring", "clips") as progress:
                values = evaluate_weights(
                    weights[0], datasets[0], out, crops=int(crops), device=device, progress=progress, **options
                )
        else:
            values = evaluate_splits(
                weights, datasets, out, Settings(crops=int(crops), **options), device=device,
                progress=lambda name: bar(f"scoring {name}", "clips"),
            )  # fmt: skip
    except Unwritten as error:  # hours of scoring are not to be lost with the file
        values, problem = error.values, error
    if main_rank:
        tables = split_tables if "splits" in values else recognition_tables
        click.echo(json.dumps(values, indent=2)) if as_json else show(tables(values))
    if problem:
        raise problem


@evaluate.command()
@click.argument("predictions", type=FOLDER)
@click.option(
    "--ground-truth", required=True, type=FOLDER, help="JSON of THUMOS14 or ActivityNet, which may be gzipped."
)
@click.option("--subset", default="test", show_default=True, help="Of the ground truth; ActivityNet: validation.")
@click.option(
    "--tiou", default="0.1:0.5:0.1", show_default=True,
    help="Thresholds, first:last:step or with commas; ActivityNet: 0.5:0.95:0.05.",
)  # fmt: skip
@click.option("--per-class", is_flag=True, help="Also show the average precision of each class.")
@click.option("--recall", metavar="N,...", help="Also the average recall at N proposals a video, e.g. 1,10,50,100.")
@click.option("--errors", is_flag=True, help="Also what the errors are among the top 10G predictions.")
@click.option("--out", type=FOLDER, help="Write all of it to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@examples(
    "genkd evaluate detection detections.json --ground-truth thumos_gt.json --per-class\n"
    "genkd evaluate detection detections.json --ground-truth thumos_gt.json --tiou 0.3:0.7:0.1 --json | jq .map\n"
    "genkd evaluate detection detections.json --ground-truth activity_net.v1-3.min.json --subset validation \\\n"
    "      --tiou 0.5:0.95:0.05 --recall 1,10,100 --errors --out detection.json"
)
def detection(predictions: Path, ground_truth: Path, subset: str, tiou: str, per_class: bool, recall: str | None,
              errors: bool, out: Path | None, as_json: bool) -> None:  # fmt: skip
    """Mean average precision of temporal action detections, as ActivityNet's evaluator defines it, and average recall
    and errors (DETAD) on request.

    PREDICTIONS is JSON, which may be gzipped: {"results": {VIDEO: [{"label", "score", "segment": [START_S, END_S]}]}}.
    Those of other videos and labels than the subset's are ignored and counted.
    """
    from .evaluation import detection as metrics
    from .evaluation.ground_truth import read_ground_truth
    from .evaluation.proposals import read_proposals
    from .files import prepare_file, write_json
    from .tables import detection_tables, show

    tious, numbers = metrics.parse_tious(tiou), _numbers(recall)
    truth, found = read_ground_truth(ground_truth, subset), read_proposals(predictions)
    if out:
        prepare_file(out)
    values = metrics.mean_average_precision(truth, found, tious, subset).to_json()
    if numbers:
        values["average_recall"] = metrics.average_recall(truth, found, tious, numbers, subset).to_json()
    if errors:
        values["errors"] = metrics.error_breakdown(truth, found, tious, subset).to_json()
    if out:
        write_json(out, values)
    click.echo(json.dumps(values, indent=2)) if as_json else show(detection_tables(values, per_class=per_class))


@click.command()
@click.argument("streams", nargs=-1, required=True, type=FOLDER)
@click.option("--weights", help="One a stream, e.g. 1,1.5  [default: all 1]")
@click.option(
    "--rule", default="scores", show_default=True, type=click.Choice(["scores", "logits", "reference"]),
    help="scores: weighted mean of class scores; logits: softmax of the weighted mean of time-averaged logits; "
    "reference: the original's, logits added, softmax, sum over time, softmax again; exact for one view a video.",
)  # fmt: skip
@click.option("--search", is_flag=True, help="Also top-1 for weights 0.25 to 4 of the second stream, tuned on the very "
              "videos it is measured on.")  # fmt: skip
@click.option("--out", type=FOLDER, help="Write results.json and scores.parquet into this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
@examples(
    "genkd fuse runs/rgb/evaluation runs/flow/evaluation\n"
    "genkd fuse runs/rgb-eval runs/flow-eval --rule reference --out runs/two-stream   # three splits in each\n"
    "genkd fuse rgb/scores.parquet flow/scores.parquet --weights 1,1.5 --json | jq .top1"
)
def fuse(streams: tuple[Path, ...], weights: str | None, rule: str, search: bool, out: Path | None,
         as_json: bool) -> None:  # fmt: skip
    """Fuse the scores of two or more networks on the same videos, such as the RGB and the flow stream.

    Each of STREAMS is a scores.parquet of `genkd evaluate recognition --out` or `genkd fuse --out`, or the folder that
    holds it. Folders of several splits' evaluations are fused split by split; then come mean and standard deviation.
    """
    from .evaluation.fusion import fuse_files
    from .tables import fusion_tables, show

    values = fuse_files(streams, parse_weights(weights), rule, out, search=search)
    click.echo(json.dumps(values, indent=2)) if as_json else show(fusion_tables(values))


def _numbers(text: str | None) -> list[int]:
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) < 2**31 for part in parts):
        raise UserError(f"--recall {text!r} is not numbers of proposals with commas between them, e.g. 1,10,50,100")
    return list(map(int, parts))


def parse_weights(text: str | None) -> list[float] | None:
    """Numbers with commas between them; None for none. Raises UserError."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text!r} are not numbers with commas between them, e.g. 1,1.5") from None


COMMANDS = (evaluate, fuse)
