"""Layouts whose videos a list names: HMDB51, CSV files as of Kinetics, plain list files."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..files import numbered_lines
from .lookup import Finder, printable, relative_name, video_stem
from .sources import (
    SPLIT_NAMES,
    Rejection,
    SourceList,
    SourceVideo,
    existing_folder,
    missing,
    sorted_unique,
    source_video,
    unlisted,
)

# Names of CSV columns, in lower case.
_PATH_COLUMNS = ("path", "video", "filename", "youtube_id")
_LABEL_COLUMNS = ("label", "class", "name")
_START_COLUMNS = ("start", "time_start", "start_s")
_END_COLUMNS = ("end", "time_end", "end_s")
_SPLIT_COLUMNS = ("split", "subset")
_MOST_CLASSES = 100_000  # a greater class number is a mistake, and a name for each below it would fill the memory


def hmdb51(
    root: Path, *, fold: int = 1, annotations: Path | None = None, source_fps: float | None = None
) -> SourceList:
    """HMDB51's layout: CLASS/VIDEO.avi below ROOT or ROOT/hmdb51_org, and the official CLASS_test_splitN.txt files.

    annotations: the folder of those files; looked for in ROOT, ROOT/testTrainMulti_7030_splits and beside ROOT when
    it is None. fold: 1, 2 or 3. Videos are found as in ucf101, so also as frames or arrays at source_fps. The videos
    that the official split does not use (marked 0) are left out; those without a file, and those in no list, are
    recorded as rejected.
    """
    root = existing_folder(root)
    video_root = root / "hmdb51_org" if (root / "hmdb51_org").is_dir() else root
    name = "testTrainMulti_7030_splits"
    places = [annotations] if annotations else [root, root / name, root.parent / name, root.parent]
    ending = f"_test_split{fold}.txt"
    found = ((place, sorted(place.glob(f"?*{ending}"))) for place in places if place.is_dir())
    place, listings = next(((place, files) for place, files in found if files), (root, []))
    if not listings:
        looked = ", ".join(str(place) for place in places)
        raise UserError(f"no CLASS{ending} in {looked}; name the folder of HMDB51's split files with --annotations")
    listing_of = {listing.name[: -len(ending)]: listing for listing in listings}
    classes = tuple(sorted(listing_of))
    finder = Finder(video_root)
    videos: list[SourceVideo] = []
    rejected: list[Rejection] = []
    unused: set[str] = set()
    for label, class_name in enumerate(classes):
        listing = listing_of[class_name]
        for number, line in numbered_lines(listing):
            match = re.fullmatch(r"(.*\S)\s+([012])", line)
            if not match:
                raise UserError(f"{listing}, line {number}: expected `NAME.avi 0|1|2`, found {line!r}")
            name = relative_name(f"{class_name}/{match[1]}", video_root, f"{listing}, line {number}")
            base = os.path.basename(name)
            if match[2] == "0":
                unused |= {printable(video_stem(name)), printable(video_stem(base))}
                continue
            path = finder.find(name) or finder.find(base)
            if path:
                videos.append(source_video(path, video_root, ("train", "test")[match[2] == "2"], label, source_fps))
            else:
                rejected.append(missing(name, listing.name, finder))
    if not videos:
        raise UserError(f"none of the videos that {place} lists is below {video_root}; is ROOT the right folder?")
    rejected += unlisted(video_root, videos, f"not in a list of split {fold}", unused)
    return SourceList(root.name, video_root, classes, sorted_unique(videos), tuple(rejected))


def csv_list(
    root: Path,
    listings: Path | Sequence[Path],
    *,
    classes: Path | None = None,
    split: str | None = None,
    source_fps: float | None = None,
) -> SourceList:
    """Videos below ROOT that CSV files name, one row a video or a part of one, as Kinetics has them.

    With a header: a column path, video, filename or youtube_id; label, class or name; start, time_start or start_s,
    and end, time_end or end_s, in seconds; split or subset. Without one: path, label[, start, end]. A part's key is
    its video's with `_START_END` in seconds. A youtube_id is looked for as a file cut to size already,
    ID_START_END.*, then as a whole one, ID.*; each in ROOT, ROOT/LABEL, ROOT/SPLIT and ROOT/SPLIT/LABEL.
    Labels are names, or class numbers if all are numbers; -1, or no label column, is no class. classes: a file with
    the class names in label order. A row's split is its own, else `split`, else its file's name (train.csv), else
    train. Rows without a file are recorded as rejected. Raises UserError for a row that makes no sense.
    """
    root = existing_folder(root)
    finder = Finder(root)
    files = [Path(listing) for listing in ([listings] if isinstance(listings, (str, Path)) else listings)]
    rows = [row for listing in files for row in _csv_rows(listing, _split_name(split), root)]
    found = []
    for row in rows:
        path, is_cut = _kinetics_file(finder, row) if row.is_id else (finder.find(row.name), True)
        found.append((row, path, is_cut))
    return _listed(root, files, found, classes, source_fps, finder)


def list_file(
    root: Path,
    listings: Path | Sequence[Path],
    *,
    classes: Path | None = None,
    split: str | None = None,
    source_fps: float | None = None,
) -> SourceList:
    """Videos below ROOT that text files name, one a line: `path label`, `path<TAB>label`, `path frames label`, `path`.

    The label is a class number, -1 or none for no class; the path may hold spaces, and where a line can be read in
    several ways, the one whose file exists counts. Lines that start with # and name no file are comments. classes: a
    file with the class names in label order. split: of all videos; else a file's name says it, if it begins with
    train, val or test; else it is train. Videos without a file are recorded as rejected. Raises UserError for a path
    that leads out of ROOT.
    """
    root = existing_folder(root)
    finder = Finder(root)
    files = [Path(listing) for listing in ([listings] if isinstance(listings, (str, Path)) else listings)]
    found = []
    for listing in files:
        stem = re.match("train|val|test", listing.stem.lower())
        chosen = _split_name(split) or (stem[0] if stem else "train")
        for number, line in numbered_lines(listing):
            where = f"{listing}, line {number}"
            try:
                rows = [
                    _Row(relative_name(name, root, where), _label(label), chosen, where)
                    for name, label in _readings(line, where)
                ]
            except UserError:
                if line.startswith("#"):
                    continue
                raise
            there = next(((row, path) for row in rows if (path := finder.find(row.name))), None)
            if there or not line.startswith("#"):
                found.append((*(there or (rows[0], None)), True))
    return _listed(root, files, found, classes, source_fps, finder)


@dataclass(frozen=True)
class _Row:
    """A line of a list. name: a path relative to the root, or an id; label: "" for none; where: list and line."""

    name: str
    label: str
    split: str
    where: str
    start_s: float | None = None
    end_s: float | None = None
    is_id: bool = False


def _listed(
    root: Path,
    listings: Sequence[Path],
    found: Sequence[tuple[_Row, str | None, bool]],
    class_file: Path | None,
    source_fps: float | None,
    finder: Finder,
) -> SourceList:
    """The SourceList of rows, the files found for them, and whether those are still to be cut to the row's times."""
    names = ", ".join(str(listing) for listing in listings)
    if not found:
        raise UserError(f"{names}: no video is listed")
    if not any(path for _, path, _ in found):
        first = found[0][0]
        raise UserError(f"no listed video is below {root}; for one, {first.where} names {first.name!r}")
    classes, labels = _class_numbers([row for row, _, _ in found], class_file)
    videos: list[SourceVideo] = []
    rejected: list[Rejection] = []
    for (row, path, is_cut), label in zip(found, labels, strict=True):
        if path is None:
            rejected.append(missing(row.name, os.path.basename(row.where), finder))
            continue
        video = source_video(path, root, row.split, label, source_fps)
        if is_cut and (row.start_s is not None or row.end_s is not None):
            key = video.key + _span_suffix(row.start_s or 0.0, row.end_s)
            video = replace(video, key=key, start_s=row.start_s, end_s=row.end_s)
        videos.append(video)
    return SourceList(root.name, root, classes, sorted_unique(videos), tuple(rejected))


