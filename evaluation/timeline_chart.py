"""What was found in a video over time as a PNG: classes as rows, segments as bars shaded by score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..errors import explained
from ..files import write_atomically
from .panels import drawable
from .timeline import Action, ActionTimeline, Segment, Timeline

_INK, _SOFT, _LINE = "#20272e", "#46505a", "#e3e7ea"
_SHADES: Colormap = LinearSegmentedColormap.from_list("score", ["#dbe7f5", "#3b6fb6", "#16325c"])
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)  # seconds from one tick to the next
_TICKS = 11
_WIDTH, _ROW, _DPI = 11.0, 0.42, 150  # inches, inches, dots an inch


def write_timeline(path: Path, timeline: Timeline | ActionTimeline, classes: Sequence[str], *, title: str = "") -> None:
    """Writes the picture, whole or not at all. classes: the names, by number. Rows are the classes that are there, the
    first one on top. Raises UserError where it cannot be written."""
    segments = timeline.segments()
    rows = sorted({segment.label for segment in segments}, key=lambda label: _first(segments, label))
    figure = Figure(figsize=(_WIDTH, 1.45 + _ROW * max(2, len(rows))), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    # Detectors differ in how high their scores are: the scale ends with the next tenth.
    most = min(1.0, max(1, math.ceil(10 * max((segment.score for segment in segments), default=1.0) - 1e-9)) / 10)
    scale = Normalize(0, most, clip=True)
    draw_segments(axes, segments, rows, scale)
    _label(axes, rows, classes, timeline.duration_s)
    if not segments:
        axes.text(0.5, 0.5, "no action", transform=axes.transAxes, ha="center", va="center", color=_SOFT, fontsize=12)
    axes.set_title(drawable(title, 0) if title else "", loc="left", color=_INK, fontsize=11, pad=10)
    bar = figure.colorbar(ScalarMappable(scale, _SHADES), ax=axes, pad=0.015, aspect=max(8, 5 * len(rows)))
    bar.set_label("score", color=_SOFT, fontsize=9)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=_SOFT)
    bar.set_ticks([0, most / 2, most], labels=[f"{100 * value:g} %" for value in (0, most / 2, most)])
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    with explained(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())


def draw_segments(axes: Axes, segments: Sequence[Segment | Action], rows: Sequence[int], scale: Normalize) -> None:
    """Bars of the segments, a row a class of `rows`; the surest lie above those that they overlap."""
    for segment in sorted(segments, key=lambda segment: segment.score):
        row, length = rows.index(segment.label), segment.end_s - segment.start_s
        axes.barh(
            row,
            length,
            left=segment.start_s,
            height=0.66,
            color=_SHADES(scale(segment.score)),
            edgecolor="white",
            linewidth=0.7,
        )


def ticks(duration_s: float) -> list[float]:
    """Times in seconds for an axis of so many: round ones, at most a dozen."""
    step = next((step for step in _STEPS if duration_s / step < _TICKS), _STEPS[-1])
    return [float(step * number) for number in range(int(duration_s // step) + 1)]


def minutes(seconds: float) -> str:
    """Whole seconds as m:ss, from an hour on as h:mm:ss."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _first(segments: Sequence[Segment | Action], label: int) -> tuple[float, int]:
    return min(segment.start_s for segment in segments if segment.label == label), label


def _label(axes: Axes, rows: Sequence[int], classes: Sequence[str], duration_s: float) -> None:
    axes.set_yticks(range(len(rows)), [_short(drawable(classes[label], label)) for label in rows])
    axes.set_ylim(max(1.5, len(rows) - 0.5), -0.5)
    axes.set_xlim(0, max(duration_s, 1e-3))
    axes.set_xticks(ticks(duration_s))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: minutes(value)))
    axes.tick_params(length=0, labelsize=9, labelcolor=_SOFT)
    axes.grid(True, axis="x", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=_LINE)


def _short(name: str) -> str:
    return name if len(name) <= 32 else name[:31].rstrip() + "…"
