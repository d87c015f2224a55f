"""THUMOS14: untrimmed videos with the times and classes of the actions in them."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .lookup import Finder, numbered_lines, printable, relative_name
from .sources import (
    Annotation,
    Rejection,
    SourceList,
    SourceVideo,
    existing_folder,
    missing,
    sorted_unique,
    source_video,
)

# Splits and the folders that hold their videos, as published, renamed or as arrays.
_FOLDERS = {
    "val": ("validation", "val", "videos_val", "TH14_validation_set_mp4", "validation_npy", "val_npy", ""),
    "test": ("test", "videos_test", "TH14_test_set_mp4", "TH14_Test_set_mp4", "test_npy", ""),
}
_FLOW_FOLDERS = {"val": ("validation_flow_npy", "val_flow_npy", ""), "test": ("test_flow_npy", "")}


def thumos14(
    root: Path, *, annotations: Path | None = None, flow: bool = False, source_fps: float | None = None
) -> SourceList:
    """THUMOS14's videos with temporal annotations: splits `val` (200 videos) and `test` (212).

    Videos lie in ROOT/validation and ROOT/test (or the folders' published names), or in ROOT; arrays at 10 frames a
    second in ROOT/validation_npy and ROOT/test_npy, with flow=True in validation_flow_npy and test_flow_npy.
    annotations: the folder of val_Annotation.csv, test_Annotation.csv and `Class Index_Detection.txt`; else looked for
    in ROOT, annotations and thumos_annotations in ROOT and beside it. The rate of arrays is source_fps, or what
    val_video_info.csv and test_video_info.csv say: those beside the arrays or in ROOT, written with them, before
    those of the annotations. A key is a video's name.
    Class 0 is Background, 1 to 20 are those of the index file. Annotations of the class Ambiguous are dropped;
    videos without any other are recorded as rejected; those never annotated are left out. Some annotations end
    after their video.
    """
    root = existing_folder(root)
    folder = _annotations_folder(root, annotations)
    number_of, classes = _classes(folder)
    finder = Finder(root)
    videos: list[SourceVideo] = []
    rejected: list[Rejection] = []
    for split, places in (_FLOW_FOLDERS if flow else _FOLDERS).items():
        actions: dict[str, list[Annotation]] = {}
        for row in _rows(folder, split, number_of):
            kept = actions.setdefault(row["video"], [])
            if row["label"]:
                kept.append(Annotation(row["start"], row["end"], row["label"]))
        rates = _Rates(split, (root, folder))
        for name, kept in actions.items():
            path = next((path for place in places if (path := finder.find(os.path.join(place, name)))), None)
            if path and not kept:
                rejected.append(Rejection(printable(name), "scan", "all its annotations are of the class Ambiguous"))
            elif path:
                fps = rates.of(path, name) if source_fps is None and path.endswith(".npy") else source_fps
                actions_by_time = tuple(sorted(kept))
                videos.append(
                    source_video(path, root, split, -1, fps, key=printable(name), annotations=actions_by_time)
                )
            elif kept:
                rejected.append(missing(name, f"{split}_Annotation.csv", finder))
    if not videos:
        raise UserError(f"none of the videos that {folder} annotates is below {root}; is ROOT the right folder?")
    return SourceList(root.name, root, classes, sorted_unique(videos), tuple(rejected))


def thumos_frames(
    video_info: Path, annotations: Path, class_index: Path
) -> dict[str, tuple[int, list[tuple[float, float, int]]]]:
    """The annotated videos of a split as the original implementation sees them, in file order.

    video_info, annotations, class_index: val_video_info.csv, val_Annotation.csv, `Class Index_Detection.txt`.
    Video name -> (frames at 10 a second, (start, end, label) in those frames). It takes the frame columns, which
    assume 30 frames a second, times sampled frames / frames: for a video of another rate that is not its seconds.
    """
    number_of, _ = _read_classes(class_index)
    info = _read_info(video_info)
    videos: dict[str, tuple[int, list[tuple[float, float, int]]]] = {}
    for row in _read_rows(annotations, number_of):
        if row["label"]:
            if row["video"] not in info:
                raise UserError(f"{video_info}: no line for {row['video']}")
            counts = info[row["video"]]
            ratio = counts["sample_count"] / counts["count"]
            _, frames = videos.setdefault(row["video"], (int(counts["sample_count"]), []))
            frames.append((row["startFrame"] * ratio, row["endFrame"] * ratio, row["label"]))
    return videos


def _annotations_folder(root: Path, annotations: Path | None) -> Path:
    names = ("", "annotations", "thumos_annotations")
    places = [annotations] if annotations else [base / name for base in (root, root.parent) for name in names]
    for place in places:
        if _csv_file(place, "val"):
            return place
    looked = ", ".join(str(place) for place in places)
    raise UserError(f"no val_Annotation.csv in {looked}; name the folder of THUMOS14's annotations with --annotations")


def _csv_file(folder: Path, split: str) -> Path | None:
    names = (f"{split}_Annotation.csv", f"{split}_Annotation_ours.csv")  # the latter: without the class Ambiguous
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _classes(folder: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    """The class number for each number of the index file, and the class names; 0 is the background."""
    names = ("Class Index_Detection.txt", "Class_Index_Detection.txt")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"there is no `{names[0]}` in {folder}")
    return _read_classes(path)


def _read_classes(path: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    pairs = []
    for number, line in numbered_lines(path):
        parts = line.split(maxsplit=1)
        if len(parts) != 2 or not parts[0].isdecimal():
            raise UserError(f"{path}, line {number}: expected `number name`, found {line!r}")
        pairs.append((int(parts[0]), parts[1]))
    return (
        {original: label for label, (original, _) in enumerate(pairs, 1)},
        ("Background", *(name for _, name in pairs)),
    )


def _rows(folder: Path, split: str, number_of: dict[int, int]) -> Iterator[dict[str, Any]]:
    """The annotations of a split: video, label (0: Ambiguous), start and end in seconds, startFrame and endFrame."""
    path = _csv_file(folder, split)
    if path is None:
        raise UserError(f"there is no {split}_Annotation.csv in {folder}")
    return _read_rows(path, number_of)


def _read_rows(path: Path, number_of: dict[int, int]) -> Iterator[dict[str, Any]]:
    numbers = ("type_idx", "start", "end", "startFrame", "endFrame")
    for where, row in _table(path, numbers):
        relative_name(row["video"], path.parent, where)
        if row["type_idx"] and row["type_idx"] not in number_of:
            raise UserError(f"{where}: class number {row['type_idx']:g} is not in the class index file")
        if not 0 <= row["start"] < row["end"] < math.inf:
            raise UserError(f"{where}: start {row['start']:g} is not before end {row['end']:g}, or below 0")
        yield {**row, "label": number_of.get(row["type_idx"], 0)}


class _Rates:
    """Frame rates of arrays by the SPLIT_video_info.csv files beside them and in `places`, each read once."""

    def __init__(self, split: str, places: tuple[Path, ...]):
        self._name, self._places = f"{split}_video_info.csv", places
        self._read: dict[Path, dict[str, dict[str, Any]]] = {}

    def of(self, path: str, name: str) -> float | None:
        """Of the array at `path` of the video `name`; None if no file lists it."""
        for place in (Path(path).parent, *self._places):
            if place not in self._read:
                file = place / self._name
                self._read[place] = _read_info(file) if file.is_file() else {}
            row = self._read[place].get(name) or self._read[place].get(printable(name))
            if row:
                return row["sample_fps"]
        return None


def _read_info(path: Path) -> dict[str, dict[str, Any]]:
    videos = {}
    for where, row in _table(path, ("fps", "sample_fps", "count", "sample_count")):
        if min(row["sample_fps"], row["count"], row["sample_count"]) <= 0:
            raise UserError(f"{where}: rates and counts must be above 0")
        videos[row["video"]] = row
    return videos


def _table(path: Path, numbers: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file with a column `video` and columns of numbers, each with its place for error messages."""
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
                except (TypeError, ValueError):
                    raise UserError(f"{where}: {', '.join(numbers)} must be numbers") from None
                yield where, {"video": row["video"], **values}
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a UTF-8 text file") from None
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
