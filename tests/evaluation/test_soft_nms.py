import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import genkd.evaluation
from genkd.benchmarks.detect_reference import soft_nms as original
from genkd.errors import UserError
from genkd.evaluation.soft_nms import soft_nms, soft_nms_classes, soft_nms_groups

CASES = {
    "sigma0.5": (0.5, 1000), "sigma0.1": (0.1, 1000), "sigma0.5_top50": (0.5, 50), "sigma0.1_top5000": (0.1, 5000),
}  # fmt: skip


def by_hand(segments, sigma, top_k, threshold, least):
    """The definition, one segment after another, in Python's own numbers."""
    rows = [list(map(float, row)) for row in segments]
    left = {number for number, row in enumerate(rows) if row[2] >= threshold}
    kept = set()
    while len(left) >= least and len(kept) < top_k:
        best = min(left, key=lambda number: (-rows[number][2], number))
        left.remove(best)
        kept.add(best)
        start, end, _ = rows[best]
        for number in sorted(left):
            shared = min(end, rows[number][1]) - max(start, rows[number][0])
            if shared > 0:
                tiou = shared / (end - start + rows[number][1] - rows[number][0] - shared)
                rows[number][2] *= math.exp(-(tiou**2) / sigma)
                if rows[number][2] < threshold:
                    left.remove(number)
    return np.array([rows[number] for number in sorted(kept)]).reshape(-1, 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["numpy", "torch", "float64"])
def test_equals_the_reference_implementation(reference, case, kind):
    arrays = np.load(reference / "open/softnms.npz")
    segments = arrays["segments"]
    given = {"numpy": segments, "torch": torch.from_numpy(segments), "float64": segments.astype(np.float64)}[kind]
    before = given.copy() if kind != "torch" else given.clone()
    kept = soft_nms(given, *CASES[case], 0.001, compat="reference")
    assert type(kept) is type(given) and kept.dtype == given.dtype and (given == before).all()
    assert len(kept) == arrays[f"count_{case}"]
    np.testing.assert_allclose(np.asarray(kept), arrays[f"rows_{case}"], atol=1e-6)


def test_a_lone_detection_is_kept_unless_as_the_reference():
    lone = np.array([[1.0, 2.0, 0.5]])
    assert soft_nms(lone).tolist() == lone.tolist()
    assert soft_nms(lone, compat="reference").shape == (0, 3)
    apart = np.array([[1.0, 2.0, 0.5], [5.0, 6.0, 0.4]])
    assert soft_nms(apart).tolist() == apart.tolist()
    assert soft_nms(apart, compat="reference").tolist() == apart[:1].tolist()


def test_scores_decay_by_hand():
    """tIoU of the first two is 5 of 15; the third touches the first, and shares 2 of 13 with the second."""
    segments = np.array([[5, 15, 0.8], [0, 10, 0.9], [10, 13, 0.002]], np.float32)
    kept = soft_nms(segments, sigma=0.5, score_threshold=0.001)
    second = 0.8 * math.exp(-((5 / 15) ** 2) / 0.5)
    third = 0.002 * math.exp(-((3 / 10) ** 2) / 0.5)
    np.testing.assert_allclose(kept[:, 2], [second, 0.9, third], rtol=1e-6)
    assert soft_nms(segments, score_threshold=0.0019)[:, 2].tolist() == kept[:2, 2].tolist()
    assert soft_nms(segments, top_k=1)[:, 1].tolist() == [10]


@pytest.mark.parametrize("compat", ["none", "reference"])
@pytest.mark.parametrize(("sigma", "top_k", "threshold"), [(0.5, 1000, 0.001), (0.05, 1000, 0.0), (1.0, 20, 0.3)])
def test_equals_the_definition_on_awkward_segments(sigma, top_k, threshold, compat):
    """Equal scores and starts, segments without length or that end before they start, more than a block of them."""
    generator = np.random.default_rng(0)
    for count in (2, 63, 65, 150):
        starts = generator.integers(-5, 40, count)
        lengths = generator.choice([-3, 0, 1, 2, 5, 30], count)
        segments = np.stack([starts, starts + lengths, generator.integers(0, 10, count) / 10], 1)
        kept = soft_nms(segments, sigma, top_k, threshold, compat)
        wanted = by_hand(segments, sigma, top_k, threshold, 2 if compat == "reference" else 1)
        assert kept.shape == wanted.shape
        np.testing.assert_allclose(kept, wanted, atol=1e-12)


def test_equals_the_originals_loop_on_many_segments():
    generator = torch.Generator().manual_seed(0)
    segments = torch.rand(500, 3, generator=generator) * torch.tensor([100.0, 5.0, 1.0])
    segments[:, 1] += segments[:, 0]
    kept = soft_nms(segments, 0.3, 1000, 0.01, compat="reference")
    torch.testing.assert_close(kept, original(segments, 0.3, 1000, 0.01), atol=1e-6, rtol=0)


