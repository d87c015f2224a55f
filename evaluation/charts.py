"""The charts of a report, as inline SVG or JPEG."""

from __future__ import annotations

import base64
import io
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#3b6fb6", "#7a5aa6", "#d9822b", "#2a9d6f", "#b5485d", "#5c6b73")
_STYLE: dict[str, Any] = {"color": "#46505a", "fontsize": 9}

Series = dict[str, tuple[list[float], list[float]]]


def lines(
    series: Series, x_label: str, y_label: str, *, percent: bool = False, floor: float | None = None,
    whole: bool = True,
) -> str:  # fmt: skip
    """One line a name; floor draws a dashed line, such as the accuracy of guessing; whole: percent up to 100."""
    figure = Figure(figsize=(5.4, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(series.items()):
        axes.plot(
            x,
            y,
            color=COLOURS[number % len(COLOURS)],
            label=name,
            linewidth=1.7,
            marker="o" if len(x) < 30 else None,
            markersize=3,
        )
    if floor is not None:
        axes.axhline(floor, color="#9aa4ad", linestyle="--", linewidth=1)
        axes.annotate("guessing", (0.995, floor), xycoords=("axes fraction", "data"), ha="right", va="bottom", **_STYLE)
    finish(axes, x_label, y_label)
    axes.set_ylim(bottom=0, top=1 if percent and whole else None)
    if x_label == "epoch":
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    figure.legend(
        frameon=False, fontsize=9, loc="outside lower center", ncols=min(4, len(series)), labelcolor="#46505a"
    )
    return svg(figure)


def bars(values: dict[str, float], x_label: str) -> str:
    """One horizontal bar a name, with its value."""
    figure = Figure(figsize=(5.4, 0.45 * len(values) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    names = list(values)[::-1]
    colours = [COLOURS[list(values).index(name) % len(COLOURS)] for name in names]
    drawn = axes.barh(names, [values[name] for name in names], color=colours, height=0.62)
    axes.bar_label(drawn, fmt="{:.1f}", padding=4, **_STYLE)
    axes.margins(x=0.14)
    finish(axes, x_label, "")
    axes.grid(False)
    return svg(figure)


def confusion(matrix: np.ndarray, classes: list[str]) -> str:
    """Rows are true classes, as shares of their videos; counts are written in where there are few classes."""
    side = max(3.2, min(7.0, 0.42 * len(classes) + 1.2))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "#46505a"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted", **_STYLE)
    axes.set_ylabel("true", **_STYLE)
    axes.tick_params(length=0, labelsize=8, labelcolor="#46505a")
    axes.spines[:].set_visible(False)
    return svg(figure)


def reliability(bins: list[dict[str, Any]]) -> str:
    """Accuracy against confidence: a bar a bin, with a mark at its mean confidence; below, how the videos spread."""
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    filled = [entry for entry in bins if entry["videos"]]
    middles = [(entry["low"] + entry["high"]) / 2 for entry in filled]
    width = 0.92 * (bins[0]["high"] - bins[0]["low"])
    axes.plot([0, 1], [0, 1], color="#9aa4ad", linestyle="--", linewidth=1, label="calibrated", zorder=3)
    axes.bar(middles, [entry["accuracy"] for entry in filled], width=width, color=COLOURS[0], label="accuracy")
    axes.scatter(
        middles, [entry["confidence"] for entry in filled], color=COLOURS[2], s=18, zorder=4, label="mean confidence"
    )
    below.bar(middles, [entry["videos"] for entry in filled], width=width, color="#c3ccd3")
    finish(axes, "", "share")
    finish(below, "confidence", "videos")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    for axis in (axes.yaxis, below.xaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=3, labelcolor="#46505a")
    return svg(figure)


def attention(curves: dict[str, tuple[np.ndarray, np.ndarray]], colours: dict[str, str], width: float) -> str:
    """Attention over time against its own mean, a line a network; x are seconds, width the picture's in inches."""
    figure = Figure(figsize=(width, 1.6), layout="constrained")
    axes = figure.add_subplot()
    for name, (seconds, values) in curves.items():
        label = f"{name}, mean {values.mean():.2f}"
        axes.plot(seconds, 100 * (values / values.mean() - 1), label=label, color=colours[name], linewidth=1.7)
    finish(axes, "seconds", "% of mean")
    axes.yaxis.set_major_formatter("{x:+.0f}")
    axes.margins(x=0)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def strip(frames: np.ndarray) -> str:
    """Frames (T,H,W,3) uint8 RGB side by side as a data: JPEG."""
    picture = np.hstack(list(frames))[..., ::-1]
    data = cv2.imencode(".jpg", np.ascontiguousarray(picture), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def heat(frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Frames with a coloured bar below each that shows its weight, 0..1."""
    bar = np.zeros((frames.shape[0], max(4, frames.shape[1] // 12), frames.shape[2], 3), np.uint8)
    bar[:] = (255 * colormaps["viridis"](np.clip(weights, 0, 1))[:, None, None, :3]).astype(np.uint8)
    return np.concatenate([frames, bar], 1)


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a faint grid and no frame."""
    axes.set_xlabel(x_label, **_STYLE)
    axes.set_ylabel(y_label, **_STYLE)
    axes.tick_params(length=0, labelsize=9, labelcolor="#46505a")
    axes.grid(True, color="#e7eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def svg(figure: Figure) -> str:
    """The figure as an element of a page."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]
