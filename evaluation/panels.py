"""What is drawn into a video's pictures: a panel of names with scores, and a strip over time with a play head."""

from __future__ import annotations

import abc
import functools
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from .timeline import clock

CURVE, AHEAD, FAINT = (90, 180, 255), (176, 184, 194), (200, 206, 214, 255)
_PANEL, _TEXT, _BAR = (12, 14, 18, 150), (255, 255, 255, 255), (46, 134, 222, 215)


class Panels(abc.ABC):
    """The panels of one video's pictures of one size; their size follows the picture's short side.

    names: all that may stand in the upper panel; beside: what stands left of the strip's rows, of which there is one a
    name, None for a strip without rows.
    """

    def __init__(
        self, duration_s: float, names: Sequence[str], width: int, height: int, beside: Sequence[str] | None = None
    ):
        self._duration_s, self._width, self._height = duration_s, width, height
        side = min(width, height)
        self._text = max(11, round(side / 30))
        self._font, self._small = font(self._text), font(max(10, round(0.85 * self._text)))
        self._margin = max(4, side // 45)
        self._pad = max(3, self._text // 3)
        self._line = max(2, self._text // 8)
        self._percent = round(self._font.getlength("100 %"))
        longest = max(map(self._font.getlength, names), default=0) + self._percent + 6 * self._pad
        widest = max(15.5 * self._text, min(22 * self._text, 0.45 * width))
        self._panel = min(width - 2 * self._margin, round(min(max(longest, 11 * self._text), widest)))
        left, right = self._margin + self._pad, width - self._margin - self._pad
        bottom = height - self._margin - self._pad
        ascent, descent = self._small.getmetrics()
        self.row = round(1.15 * (ascent + descent))
        high = max(18, round(side / 14))
        if beside is not None:
            high = max(1, len(beside)) * self.row
            longest = max(map(self._small.getlength, beside), default=0)
            left += math.ceil(min(longest + 2 * self._pad, 0.3 * width)) if beside else 0
        # left, top, right, bottom of the strip's picture in pixels; the play head moves in it
        self.plot = (left, bottom - high, right, bottom)
        self._strip_top = bottom - high - self._pad - ascent - descent - self._pad // 2
        self._label_y = bottom - high - self._pad
        self._played, self._ahead = self._layer(CURVE), self._layer(AHEAD)

    @abc.abstractmethod
    def entries(self, seconds: float) -> Sequence[tuple[str, float]]:
        """Names and scores, 0..1, for the upper panel at a time."""

    @abc.abstractmethod
    def label(self) -> str:
        """What stands above the strip."""

    @abc.abstractmethod
    def fill(self, strip: Image.Image, colour: tuple[int, int, int], top: int) -> None:
        """Draws into the RGBA picture of the strip's panel, `top` pixels of whose pictures lie above it."""

    def head_x(self, seconds: float) -> int:
        """The column of the play head at a time."""
        left, _, right, _ = self.plot
        share = min(1.0, max(0.0, seconds / max(self._duration_s, 1e-9)))
        return left + round(share * (right - left))

    def draw(self, picture: Image.Image, seconds: float) -> None:
        """Draws the state at a time into an RGB picture of the panels' size."""
        entries = self.entries(seconds)
        if entries:
            self._draw_entries(ImageDraw.Draw(picture, "RGBA"), entries)
        x = self.head_x(seconds)
        top = self._strip_top
        for layer, first, last in ((self._played, 0, x), (self._ahead, x, self._width)):
            part = layer.crop((first, 0, last, layer.height))
            picture.paste(part, (first, top), part)
        draw = ImageDraw.Draw(picture, "RGBA")
        _, plot_top, right, bottom = self.plot
        draw.rectangle((x - self._line // 2, plot_top, x - self._line // 2 + self._line - 1, bottom), fill=_TEXT)
        at = f"{clock(seconds)} / {clock(self._duration_s)}"
        draw.text((right, self._label_y), at, font=self._small, fill=_TEXT, anchor="rs")

    def _draw_entries(self, draw: ImageDraw.ImageDraw, entries: Sequence[tuple[str, float]]) -> None:
        row = round(1.5 * self._text)
        left, top = self._margin, self._margin
        draw.rounded_rectangle(
            (left, top, left + self._panel, top + len(entries) * row + 2 * self._pad), self._pad, fill=_PANEL
        )
        inner_left, inner_right = left + self._pad, left + self._panel - self._pad
        for number, (name, score) in enumerate(entries):
            y = top + self._pad + number * row
            filled = round(score * (inner_right - inner_left))
            if filled:
                draw.rectangle((inner_left, y + 1, inner_left + filled, y + row - 2), fill=_BAR)
            middle = y + row // 2
            percent = f"{100 * score:.0f} %"
            draw.text((inner_right - self._pad, middle), percent, font=self._font, fill=_TEXT, anchor="rm")
            room = inner_right - inner_left - 3 * self._pad - self._percent
            text = shortened(name, room, self._font)
            draw.text((inner_left + self._pad, middle), text, font=self._font, fill=_TEXT, anchor="lm")

    def _layer(self, colour: tuple[int, int, int]) -> Image.Image:
        """The strip's panel, once as played and once as still to come."""
        layer = Image.new("RGBA", (self._width, self._height - self._margin - self._strip_top), (0, 0, 0, 0))
        draw = ImageDraw.Draw(layer)
        corner = (self._width - self._margin, layer.height - 1)
        draw.rounded_rectangle((self._margin, 0, *corner), self._pad, fill=_PANEL)
        left = self._margin + self._pad
        draw.text((left, self._label_y - self._strip_top), self.label(), font=self._small, fill=FAINT, anchor="ls")
        self.fill(layer, colour, self._strip_top)
        return layer


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


@functools.lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all panels, in pixels."""
    return ImageFont.truetype(_font_file(), size)


def _font_file() -> str:
    # Matplotlib's own copy is there on every machine; it has Latin, Greek, Cyrillic and more, no Chinese or Japanese.
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@functools.lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(_font_file()).get_charmap())
