"""A procedural motion data set: real AVI files whose classes differ only by how one object moves."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import cv2
import numpy as np

from ..errors import UserError, explain_os_error
from ..files import replacing, write_json
from . import engines

# Each class survives a horizontal flip, so that flipping stays a fair augmentation.
CLASSES = ("Bob", "Fall", "Grow", "Orbit", "Pulse", "Rise", "Shrink", "Slide", "Spin", "Sway")
CLIPS_A_GROUP = 4
_STAMP = "synth.json"
MAX_SECONDS, MAX_FPS = 24 * 3600, 1000
_SHAPES = ("bar", "cross", "ellipse", "square", "star", "triangle")


@dataclass(frozen=True)
class SynthSettings:
    """Size of the data set. Groups are as in UCF101: the videos of one are all in train or all in test."""

    videos_per_class: int = 40
    seconds: float = 2.0
    fps: int = 25
    width: int = 160
    height: int = 120
    seed: int = 0
    test_share: float = 0.3

    def __post_init__(self) -> None:
        groups = -(-self.videos_per_class // CLIPS_A_GROUP)
        if groups < 2:
            raise UserError(f"--videos-per-class {self.videos_per_class}: at least {CLIPS_A_GROUP + 1}, for two groups")
        if not 0 < self.test_share < 1:
            raise UserError(f"--test-share {self.test_share} is not between 0 and 1")
        refuse_unplayable((self.seconds, self.seconds), self.fps, (self.width, self.height))


def refuse_unplayable(seconds: tuple[float, float], fps: int, size: tuple[int, int]) -> None:
    """Raises UserError unless there are videos of so many seconds, from shortest to longest, and of that size."""
    if fps < 1 or seconds[0] * fps < 2:
        raise UserError(f"{seconds[0]:g} s at {fps} frames/s is less than two frames")
    if not seconds[0] <= seconds[1] <= MAX_SECONDS:
        raise UserError(f"--seconds {span_text(seconds)} is no length of up to {MAX_SECONDS} s, which is a day")
    if fps > MAX_FPS:
        raise UserError(f"--fps {fps} is more than {MAX_FPS} frames/s")
    width, height = size
    if min(size) < 32 or max(size) > 4096 or width % 2 or height % 2:
        raise UserError(f"--size {width}x{height}: both sides must be even and from 32 to 4096 pixels")


def span_text(span: tuple[float, float]) -> str:
    """A range of seconds as the command line takes it: 2, or 45-75."""
    return "-".join(dict.fromkeys(f"{seconds:g}" for seconds in span))


def synthesize(
    out: Path, settings: SynthSettings, *, workers: int, on_video: Callable[[int], None] = lambda count: None
) -> dict[str, int]:
    """Writes OUT/UCF-101/CLASS/v_CLASS_gXX_cYY.avi (MPEG-4 Part 2) and OUT/ucfTrainTestlist with the UCF101 lists.

    The same settings give the same files; a run that was interrupted is continued. Groups are divided between train
    and test, never the videos of one. Returns the number of videos by split. Raises UserError if OUT holds others.
    """
    out = Path(out).absolute()
    try:
        adopt(out, dataclasses.asdict(settings))
        names = [
            (name, group, clip)
            for name in CLASSES
            for group, clip in (divmod(number, CLIPS_A_GROUP) for number in range(settings.videos_per_class))
        ]
        tasks = [(str(out), settings, names[start : start + 8]) for start in range(0, len(names), 8)]
        for _ in engines.run_local(_write_videos, tasks, min(workers, len(tasks)), on_video):
            pass
        return _write_lists(out / "ucfTrainTestlist", names, settings)
    except OSError as error:
        raise UserError(explain_os_error(error, f"writing {out}")) from None


def render(settings: SynthSettings, name: str, group: int, clip: int) -> np.ndarray:
    """The frames of one video: uint8 (T,H,W,3) RGB."""
    # The same scene and start for every class: what is seen in one frame says nothing about the class.
    scene = np.random.default_rng([settings.seed, 1, group, clip])
    motion = np.random.default_rng([settings.seed, 2, group, clip])
    size = (settings.width, settings.height)
    background, sprite = draw_background(scene, size), draw_sprite(scene, size)
    frames = max(2, round(settings.seconds * settings.fps))
    seconds = np.arange(frames) / settings.fps
    light, grain = lighting(motion, seconds, size)
    path = motion_path(name, motion, seconds, settings.seconds)
    images = np.empty((frames, settings.height, settings.width, 3), np.uint8)
    for number, pose in enumerate(path):
        image = compose(background, sprite, pose)
        images[number] = np.clip(image * light[number] + grain[motion.integers(8)], 0, 255)
    return images


def lighting(random: np.random.Generator, seconds: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A slow change of light, a factor for each of the times (T,), and eight patterns of grain (8,H,W,1)."""
    light = 1 + 0.08 * np.sin(2 * np.pi * (random.uniform() + random.uniform(0.2, 0.6) * seconds))
    return light, random.normal(0, 3, (8, size[1], size[0], 1))


