"""generative_kd: formula, torch implementation and the kernels' own code agree; gradients are right."""

import pytest
import torch

from genkd.kernels.generative_kd import generative_kd as op
from genkd.kernels.generative_kd import reference

SHAPES = [(2, 40, 3, 7, 7), (1, 1031, 1, 1, 1), (3, 40, 1, 3, 3), (1, 5, 3, 3, 1), (1, 832, 2, 3, 3)]
ALL = (torch.float32,) * 6


def inputs(shape, types=ALL, *, last=False, seed=0):
    """features, reconstruction, mean, logvar, attention, the teacher's reconstruction"""
    n, channels, time = shape[:3]
    generator = torch.Generator().manual_seed(seed)
    latent = (n, time, channels)
    sizes = (shape, shape, latent, latent, (n, channels, time), shape)
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    if last:
        for number in (0, 1, 5):
            drawn[number] = drawn[number].contiguous(memory_format=torch.channels_last_3d)
    return [value.to(kind) for value, kind in zip(drawn, types, strict=True)]


def run(function, values):
    features, reconstruction, mean, logvar, attention, taught = values
    leaves = [value.detach().clone().requires_grad_() for value in (reconstruction, mean, logvar)]
    found = function(features, *leaves, attention, taught)
    (3 * found.mse - 0.5 * found.kl + (2 * found.kd if found.kd is not None else 0)).backward()
    return list(found), [leaf.grad for leaf in leaves]


def compare(values, tolerance):
    got, got_grads = run(op, values)
    want, want_grads = run(reference, [None if value is None else value.double() for value in values])
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        if b is None:
            assert a is None
            continue
        assert a.shape == b.shape and (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_equals_the_formula(request, shape, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    for last in (False, True):
        values = inputs(shape, last=last)
        compare(values, 2e-6)
        compare([*values[:5], None], 2e-6)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_half_precision(request, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    half, full = torch.bfloat16, torch.float32
    compare(inputs((2, 40, 3, 3, 3), (half, full, half, half, half, full), last=True), 1e-2)
    compare(inputs((2, 40, 3, 3, 3), (torch.float16,) * 6), 2e-3)


def test_by_hand():
    features, made = torch.zeros(1, 1, 1, 1, 2), torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 1, 2)
    found = op(features, made, torch.full((1, 1, 1), 2.0), torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.5), made - 1)
    # (1 + 9) / 2; half the squared distance of the means, for equal variances; 1.
    assert [value.item() for value in found] == [5.0, pytest.approx(1.125), 1.0]


def test_gradcheck_and_opcheck():
    features, made, mean, logvar, attention, taught = (value.double() for value in inputs((2, 3, 2, 2, 2)))
    leaves = [value.requires_grad_() for value in (made, mean, logvar)]
    assert torch.autograd.gradcheck(lambda a, b, c: tuple(op(features, a, b, c, attention, taught)), leaves)
    values = inputs((1, 8, 3, 3, 3), last=True)
    leaves = [value.requires_grad_() for value in values[1:4]]
    for teacher in (values[5], None):
        torch.library.opcheck(
            torch.ops.genkd.generative_kd, (values[0], leaves[0], teacher, leaves[1], leaves[2], values[4])
        )


def test_compiled_whole_graph():
    values = inputs((2, 8, 3, 3, 3))

    def loss(features, made, mean, logvar, attention, taught):
        found = op(features, made * 2, mean, logvar, attention, taught)
        return found.mse + 0.1 * found.kl + 0.01 * found.kd

    def gradients(function):
        leaves = [value.detach().clone().requires_grad_() for value in values[1:4]]
        function(values[0], *leaves, *values[4:]).backward()
        return [leaf.grad for leaf in leaves]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(got, want)


def test_one_loss_alone_gives_the_others_no_gradient(emulated):
    features, made, mean, logvar, attention, taught = inputs((2, 8, 3, 3, 3))
    for index in range(3):
        leaves = [value.clone().requires_grad_() for value in (made, mean, logvar)]
        got = torch.autograd.grad(op(features, *leaves, attention, taught)[index], leaves)
        want = torch.autograd.grad(
            reference(features, *leaves, attention, taught)[index], leaves, materialize_grads=True
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_an_infinite_loss_does_not_spoil_the_others_gradients(request, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    features, made, mean, logvar, attention, taught = inputs((1, 8, 2, 3, 3))
    features[0, 0, 0, 0, 0] = torch.inf
    leaves = [value.clone().requires_grad_() for value in (made, mean, logvar)]
    for index in (1, 2):
        grads = torch.autograd.grad(op(features, *leaves, attention, taught)[index], leaves)
        assert all(grad.isfinite().all() for grad in grads)


def test_constants_may_require_gradients_where_none_are_made():
    features, made, mean, logvar, attention, taught = inputs((1, 8, 2, 3, 3))
    with torch.no_grad():
        assert op(features.requires_grad_(), made, mean, logvar, attention, taught).mse.isfinite()


def test_bad_input_is_refused():
    features, made, mean, logvar, attention, taught = inputs((2, 8, 3, 3, 3))
    with pytest.raises(ValueError, match="no gradient for features; detach it"):
        op(features.requires_grad_(), made, mean, logvar, attention)
    with pytest.raises(ValueError, match=r"mean must be \(2, 3, 8\) for features"):
        op(features.detach(), made, mean.transpose(1, 2), logvar, attention)
    with pytest.raises(ValueError, match="teacher_reconstruction must be"):
        op(features.detach(), made, mean, logvar, attention, taught[:1])
