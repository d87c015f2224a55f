"""The whole of genkd once, on synthetic videos: from AVI files to a distilled student and a report page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .configs.load import load
from .evaluation.recognition import evaluate_weights
from .evaluation.report import write_report
from .files import write_json
from .preprocessing import sources
from .preprocessing.convert import convert
from .preprocessing.synthetic import SynthSettings, synthesize
from .preprocessing.video import VideoSettings
from .trainers.distributed import choose_device
from .trainers.loop import train

VIDEOS = SynthSettings(videos_per_class=64, test_share=0.375)
CLIPS = 4  # views of a video in the final evaluation


def run(out: Path, *, device: str, seed: int, say: Callable[[str], None], workers: int = 2) -> Path:
    """Runs every step that is not yet done in `out`; returns the report's path.

    The student is trained twice from one seed, so from the same weights and on the same clips: without and with
    distillation.
    """
    out.mkdir(parents=True, exist_ok=True)
    on_gpu = choose_device(device).type == "cuda"
    # DALI decodes VP9 on a CPU; NVDEC takes H.264 at any size, but VP9 only from 128 pixels up.
    video = VideoSettings(codec="h264" if on_gpu else "vp9", short_side=72)
    data = f"data.dataset={out / 'data'}"
    common = [data, f"seed={seed}", f"device={device}"]
    steps: list[tuple[str, Callable[[], object]]] = [
        ("synthesize videos", lambda: synthesize(out / "videos", VIDEOS, workers=workers)),
        ("convert to shards", lambda: convert(sources.ucf101(out / "videos"), out / "data", video, workers=workers)),
    ]
    runs = {
        "teacher": ("teacher", []),
        "representation": ("representation", [f"init={out / 'teacher'}"]),
        "student-plain": ("distill", ["method=none"]),
        "student-distilled": ("distill", [f"teacher={out / 'representation'}"]),
    }
    for name, (phase, overrides) in runs.items():
        steps.append((f"train {name}", partial(_train, phase, [*common, *overrides], out / name, say)))
    for name in runs:
        steps.append((f"evaluate {name}", partial(_evaluate, out, name, device)))
    timings = _read(out / "timings.json")
    for number, (what, step) in enumerate(steps, 1):
        say(f"[{number}/{len(steps) + 1}] {what}")
        started = time.perf_counter()
        step()
        # A step that was finished earlier keeps the time it took then.
        timings.setdefault(what, round(time.perf_counter() - started, 2))
        write_json(out / "timings.json", timings)
    say(f"[{len(steps) + 1}/{len(steps) + 1}] write the report")
    report = out / "report.html"
    write_report(report, [out / name for name in runs], title="genkd demo", timings=timings)
    return report


def _train(phase: str, overrides: list[str], run: Path, say: Callable[[str], None]) -> None:
    train(load("demo", phase, overrides), run, say)


def _evaluate(out: Path, name: str, device: str) -> None:
    folder = out / name / "evaluation"
    if not (folder / "results.json").is_file():
        evaluate_weights(out / name, out / "data", folder, clips=CLIPS, device=device)


def _read(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