def motion_path(name: str, random: np.random.Generator, t: np.ndarray, seconds: float) -> np.ndarray:
    """Centre x, y (shares of the frame), scale and angle (degrees) of the object over time: (T,4).

    Place, size and turn of the object are drawn in the same way for every class, so that one frame tells little.
    """
    x, y = (np.full_like(t, random.uniform(0.35, 0.65)) for _ in range(2))
    scale, angle = np.full_like(t, random.uniform(0.75, 1.35)), np.full_like(t, random.uniform(0, 360))
    sign = random.choice([-1.0, 1.0])
    travel = random.uniform(0.5, 0.8) * (t / seconds - 0.5)
    wave = np.sin(2 * np.pi * (random.uniform() + random.uniform(0.9, 1.6) * t))
    turn = 2 * np.pi * (random.uniform() + sign * random.uniform(0.7, 1.2) * t)
    growth = random.uniform(2.2, 3.2) ** (t / seconds - 0.5)
    swing, radius = random.uniform(0.14, 0.24), random.uniform(0.14, 0.22)
    if name == "Slide":
        x = x + sign * travel
    elif name == "Rise":
        y = y - travel
    elif name == "Fall":
        y = y + travel
    elif name == "Sway":
        x = x + swing * wave
    elif name == "Bob":
        y = y + swing * wave
    elif name == "Orbit":
        x, y = x + 0.75 * radius * np.cos(turn), y + radius * np.sin(turn)
    elif name == "Grow":
        scale = scale * growth
    elif name == "Shrink":
        scale = scale / growth
    elif name == "Pulse":
        scale = scale * np.exp(0.45 * wave)
    else:
        angle = angle + sign * random.uniform(110, 240) * t
    return np.stack([x, y, scale, angle], 1)


def compose(background: np.ndarray, sprite: np.ndarray, pose: Iterable[float]) -> np.ndarray:
    """The object on its background, float32 (H,W,3). pose: x, y (shares of the frame), scale, angle (degrees)."""
    x, y, scale, angle = pose
    side = sprite.shape[0]
    height, width = background.shape[:2]
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, scale)
    matrix[:, 2] += x * width - side / 2, y * height - side / 2
    placed = cv2.warpAffine(sprite, matrix, (width, height), flags=cv2.INTER_LINEAR)
    alpha = placed[..., 3:]
    return background * (1 - alpha) + placed[..., :3] * alpha