def _class_numbers(rows: Sequence[_Row], class_file: Path | None) -> tuple[tuple[str, ...], list[int]]:
    """The class names, and each row's class number: its label itself if all labels are numbers."""
    names = _class_names(class_file) if class_file else None
    if not all(re.fullmatch(r"-?[0-9]+", row.label) for row in rows if row.label):
        names = names or tuple(sorted({row.label for row in rows if row.label}))
        number_of = {name: number for number, name in enumerate(names)} | {"": -1}
        for row in rows:
            if row.label not in number_of:
                raise UserError(f"{row.where}: class {row.label!r} is not in {class_file}")
        return names, [number_of[row.label] for row in rows]
    numbers = [int(row.label or -1) for row in rows]
    limit = len(names) if names is not None else _MOST_CLASSES
    for row, number in zip(rows, numbers, strict=True):
        if not -1 <= number < limit:
            raise UserError(f"{row.where}: class number {number} is not in -1 to {limit - 1}; -1 is no class")
    if names is None:
        names = tuple(str(number) for number in range(max(numbers, default=-1) + 1))
    return names, numbers


def _class_names(path: Path) -> tuple[str, ...]:
    """Class names, one a line, each with its number before it or none with."""
    lines = [line for _, line in numbered_lines(path)]
    numbered = [re.fullmatch(r"([0-9]+)\s+(\S.*)", line) for line in lines]
    pairs = sorted((int(match[1]), match[2]) for match in numbered if match)
    if len(pairs) == len(lines) and [number - pairs[0][0] for number, _ in pairs] == list(range(len(pairs))):
        lines = [name for _, name in pairs]
    if len(set(lines)) != len(lines):
        raise UserError(f"{path} names a class twice; it must name each class on a line of its own")
    return tuple(lines)


def _label(text: str) -> str:
    return "" if text == "-1" else text


def _split_name(name: str | None, where: str = "--split") -> str | None:
    if name and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise UserError(f"{where}: {name!r} cannot be the name of a split; use letters, digits, _ and -")
    return name


