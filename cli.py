"""The `genkd` command: one verb a function of the packages below."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from . import __version__, cli_cluster, cli_data, cli_detection, cli_evaluate, cli_export, cli_predict, cli_weights
from .cli_options import DEVICE, FOLDER, examples
from .configs import PHASES
from .errors import Stopped, UserError, explain_os_error
from .files import write_json


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
            click.echo(
                "interrupted; run the same command to continue: finished shards, checkpoints, splits and demo "
                "steps are kept, other work starts over",
                err=True,
            )
            sys.exit(130)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(explain_os_error(error, "running")) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Convert video data sets to shards, feed them through DALI, and distil action recognition networks.

    \b
    Start with:  genkd demo             everything once, on synthetic videos, with a report page
                 genkd COMMAND --help   what a command does, with examples
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("genkd").setLevel(logging.INFO)


_GROUPS = (cli_data, cli_evaluate, cli_detection, cli_predict, cli_weights, cli_export, cli_cluster)
for _command in (command for group in _GROUPS for command in group.COMMANDS):
    main.add_command(_command)


@main.command()
@click.argument("phase", type=click.Choice(PHASES))
@click.option("--config", "source", required=True, help="A preset's name or a YAML file.")
@click.option("--out", required=True, type=FOLDER, help="Run folder; an unfinished run in it is continued.")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "never"]),
    help="auto: continue what is in the run folder; never: refuse a folder that a run has begun in.",
)
@click.argument("overrides", nargs=-1)
@examples(
    "genkd train teacher --config ucf101 --out runs/teacher data.dataset=data/ucf101\n"
    "genkd train representation --config ucf101 --out runs/rep data.dataset=data/ucf101 init=runs/teacher\n"
    "genkd train distill --config ucf101 --out runs/student data.dataset=data/ucf101 teacher=runs/rep\n"
    "genkd train distill --config ucf101-modern --out runs/kd data.dataset=data/ucf101 teacher=runs/rep method=logits\n"
    "genkd train detect-teacher --config thumos14 --out runs/det data.dataset=data/thumos14 init=rgb_imagenet.pt\n"
    "torchrun --nproc-per-node 8 -m genkd train teacher --config ucf101 --out runs/teacher data.dataset=data/ucf101"
)
def train(phase: str, source: str, out: Path, resume: str, overrides: tuple[str, ...]) -> None:
    """Train one phase: teacher, representation (init=RUN names the teacher), distill (needs teacher=RUN), or the same
    of a detector, detect-teacher, detect-representation, detect-distill.

    OVERRIDES are key=value pairs over the configuration, dotted keys and YAML values: optimizer.lr=0.05. A run that
    was stopped or killed continues from its newest checkpoint when the same command is run again.
    """
    from .configs.load import load
    from .trainers.loop import train as run

    config = load(source, phase, overrides)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, after a rank has died
    if resume == "never" and not restarted and (out / "config.yaml").exists():
        raise UserError(f"{out} holds a run already; choose another --out, or leave --resume never out to continue it")
    result = run(config, out, say=click.echo)
    if int(os.environ.get("RANK", "0")) == 0:
        click.echo(f"finished; weights are in {result['weights']}")


@main.command()
@click.option("--out", default="demo-run", show_default=True, type=FOLDER, help="Folder; finished steps are kept.")
@DEVICE
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1))
@examples("genkd demo\ngenkd demo --out /tmp/demo --seed 1")
def demo(out: Path, device: str, seed: int) -> None:
    """Everything once: synthetic videos, shards, teacher, representation, two students, evaluation, report.html."""
    from .demo import run

    report = run(out, device=device, seed=seed, say=click.echo)
    click.echo(f"open {report}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--out", type=FOLDER, help="File to write  [default: report.html in the first run]")
@click.option("--ground-truth", type=FOLDER, help="Of detectors: JSON of THUMOS14 or ActivityNet, may be gzipped  "
              "[default: the annotations of the data set that was detected in]")  # fmt: skip
@click.option("--subset", help="Of that file, ActivityNet: validation  [default: test]")
@examples(
    "genkd report runs/student\n"
    "genkd report runs/teacher runs/plain runs/student --out report.html\n"
    "genkd detect runs/thumos14/student data/thumos14 runs/thumos14/student/evaluation/detections.json\n"
    "genkd report runs/thumos14/student --ground-truth thumos_gt.json"
)
def report(runs: tuple[Path, ...], out: Path | None, ground_truth: Path | None, subset: str | None) -> None:
    """Write one self-contained HTML page about training runs: curves, accuracies, confusion, attention.

    What `genkd evaluate recognition --out RUN/evaluation` measured is shown too. Of detectors' runs: curves, and mAP,
    average recall and kinds of errors of what `genkd detect` put into RUN/evaluation/detections.json.
    """
    from .evaluation.report import write_report

    path = out or runs[0] / "report.html"
    write_report(path, list(runs), ground_truth=ground_truth, subset=subset)
    click.echo(f"open {path}")


@main.command()
@click.argument("what", type=click.Choice(["loader", "shard", "train", "kernels", "detect", "scaling"]))
@click.option(
    "--data", type=FOLDER,
    help="loader, train, scaling: shard data set; shard: folder of videos; detect: ground-truth JSON  "
    "[default: synthetic]",
)  # fmt: skip
@click.option(
    "--workload", "workloads", multiple=True,
    help="loader: 16x224, 64x224, 256x96-long, index, or memory, which only runs when named; detect: soft-nms, map, "
    "inference or training; kernels: cases, train: contenders, scaling: distilled, student alone, representation or "
    "teacher, with this text in their names. May be repeated.",
)  # fmt: skip
@click.option("--tune", is_flag=True, help="loader: look for the fastest data.* settings on this machine instead.")
@click.option(
    "--batches",
    type=click.IntRange(1),
    help="train, scaling: batches that are timed  [default: CPU 4, GPU 20; scaling 6]",
)
@click.option("--preset", help="scaling: what is trained by one and two ranks here  [default: small]")
@click.option("--target", help="scaling: what is predicted for GPUs  [default: ucf101-modern]")
@click.option(
    "--assume", multiple=True, metavar="NAME=VALUE", help="scaling: of the assumptions it prints. Repeatable."
)
@click.option("--plot", type=FOLDER, help="scaling: draw the prediction to this PNG file.")
@click.option("--out", type=FOLDER, help="Write the JSON result to this file.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@examples(
    "genkd bench loader\n"
    "genkd bench loader --data data/ucf101 --workload 16x224 --json\n"
    "genkd bench loader --tune --data data/ucf101 --workload 64x224\n"
    "genkd bench train --out result.json\n"
    "genkd bench train --batches 8 --workload distilled\n"
    "genkd bench kernels --repeats 20 --workload generative_kd\n"
    "genkd bench detect --data thumos_gt.json\n"
    "genkd bench detect --workload inference --workload training\n"
    "genkd bench scaling --plot scaling.png --assume inter_host_gb_s=25 --assume step_s=0.2"
)
def bench(what: str, data: Path | None, workloads: tuple[str, ...], tune: bool, batches: int | None,
          preset: str | None, target: str | None, assume: tuple[str, ...], plot: Path | None, out: Path | None,
          repeats: int, as_json: bool) -> None:  # fmt: skip
    """Measure side by side in one run: the loader against other loaders, sharding, training steps, fused kernels, and
    soft-NMS, mAP and windows of detection; or predict training on many GPUs, and check the model with two ranks.

    With --tune: look for the loader's fastest settings on this machine, for `genkd train`.
    """
    from .benchmarks import run_benchmark
    from .tables import benchmark_tables, scaling_tables, show

    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    result = run_benchmark(
        what,
        data,
        repeats,
        workloads,
        tune=tune,
        batches=batches,
        preset=preset,
        target=target,
        assume=assume,
        plot=plot,
    )
    if out:
        write_json(out, result)
    tables = benchmark_tables(result) + (scaling_tables(result) if what == "scaling" else [])
    click.echo(json.dumps(result, indent=2)) if as_json else show(tables)
    if tune and not as_json:
        click.echo("fastest: " + " ".join(f"{name}={value}" for name, value in result["best"].items()))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Look over this machine: Python, PyTorch, GPUs, cuDNN, NCCL, DALI, NVDEC, codecs, Apex, the kernels, free space,
    and one clip through the whole loader.

    The exit code is 1 where something that genkd needs is not fine, so that scripts can ask before they begin.
    """
    from .doctor import examine
    from .tables import doctor_tables, show

    findings = examine()
    click.echo(json.dumps(findings, indent=2)) if as_json else show(doctor_tables(findings))
    sys.exit(0 if all(entry["ok"] for entry in findings) else 1)
