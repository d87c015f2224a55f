"""A detector's windows beside the original's loops, at a size that takes seconds."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from genkd.benchmarks import detect, detect_windows
from genkd.benchmarks.detect_schedule import OriginalTraining, Seen
from genkd.evaluation.detect import Found, candidates
from genkd.tables import benchmark_tables, show

TINY = "base: detect-demo\ndata: {size: 32}\nmodel: {width: 0.0625}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY)
    with detect_windows.setting(detect_windows.Size(str(path), 40.0, 4, 2, 2)) as made:
        yield made


def test_inference_finds_the_same_in_the_same_windows(place):
    result = detect_windows.inference(place, 1)
    assert [row["name"] for row in result["rows"]] == [detect_windows.LOOP, detect_windows.GENKD]
    about = result["about"]
    # 400 frames, 64 apart: 0, 64, ..., 256, and one that ends with the video.
    assert (about["windows"], about["video_seconds"], about["preset"][-9:]) == (6, 40.0, "tiny.yaml")
    assert about["same"]["segments_max"] < 0.01 and about["same"]["scores_max"] < 1e-5


def test_other_results_are_no_comparison(place, monkeypatch):
    loop = detect_windows.slide

    def late(*given):
        found = loop(*given)
        return found._replace(segments=found.segments + 1)

    monkeypatch.setattr(detect_windows, "slide", late)
    with pytest.raises(AssertionError, match=r"100\.0 % of the segments differ"):
        detect_windows.inference(place, 1)
    one = Seen(torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), [torch.zeros(4, 3), torch.zeros(0, 3)])
    with pytest.raises(AssertionError, match="0 of 4 segments of class 1"):
        detect_windows._same(one, one._replace(by_class=[torch.zeros(0, 3)] * 2))


def test_training_sees_the_same_windows_in_any_batch(place):
    samples = detect_windows._samples(place)
    batches = detect_windows._batches(place, 2, torch.device("cpu"))
    assert [len(batch.clips) for batch in batches] == [2, 2] and len(samples) == 4
    assert any(sample.spliced is not None for sample in samples)
    for number, sample in enumerate(samples):
        batch, own = batches[number // 2], number % 2
        assert torch.equal(batch.clips[own], sample.clip[0])
        torch.testing.assert_close(sample.actions[:, :2] * 128, batch.windows.actions[own][:, :2])
        assert (own in batch.windows.with_splice) == (sample.spliced is not None)
        assert (sample.actions[:, 0].diff() >= 0).all(), "in order, as the background between them needs"


def test_training_is_measured_beside_the_originals_two_passes(place, monkeypatch):
    seen = []
    for name in ("vae_pass", "detector_pass"):
        real = getattr(OriginalTraining, name)
        monkeypatch.setattr(
            OriginalTraining, name,
            lambda self, windows, *rest, real=real, name=name: (seen.append((name, len(windows))),
                                                                real(self, windows, *rest)),
        )  # fmt: skip
    size = dataclasses.replace(place.size, windows=2)
    result = detect_windows.training(dataclasses.replace(place, size=size), 1)
    assert seen == [("vae_pass", 2), ("detector_pass", 2)] * 2  # once to warm up
    assert [row["name"] for row in result["rows"]] == [
        detect_windows.LOOP, detect_windows.GENKD, "genkd, stages by epoch", "genkd, batches of one window",
    ]  # fmt: skip
    assert all(row["median"] > 0 and row["extra"]["cpu_ms_a_window"] > 1 for row in result["rows"])


def test_the_originals_passes_train_one_module_each(place):
    """And leave the other, the teacher and batch norm's statistics as they are."""
    samples = detect_windows._samples(place)[:1]
    modules = detect_windows._original_modules(place)
    schedule = OriginalTraining(*modules, torch.device("cpu"))

    def state():
        return [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]

    def changed(before):
        return [
            {key for key, value in module.state_dict().items() if not torch.equal(value, old[key])}
            for module, old in zip(modules, before, strict=True)
        ]

    before = state()
    schedule.vae_pass(samples)
    student, cvaes, *others = changed(before)
    assert cvaes and not student and not any(others)
    before = state()
    schedule.detector_pass(samples, 1)
    student, *others = changed(before)
    assert student and not any(others) and not any("running" in name for name in student)


def test_the_workloads_of_the_command(place, monkeypatch, capsys):
    for name in ("inference", "training"):
        measured = {"benchmark": "detect", "unit": "windows/s", "about": {"windows": 9}, "machine": {"cpu": "a"}}
        rows = [{"name": label, "median": rate, "p10": rate, "p90": rate, "ratio": rate, "repeats": 1, "extra": {}}
                for label, rate in ((detect_windows.LOOP, 1.0), (detect_windows.GENKD, 2.5))]  # fmt: skip
        monkeypatch.setattr(
            detect_windows, name, lambda place, repeats, measured=measured, rows=rows: {**measured, "rows": rows}
        )
    result = detect.run(None, 1, ["inference", "training"], size=place.size)
    assert [(row["workload"], row["unit"]) for row in result["rows"]] == [("inference", "windows/s")] * 2 + [
        ("training", "windows/s")
    ] * 2
    # Training has no goal.
    assert [(target["name"], target["met"]) for target in result["targets"]] == [
        ("inference beside the original's loop", False)
    ]
    assert result["about"] == {"skipped": {}, "inference": {"windows": 9}, "training": {"windows": 9}}
    json.dumps(result)
    show(benchmark_tables(result))
    assert "detect training" in capsys.readouterr().out


def test_candidates_by_hand():
    """Of a video of 25 frames at 10 a second: a window from 10 on; the second anchor reaches beyond the video's end,
    the third has no length, and the threshold itself is not above it."""
    segments = np.array([[2.0, 8.0], [5.0, 40.0], [30.0, 40.0]])
    scores = np.array([[0.5, 0.1], [0.25, 0.75], [0.9, 0.9]])
    one, two = candidates([Found(0, 10, segments, scores)], 10.0, 25, 0.25)
    np.testing.assert_allclose(one, [[1.2, 1.8, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(two, [[1.5, 2.5, 0.75]], rtol=1e-6)
    assert one.dtype == np.float32
