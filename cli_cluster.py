"""The command that gives job files for clusters."""

from __future__ import annotations

import click

from .cli_options import examples


@click.command()
@click.argument("template", required=False)
@click.argument("values", nargs=-1)
@examples(
    "genkd cluster                                              what there is, and what each wants to know\n"
    "genkd cluster slurm-train > train.sbatch\n"
    "genkd cluster slurm-train VENV=/nfs/venv PHASE=teacher CONFIG=ucf101-modern RUN=/nfs/runs/teacher "
    "DATASET=/nfs/ucf101 > train.sbatch\n"
    "genkd cluster kubernetes-train > train.yaml"
)
def cluster(template: str | None, values: tuple[str, ...]) -> None:
    """Print a job file for Slurm or Kubernetes to start from.

    VALUES are NAME=VALUE pairs for what stands as @NAME@ in it; what is left is described at its top.
    """
    from .configs import templates

    if template:
        click.echo(templates.fill(template, values), nl=False)
        return
    for name in templates.templates():
        text = templates.fill(name)
        click.echo(f"{name:<18}{templates.about(text)}\n{'':<18}{' '.join(templates.places(text))}")


COMMANDS = (cluster,)
