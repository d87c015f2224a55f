"""Weights & Biases, where its package is installed: the same numbers as TensorBoard's, offline or online."""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from typing import Any

from ..configs.schema import TrainConfig
from ..errors import UserError
from ..files import read_json, write_json


def package() -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        found = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(f"wandb: its package cannot be imported ({error}); {_REMEDY}") from None
    # Without the package, a folder that it once wrote beside the command imports as an empty namespace.
    if not hasattr(found, "init"):
        raise UserError(f"wandb: its package is not installed; {_REMEDY}")
    return found


class WandbRun:
    """A run there. The same one goes on when a run is continued, by the id that its folder keeps.

    Steps that a run repeats from its checkpoint have the same values, and W&B leaves them out. Raises UserError where
    W&B refuses, as without a login.
    """

    def __init__(self, config: TrainConfig, run: Path):
        self._wandb = package()
        kept = run / "wandb" / "genkd.json"
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, {"id": secrets.token_hex(4)})
        try:
            self._run = self._wandb.init(
                project=config.wandb_project,
                name=config.wandb_name or run.resolve().name,
                id=read_json(kept)["id"],
                resume="allow" if config.wandb == "online" else None,  # offline it has no meaning, and is warned of
                mode=config.wandb,
                dir=str(run),
                config=config.model_dump(mode="json"),
            )
        except self._wandb.Error as error:
            raise UserError(
                f"wandb={config.wandb}: {str(error).strip(' .') or type(error).__name__}; mend that, log in with "
                "`wandb login`, or set wandb=offline or off"
            ) from None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Numbers of a line of metrics.jsonl."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self._run.log(numbers, step=step)

    def close(self, finished: bool) -> None:
        """Waits until what is left has been handed over; a run that is not finished counts as failed there."""
        self._run.finish(exit_code=0 if finished else 1)


_REMEDY = "install it with pip install 'genkd[wandb]' or pip install wandb, or set wandb=off"
