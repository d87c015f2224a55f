"""THUMOS14: untrimmed videos with the times and classes of the actions in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import thumos_files
from ..errors import UserError
from .lookup import Finder, printable, relative_name
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
    videos without any other, and annotated ones that are not there, are recorded as rejected; those never annotated
    are left out. Some annotations begin or end after their video: the conversion counts them. Raises UserError for
    annotation files that are missing or wrong, naming the line, and if no annotated video is there.
    """
    root = existing_folder(root)
    folder = _annotations_folder(root, annotations)
    number_of, classes = _classes(folder)
    finder = Finder(root)
    videos: list[SourceVideo] = []
    rejected: list[Rejection] = []
    for split, places in (_FLOW_FOLDERS if flow else _FOLDERS).items():
        actions: dict[str, list[Annotation]] = {}
        for row in _rows(folder, split, number_of, classes):
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
    return thumos_files.read_classes(path)


def _rows(folder: Path, split: str, number_of: dict[int, int], classes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The annotations of a split: video, label (0: Ambiguous), start and end in seconds, startFrame and endFrame."""
    path = _csv_file(folder, split)
    if path is None:
        raise UserError(f"there is no {split}_Annotation.csv in {folder}")
    for where, row in thumos_files.read_rows(path, number_of, classes):
        relative_name(row["video"], folder, where)
        yield row


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
                self._read[place] = thumos_files.read_info(file) if file.is_file() else {}
            row = self._read[place].get(name) or self._read[place].get(printable(name))
            if row:
                return row["sample_fps"]
        return None
