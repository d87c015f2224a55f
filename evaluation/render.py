"""Draws predictions into the video that they are about: classes with their scores, attention or actions over time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw

from ..errors import UserError, explained
from ..files import remove_leftovers, replacing
from ..preprocessing.decoding import Frames, VideoError, build_graph, filtered, open_frames, upright_filters
from ..preprocessing.video import VideoSettings, output_rate, output_size
from .panels import FAINT, Panels, drawable, shortened
from .predict import Prediction
from .raw_clips import raw_source
from .timeline import ActionTimeline, Timeline

LEAST_SIDE = 240  # smaller pictures are enlarged, as no text could be read on them
CLASSES = 3
ROWS = 5  # a detector's classes with a row of their own
_SMOOTH = 3  # times larger that the curve is drawn before it is scaled down


def render(
    found: Prediction[Timeline] | Prediction[ActionTimeline],
    classes: Sequence[str],
    out: Path,
    *,
    most_side: int = 720,
    on_frame: Callable[[], None] = lambda: None,
) -> int:
    """Writes the video as H.264 in MP4 with an overlay, without sound; returns its number of frames.

    The picture keeps its shape, upright and in square pixels; its short side is at most most_side pixels and at least
    LEAST_SIDE. The frame rate is the source's, constant. A video that is damaged further on ends there. Raises
    UserError where nothing can be read or written.
    """
    assert found.timeline is not None, "only what was scored can be drawn"
    count = 0
    with explained(f"writing {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out.parent, (f"{out.name}.",))
        try:
            with open_frames(raw_source(found.path)) as frames, replacing(out) as temporary:
                rate = output_rate(frames, VideoSettings(fps=None if frames.rate else found.fps))
                width, height = _size(frames, most_side)
                overlay = overlay_of(found.timeline, classes, width, height)
                with contextlib.closing(_Writer(temporary, width, height, rate)) as writer:
                    for picture in _pictures(frames, rate, width, height):
                        overlay.draw(picture, count / float(rate))
                        writer.write(picture)
                        count += 1
                        on_frame()
        except VideoError as error:
            raise UserError(f"{found.path} cannot be rendered: {error}") from None
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise UserError(f"{out} cannot be encoded ({error.strerror})") from None
    return count


def overlay_of(timeline: Timeline | ActionTimeline, classes: Sequence[str], width: int, height: int) -> Panels:
    """What draws a timeline into pictures."""
    if isinstance(timeline, ActionTimeline):
        return ActionOverlay(timeline, classes, width, height)
    return Overlay(timeline, classes, width, height)


class Overlay(Panels):
    """A recognizer's best classes, and its attention over time, or the top score where it has none."""

    def __init__(self, timeline: Timeline, classes: Sequence[str], width: int, height: int):
        self._timeline = timeline
        self._names = [drawable(name, label) for label, name in enumerate(classes)]
        super().__init__(timeline.duration_s, self._names, width, height)

    def entries(self, seconds: float) -> list[tuple[str, float]]:
        """The best classes with their scores."""
        scores = self._timeline.scores_at(np.array([seconds]))[0]
        best = np.argsort(-scores, kind="stable")[:CLASSES]
        return [(self._names[label], float(np.clip(scores[label], 0, 1))) for label in best]

    def label(self) -> str:
        """What the curve shows, and from what to what."""
        values, name = self._curve
        least, most = f"{values.min():.2f}", f"{values.max():.2f}"
        return f"{name} {least}" + (f"–{most}" if least != most else "")

    def fill(self, strip: Image.Image, colour: tuple[int, int, int], top: int) -> None:
        """The curve."""
        left, plot_top, right, bottom = self.plot
        values, _ = self._curve
        least, most = float(values.min()), float(values.max())
        room = max(most - least, 0.02)  # what changes less is drawn flat, not as noise
        heights = (values - (least + most) / 2) / room * 0.8 + 0.5
        curve = _plotted(heights, right - left + 1, bottom - plot_top, colour, self._line)
        strip.alpha_composite(curve, (left, plot_top - top))

    @functools.cached_property
    def _curve(self) -> tuple[np.ndarray, str]:
        left, _, right, _ = self.plot
        times = np.linspace(0, self._timeline.duration_s, max(2, right - left + 1))
        if self._timeline.attention is not None:
            return self._timeline.attention_at(times), "attention"
        return self._timeline.scores_at(times).max(1), "top score"


