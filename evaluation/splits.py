"""Evaluation over several splits, such as the three of UCF101 and HMDB51."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import prepare_folder, write_json
from ..trainers import distributed
from .metrics import summary
from .recognition import Progress, Settings, Task, write_results
from .scores import RESULTS_FILE, SCORES_FILE, holds_videos, read_results, refuse_other_layout

log = logging.getLogger(__name__)

# What stored results have to share with an evaluation to stand for it, with the words for it.
_IDENTITY = {
    "weights_sha256": "weights",
    "index_digest": "data set",
    "split": "split",
    "clips": "number of clips",
    "crops": "number of crops",
    "precision": "precision",
    "decoder": "decoder",
}


def evaluate_splits(
    weights: Sequence[Path],
    datasets: Sequence[str | Path],
    out: Path | None = None,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
) -> dict[str, Any]:
    """Evaluates each of the weights (two or more) on its data set, or all on one.

    Returns {"splits": [metrics, ...], "mean": {...}, "std": {...}}, the last with n - 1. With `out`, each split's
    results.json and scores.parquet go to out/1, out/2, ... and all of the above to out/results.json. Results in `out`
    that were made from the same weights (by SHA-256), index, split, views, precision and decoder are kept; others are
    made again. progress: what shows a split's progress, by its name.
    Raises UserError before the first clip for whatever does not fit, see recognition.evaluate_weights; Unwritten, with
    what was measured last, where writing fails after it.
    """
    settings, count = settings or Settings(), len(weights)
    if count < 2:
        raise UserError("one set of weights has no mean over splits; name two or more")
    if len(datasets) == 1:
        datasets = list(datasets) * count
    if len(datasets) != count:
        raise UserError(f"{count} weights, but {len(datasets)} data sets; give one for all or one for each, in order")
    if out is not None:
        refuse_other_layout(out, count)
    with distributed.ranks(device) as place, contextlib.ExitStack() as opened:
        tasks = [
            opened.enter_context(contextlib.closing(Task(*pair, settings, place)))
            for pair in zip(weights, datasets, strict=True)
        ]
        _refuse_other_classes(tasks)
        if out is not None:
            place.on_main(lambda: prepare_folder(out))
        results = []
        for number, task in enumerate(tasks, 1):
            folder = None if out is None else out / str(number)
            # The main rank's word holds for all, whose disks may be others.
            values = None if folder is None else place.gather(_kept(folder, task))[0]
            if values is None:
                if out is not None:
                    place.on_main(lambda: (out / RESULTS_FILE).unlink(missing_ok=True))
                name = f"split {number} of {count}"
                with progress(name) if progress and place.is_main else contextlib.nullcontext() as shown:
                    values = task.run(folder, shown)
            results.append(values)
        mean, std = summary(results)
        together = {"splits": results, "mean": mean, "std": std}
        if out is not None:
            write_results(place, lambda: write_json(out / RESULTS_FILE, together), together)
    return together


def _kept(folder: Path, task: Task) -> dict[str, Any] | None:
    """A folder's results if they are those that the task would make."""
    values = read_results(folder)
    if values is None or not holds_videos(folder / SCORES_FILE, values.get("videos")):
        return None
    other = [words for name, words in _IDENTITY.items() if values.get(name) != task.about[name]]
    # The original's foreground ratio is taken over the whole batch, so scores depend on its size.
    if task.card.compat == "reference" and values.get("batch_size") != task.about["batch_size"]:
        other.append("batch size")
    if task.place.is_main:
        if other:
            log.info("%s: %s changed, so it is evaluated again", folder, " and ".join(other))
        else:
            log.info("%s is finished and kept", folder)
    return None if other else values


def _refuse_other_classes(tasks: Sequence[Task]) -> None:
    for task in tasks[1:]:
        if task.card.classes != tasks[0].card.classes:
            raise UserError(
                f"{tasks[0].weights} and {task.weights} know different classes, which have no common mean; evaluate "
                "them one by one"
            )
