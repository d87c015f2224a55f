"""THUMOS14's annotation files: classes, actions, and the frame counts of the videos."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import numbered_lines


def thumos_frames(
    video_info: Path, annotations: Path, class_index: Path
) -> dict[str, tuple[int, list[tuple[float, float, int]]]]:
    """The annotated videos of a split as the original implementation sees them, in file order.

    video_info, annotations, class_index: val_video_info.csv, val_Annotation.csv, `Class Index_Detection.txt`.
    Video name -> (frames at 10 a second, (start, end, label) in those frames). It takes the frame columns, which
    assume 30 frames a second, times sampled frames / frames: for a video of another rate that is not its seconds.
    """
    number_of, classes = read_classes(class_index)
    info = read_info(video_info)
    videos: dict[str, tuple[int, list[tuple[float, float, int]]]] = {}
    for _, row in read_rows(annotations, number_of, classes):
        if row["label"]:
            if row["video"] not in info:
                raise UserError(f"{video_info}: no line for {row['video']}")
            counts = info[row["video"]]
            ratio = counts["sample_count"] / counts["count"]
            _, frames = videos.setdefault(row["video"], (int(counts["sample_count"]), []))
            frames.append((row["startFrame"] * ratio, row["endFrame"] * ratio, row["label"]))
    return videos


def read_classes(path: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    """The class number for each number of the index file, and the class names; 0 is the background."""
    names: dict[int, str] = {}
    for number, line in numbered_lines(path):
        parts = line.split(maxsplit=1)
        if len(parts) != 2 or not parts[0].isdecimal():
            raise UserError(f"{path}, line {number}: expected `number name`, found {line!r}")
        if int(parts[0]) in {0, *names} or parts[1] in names.values():
            raise UserError(f"{path}, line {number}: {line!r} repeats a number or name, or takes 0, which is Ambiguous")
        names[int(parts[0])] = parts[1]
    if not names:
        raise UserError(f"{path} names no class; expected lines of `number name`")
    return {original: label for label, original in enumerate(names, 1)}, ("Background", *names.values())


def read_rows(path: Path, number_of: dict[int, int], classes: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The annotations of a split, each with its place in the file: video, label (0: Ambiguous), start and end in
    seconds, startFrame and endFrame. number_of, classes: as read_classes gives them.

    Raises UserError for the first row that is wrong: no number, a class that the index lacks or calls otherwise, an
    end that is not behind the start. Whether the video is that long is not known here.
    """
    numbers = ("type_idx", "start", "end", "startFrame", "endFrame")
    for where, row in _table(path, numbers):
        if row["type_idx"] and row["type_idx"] not in number_of:
            raise UserError(f"{where}: class number {row['type_idx']:g} is not in the class index file")
        label = number_of.get(row["type_idx"], 0)
        name = classes[label] if label else "Ambiguous"
        if row["type"] not in (None, name):
            raise UserError(f"{where}: class number {row['type_idx']:g} is {name}, not {row['type']}")
        if not 0 <= row["start"] < row["end"]:
            raise UserError(f"{where}: start {row['start']:g} is not before end {row['end']:g}, or below 0")
        yield where, {**row, "label": label}


def read_info(path: Path) -> dict[str, dict[str, Any]]:
    """Frame counts and rates by video name: of the file, and of the array made of it."""
    videos = {}
    for where, row in _table(path, ("fps", "sample_fps", "count", "sample_count")):
        if min(row["sample_fps"], row["count"], row["sample_count"]) <= 0:
            raise UserError(f"{where}: rates and counts must be above 0")
        videos[row["video"]] = row
    return videos


def _table(path: Path, numbers: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file with a column `video` and columns of numbers, each with its place for error messages.

    `type` is None where there is no such column.
    """
    try:
        file = open(path, encoding="utf-8-sig", newline="")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    with file:
        reader = csv.DictReader(file)
        try:
            for name in ("video", *numbers):
                if name not in (reader.fieldnames or ()):
                    raise UserError(f"{path}: no column {name}; expected video, {', '.join(numbers)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                try:
                    values = {name: float(row[name]) for name in numbers}
                    if not all(map(math.isfinite, values.values())):
                        raise ValueError
                except (TypeError, ValueError):
                    raise UserError(f"{where}: {', '.join(numbers)} must be numbers") from None
                yield where, {"video": row["video"], "type": row.get("type"), **values}
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a UTF-8 text file") from None
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