def test_classes_and_groups_are_suppressed_by_themselves():
    generator = np.random.default_rng(1)
    segments = generator.random((4, 90, 3)).astype(np.float32) * [50, 5, 1]
    segments[..., 1] += segments[..., 0]
    segments[2, 10:] = 0  # rows that only fill up
    by_class = soft_nms_classes(torch.from_numpy(segments), 0.3, 40, 0.02)
    assert [len(kept) for kept in by_class][2] <= 10
    for own, kept in zip(segments, by_class, strict=True):
        assert kept.tolist() == soft_nms(own, 0.3, 40, 0.02).tolist()
    shuffled = generator.permutation(360)
    groups = np.repeat([7, 3, 9, 1], 90)[shuffled]
    flat = segments.reshape(-1, 3)[shuffled]
    rows, scores = soft_nms_groups(flat, groups, 0.3, 40, 0.02)
    assert (np.diff(rows) > 0).all()
    for group in (7, 3, 9, 1):
        own = groups[rows] == group
        kept = np.column_stack([flat[rows[own], :2], scores[own]])
        np.testing.assert_array_equal(kept, soft_nms(flat[groups == group], 0.3, 40, 0.02))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_dtype_is_kept(dtype):
    segments = torch.tensor([[0, 10, 4], [5, 15, 2]]).to(dtype)
    kept = soft_nms(segments)
    assert kept.dtype == (torch.float64 if dtype == torch.int64 else dtype)
    assert kept[1, 2].item() == pytest.approx(2 * math.exp(-2 / 9), rel=1e-2)


def test_no_segments():
    assert soft_nms(np.empty((0, 3), np.float32)).shape == (0, 3)
    assert soft_nms(torch.empty(0, 3)).shape == (0, 3)
    assert [kept.shape for kept in soft_nms_classes(np.empty((2, 0, 3)))] == [(0, 3)] * 2
    assert soft_nms_classes(np.empty((0, 5, 3))) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": 0}, "sigma above 0, not 0"),
        ({"sigma": math.nan}, "sigma above 0, not nan"),
        ({"top_k": 0}, "top_k must be 1 or more, not 0"),
        ({"score_threshold": -0.1}, "threshold of soft-NMS must be 0 or more, not -0.1"),
        ({"compat": "nearly"}, "unknown compat 'nearly'"),
        ({"segments": np.zeros((3, 4))}, r"takes segments \(N,3\) of start, end, score, not \(3, 4\)"),
        ({"segments": np.array([[0, 1, 0.5], [2, np.nan, 0.5]])}, r"segment 1 \(2, nan, 0.5\) is not finite"),
        ({"segments": np.array([[0, 1, np.inf]])}, r"segment 0 \(0, 1, inf\) is not finite"),
    ],
)
def test_bad_input_is_one_sentence(change, words):
    with pytest.raises(UserError, match=words):
        soft_nms(**{"segments": np.array([[0, 1, 0.5]]), **change})


def test_neither_torch_nor_numba_is_imported_for_it():
    code = (
        "import sys, genkd.evaluation.detection; print([n for n in ('torch', 'numba', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("home", ["read-only", "writable"])
def test_compiles_where_the_package_is_read_only(tmp_path, home):
    """With a home the compiled loops are kept there, and without one compiled anew: said, not refused."""
    package, place = tmp_path / "package", tmp_path / "home"
    package.mkdir()
    place.mkdir()
    shutil.copy(os.path.join(genkd.evaluation.__path__[0], "detection_loops.py"), package)
    package.chmod(0o555)
    if home == "read-only":
        place.chmod(0o555)
    command = [sys.executable, "-B", "-c",
               "import logging, sys; logging.basicConfig(level=logging.INFO); sys.path.insert(0, sys.argv[1])\n"
               "from detection_loops import _overlap; print(_overlap(0.0, 10.0, 5.0, 15.0))", str(package)]  # fmt: skip
    if os.geteuid() == 0:  # whom modes do not keep from writing
        if not shutil.which("setpriv"):
            pytest.skip("as root, needs setpriv to give up the right to write everywhere")
        lost = "-dac_override,-dac_read_search"
        command = ["setpriv", "--bounding-set", lost, "--inh-caps", lost, *command]
    environment = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "PYTHONPATH")}
    environment |= {"HOME": str(place), "XDG_CACHE_HOME": str(place)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == str(5 / 15), done.stderr
    assert done.stderr.count("compiled anew in every process") == (home == "read-only")
    assert bool(list(place.rglob("*.nbc"))) == (home == "writable")
    assert [path.name for path in package.iterdir()] == ["detection_loops.py"]
