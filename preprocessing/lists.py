"""File lists of UCF101 and HMDB51 as the original's preparation scripts write them."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, explain_os_error
from ..files import numbered_lines, write_atomically
from .lookup import printable
from .shards import Dataset
from .sources import ucf101_classes


@dataclass(frozen=True)
class ListFile:
    """A list that was written: its path, how many videos it has, and the listed ones that were not there."""

    path: Path
    videos: int
    missing: tuple[str, ...]


def frame_counter(
    counts: Mapping[str, int] | Dataset | str | Path, column: str = "source_frames"
) -> Callable[[str], int | None]:
    """A function: CLASS/NAME -> how many frames that video has, None if it is not there.

    counts: a folder of frame folders CLASS/NAME or NAME (n_frames, else the number of image_*.jpg), a data set
    (column: source_frames, or num_frames as stored), or a mapping of such keys. Raises UserError for another column,
    no such folder, or an n_frames file that holds no number.
    """
    if isinstance(counts, Dataset):
        if column not in ("source_frames", "num_frames"):
            raise UserError(f"frame counts are in the columns source_frames and num_frames, not in {column!r}")
        counts = dict(zip(counts.table["key"].to_pylist(), counts.table[column].to_pylist(), strict=True))
    if isinstance(counts, Mapping):
        look_up: Callable[[str], int | None] = counts.get
    else:
        folder = Path(counts)
        if not folder.is_dir():
            raise UserError(f"there is no folder of frames {folder}")
        look_up = functools.partial(_frames_in, folder)

    def count(name: str) -> int | None:
        places = (name, printable(name), os.path.basename(name), printable(os.path.basename(name)))
        return next((found for place in places if (found := look_up(place)) is not None), None)

    return count


def _frames_in(root: Path, name: str) -> int | None:
    folder = root / name
    try:
        text = (folder / "n_frames").read_text(encoding="utf-8").strip()
        if not re.fullmatch("[0-9]+", text):
            raise UserError(f"{folder / 'n_frames'} holds no number of frames; delete it, and the images are counted")
        return int(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return sum(re.fullmatch(r"image_\d+\.jpg", name) is not None for name in names) or None


def ucf101_lists(
    counts: Mapping[str, int] | Dataset | str | Path,
    annotations: Path,
    out: Path,
    *,
    folds: Iterable[int] = (1, 2, 3),
    modality: str = "rgb",
    column: str = "source_frames",
    skip_missing: bool = False,
) -> list[ListFile]:
    """Writes train_rgb_splitN.txt and val_rgb_splitN.txt, lines `v_CLASS_gXX_cYY FRAMES LABEL` in the official order.

    counts, column: see frame_counter; annotations: the folder of classInd.txt, trainlist0N.txt and testlist0N.txt;
    modality: the word in the files' names. Labels count from 0. Raises UserError for a malformed list, and for a
    listed video that is not there unless skip_missing.
    """
    label_of = {name: label for label, name in enumerate(ucf101_classes(annotations / "classInd.txt"))}
    count = frame_counter(counts, column)
    lists = []
    for fold in folds:
        for kind, listing in (("train", f"trainlist{fold:02d}.txt"), ("val", f"testlist{fold:02d}.txt")):
            listed = []
            for number, line in numbered_lines(annotations / listing):
                class_name, _, name = re.sub(r"\s+\d+$", "", line).rpartition("/")
                if class_name not in label_of:
                    raise UserError(f"{annotations / listing}, line {number}: {line!r} names no class of classInd.txt")
                listed.append((class_name, os.path.splitext(name)[0], label_of[class_name]))
            lists.append(
                _write_counted(out / f"{kind}_{modality}_split{fold}.txt", listed, count, listing, skip_missing)
            )
    return lists


def hmdb51_lists(
    counts: Mapping[str, int] | Dataset | str | Path,
    annotations: Path,
    out: Path,
    *,
    folds: Iterable[int] = (1, 2, 3),
    fold: int = 1,
    modality: str = "rgb",
    column: str = "source_frames",
    skip_missing: bool = False,
) -> list[ListFile]:
    """Writes train_rgb_splitN.txt and val_rgb_splitN.txt for `folds`, and hmdb51_{train,test,val}.txt for `fold`.

    The former have lines `NAME FRAMES LABEL` in the official order, class by class; the latter `CLASS/NAME LABEL`
    sorted by class and name, of the videos marked 1, 2 and 0. Labels number the sorted classes from 0. counts,
    column, modality: as in ucf101_lists; annotations: the folder of CLASS_test_splitN.txt. Raises UserError as that
    does; the videos of hmdb51_val.txt, which belong to neither side, may be absent.
    """
    count = frame_counter(counts, column)
    lists = []
    for number in folds:
        rows = _hmdb51_split(annotations, number)
        for kind, wanted in (("train", 1), ("val", 2)):
            path = out / f"{kind}_{modality}_split{number}.txt"
            listed = [row for row, mark in rows if mark == wanted]
            lists.append(_write_counted(path, listed, count, f"*_test_split{number}.txt", skip_missing))
    rows = sorted(_hmdb51_split(annotations, fold))
    for kind, wanted in (("train", 1), ("test", 2), ("val", 0)):
        listed = [row for row, mark in rows if mark == wanted]
        found = [count(f"{class_name}/{name}") is not None for class_name, name, _ in listed]
        missing = [row for row, there in zip(listed, found, strict=True) if not there]
        _refuse_missing(missing, len(listed), f"*_test_split{fold}.txt", skip_missing or wanted == 0)
        lines = [f"{row[0]}/{row[1]} {row[2]}" for row, there in zip(listed, found, strict=True) if there]
        lists.append(_write_list(out / f"hmdb51_{kind}.txt", lines, missing))
    return lists


_Listed = tuple[str, str, int]  # class, name without extension, label


def _hmdb51_split(annotations: Path, fold: int) -> list[tuple[_Listed, int]]:
    """Videos and marks (1 train, 2 test, 0 neither) of a split, class by class."""
    ending = f"_test_split{fold}.txt"
    listings = {path.name[: -len(ending)]: path for path in annotations.glob(f"?*{ending}")}
    if not listings:
        raise UserError(f"no CLASS{ending} in {annotations}; name the folder of HMDB51's split files")
    rows = []
    for label, class_name in enumerate(sorted(listings)):
        for number, line in numbered_lines(listings[class_name]):
            match = re.fullmatch(r"(.*\S)\s+([012])", line)
            if not match:
                raise UserError(f"{listings[class_name]}, line {number}: expected `NAME.avi 0|1|2`, found {line!r}")
            rows.append(((class_name, os.path.splitext(match[1])[0], label), int(match[2])))
    return rows


def _write_counted(
    path: Path, listed: list[_Listed], count: Callable[[str], int | None], listing: str, skip_missing: bool
) -> ListFile:
    counted = [(row, count(f"{row[0]}/{row[1]}")) for row in listed]
    missing = [row for row, frames in counted if frames is None]
    _refuse_missing(missing, len(listed), listing, skip_missing)
    lines = [f"{name} {frames} {label}" for (_, name, label), frames in counted if frames is not None]
    return _write_list(path, lines, missing)


def _refuse_missing(missing: list[_Listed], total: int, listing: str, skip_missing: bool) -> None:
    if missing and not skip_missing:
        raise UserError(
            f"{len(missing)} of {total} videos listed in {listing} are not there, the first "
            f"{missing[0][0]}/{missing[0][1]}; prepare them, or leave them out with --skip-missing"
        )


def _write_list(path: Path, lines: list[str], missing: list[_Listed]) -> ListFile:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {path}")) from None
    return ListFile(path, len(lines), tuple(f"{class_name}/{name}" for class_name, name, _ in missing))
