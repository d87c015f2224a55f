import pytest
import torch

from genkd.benchmarks import kernels, run_benchmark
from genkd.errors import UserError


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes a minute, and is torch's own
    return kernels.run(2, small=True, on_gpu=False)


def test_every_op_is_measured_beside_the_others(result):
    rows = result["rows"]
    assert {(row["workload"].split()[0], row["name"]) for row in rows} == {
        (kernel, name)
        for kernel in ("attention_kd", "generative_kd", "boundary_max_pool")
        for name in ("torch eager", "torch.compile", "genkd")
    }
    for row in rows:
        assert row["p10"] <= row["median"] <= row["p90"] and row["repeats"] == 2
        assert row["extra"]["GB/s"] == pytest.approx(row["bytes"] / row["median"] / 1e3)
        assert ("peak MB" in row["extra"]) == row["workload"].endswith("both")
        if row["name"] == "torch eager":
            assert row["ratio"] == 1.0


def test_bytes_that_must_move_are_counted_by_hand(result):
    """Features of 1x64x4x3x3 float32 are 9216 bytes, a row of attention (N,C,T) 1024."""
    moved = {row["workload"]: row["bytes"] for row in result["rows"]}
    name = "1x64x4x3x3 fp32 channels_last_3d"
    # Reads features and reconstruction, both attentions; writes the pooled foreground.
    assert moved[f"attention_kd pooled {name} forward"] == 2 * 9216 + 3 * 1024
    # Reads both again, and attention, the teacher's and the pooled gradient; writes two gradients and attention's.
    assert moved[f"attention_kd pooled {name} backward"] == 4 * 9216 + 4 * 1024
    assert moved[f"generative_kd {name} forward"] == 3 * 9216 + 3 * 1024


@pytest.mark.parametrize("maps", [False, True])
def test_contenders_compute_the_same(maps):
    device = torch.device("cpu")
    cases = [kernels._attention((1, 8, 3, 2, 2), "fp32", "contiguous", device, maps)]
    if not maps:
        cases += [
            kernels._generative((1, 8, 3, 2, 2), "fp32", "contiguous", device),
            kernels._pooling(1, 4, 16, 5, "fp32", device),
        ]
    for case in cases:
        outputs = [function(*case.leaves) for function in case.contenders.values()]
        for values in zip(*outputs, strict=True):
            torch.testing.assert_close(values[0], values[1])


def test_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="takes no --data"):
        run_benchmark("kernels", tmp_path, 1)
