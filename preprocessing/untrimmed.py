"""Untrimmed synthetic videos: motions of several classes between stretches of background, in THUMOS14's layout."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..errors import UserError, explain_os_error
from ..files import remove_leftovers, replacing, write_atomically, write_json
from . import engines
from .npy import sample_frames
from .synthetic import (
    CLASSES,
    MAX_SECONDS,
    adopt,
    compose,
    draw_background,
    draw_sprite,
    lighting,
    motion_path,
    refuse_unplayable,
    span_text,
    write_video,
)

ANNOTATIONS = "thumos_annotations"
# Split -> its folder, which is also in the videos' names, and what thumos_gt.json calls it.
SPLITS = {"val": ("validation", "train"), "test": ("test", "test")}
_SAMPLE_FPS = 10.0  # of the *_video_info.csv files: the detectors' rate
_PIECE_SECONDS = 3.0  # about how long one kind of background lasts
_TIMES, _MOTION, _PICTURES = 3, 4, 5  # streams of random numbers; the trimmed videos have 1 and 2


@dataclass(frozen=True)
class UntrimmedSettings:
    """Size of the data set, and how its actions are spread. Ranges are (least, most) in seconds.

    Lengths of actions are log-uniform: from 1 to 8 s with a median of 2.8 s, where THUMOS14's is 3 s, and 1 to 9 s
    holds four fifths. It has 4.5 actions a minute. gap_seconds: the least between two actions, and at both ends.
    mixed_share: videos with two or three classes instead of one; a seventh in THUMOS14. classes: some of CLASSES.
    """

    validation_videos: int = 20
    test_videos: int = 10
    seconds: tuple[float, float] = (45.0, 75.0)
    fps: int = 10
    width: int = 112
    height: int = 112
    classes: tuple[str, ...] = CLASSES
    actions_per_minute: float = 6.0
    action_seconds: tuple[float, float] = (1.0, 8.0)
    gap_seconds: float = 1.0
    mixed_share: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("validation_videos", "test_videos"):
            if not 1 <= getattr(self, name) < 10**7:
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"{option} {getattr(self, name)}: each split needs at least one video, below 10 million"
                )
        refuse_unplayable(self.seconds, self.fps, (self.width, self.height))
        _refuse_classes(self.classes)
        shortest, longest = self.action_seconds
        if not 0 < shortest <= longest <= MAX_SECONDS or not 2 <= self.action_frames[0] <= self.action_frames[1]:
            raise UserError(
                f"--action-seconds {span_text(self.action_seconds)} is no length, or range from shorter to longer, of "
                f"two or more whole frames of {1 / self.fps:g} s"
            )
        if not 0 < self.actions_per_minute <= 60 * self.fps:
            raise UserError(
                f"--actions-per-minute {self.actions_per_minute:g} is not above 0 and at most one a frame, "
                f"{60 * self.fps}"
            )
        if not 0 <= self.gap_seconds <= MAX_SECONDS:
            raise UserError(f"--gap-seconds {self.gap_seconds:g} is not between 0 and {MAX_SECONDS}")
        if not 0 <= self.mixed_share <= 1:
            raise UserError(f"--mixed-share {self.mixed_share:g} is not between 0 and 1")
        if self.mixed_share and len(self.classes) == 1:
            raise UserError(f"--mixed-share {self.mixed_share:g} needs two --classes or more; with one it is 0")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def action_frames(self) -> tuple[int, int]:
        """The range of the actions' lengths in whole frames."""
        shortest, longest = self.action_seconds
        return math.ceil(shortest * self.fps - 1e-9), math.floor(longest * self.fps + 1e-9)

    @property
    def class_numbers(self) -> dict[str, int]:
        """The number of each class: its line in the trimmed data set's classInd.txt, whichever others there are."""
        return {name: number for number, name in enumerate(CLASSES, 1) if name in self.classes}


class Action(NamedTuple):
    """A motion of a class: under way from the time of frame `first` to that of frame `end`, and still outside."""

    first: int
    end: int
    name: str


