"""boundary_max_pool: the reference implementation's numbers, the formula, and the kernels' own code."""

from pathlib import Path

import numpy as np
import pytest
import torch

import genkd
from genkd.benchmarks import kernels as benchmark
from genkd.kernels.boundary_max_pool import _sum_in_order, reference
from genkd.kernels.boundary_max_pool import boundary_max_pool as op

OPEN = Path(genkd.__file__).parent.parent / "shared/reference/open/boundary_max_pooling.npz"


def inputs(n, channels, time, count, dtype=torch.float32, seed=0):
    """Few values, so that many are equal; segments reversed and out of range too."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(-4, 5, (n, channels, time), generator=generator).to(dtype)
    segments = torch.rand(n, count, 4, generator=generator) * (time + 6) - 3
    return features, segments


def run(function, features, segments):
    leaf = features.detach().clone().requires_grad_()
    found = function(leaf, segments)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    found.backward(weights.to(found))
    return found.detach(), leaf.grad


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.skipif(not OPEN.is_file(), reason="the reference implementation's numbers are absent")
def test_equals_the_reference_implementation(request, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    arrays = {name: torch.from_numpy(value) for name, value in np.load(OPEN).items()}
    for size in ("k40", "k6"):
        features = arrays["input"].clone().requires_grad_()
        pooled = op(features, arrays[f"segments_{size}"])
        assert torch.equal(pooled, arrays[f"output_{size}"])
        pooled.backward(arrays[f"grad_output_{size}"])
        torch.testing.assert_close(features.grad, arrays[f"grad_input_{size}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (2, 6, 3, 7), (1, 1030, 5, 2), (2, 4, 300, 300), (1, 8, 64, 1)])
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_equals_the_formula(request, shape, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        features, segments = inputs(*shape, dtype=dtype)
        pooled, grad = run(op, features, segments)
        want, want_grad = run(reference, features, segments)
        assert torch.equal(pooled, want) and pooled.dtype == dtype
        torch.testing.assert_close(grad, want_grad, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_boundaries_by_hand(request, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    features = torch.tensor([[[1.0, 5.0, 5.0, 2.0], [4.0, 3.0, 2.0, 9.0]]]).requires_grad_()
    nan, inf = float("nan"), float("inf")
    segments = torch.tensor([[[0.9, 2.2, 1.0, 2.999], [3.0, 1.0, -7.0, 0.0], [nan, -inf, 2.0, inf]]])
    pooled = op(features, segments)
    assert pooled.tolist() == [[[5.0, 2.0, 1.0], [3.0, 4.0, 9.0]]]
    pooled.backward(torch.tensor([[[1.0, 10.0, 100.0], [1.0, 10.0, 100.0]]]))
    assert features.grad.tolist() == [[[100.0, 1.0, 0.0, 10.0], [10.0, 1.0, 0.0, 100.0]]]  # of the two fives, the first


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_not_a_number_and_infinities_in_features(request, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    row = [1.0, float("nan"), 3.0, float("nan"), -float("inf"), -float("inf")]
    features = torch.tensor([[row, row]]).requires_grad_()
    pooled = op(features, torch.tensor([[[0.0, 5.0, 4.0, 5.0], [2.0, 2.0, 2.0, 4.0]]]))
    assert pooled.isnan().tolist() == [[[True, False], [False, True]]] and pooled[0, 1, 0] == -float("inf")
    pooled.backward(torch.ones_like(pooled))
    assert features.grad.tolist() == [[[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]]


def test_a_stretch_of_minus_infinities_stays_inside():
    features = torch.tensor([[[1.0, 2.0, -torch.inf, -torch.inf]] * 2])
    segments = torch.tensor([[[2.0, 3.0, 0.0, 3.0]]])
    for function in (op, reference):
        assert function(features, segments).tolist() == [[[-torch.inf], [2.0]]]


def test_the_sum_that_stands_in_on_a_gpu_is_the_same():
    grad, chosen = torch.randn(2, 70, 9), torch.randint(0, 5, (2, 70, 9), dtype=torch.int32)
    want = torch.zeros(2, 70, 5).scatter_add_(2, chosen.long(), grad)
    torch.testing.assert_close(_sum_in_order(grad, chosen, 5), want)


def test_the_benchmarks_transcription_of_the_original_algorithm(emulated):
    """No two values are equal: of equal ones the original's order of atomics is free."""
    features = torch.randperm(2 * 6 * 30, generator=torch.Generator().manual_seed(0)).reshape(2, 6, 30).float()
    segments = inputs(2, 6, 30, 50)[1]
    want = run(reference, features, segments)
    for got, expected in zip(run(benchmark._Original.apply, features, segments), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_gradcheck_opcheck_and_no_segments(emulated):
    generator = torch.Generator().manual_seed(0)
    features = torch.randperm(2 * 4 * 9, generator=generator).reshape(2, 4, 9).double().requires_grad_()
    segments = inputs(2, 4, 9, 5)[1]
    assert torch.autograd.gradcheck(op, (features, segments))
    torch.library.opcheck(torch.ops.genkd.boundary_max_pool, (features.detach().requires_grad_(), segments))
    for values in (features.detach(), features.detach().float()):
        leaf = values.requires_grad_()
        pooled = op(leaf, segments[:, :0])
        assert pooled.shape == (2, 4, 0)
        pooled.sum().backward()
        assert (leaf.grad == 0).all()


def test_same_bits_twice(emulated):
    features, segments = inputs(2, 8, 40, 200)
    first, second = run(op, features, segments), run(op, features, segments)
    assert torch.equal(first[1], second[1])


def test_compiled_whole_graph():
    features, segments = inputs(2, 8, 40, 20)
    compiled = torch.compile(lambda x, s: op(x * 2, s) * 3, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, features, segments), run(lambda x, s: op(x * 2, s) * 3, features, segments),
                         strict=True):  # fmt: skip
        assert torch.equal(got, want)


def test_bad_shapes_name_what_is_wrong():
    features, segments = inputs(2, 8, 40, 20)
    with pytest.raises(ValueError, match="even number of channels, not \\(2, 7, 40\\)"):
        op(features[:, :7], segments)
    with pytest.raises(ValueError, match=r"segments must be \(N,K,4\)"):
        op(features, segments[:1])
    with pytest.raises(ValueError, match=r"segments must be floating point, not torch\.int64"):
        op(features, segments.long())
