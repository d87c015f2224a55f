"""What a soak calls lost, repeated and grown, on records made by hand."""

import json
import mmap
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from genkd.benchmarks import soak_findings
from genkd.benchmarks.soak_findings import Sample


def write(path, lines, end=""):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def test_parts_of_lines_are_passed_over(tmp_path):
    path = write(tmp_path / "record", [[1.0, 0, 0, 0, [10, 11]], [1.0, 1, 0, 0, [12]]], end="[1.0, 2, 0")
    assert [line[1] for line in soak_findings.read(path)] == [0, 1]
    assert [line[1] for line in soak_findings.read(path, behind=3)] == [1]
    assert [line[1] for line in soak_findings.read(path, behind=-100)] == [0, 1]
    assert not list(soak_findings.read(tmp_path / "none"))


# Two epochs of the rows 0 to 3 in batches of two, one row a rank.
WHOLE = [[1.0, step, step // 2, rank, [(2 * step + rank) % 4]] for step in range(4) for rank in range(2)]


@pytest.mark.parametrize(
    ("change", "lost", "repeated", "unknown"),
    [
        (lambda lines: lines, 0, 0, 0),
        (
            lambda lines: [*lines[:4], [1.0, 2, 1, 0, [3]], *lines[4:], [2.0, 2, 1, 0, [0]], [2.0, 2, 1, 1, [1]]],
            0,
            0,
            0,
        ),
        (lambda lines: lines[:-1], 1, 0, 0),  # the last row was never taken
        (lambda lines: [*lines, [2.0, 3, 1, 0, [2]]], 1, 0, 0),  # an attempt of one rank only counts instead
        (lambda lines: [*lines, [1.0, 4, 1, 0, [0]]], 0, 1, 0),
        (lambda lines: [*lines, [1.0, 4, 2, 0, [0]]], 0, 0, 1),
    ],
    ids=["whole", "taken again", "lost", "half an attempt", "repeated", "an epoch too many"],
)
def test_samples_are_counted_by_what_the_last_attempt_saw(tmp_path, change, lost, repeated, unknown):
    counts = soak_findings.count_samples(write(tmp_path / "record", change(WHOLE)), 2, [0, 1, 2, 3])
    assert counts == {"lost": lost, "repeated": repeated, "unknown": unknown}


def test_growth_is_of_what_had_warmed_up():
    def looks(first, last, count=20):
        return [Sample(25.0 + i, megabytes, 8, 30) for i, megabytes in enumerate(np.linspace(first, last, count))]

    cold = [Sample(float(i), 1.0, 1, 3) for i in range(20)]
    steady, leaky = cold + looks(100, 100), cold + looks(100, 200, 30)
    assert soak_findings.growth({1: steady, 2: cold}) == {"megabytes": 1.0, "threads": 1.0, "files": 1.0}
    assert soak_findings.growth({1: steady, 2: leaky})["megabytes"] > 1.5
    assert soak_findings.growth({1: cold}) == {}
    starts = {number: cold + looks(megabytes, megabytes) for number, megabytes in enumerate(range(100, 200, 10))}
    assert soak_findings.growth_from_start_to_start(starts)["megabytes"] == pytest.approx(185 / 105, abs=1e-3)


def test_a_look_at_this_process():
    block = mmap.mmap(-1, 50_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # no allocator keeps a part
    block.write(bytes([1]) * len(block))
    files = [open(os.devnull) for _ in range(50)]  # noqa: SIM115
    sample = soak_findings.look_at(os.getpid())
    for file in files:
        file.close()
    block.close()
    after = soak_findings.look_at(os.getpid())
    assert sample.megabytes - after.megabytes > 40
    assert 40 < sample.files - after.files < 60  # other threads of this process may open and close some
    assert 0 < sample.seconds <= after.seconds
    assert soak_findings.look_at(1 << 30) is None


def test_the_largest_difference_of_weights(tmp_path):
    for name, shift in (("one", 0.0), ("two", 0.25)):
        (tmp_path / name / "weights").mkdir(parents=True)
        for network in ("recognizer", "cvae"):
            weights = {"a": np.zeros(3, np.float32), "b": np.full(2, shift if network == "cvae" else 1.0, np.float32)}
            save_file(weights, tmp_path / name / "weights" / f"{network}.safetensors")
    assert soak_findings.compare_weights(tmp_path / "one", tmp_path / "two") == 0.25