class Timeline(NamedTuple):
    """A video: its split and place there from 0, its length in frames, its actions in order, which never overlap."""

    split: str
    number: int
    frames: int
    actions: tuple[Action, ...]

    @property
    def name(self) -> str:
        return f"video_{SPLITS[self.split][0]}_{self.number + 1:07d}"


def synthesize_untrimmed(
    out: Path, settings: UntrimmedSettings, *, workers: int, on_video: Callable[[int], None] = lambda count: None
) -> list[Timeline]:
    """Writes OUT/validation/video_validation_0000001.mp4 ..., OUT/test/video_test_0000001.mp4 ... and their actions.

    OUT/thumos_annotations gets THUMOS14's files: val_Annotation.csv, val_video_info.csv, those of test, `Class
    Index_Detection.txt` and thumos_gt.json, which has the fields of ActivityNet's too. Times are those of frames, so
    they are exact. A video depends on the settings and its own number alone, not on the number of workers or videos;
    a run that was interrupted is continued. Returns the videos. Raises UserError if OUT holds others, and before
    anything is written where the actions do not fit into a video.
    """
    out = Path(out).absolute()
    videos = timelines(settings)
    try:
        adopt(out, dataclasses.asdict(settings))
        for folder, _ in SPLITS.values():
            (out / folder).mkdir(exist_ok=True)
            remove_leftovers(out / folder)
        tasks = [(str(out), settings, video) for video in videos]
        for _ in engines.run_local(_write_video, tasks, min(workers, len(tasks)), on_video):
            pass
        _write_annotations(out / ANNOTATIONS, settings, videos)
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {out}")) from None
    return videos


def timelines(settings: UntrimmedSettings) -> list[Timeline]:
    """Every video of the data set. Raises UserError naming the first whose actions do not fit."""
    counts = {"val": settings.validation_videos, "test": settings.test_videos}
    return [timeline(settings, split, number) for split in SPLITS for number in range(counts[split])]


def timeline(settings: UntrimmedSettings, split: str, number: int) -> Timeline:
    """When which action happens in a video. Raises UserError if they do not fit."""
    random = _random(settings, _TIMES, split, number)
    fps = settings.fps
    frames = round(random.uniform(*settings.seconds) * fps)
    count = max(1, round(settings.actions_per_minute * frames / fps / 60))
    least, most = settings.action_frames
    gap = math.ceil(settings.gap_seconds * fps - 1e-9)
    room = frames - count * least - (count + 1) * gap
    if room < 0:
        needed = f"{count} actions of at least {least / fps:g} s with {count + 1} gaps of {gap / fps:g} s"
        raise UserError(
            f"{needed} need {(frames - room) / fps:g} s, but {Timeline(split, number, frames, ()).name} has "
            f"{frames / fps:g} s; lower --actions-per-minute, --action-seconds or --gap-seconds, or raise --seconds"
        )
    longer = np.round(np.exp(random.uniform(math.log(least), math.log(most), count))).astype(int) - least
    if longer.sum() > room:
        longer = longer * room // longer.sum()
    lengths = least + longer
    edges = np.sort(random.integers(0, room - longer.sum() + 1, count))
    firsts = edges + gap * np.arange(1, count + 1) + np.cumsum(lengths) - lengths
    names = _names(settings, random, number, count)
    actions = zip(firsts.tolist(), (firsts + lengths).tolist(), names, strict=True)
    return Timeline(split, number, frames, tuple(Action(*action) for action in actions))


