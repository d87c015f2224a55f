"""A contact sheet of the clips that a training run sees of one video: before and after augmentation."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from ..configs.schema import DataConfig
from ..errors import UserError
from ..files import replacing
from ..preprocessing.shards import Dataset
from . import plan
from .loader import Loader
from .pyav import decode_rgb
from .streams import is_flow

_COLUMNS = 8  # frames of a clip that are shown
_HEIGHT = 150  # pixels of a thumbnail
_GAP, _MARGIN, _TEXT = 4, 14, 20
_INK, _FAINT, _PAPER, _CROP = (24, 24, 27), (113, 113, 122), (255, 255, 255), (234, 88, 12)


@dataclass(frozen=True)
class _Strip:
    """One clip: title, its frames as they are stored with the crop drawn in, and as the network gets them."""

    title: str
    before: list[Image.Image]
    after: list[Image.Image]


def find_key(dataset: Dataset, key: str) -> int:
    """The row of a video. Raises UserError naming the nearest keys."""
    rows = pc.indices_nonzero(pc.equal(dataset.table["key"], key))
    if not len(rows):
        keys = dataset.table["key"].to_pylist()
        near = difflib.get_close_matches(key, keys, 3, 0.3) or keys[:3]
        raise UserError(f"{dataset.storage} has no video {key!r}; it has, for example, {', '.join(near)}")
    return rows[0].as_py()


def contact_sheet(
    dataset: Dataset, config: DataConfig, key: str, out: Path, *, seed: int = 0, epochs: Sequence[int] = (1,)
) -> list[dict[str, Any]]:
    """Writes a PNG with the clip of video `key` in each of some epochs (counted from 1), and returns what was drawn.

    Clips come through the Loader itself, so they are those of a run with this seed and configuration, up to the
    differences between decoders. Raises UserError for an unknown key.
    """
    row = find_key(dataset, key)
    video = dataset.video(row)
    strips, drawn = [], []
    with Loader(dataset, "", config, batch_size=1, training=True, seed=seed, rows=np.array([row])) as loader:
        for epoch in epochs:
            loader.load_state_dict({"epoch": epoch - 1, "batch": 0})
            batch = next(iter(loader))
            sample = loader.sample(epoch - 1, 0)
            part = loader.streams[0].read(sample)
            picked = np.linspace(0, len(sample.frames) - 1, min(_COLUMNS, len(sample.frames))).round().astype(int)
            stored = decode_rgb(part.data, sample.frames[picked] - part.base)
            clip = batch.clips[0].permute(1, 2, 3, 0).numpy()[picked]  # (T,H,W,C)
            strips.append(
                _Strip(
                    _title(epoch, sample, config),
                    [_with_crop(frame, sample.crop, is_flow(dataset)) for frame in stored],
                    [Image.fromarray(_pixels(frame, config)) for frame in clip],
                )
            )
            drawn.append(
                {"epoch": epoch, "frames": sample.frames.tolist(), "crop": list(sample.crop), "flip": sample.flip,
                 "colour": sample.colour._asdict() if sample.colour else None}
            )  # fmt: skip
    label = dataset.classes[video.label] if video.label >= 0 else "no class"
    heading = f"{key}   {label}   {video.num_frames} frames, {video.width}x{video.height}, seed {seed}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        _draw(heading, strips).save(temporary, format="PNG")
    return drawn


def _title(epoch: int, sample: plan.Sample, config: DataConfig) -> str:
    top, left, bottom, right = sample.crop
    parts = [
        f"epoch {epoch}: frames {sample.frames[0]} to {sample.frames[-1]}",
        f"crop {right - left}x{bottom - top} at {left},{top} -> {config.size}x{config.size}",
        "flipped" if sample.flip else "not flipped",
    ]
    if sample.colour:
        parts.append(
            "brightness {:.2f}, contrast {:.2f}, saturation {:.2f}, hue {:+.0f}\N{DEGREE SIGN}".format(
                *sample.colour[:3], 360 * sample.colour.hue
            )
        )
    return ",  ".join(parts)


def _with_crop(frame: np.ndarray, crop: tuple[int, int, int, int], flow: bool) -> Image.Image:
    """A stored frame with its crop outlined; on both halves of a flow frame."""
    image = Image.fromarray(frame)
    draw = ImageDraw.Draw(image)
    top, left, bottom, right = crop
    width = max(1, round(image.height / 80))
    for x in (0, image.width // 2) if flow else (0,):
        draw.rectangle((x + left, top, x + right - 1, bottom - 1), outline=_CROP, width=width)
    return image


def _pixels(frame: np.ndarray, config: DataConfig) -> np.ndarray:
    """A frame of a clip (H,W,C) as a picture again, uint8 (H,W,3); flow's x and y side by side in grey."""
    flow = frame.shape[-1] == 2
    if config.dtype != "uint8":
        mean, std = (config.flow_mean, config.flow_std) if flow else (config.mean, config.std)
        frame = np.clip((frame.astype(np.float32) * std + mean) * 255, 0, 255).round().astype(np.uint8)
    if flow:
        grey = np.concatenate([frame[..., 0], frame[..., 1]], axis=1)
        return np.repeat(grey[..., None], 3, axis=-1)
    return frame


def _draw(heading: str, strips: list[_Strip]) -> Image.Image:
    rows = [
        (strip.title if number == 0 else "", name, [_thumbnail(image) for image in images])
        for strip in strips
        for number, (name, images) in enumerate((("stored", strip.before), ("clip", strip.after)))
    ]
    side = 52  # for the row's name
    widths = [side + sum(image.width + _GAP for image in images) for *_, images in rows]
    text = ImageFont.load_default(size=13)
    big = ImageFont.load_default(size=15)
    titles = [int(text.getlength(title)) for title, *_ in rows] + [int(big.getlength(heading))]
    height = 2 * _MARGIN + 26 + sum(_HEIGHT + _GAP + (_TEXT + 8 if title else 0) for title, *_ in rows)
    sheet = Image.new("RGB", (2 * _MARGIN + max(*widths, *titles), height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), heading, fill=_INK, font=big)
    y = _MARGIN + 26
    for title, name, images in rows:
        if title:
            draw.text((_MARGIN, y + 8), title, fill=_INK, font=text)
            y += _TEXT + 8
        draw.text((_MARGIN, y + _HEIGHT // 2 - 8), name, fill=_FAINT, font=text)
        x = _MARGIN + side
        for image in images:
            sheet.paste(image, (x, y))
            x += image.width + _GAP
        y += _HEIGHT + _GAP
    return sheet


def _thumbnail(image: Image.Image) -> Image.Image:
    return image.resize((max(1, round(image.width * _HEIGHT / image.height)), _HEIGHT), Image.Resampling.LANCZOS)