def _readings(line: str, where: str) -> Iterator[tuple[str, str]]:
    """What a line of a list file may mean, as (path, label), the likeliest first."""
    if "\t" in line:
        path, *fields = line.split("\t")
        if not re.fullmatch(r"-?[0-9]+", fields[-1].strip()):
            raise UserError(f"{where}: the last field, {fields[-1].strip()!r}, is no class number")
        yield path.strip(), fields[-1].strip()
        return
    match = re.fullmatch(r"((.*?\S)(?:\s+[0-9]+)?)\s+(-?[0-9]+)", line)
    if match:
        yield match[1], match[3]
        yield match[2], match[3]
    yield line, ""


def _csv_rows(listing: Path, split: str | None, root: Path) -> Iterator[_Row]:
    """The rows of a CSV file; split: of rows that name none."""
    if not listing.is_file():
        raise UserError(f"there is no list file {listing}")
    stem = listing.stem.lower()
    split = split or (stem if stem in (*SPLIT_NAMES, "validate") else "train")
    columns: dict[str, int] | None = None
    with open(listing, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True)
        try:
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if columns is None:
                    columns = _csv_columns(cells, listing)
                    if "header" in columns:
                        continue
                yield _csv_row(cells, columns, f"{listing}, line {reader.line_num}", split, root)
        except UnicodeDecodeError:
            raise UserError(f"{listing} is not a UTF-8 text file") from None
        except csv.Error as error:
            raise UserError(f"{listing}, line {reader.line_num}: not CSV ({error})") from None


def _csv_columns(cells: Sequence[str], listing: Path) -> dict[str, int]:
    """Which column holds what, by a CSV file's first row; with the entry "header" if that is a header."""
    names = [cell.strip().lower() for cell in cells]
    if not set(names) & {*_PATH_COLUMNS, "label", "class"}:
        if len(names) > 4:
            raise UserError(f"{listing}: {len(names)} columns without a header; name them: path, label, start, end")
        return {name: number for number, name in enumerate(("path", "label", "start", "end")[: len(names)])}
    columns = {"header": 0}
    kinds = {
        "path": _PATH_COLUMNS, "label": _LABEL_COLUMNS, "start": _START_COLUMNS, "end": _END_COLUMNS,
        "split": _SPLIT_COLUMNS,
    }  # fmt: skip
    for kind, known in kinds.items():
        for name in known:
            if name in names and kind not in columns:
                columns[kind] = names.index(name)
    if "path" not in columns:
        raise UserError(f"{listing}: no column {', '.join(_PATH_COLUMNS[:-1])} or {_PATH_COLUMNS[-1]} in its header")
    if names[columns["path"]] == "youtube_id":
        columns["id"] = columns["path"]
    return columns


def _csv_row(cells: Sequence[str], columns: dict[str, int], where: str, split: str, root: Path) -> _Row:
    def cell(kind: str) -> str:
        number = columns.get(kind, len(cells))
        return cells[number].strip() if number < len(cells) else ""

    def seconds(kind: str) -> float | None:
        try:
            value = float(cell(kind) or "nan")
        except ValueError:
            raise UserError(f"{where}: {kind} {cell(kind)!r} is no number of seconds") from None
        if cell(kind) and not (math.isfinite(value) and value >= 0):
            raise UserError(f"{where}: {kind} {cell(kind)!r} is not in the video; seconds count from 0")
        return value if cell(kind) else None

    if "label" in columns and not cell("label"):
        raise UserError(f"{where}: no label; give the class's name or number, or -1 for none")
    start, end = seconds("start"), seconds("end")
    if end is not None and (start or 0.0) >= end:
        raise UserError(f"{where}: start {start or 0.0:g} is not before end {end:g}")
    name = relative_name(cell("path"), root, where)
    chosen = _split_name(cell("split"), where) or split
    return _Row(name, _label(cell("label")), chosen, where, start, end, "id" in columns)


def _kinetics_file(finder: Finder, row: _Row) -> tuple[str | None, bool]:
    """The file of an id, and whether it is still to be cut."""
    folders = [""]
    for label in dict.fromkeys([row.label, row.label.replace(" ", "_")]):
        if label and "/" not in label and label not in (".", ".."):
            folders.append(label)
    folders += [os.path.join(row.split, folder) for folder in folders]
    start, end = row.start_s or 0.0, row.end_s
    if end is not None and start.is_integer() and end.is_integer():
        for folder in folders:
            path = finder.find(os.path.join(folder, row.name + _span_suffix(start, end)))
            if path:
                return path, False
    return next((path for folder in folders if (path := finder.find(os.path.join(folder, row.name)))), None), True


def _span_suffix(start: float, end: float | None) -> str:
    """_000012_000022, as in the names of Kinetics' files; _000012.500_000022.000 where there are parts of seconds."""
    times = (start,) if end is None else (start, end)
    if all(time.is_integer() for time in times):
        texts = [f"{int(time):06d}" for time in times]
    else:
        decimals = 3 if all(round(time, 3) == time for time in times) else 6
        texts = [f"{time:0{7 + decimals}.{decimals}f}" for time in times]
    return "".join(f"_{text}" for text in (*texts, *(["end"] if end is None else [])))
