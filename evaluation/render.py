"""Draws predictions into the video that they are about: classes with their scores, attention over time."""

from __future__ import annotations

import contextlib
import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import matplotlib
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError, explained
from ..files import remove_leftovers, replacing
from ..preprocessing.decoding import Frames, VideoError, build_graph, filtered, open_frames, upright_filters
from ..preprocessing.video import VideoSettings, output_rate, output_size
from .predict import Prediction
from .raw_clips import raw_source
from .timeline import Timeline, clock

LEAST_SIDE = 240  # smaller pictures are enlarged, as no text could be read on them
CLASSES = 3
_PANEL, _TEXT, _FAINT = (12, 14, 18, 150), (255, 255, 255, 255), (200, 206, 214, 255)
_BAR, _CURVE, _AHEAD = (46, 134, 222, 215), (90, 180, 255), (176, 184, 194)
_SMOOTH = 3  # times larger that the curve is drawn before it is scaled down


def render(
    found: Prediction,
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
                overlay = Overlay(found.timeline, classes, width, height)
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


class Overlay:
    """The panels of one video's pictures of one size; their size follows the picture's short side."""

    def __init__(self, timeline: Timeline, classes: Sequence[str], width: int, height: int):
        self._timeline, self._width, self._height = timeline, width, height
        side = min(width, height)
        self._text = max(11, round(side / 30))
        self._font, self._small = _font(self._text), _font(max(10, round(0.85 * self._text)))
        self._names = [drawable(name, label) for label, name in enumerate(classes)]
        self._margin = max(4, side // 45)
        self._pad = max(3, self._text // 3)
        self._percent = round(self._font.getlength("100 %"))
        longest = max(self._font.getlength(name) for name in self._names) + self._percent + 6 * self._pad
        widest = max(15.5 * self._text, min(22 * self._text, 0.45 * width))
        self._panel = min(width - 2 * self._margin, round(min(max(longest, 11 * self._text), widest)))
        left, right = self._margin + self._pad, width - self._margin - self._pad
        bottom = height - self._margin - self._pad
        top = bottom - max(18, round(side / 14))
        # left, top, right, bottom of the curve in pixels; the play head moves in it
        self.plot = (left, top, right, bottom)
        self._played, self._ahead = self._draw_strip()

    def head_x(self, seconds: float) -> int:
        """The column of the play head at a time."""
        left, _, right, _ = self.plot
        share = min(1.0, max(0.0, seconds / max(self._timeline.duration_s, 1e-9)))
        return left + round(share * (right - left))

    def draw(self, picture: Image.Image, seconds: float) -> None:
        """Draws the state at a time into an RGB picture of the overlay's size."""
        self._draw_classes(ImageDraw.Draw(picture, "RGBA"), seconds)
        x = self.head_x(seconds)
        top = self._strip_top
        for layer, first, last in ((self._played, 0, x), (self._ahead, x, self._width)):
            part = layer.crop((first, 0, last, layer.height))
            picture.paste(part, (first, top), part)
        draw = ImageDraw.Draw(picture, "RGBA")
        _, plot_top, right, bottom = self.plot
        draw.rectangle((x - self._line // 2, plot_top, x - self._line // 2 + self._line - 1, bottom), fill=_TEXT)
        at = f"{clock(seconds)} / {clock(self._timeline.duration_s)}"
        draw.text((right, self._label_y), at, font=self._small, fill=_TEXT, anchor="rs")

    def _draw_classes(self, draw: ImageDraw.ImageDraw, seconds: float) -> None:
        scores = self._timeline.scores_at(np.array([seconds]))[0]
        row = round(1.5 * self._text)
        left, top = self._margin, self._margin
        best = np.argsort(-scores, kind="stable")[:CLASSES]
        radius = self._pad
        draw.rounded_rectangle(
            (left, top, left + self._panel, top + len(best) * row + 2 * self._pad), radius, fill=_PANEL
        )
        inner_left, inner_right = left + self._pad, left + self._panel - self._pad
        for number, label in enumerate(best):
            y = top + self._pad + number * row
            score = float(np.clip(scores[label], 0, 1))
            filled = round(score * (inner_right - inner_left))
            if filled:
                draw.rectangle((inner_left, y + 1, inner_left + filled, y + row - 2), fill=_BAR)
            middle = y + row // 2
            percent = f"{100 * score:.0f} %"
            draw.text((inner_right - self._pad, middle), percent, font=self._font, fill=_TEXT, anchor="rm")
            room = inner_right - inner_left - 3 * self._pad - self._percent
            name = shortened(self._names[label], room, self._font)
            draw.text((inner_left + self._pad, middle), name, font=self._font, fill=_TEXT, anchor="lm")

    def _draw_strip(self) -> tuple[Image.Image, Image.Image]:
        """The panel with the curve, once as played and once as still to come."""
        left, top, right, bottom = self.plot
        times = np.linspace(0, self._timeline.duration_s, max(2, right - left + 1))
        values, name = self._curve(times)
        least, most = float(values.min()), float(values.max())
        label = f"{name} {least:.2f}" + (f"–{most:.2f}" if f"{least:.2f}" != f"{most:.2f}" else "")
        room = max(most - least, 0.02)  # what changes less is drawn flat, not as noise
        heights = (values - (least + most) / 2) / room * 0.8 + 0.5
        ascent, descent = self._small.getmetrics()
        self._strip_top = top - self._pad - ascent - descent - self._pad // 2
        self._label_y = top - self._pad
        self._line = max(2, self._text // 8)
        size = (self._width, self._height - self._margin - self._strip_top)
        layers = []
        for colour in (_CURVE, _AHEAD):
            layer = Image.new("RGBA", size, (0, 0, 0, 0))
            draw = ImageDraw.Draw(layer)
            draw.rounded_rectangle((self._margin, 0, self._width - self._margin, size[1] - 1), self._pad, fill=_PANEL)
            draw.text((left, self._label_y - self._strip_top), label, font=self._small, fill=_FAINT, anchor="ls")
            layer.alpha_composite(
                _plotted(heights, right - left + 1, bottom - top, colour, self._line), (left, top - self._strip_top)
            )
            layers.append(layer)
        return layers[0], layers[1]

    def _curve(self, times: np.ndarray) -> tuple[np.ndarray, str]:
        if self._timeline.attention is not None:
            return self._timeline.attention_at(times), "attention"
        return self._timeline.scores_at(times).max(1), "top score"


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


def shortened(text: str, room: float, font: ImageFont.FreeTypeFont) -> str:
    """text, or as much of it as fits into `room` pixels with an ellipsis behind it."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text.rstrip() + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"


def drawable(name: str, label: int) -> str:
    """A class name with a question mark for what the font lacks; "class 7" where no letter would be left."""
    letters = _letters()
    text = "".join(c if ord(c) in letters else "?" for c in unicodedata.normalize("NFC", name))
    return text if any(c.isalnum() for c in text) else f"class {label}"


def _font_file() -> str:
    # Matplotlib's own copy is there on every machine; it has Latin, Greek, Cyrillic and more, no Chinese or Japanese.
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


@functools.lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(_font_file()).get_charmap())


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
