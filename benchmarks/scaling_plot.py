"""The scaling benchmark's picture: clips a second and efficiency against GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation.charts import COLOURS
from ..files import replacing

_TEXT = "#46505a"
_KINDS = (
    ("rows", "compute and exchange, fp32", COLOURS[0], "o"),
    ("rows_bf16", "compute and exchange, bf16", COLOURS[2], "s"),
)


def draw(prediction: dict[str, Any], path: Path) -> None:
    """Writes the PNG. Above, what compute and communication allow, the ideal, and the limits of loaders and storage;
    below, what is left of the ideal with and without these limits."""
    rows = prediction["rows"]
    gpus = [row["gpus"] for row in rows]
    figure = Figure(figsize=(7.6, 7.2), layout="constrained", dpi=150)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    above.plot(gpus, [row["ideal"] for row in rows], color="#9aa4ad", linestyle="--", linewidth=1.2, label="ideal")
    for key, name, colour, marker in _KINDS:
        rates = [row["without_limits"] for row in prediction[key]]
        above.plot(gpus, rates, color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
        shares = [100 * row["without_limits"] / row["ideal"] for row in prediction[key]]
        below.plot(gpus, shares, color=colour, marker=marker, markersize=4, linewidth=1.6)
    for limit, colour in (("loader", COLOURS[3]), ("storage", COLOURS[4])):
        above.plot(
            gpus, [row[limit] for row in rows], color=colour, linestyle=":", linewidth=1.8, label=f"{limit} limit"
        )
    whole = {"color": "#20262b", "linewidth": 6, "alpha": 0.18, "solid_capstyle": "round"}
    above.plot(gpus, [row["clips_per_s"] for row in rows], label="fp32, within all limits", **whole)
    below.plot(gpus, [100 * row["efficiency"] for row in rows], **whole)
    _mark(above, rows)
    above.set_xscale("log", base=2)
    above.set_yscale("log")
    low, high = min(row["clips_per_s"] for row in rows), max(row["ideal"] for row in rows)
    above.set_ylim(low / 2, high * 2)
    below.set_ylim(0, 105)
    below.set_xticks(gpus, [str(number) for number in gpus])
    for axes in (above, below):
        axes.minorticks_off()
    above.set_ylabel("clips a second", color=_TEXT)
    below.set_ylabel("% of ideal", color=_TEXT)
    below.set_xlabel("GPUs", color=_TEXT)
    step = next(entry for entry in prediction["assumptions"] if entry["name"] == "step_s")
    above.set_title(
        f"{prediction['case']}, {prediction['preset']}: predicted, not measured on several GPUs\n"
        f"step of one GPU {1000 * step['value']:.1f} ms ({step['source'].split(':')[0]})",
        color=_TEXT, fontsize=10, loc="left",
    )  # fmt: skip
    for axes in (above, below):
        axes.grid(True, color="#e7eaed", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9, labelcolor=_TEXT)
        axes.spines[:].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3, labelcolor=_TEXT)
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _mark(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Names what limits, where that begins."""
    before = ""
    for number, row in enumerate(rows):
        if row["limit"] != before:
            right = number > len(rows) / 2  # where the text would leave the picture
            axes.annotate(
                f"{row['limit']} limits", (row["gpus"], row["clips_per_s"]), xytext=(0, -36) if right else (6, -18),
                textcoords="offset points", ha="right" if right else "left", color="#20262b", fontsize=9,
            )  # fmt: skip
        before = row["limit"]