class ActionOverlay(Panels):
    """A detector's actions of a time, and all of them below, a row a class; the surer the brighter."""

    def __init__(self, timeline: ActionTimeline, classes: Sequence[str], width: int, height: int):
        self._timeline = timeline
        self._names = {label: drawable(classes[label], label) for label in timeline.classes()}
        self._rows = sorted(timeline.classes()[:ROWS])
        names = [self._names[label] for label in self._rows]
        super().__init__(timeline.duration_s, list(self._names.values()), width, height, beside=names)

    def entries(self, seconds: float) -> list[tuple[str, float]]:
        """The actions that go on."""
        return [(self._names[action.label], min(1.0, action.score)) for action in self._timeline.at(seconds)[:CLASSES]]

    def label(self) -> str:
        """How many actions there are, and of how many classes there is no row."""
        count, hidden = len(self._timeline.actions), len(self._names) - len(self._rows)
        if not count:
            return "no action"
        text = f"{count} action{'s' if count > 1 else ''}"
        return text + (f", {hidden} more class{'es' if hidden > 1 else ''} not shown" if hidden else "")

    def fill(self, strip: Image.Image, colour: tuple[int, int, int], top: int) -> None:
        """The rows."""
        left, plot_top, _, _ = self.plot
        draw = ImageDraw.Draw(strip)
        most = max((action.score for action in self._timeline.actions), default=1.0)
        for number, label in enumerate(self._rows):
            y = plot_top - top + number * self.row
            room = left - self._margin - 3 * self._pad
            name = shortened(self._names[label], room, self._small)
            middle = y + self.row // 2
            draw.text((left - 2 * self._pad, middle), name, font=self._small, fill=FAINT, anchor="rm")
            own = [action for action in self._timeline.actions if action.label == label]
            for action in sorted(own, key=lambda action: action.score):
                first, last = self.head_x(action.start_s), self.head_x(action.end_s)
                shade = 0.35 + 0.65 * action.score / most
                red, green, blue = (round(shade * value) for value in colour)
                draw.rectangle((first, y + 2, max(first + 1, last - 2), y + self.row - 3), fill=(red, green, blue, 235))


def _plotted(heights: np.ndarray, width: int, height: int, colour: tuple[int, int, int], line: int) -> Image.Image:
    """A filled curve of values in 0..1, one a column, on a transparent picture."""
    big = Image.new("RGBA", (width * _SMOOTH, height * _SMOOTH), (*colour, 0))
    draw = ImageDraw.Draw(big)
    x = (np.arange(len(heights)) + 0.5) * _SMOOTH * width / len(heights)
    y = (1 - np.clip(heights, 0, 1)) * (height * _SMOOTH - 1)
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    draw.polygon([(0, height * _SMOOTH), *points, (width * _SMOOTH, height * _SMOOTH)], fill=(*colour, 70))
    draw.line(points, fill=(*colour, 255), width=max(1, round(0.8 * line * _SMOOTH)), joint="curve")
    return big.resize((width, height), Image.Resampling.BOX)


def _size(frames: Frames, most_side: int) -> tuple[int, int]:
    side = min(output_size(frames, VideoSettings(short_side=0)))
    return output_size(frames, VideoSettings(short_side=min(max(side, LEAST_SIDE), max(most_side, LEAST_SIDE))))


def _pictures(frames: Frames, rate: Fraction, width: int, height: int) -> Iterator[Image.Image]:
    filters = [
        *upright_filters(frames),
        ("fps", f"fps={rate.numerator}/{rate.denominator}"),
        ("scale", f"{width}:{height}:flags=bicubic+accurate_rnd"),
        ("setsar", "1"),
        ("format", "rgb24"),
    ]
    given = 0
    try:
        for frame in filtered(build_graph(frames, filters), frames):
            yield frame.to_image()
            given += 1
    except (VideoError, av.FFmpegError):
        if not given:
            raise


class _Writer:
    """H.264 in an MP4 that plays while it is being fetched; BT.709 as its header says."""

    def __init__(self, path: Path, width: int, height: int, rate: Fraction):
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        stream = cast(
            av.VideoStream,
            self._container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "20"}),
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / rate
        context.color_primaries = context.color_trc = context.colorspace = 1
        context.color_range = ColorRange.MPEG
        self._stream, self._rate, self._count = stream, rate, 0

    def write(self, picture: Image.Image) -> None:
        frame = av.VideoFrame.from_image(picture).reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.pts, frame.time_base = self._count, 1 / self._rate
        self._count += 1
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()
