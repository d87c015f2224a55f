"""The charts of detections in a report, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .charts import COLOURS, finish, svg
from .detection_errors import TYPES
from .timeline_chart import minutes, ticks

_KINDS = dict(zip(TYPES, ("#2a9d6f", "#e0b13c", "#7a5aa6", "#3b6fb6", "#b5485d", "#b9c2c9"), strict=True))
_SOFT = "#46505a"


def per_class(values: dict[str, dict[str, float]], x_label: str) -> str:
    """Of each run by class a share: a group of bars a class, the best one on top by the first run."""
    first = next(iter(values.values()))
    names = sorted({name for own in values.values() for name in own}, key=lambda name: (-first.get(name, 0.0), name))
    height = 0.8 / len(values)
    figure = Figure(figsize=(5.4, 0.9 + len(names) * max(0.3, 0.2 * len(values))), layout="constrained")
    axes = figure.add_subplot()
    for number, (run, own) in enumerate(values.items()):
        places = np.arange(len(names)) + (number - (len(values) - 1) / 2) * height
        shares = [own.get(name, 0.0) for name in names]
        bars = axes.barh(places, shares, height=0.9 * height, color=COLOURS[number % len(COLOURS)], label=run)
        axes.bar_label(bars, [f"{100 * share:.0f}" for share in shares], padding=3, color=_SOFT, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    finish(axes, x_label, "")
    axes.grid(False, axis="y")
    axes.set_xlim(left=0)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if len(values) > 1:
        figure.legend(
            frameon=False, fontsize=9, loc="outside lower center", ncols=min(4, len(values)), labelcolor=_SOFT
        )
    return svg(figure)


def errors(shares: np.ndarray) -> str:
    """What predictions are (F,6), by rank, as stacked shares; a rank without predictions is left out."""
    filled = shares[~np.isnan(shares).any(1)]
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    ranks = np.arange(1, len(filled) + 1)
    bottom = np.zeros(len(filled))
    for number, (name, colour) in enumerate(_KINDS.items()):
        axes.bar(ranks, filled[:, number], bottom=bottom, width=0.86, color=colour, label=name)
        bottom += filled[:, number]
    finish(axes, "rank of the predictions, in instances of their class", "share")
    axes.grid(False, axis="x")
    axes.set(ylim=(0, 1))
    axes.set_xticks(ranks, [f"{rank}G" for rank in ranks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=3, labelcolor=_SOFT)
    return svg(figure)


def gains(gain: dict[str, float]) -> str:
    """By how many points mAP_N rises without the errors of a type, a bar a type."""
    names = list(gain)[::-1]
    figure = Figure(figsize=(5.4, 0.36 * len(names) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(names, [100 * gain[name] for name in names], color=[_KINDS[name] for name in names], height=0.62)
    axes.bar_label(drawn, fmt="{:+.1f}", padding=4, color=_SOFT, fontsize=9)
    axes.margins(x=0.16)
    finish(axes, "points of mAP_N gained without these errors", "")
    axes.grid(False)
    return svg(figure)


def beside_truth(
    true: Sequence[tuple[str, float, float]], found: dict[str, list[tuple[str, float, float, float]]],
    colours: dict[str, str], duration_s: float,
) -> str:  # fmt: skip
    """Instances (class, start, end) of a video in grey, and below them what each run found (class, start, end, score),
    the surer the darker; a row a class."""
    names = sorted({entry[0] for entry in true} | {entry[0] for own in found.values() for entry in own})
    height = 0.8 / (1 + len(found))
    figure = Figure(figsize=(10.5, 0.75 + len(names) * 0.17 * (2 + len(found))), layout="constrained")
    axes = figure.add_subplot()
    lanes = [[(*entry, 1.0) for entry in true], *found.values()]
    for lane, (entries, colour) in enumerate(zip(lanes, ["#5c6b73", *(colours[run] for run in found)], strict=True)):
        most = max((entry[3] for entry in entries), default=1.0)
        for name, start, end, score in sorted(entries, key=lambda entry: entry[3]):
            axes.barh(
                names.index(name) - 0.4 + (lane + 0.5) * height, end - start, left=start, height=0.86 * height,
                color=colour, alpha=0.25 + 0.75 * score / most, linewidth=0,
            )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, duration_s)
    axes.set_xticks(ticks(duration_s))
    finish(axes, "", "")
    axes.grid(False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: minutes(value)))
    for border in range(1, len(names)):
        axes.axhline(border - 0.5, color="#e7eaed", linewidth=0.8)
    return svg(figure)
