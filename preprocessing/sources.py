"""Data set layouts: each function lists a layout's videos as SourceVideo records, in sorted order."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files import numbered_lines
from .lookup import (
    ARRAY_EXTENSION,
    Finder,
    is_folder,
    is_frame_folder,
    printable,
    relative_name,
    video_stem,
)

MIN_FPS, MAX_FPS = 0.01, 1000.0  # what is taken for a frame rate that somebody gives
SPLIT_NAMES = ("train", "training", "val", "validation", "valid", "test", "testing")


class Annotation(NamedTuple):
    """An action in an untrimmed video: from start_s to end_s seconds, and its class number."""

    start_s: float
    end_s: float
    label: int


@dataclass(frozen=True)
class SourceVideo:
    """One video to convert: a video file, a folder of numbered JPEG frames, an .npy array, or a span of a file.

    key: path relative to the root without extension; label: class number, -1 for none; size, mtime_ns: of the file,
    to notice that it changed; start_s, end_s: the part to take, None for all; span: (offset, size) in bytes where the
    video lies inside a larger file; fps: frame rate of a source that states none.
    """

    key: str
    path: str
    split: str
    label: int
    size: int
    mtime_ns: int = 0
    start_s: float | None = None
    end_s: float | None = None
    span: tuple[int, int] | None = None
    fps: float | None = None
    annotations: tuple[Annotation, ...] = ()


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


def folder(
    root: Path, *, test_fold: str | None = None, group_by: str | None = None, source_fps: float | None = None
) -> SourceList:
    """A folder a class: ROOT/CLASS/**/VIDEO, or ROOT/SPLIT/CLASS/**/VIDEO with splits named train, val, test.

    A VIDEO is a video file, an .npy array or a folder of JPEG frames; source_fps is the rate of the latter two.
    test_fold "2/5" makes a test split of every fifth group of videos, the second ones; without it all go to
    `train` (unless the folders name splits). group_by: a regular expression; videos whose keys give the same
    captured text are one group and stay on the same side. Without it each video is its own group.
    Raises UserError for a missing or empty root, a class without a video, or two files with one key.
    """
    root = existing_folder(root)
    rejected: list[Rejection] = []
    tops = _class_folders(root, root, rejected)
    has_splits = bool(tops) and all(name.lower() in SPLIT_NAMES for name in tops)
    if has_splits and test_fold:
        raise UserError(f"{root} already names its splits ({', '.join(tops)}); leave --test-fold out")
    class_folders = (
        [(top, name) for top in tops for name in _class_folders(root / top, root, rejected)]
        if has_splits
        else [("", name) for name in tops]
    )
    if not class_folders:
        raise UserError(f"{root} holds no class folder; expected {root}/CLASS/VIDEO files")
    classes = tuple(sorted({name for _, name in class_folders}))
    label_of = {name: label for label, name in enumerate(classes)}
    videos: list[SourceVideo] = []
    for split, name in class_folders:
        found = len(videos)
        for path, usable in scan(root / split / name, root, rejected):
            if usable:
                videos.append(source_video(path, root, split or "train", label_of[name], source_fps))
            else:
                rejected.append(Rejection(printable(_below(path, root)), "scan", "not a video file extension"))
        if len(videos) == found:
            raise UserError(f"class folder {root / split / name} holds no video; remove it or put videos in it")
    if test_fold:
        videos = _split_by_fold(videos, test_fold, group_by)
    elif group_by:
        raise UserError("--group-by only says which videos stay together in --test-fold, which is missing")
    return SourceList(root.name, root, classes, sorted_unique(videos), tuple(rejected))


def ucf101(
    root: Path, *, fold: int = 1, annotations: Path | None = None, source_fps: float | None = None
) -> SourceList:
    """UCF101's layout: CLASS/v_CLASS_gXX_cYY.avi below ROOT or ROOT/UCF-101, and the official list files.

    Where v_CLASS_gXX_cYY.avi is missing, the same name with another video extension, as .npy array or as a folder of
    JPEG frames takes its place, the latter also outside of CLASS; source_fps is the rate of arrays and frames.
    annotations: the folder of classInd.txt, trainlist0N.txt and testlist0N.txt; looked for in ROOT, in
    ROOT/ucfTrainTestlist and beside ROOT when it is None. fold: which of the official splits, from 1.
    Listed videos without a file, and videos in no list, are recorded as rejected.
    """
    root = existing_folder(root)
    video_root = root / "UCF-101" if (root / "UCF-101").is_dir() else root
    lists = _ucf101_lists(root, annotations)
    classes = ucf101_classes(lists / "classInd.txt")
    label_of = {name: label for label, name in enumerate(classes)}
    finder = Finder(video_root)
    videos: list[SourceVideo] = []
    rejected: list[Rejection] = []
    for split in ("train", "test"):
        listing = lists / f"{split}list{fold:02d}.txt"
        for number, line in numbered_lines(listing):
            name = relative_name(re.sub(r"\s+\d+$", "", line), video_root, f"{listing}, line {number}")
            class_name = name.split("/")[0]
            if class_name not in label_of:
                raise UserError(f"{listing}: class {class_name!r} of {name} is not in classInd.txt")
            path = finder.find(name) or finder.find(os.path.basename(name))
            if path:
                videos.append(source_video(path, video_root, split, label_of[class_name], source_fps))
            else:
                rejected.append(missing(name, listing.name, finder))
    if not videos:
        raise UserError(f"none of the videos that {lists} lists is below {video_root}; is ROOT the right folder?")
    rejected += unlisted(video_root, videos, f"not in a list of split {fold}")
    return SourceList(root.name, video_root, classes, sorted_unique(videos), tuple(rejected))


def source_video(
    path: str, root: Path, split: str, label: int, source_fps: float | None = None, **fields: Any
) -> SourceVideo:
    """The record of a video file, .npy array or frame folder at `path` below `root`; fields: further ones, or a key.

    source_fps is set on arrays and frame folders only; UserError for one that is no frame rate. A frame folder's size
    is the sum of its frames', its time that of the newest.
    """
    if source_fps is not None and not MIN_FPS <= source_fps <= MAX_FPS:
        raise UserError(f"a source's frame rate {source_fps:g} is not between {MIN_FPS:g} and {MAX_FPS:g}")
    key = _below(path, root)
    is_frames, size, mtime_ns = False, 0, 0
    with contextlib.suppress(OSError):  # a dangling link: the worker that opens it reports the reason
        state = os.stat(path)
        is_frames = stat.S_ISDIR(state.st_mode)
        size, mtime_ns = _frames_state(path) if is_frames else (state.st_size, state.st_mtime_ns)
    if not is_frames:
        key = video_stem(key)
    if is_frames or path.endswith(ARRAY_EXTENSION):
        fields["fps"] = source_fps
    return SourceVideo(fields.pop("key", printable(key)), path, split, label, size, mtime_ns, **fields)


def scan(folder: Path, root: Path, rejected: list[Rejection]) -> Iterator[tuple[str, bool]]:
    """Files and frame folders below `folder`, as (path, whether it is a video by its name), in sorted order.

    Hidden names are left out, and frame folders not looked into. A folder that cannot be read, or that a link makes
    appear twice, is recorded in `rejected`.
    """
    seen = set()
    waiting = [str(folder)]
    while waiting:
        base = waiting.pop()
        if is_frame_folder(base):
            yield base, True
            continue
        try:
            state = os.stat(base)
            if (state.st_dev, state.st_ino) in seen:
                rejected.append(Rejection(printable(_below(base, root)), "scan", "a link to a folder read already"))
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(base) as entries:
                found = sorted((entry.name, is_folder(entry)) for entry in entries if entry.name[0] != ".")
        except OSError as error:
            rejected.append(Rejection(printable(_below(base, root)), "scan", f"{error.strerror}"))
            continue
        waiting += [os.path.join(base, name) for name, deeper in reversed(found) if deeper]
        for name, deeper in found:
            if not deeper:
                yield os.path.join(base, name), video_stem(name) != name


def unlisted(
    root: Path, videos: Iterable[SourceVideo], reason: str, unused: Container[str] = frozenset()
) -> list[Rejection]:
    """A rejection for each video below root that is none of `videos`; keys in `unused` are passed over."""
    rejected: list[Rejection] = []
    paths, keys = {video.path for video in videos}, {video.key for video in videos}
    for path, usable in scan(root, root, rejected):
        if not usable or path in paths:
            continue
        name = printable(_below(path, root))
        key = name if os.path.isdir(path) else video_stem(name)
        if key not in unused:
            rejected.append(Rejection(name, "scan", "another file of this video is used" if key in keys else reason))
    return rejected


def missing(name: str, listing: str, finder: Finder) -> Rejection:
    """What to record for a name of a list that `finder` did not find."""
    return Rejection(printable(name), "scan", f"listed in {listing}, but {finder.why_missing(name)}")


def sorted_unique(videos: Iterable[SourceVideo]) -> tuple[SourceVideo, ...]:
    """videos by key. Raises UserError if two have the same key."""
    ordered = sorted(videos, key=lambda video: video.key)
    for first, second in itertools.pairwise(ordered):
        if first.key == second.key:
            if first.path == second.path:
                raise UserError(f"{first.path} is listed twice; a video belongs to one split")
            raise UserError(
                f"two sources have the key {first.key!r}: {first.path} and {second.path}; rename one of them"
            )
    return tuple(ordered)


def existing_folder(root: Path) -> Path:
    """root as an absolute path. Raises UserError if it is no folder or is empty."""
    root = Path(root).absolute()
    if not root.is_dir():
        raise UserError(f"{root} is not a folder" if root.exists() else f"there is no folder {root}")
    with os.scandir(root) as entries:
        if next(entries, None) is None:
            raise UserError(f"{root} is empty")
    return root


def _class_folders(path: Path, root: Path, rejected: list[Rejection]) -> list[str]:
    """Names of the folders in path, hidden ones left out; videos that lie beside them are recorded in `rejected`."""
    names = []
    with os.scandir(path) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            is_video = is_frame_folder(entry.path) if is_folder(entry) else video_stem(entry.name) != entry.name
            if is_video:
                rejected.append(Rejection(printable(_below(entry.path, root)), "scan", "outside any class folder"))
            elif is_folder(entry) and entry.name[0] != ".":
                names.append(entry.name)
    return names


def _below(path: str, root: Path) -> str:
    prefix = str(root).rstrip("/") + "/"
    return path[len(prefix) :] if path.startswith(prefix) else path


def _frames_state(path: str) -> tuple[int, int]:
    """Sum of sizes and newest modification time of the frames in a folder."""
    with os.scandir(path) as entries:
        states = [entry.stat() for entry in entries if entry.name.startswith("image_") and entry.name.endswith(".jpg")]
    return sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)


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
        replace(video, split="test" if number[groups[video.key]] % folds == fold - 1 else "train") for video in videos
    ]


def _group(key: str, pattern: re.Pattern | None) -> str:
    if pattern is None:
        return key
    match = pattern.search(key)
    if not match:
        raise UserError(f"--group-by {pattern.pattern!r} does not match the key {key!r}")
    return "\0".join(part or "" for part in match.groups()) if match.groups() else match[0]


def _ucf101_lists(root: Path, annotations: Path | None) -> Path:
    places = [annotations] if annotations else [root, root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist"]
    for place in places:
        if (place / "classInd.txt").is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise UserError(f"no classInd.txt in {looked}; name the folder of UCF101's list files with --annotations")


def ucf101_classes(path: Path) -> tuple[str, ...]:
    """The class names of UCF101's classInd.txt in the order of their numbers. Raises UserError."""
    numbers: dict[int, str] = {}
    for _, line in numbered_lines(path):
        parts = line.split()
        if len(parts) != 2 or not parts[0].isdigit():
            raise UserError(f"{path}: expected lines of `number name`, found {line!r}")
        numbers[int(parts[0])] = parts[1]
    if sorted(numbers) != list(range(1, len(numbers) + 1)):
        raise UserError(f"{path}: class numbers must run from 1 to {len(numbers)} without gaps")
    return tuple(numbers[number] for number in sorted(numbers))