def draw_background(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Smooth noise around one colour with a few still shapes on it, float32 (H,W,3) in 0..255. size: W, H."""
    coarse = (random.uniform(70, 170, 3) + random.uniform(-35, 35, (4, 5, 3))).astype(np.float32)
    fine = random.normal(0, 10, (12, 16, 3)).astype(np.float32)
    image = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC) + cv2.resize(
        fine, size, interpolation=cv2.INTER_LINEAR
    )
    for _ in range(int(random.integers(0, 3))):
        still = draw_sprite(random, size)
        pose = (random.uniform(), random.uniform(), random.uniform(0.3, 0.6), random.uniform(0, 360))
        image = compose(image, still, pose)
    return np.clip(image, 0, 255)


def draw_sprite(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A textured shape with its alpha, float32 (S,S,4): colours 0..255, alpha 0..1; a third of the frame's height."""
    side = 2 * round(size[1] * 0.19)
    grid = (np.mgrid[0:side, 0:side].astype(np.float32) + 0.5) / side * 2 - 1
    v, u = grid
    shape = _SHAPES[int(random.integers(len(_SHAPES)))]
    radius, around = np.hypot(u, v), np.arctan2(v, u)
    inside = {
        "bar": (abs(u) < 0.95) & (abs(v) < 0.4),
        "cross": ((abs(u) < 0.3) | (abs(v) < 0.3)) & (np.maximum(abs(u), abs(v)) < 0.9),
        "ellipse": u**2 + (v / 0.6) ** 2 < 0.9,
        "square": np.maximum(abs(u), abs(v)) < 0.72,
        "star": radius < 0.62 + 0.3 * np.cos(5 * around),
        "triangle": (v < 0.7) & (v > 2 * abs(u) - 0.9),
    }[shape]
    colours = random.uniform(0, 255, (2, 3))
    colours[1] = (colours[0] + random.uniform(90, 165, 3)) % 256
    direction, period = random.uniform(0, np.pi), random.uniform(0.4, 0.8)
    stripes = np.sin(2 * np.pi * (u * np.cos(direction) + v * np.sin(direction)) / period)
    if random.uniform() < 0.5:
        stripes = stripes * np.sin(2 * np.pi * (v * np.cos(direction) - u * np.sin(direction)) / period)
    # One half darker than the other, so that a turn shows on every shape.
    shade = np.where(u > 0, 1.0, random.uniform(0.45, 0.7))[..., None]
    texture = np.where(stripes[..., None] > 0, colours[0], colours[1]) * shade
    alpha = cv2.GaussianBlur(inside.astype(np.float32), (3, 3), 0)
    return np.dstack([texture, alpha]).astype(np.float32)


def _write_videos(task: tuple[str, SynthSettings, list], report: engines.Report) -> None:
    out, settings, names = task
    cv2.setNumThreads(1)
    for name, group, clip in names:
        path = Path(out, "UCF-101", _relative(name, group, clip))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                write_video(temporary, render(settings, name, group, clip), settings.fps)
        report(1)


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int, kind: str = "avi") -> None:
    """frames, each (H,W,3) uint8 RGB, as MPEG-4 Part 2 in an "avi" file, as UCF101 has it, or an "mp4" file."""
    remaining = iter(frames)
    first = next(remaining)
    with av.open(str(path), "w", format=kind, options={"fflags": "+bitexact"}) as container:
        options = {"qmin": "2", "qmax": "5", "flags": "+bitexact"}
        stream = cast(av.VideoStream, container.add_stream("mpeg4", rate=fps, options=options))
        stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], "yuv420p"
        if kind == "avi":
            stream.codec_context.codec_tag = "XVID"
        stream.codec_context.thread_count = 1
        stream.bit_rate = 8_000_000
        for image in itertools.chain([first], remaining):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _write_lists(folder: Path, names: list[tuple[str, int, int]], settings: SynthSettings) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    (folder / "classInd.txt").write_text(
        "".join(f"{n} {name}\n" for n, name in enumerate(CLASSES, 1)), encoding="utf-8"
    )
    groups = 1 + max(group for _, group, _ in names)
    # As in UCF101, the first groups are the test set.
    held_out = min(groups - 1, max(1, round(settings.test_share * groups)))
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for name, group, clip in names:
        split = "test" if group < held_out else "train"
        number = f" {CLASSES.index(name) + 1}" if split == "train" else ""
        lines[split].append(f"{_relative(name, group, clip)}{number}\n")
    for split, text in lines.items():
        (folder / f"{split}list01.txt").write_text("".join(text), encoding="utf-8")
    return {split: len(text) for split, text in lines.items()}


def _relative(name: str, group: int, clip: int) -> str:
    return f"{name}/v_{name}_g{group + 1:02d}_c{clip + 1:02d}.avi"


def adopt(out: Path, values: dict[str, Any]) -> None:
    """Makes OUT and notes in it what data set goes there; UserError if it holds something else."""
    stamp = out / _STAMP
    values = json.loads(json.dumps(values))
    if stamp.is_file():
        try:
            old = dict(json.loads(stamp.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise UserError(f"{stamp} is damaged; choose another folder, or delete {out}") from None
        if old.keys() != values.keys():
            raise UserError(f"{out} holds another kind of data set, trimmed or untrimmed; choose another folder")
        if old != values:
            changed = ", ".join(f"{key} {old[key]} -> {values[key]}" for key in values if old[key] != values[key])
            raise UserError(f"{out} holds a data set made with other settings ({changed}); choose another folder")
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    write_json(stamp, values)