def poses(settings: UntrimmedSettings, video: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """The object in every frame, (T,4) as motion_path has it, and the number of the scene that is shown, (T,)."""
    random = _random(settings, _MOTION, video.split, video.number)
    track, scenes = np.empty((video.frames, 4)), np.zeros(video.frames, np.int64)
    at, here = 0, _place(random)
    for action in video.actions:
        t = np.arange(action.end - action.first + 1) / settings.fps
        path = _inside_the_picture(motion_path(action.name, random, t, t[-1]))
        _fill_gap(random, track, scenes, (at, action.first), here, path[0], settings.fps)
        track[action.first : action.end + 1] = path[: video.frames - action.first]
        at, here = action.end, path[-1]
    _fill_gap(random, track, scenes, (at, video.frames), here, _place(random), settings.fps)
    return track, scenes


def render_untrimmed(settings: UntrimmedSettings, video: Timeline) -> Iterator[np.ndarray]:
    """The frames of a video, one after the other: uint8 (H,W,3) RGB."""
    track, scenes = poses(settings, video)
    random = _random(settings, _PICTURES, video.split, video.number)
    light, grain = lighting(random, np.arange(video.frames) / settings.fps, settings.size)
    light, grain = light.astype(np.float32), grain.astype(np.float32)
    patterns = random.integers(len(grain), size=video.frames)
    shown = -1
    for number in range(video.frames):
        if scenes[number] != shown:
            background, sprite = draw_background(random, settings.size), draw_sprite(random, settings.size)
        if scenes[number] != shown or (track[number] != track[number - 1]).any():
            image = compose(background, sprite, track[number])
        shown = scenes[number]
        yield np.clip(image * light[number] + grain[patterns[number]], 0, 255).astype(np.uint8)


# --- Background ------------------------------------------------------------------------------------------------------


def _fill_gap(
    random: np.random.Generator, track: np.ndarray, scenes: np.ndarray, span: tuple[int, int], here: np.ndarray,
    there: np.ndarray, fps: int,
) -> None:  # fmt: skip
    """Sets the frames of a gap, [first, end): the object stands, trembles or wanders, and gets from `here` to `there`.

    A wandering object moves, turns and changes its size at once, as no class does. It gets there so, or by a cut to
    another scene.
    """
    first, end = span
    if first >= end:
        return
    pieces = max(1, round((end - first) / fps / _PIECE_SECONDS))
    bounds = np.linspace(first, end, pieces + 1).astype(int).tolist()
    leaving = int(random.integers(pieces))
    for piece, (start, stop) in enumerate(itertools.pairwise(bounds)):
        length = stop - start
        # It stands still at both ends, so that an action's own motion is what begins and ends with it.
        before, after = (max(2, round(share * length)) for share in random.uniform(0.1, 0.3, 2))
        track[start:stop] = here
        begin = min(start + before, stop)
        moving = slice(begin, max(begin, stop - after))
        steps = moving.stop - moving.start
        target = there if piece == leaving else here
        kind = random.random()
        if kind < 0.4 and length >= fps:
            track[moving] = _wander(random, here, target, steps)
        elif piece == leaving:
            scenes[moving.start :] += 1
            track[moving] = target
        elif kind < 0.7:
            track[moving] += random.normal(0, (0.015, 0.015, 0.03, 5), (steps, 4))
        track[moving.stop : stop] = here = target


def _wander(random: np.random.Generator, here: np.ndarray, there: np.ndarray, steps: int) -> np.ndarray:
    """A smooth way between two poses on a bow, or there and back again, with a quarter turn or more: (steps,4)."""
    t = np.arange(1, steps + 1)[:, None] / (steps + 1)
    done = t * t * (3 - 2 * t)
    path = here + done * (there - here)
    path[:, :2] += np.sin(np.pi * done) * random.uniform(-0.2, 0.2, 2)
    path[:, 2] *= np.exp(random.choice([-0.35, 0.35]) * np.sin(np.pi * done[:, 0]))
    sign = random.choice([-1.0, 1.0])
    turn = sign * ((sign * (there[3] - here[3])) % 360)
    path[:, 3] = here[3] + done[:, 0] * (turn + sign * 360 * (abs(turn) < 90))
    return path


def _place(random: np.random.Generator) -> np.ndarray:
    """A pose to stand in, drawn as motion_path draws where a motion begins."""
    return np.array([*random.uniform(0.35, 0.65, 2), random.uniform(0.75, 1.35), random.uniform(0, 360)])


def _inside_the_picture(path: np.ndarray) -> np.ndarray:
    """path, moved as a whole so that the object can be seen when it sets out and when it arrives."""
    low, high = path[:, :2].min(0), path[:, :2].max(0)
    path[:, :2] += np.clip((low + high) / 2, 0.1 + (high - low) / 2, 0.9 - (high - low) / 2) - (low + high) / 2
    return path


# --- Files -----------------------------------------------------------------------------------------------------------


def _write_video(task: tuple[str, UntrimmedSettings, Timeline], report: engines.Report) -> None:
    out, settings, video = task
    cv2.setNumThreads(1)
    path = Path(out, SPLITS[video.split][0], f"{video.name}.mp4")
    if not path.exists():
        with replacing(path) as temporary:
            write_video(temporary, render_untrimmed(settings, video), settings.fps, "mp4")
    report(1)


def _write_annotations(folder: Path, settings: UntrimmedSettings, videos: list[Timeline]) -> None:
    folder.mkdir(exist_ok=True)
    numbers, fps = settings.class_numbers, settings.fps
    lines = "".join(f"{number} {name}\n" for name, number in numbers.items())
    write_atomically(folder / "Class Index_Detection.txt", lines.encode())
    sample_fps = min(_SAMPLE_FPS, float(fps))
    database = {}
    for split, (_, subset) in SPLITS.items():
        actions: list[tuple] = [("video", "type", "type_idx", "start", "end", "startFrame", "endFrame")]
        info: list[tuple] = [("video", "fps", "sample_fps", "count", "sample_count")]
        for video in (video for video in videos if video.split == split):
            sampled = len(sample_frames(fps, sample_fps, video.frames))
            info.append((video.name, float(fps), sample_fps, float(video.frames), sampled))
            found = []
            for first, end, name in video.actions:
                actions.append((video.name, name, numbers[name], first / fps, end / fps, first, end))
                found.append({"segment": [first / fps, end / fps], "label": name})
            database[video.name] = {"subset": subset, "duration": video.frames / fps, "annotations": found}
        write_atomically(folder / f"{split}_Annotation.csv", _csv(actions))
        write_atomically(folder / f"{split}_video_info.csv", _csv(info))
    root = {"nodeId": 0, "nodeName": "Root", "parentId": None, "parentName": None}
    nodes = [{"nodeId": n, "nodeName": name, "parentId": 0, "parentName": "Root"} for name, n in numbers.items()]
    truth = {"version": f"genkd synth, seed {settings.seed}", "taxonomy": [root, *nodes], "database": database}
    write_json(folder / "thumos_gt.json", truth)


def _csv(rows: list[tuple]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _names(settings: UntrimmedSettings, random: np.random.Generator, number: int, count: int) -> list[str]:
    """The classes of a video's actions. Classes take turns from video to video, so that each split has them all."""
    known = list(settings.class_numbers)
    main = known[number % len(known)]
    share = settings.mixed_share
    if math.floor((number + 1) * share + 1e-9) == math.floor(number * share + 1e-9):  # evenly spread, not drawn
        return [main] * count
    others = random.permutation([name for name in known if name != main]).tolist()
    chosen = [main, *others[: int(random.integers(1, 3))]][:count]
    names = chosen + random.choice(chosen, count - len(chosen)).tolist()
    return random.permutation(names).tolist()


def _refuse_classes(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in CLASSES:
            near = difflib.get_close_matches(name.capitalize(), CLASSES, 1, 0.5)
            hint = f"did you mean {near[0]}? There are" if near else "there are"
            raise UserError(f"--classes: unknown class {name!r}; {hint} {', '.join(CLASSES)}")
    if not names or len(set(names)) != len(names):
        raise UserError(f"--classes {','.join(names)!r}: name one class or more, each once")


def _random(settings: UntrimmedSettings, stream: int, split: str, number: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, stream, list(SPLITS).index(split), number])
