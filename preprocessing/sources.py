"""Data set layouts: each function lists a layout's videos as SourceVideo records, in sorted order."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError

VIDEO_EXTENSIONS = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    ]
)
SPLIT_NAMES = ("train", "training", "val", "validation", "valid", "test", "testing")


@dataclass(frozen=True)
class SourceVideo:
    """One video to convert. key: path relative to the root without extension; label: class number, -1 for none."""

    key: str
    path: str
    split: str
    label: int
    size: int


@dataclass(frozen=True)
class Rejection:
    """A source that did not become a video of the data set, the stage that refused it and why."""

    path: str
    stage: str
    reason: str


@dataclass(frozen=True)
class SourceList:
    """What a layout holds: its videos sorted by key, its classes in label order, what it could not use."""

    name: str
    root: Path
    classes: tuple[str, ...]
    videos: tuple[SourceVideo, ...]
    rejected: tuple[Rejection, ...] = field(default=())


def folder(root: Path, *, test_fold: str | None = None, group_by: str | None = None) -> SourceList:
    """A folder a class: ROOT/CLASS/**/VIDEO, or ROOT/SPLIT/CLASS/**/VIDEO with splits named train, val, test.

    test_fold "2/5" makes a test split of every fifth group of videos, the second ones; without it all go to
    `train` (unless the folders name splits). group_by: a regular expression; videos whose keys give the same
    captured text are one group and stay on the same side. Without it each video is its own group.
    Raises UserError for a missing or empty root, a class without a video, or two files with one key.
    """
    root = _existing_folder(root)
    tops = _subfolders(root)
    has_splits = bool(tops) and all(name.lower() in SPLIT_NAMES for name in tops)
    if has_splits and test_fold:
        raise UserError(f"{root} already names its splits ({', '.join(tops)}); leave --test-fold out")
    class_folders = (
        [(top, name) for top in tops for name in _subfolders(root / top)]
        if has_splits
        else [("", name) for name in tops]
    )
    if not class_folders:
        raise UserError(f"{root} holds no class folder; expected {root}/CLASS/VIDEO files")
    classes = tuple(sorted({name for _, name in class_folders}))
    label_of = {name: label for label, name in enumerate(classes)}
    videos: list[SourceVideo] = []
    rejected: list[Rejection] = [
        Rejection(printable(path.name), "scan", "outside any class folder")
        for path in sorted(root.iterdir())
        if path.is_file() and path.suffix.lower() in VIDEO_EXTENSIONS
    ]
    for split, name in class_folders:
        found = 0
        for path in _files(root / split / name, root, rejected):
            if path.suffix.lower() not in VIDEO_EXTENSIONS:
                rejected.append(Rejection(printable(_relative(path, root)), "scan", "not a video file extension"))
                continue
            found += 1
            videos.append(_video(path, root, split or "train", label_of[name]))
        if not found:
            raise UserError(f"class folder {root / split / name} holds no video; remove it or put videos in it")
    if test_fold:
        videos = _split_by_fold(videos, test_fold, group_by)
    elif group_by:
        raise UserError("--group-by only says which videos stay together in --test-fold, which is missing")
    return SourceList(root.name, root, classes, _sorted_unique(videos), tuple(rejected))


def ucf101(root: Path, *, fold: int = 1, annotations: Path | None = None) -> SourceList:
    """UCF101's layout: CLASS/v_CLASS_gXX_cYY.avi below ROOT or ROOT/UCF-101, and the official list files.

    annotations: the folder of classInd.txt, trainlist0N.txt and testlist0N.txt; looked for in ROOT, in
    ROOT/ucfTrainTestlist and beside ROOT when it is None. fold: which of the official splits, from 1.
    Listed videos without a file, and videos in no list, are recorded as rejected.
    """
    root = _existing_folder(root)
    video_root = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    lists = _ucf101_lists(root, annotations)
    classes = _ucf101_classes(lists / "classInd.txt")
    label_of = {name: label for label, name in enumerate(classes)}
    videos: list[SourceVideo] = []
    rejected: list[Rejection] = []
    for split in ("train", "test"):
        listing = lists / f"{split}list{fold:02d}.txt"
        for line in _lines(listing):
            name = line.split()[0]
            path = video_root / name
            class_name = name.split("/")[0]
            if class_name not in label_of:
                raise UserError(f"{listing}: class {class_name!r} of {name} is not in classInd.txt")
            if not path.is_file():
                rejected.append(Rejection(name, "scan", f"listed in {listing.name}, but there is no such file"))
                continue
            videos.append(_video(path, video_root, split, label_of[class_name]))
    if not videos:
        raise UserError(f"none of the videos that {lists} lists is below {video_root}; is ROOT the right folder?")
    listed = {video.path for video in videos}
    for name in _subfolders(video_root):
        for path in _files(video_root / name, video_root, rejected):
            if str(path) not in listed and path.suffix.lower() in VIDEO_EXTENSIONS:
                rejected.append(
                    Rejection(printable(_relative(path, video_root)), "scan", f"not in a list of split {fold}")
                )
    return SourceList(root.name, video_root, classes, _sorted_unique(videos), tuple(rejected))


def printable(name: str) -> str:
    """name as valid UTF-8 on one line: control characters, % and undecodable bytes become %XX."""
    raw = os.fsencode(name)
    try:
        text = raw.decode("utf-8")
        if "%" not in text and text.isprintable():
            return text
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
        return "".join(c if c.isascii() and c.isprintable() and c != "%" else f"%{ord(c):02X}" for c in text)
    return "".join(c if c.isprintable() and c != "%" else "".join(f"%{byte:02X}" for byte in c.encode()) for c in text)


def _existing_folder(root: Path) -> Path:
    root = Path(root).absolute()
    if not root.is_dir():
        raise UserError(f"{root} is not a folder" if root.exists() else f"there is no folder {root}")
    if not any(root.iterdir()):
        raise UserError(f"{root} is empty")
    return root


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _files(path: Path, root: Path, rejected: list[Rejection]) -> Iterable[Path]:
    """Every file below path, hidden ones left out, in an order that no file system decides.

    A folder that cannot be read, or that a link makes appear twice, is recorded in `rejected`.
    """

    def unreadable(error: OSError) -> None:
        rejected.append(Rejection(printable(os.path.relpath(error.filename, root)), "scan", f"{error.strerror}"))

    seen = set()
    for base, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        state = os.stat(base)
        if (state.st_dev, state.st_ino) in seen:
            rejected.append(
                Rejection(printable(os.path.relpath(base, root)), "scan", "a link to a folder read already")
            )
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(base, name)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _video(path: Path, root: Path, split: str, label: int) -> SourceVideo:
    key = printable(_relative(path, root)[: -len(path.suffix)])
    try:
        size = path.stat().st_size
    except OSError:  # a dangling link: the worker that opens it reports the reason
        size = 0
    return SourceVideo(key, str(path), split, label, size)


def _sorted_unique(videos: Iterable[SourceVideo]) -> tuple[SourceVideo, ...]:
    ordered = sorted(videos, key=lambda video: video.key)
    for first, second in itertools.pairwise(ordered):
        if first.key == second.key:
            if first.path == second.path:
                raise UserError(f"{first.path} is listed twice; a video belongs to one split")
            raise UserError(
                f"two sources have the key {first.key!r}: {first.path} and {second.path}; rename one of them"
            )
    return tuple(ordered)


def _split_by_fold(videos: list[SourceVideo], test_fold: str, group_by: str | None) -> list[SourceVideo]:
    match = re.fullmatch(r"(\d+)/(\d+)", test_fold)
    if not match or not 1 <= int(match[1]) <= int(match[2]) or int(match[2]) < 2:
        raise UserError(f"--test-fold {test_fold!r} is not of the form K/N with 1 <= K <= N and N >= 2, e.g. 1/5")
    fold, folds = int(match[1]), int(match[2])
    try:
        pattern = re.compile(group_by) if group_by else None
    except re.error as error:
        raise UserError(f"--group-by {group_by!r} is not a regular expression: {error}") from None
    groups = {video.key: _group(video.key, pattern) for video in videos}
    number = {group: index for index, group in enumerate(sorted(set(groups.values())))}
    if len(number) < folds:
        raise UserError(f"--test-fold {test_fold} needs at least {folds} groups of videos, but there are {len(number)}")
    return [
        SourceVideo(v.key, v.path, "test" if number[groups[v.key]] % folds == fold - 1 else "train", v.label, v.size)
        for v in videos
    ]


def _group(key: str, pattern: re.Pattern | None) -> str:
    if pattern is None:
        return key
    match = pattern.search(key)
    if not match:
        raise UserError(f"--group-by {pattern.pattern!r} does not match the key {key!r}")
    return "\0".join(part or "" for part in match.groups()) if match.groups() else match[0]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"there is no list file {path}")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file") from None


def _ucf101_lists(root: Path, annotations: Path | None) -> Path:
    places = [annotations] if annotations else [root, root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist"]
    for place in places:
        if (place / "classInd.txt").is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise UserError(f"no classInd.txt in {looked}; name the folder of UCF101's list files with --annotations")


def _ucf101_classes(path: Path) -> tuple[str, ...]:
    numbers: dict[int, str] = {}
    for line in _lines(path):
        parts = line.split()
        if len(parts) != 2 or not parts[0].isdigit():
            raise UserError(f"{path}: expected lines of `number name`, found {line!r}")
        numbers[int(parts[0])] = parts[1]
    if sorted(numbers) != list(range(1, len(numbers) + 1)):
        raise UserError(f"{path}: class numbers must run from 1 to {len(numbers)} without gaps")
    return tuple(numbers[number] for number in sorted(numbers))
