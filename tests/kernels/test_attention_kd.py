"""attention_kd: formula, torch implementation and the kernels' own code agree; gradients are right."""

import itertools

import pytest
import torch

from genkd.kernels import backend
from genkd.kernels.attention_kd import attention_kd as op
from genkd.kernels.attention_kd import reference
from genkd.kernels.tensors import layout_of

# (N,C,T,H,W): N = 1, time of 1 and 3, odd places, channels that 8 does and does not divide, rows longer than a tile.
SHAPES = [
    (2, 40, 3, 7, 7),
    (1, 1031, 1, 1, 1),
    (3, 40, 1, 3, 3),
    (1, 104, 3, 1, 3),
    (2, 5, 3, 3, 1),
    (1, 832, 2, 3, 3),
    (1, 2, 2, 65, 67),
    (1, 8, 2, 72, 64),
    (1, 3, 2, 27, 29),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def inputs(shape, dtype=torch.float32, *, seed=0, last=False, logits=False, attention_dtype=None, made_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, generator=generator) for size in (shape, shape[:3], shape[:3], shape)]
    features, attention, taught, made = drawn[0].relu(), *drawn[1:]
    if not logits:
        attention, taught = attention.sigmoid(), taught.sigmoid()
    if last:
        features, made = (value.contiguous(memory_format=torch.channels_last_3d) for value in (features, made))
    types = (dtype, attention_dtype or dtype, attention_dtype or dtype, made_dtype or dtype)
    return [value.to(kind) for value, kind in zip((features, attention, taught, made), types, strict=True)]


def run(function, values, **options):
    """Outputs and gradients, of a mixture of all outputs whose weights are not 1."""
    leaves = [None if value is None else value.detach().clone().requires_grad_() for value in values]
    found = function(leaves[0], leaves[1], None if values[2] is None else values[2], leaves[3], **options)
    generator = torch.Generator().manual_seed(9)
    total = 0
    for number, value in enumerate(value for value in found if value is not None):
        weights = torch.randn(value.shape, generator=generator).to(value.device)
        total = total + (weights * value.to(weights.dtype if value.dtype != torch.float64 else value.dtype)).sum()
        total = total * (1.5 if number == 0 else 1)
    total.backward()
    return list(found), [None if leaf is None else leaf.grad for leaf in (leaves[0], leaves[1], leaves[3])]


def assert_close(got, want, tolerance, what=""):
    if want is None:
        assert got is None, what
        return
    assert got.shape == want.shape and got.isfinite().all(), what
    scale = want.double().abs().max().clamp_min(1e-12)
    about = torch.finfo(got.dtype)
    finest = about.tiny * about.eps  # of a type's subnormal numbers, which a mean's gradient may be
    assert (got.double() - want.double()).abs().max() <= tolerance * scale + finest, what


def compare(values, tolerance, **options):
    """The op against the formula in float64 of the same (rounded) inputs."""
    got, got_grads = run(op, values, **options)
    exact = [None if value is None else value.double() for value in values]
    want, want_grads = run(reference, exact, **options)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, tolerance, f"output {number}")
    for name, a, b in zip(("features", "attention", "reconstruction"), got_grads, want_grads, strict=True):
        assert_close(a, b, tolerance, f"gradient of {name}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("maps", [False, True])
def test_torch_implementation_equals_the_formula(shape, maps):
    for last, logits in itertools.product((False, True), (False, True)):
        compare(inputs(shape, last=last, logits=logits), 2e-6, maps=maps, logits=logits)
    compare(inputs(shape), 2e-6, maps=maps, per_batch=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("maps", [False, True], ids=["pooled", "maps"])
def test_kernels_equal_the_formula(emulated, shape, last, maps):
    compare(inputs(shape, last=last), 2e-6, maps=maps)
    compare(inputs(shape, last=last, logits=True), 2e-6, maps=maps, logits=True)


@pytest.mark.parametrize("maps", [False, True], ids=["pooled", "maps"])
@pytest.mark.parametrize(
    ("dtype", "attention_dtype", "made_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),  # what autocast makes of the networks
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_half_precision(request, dtype, attention_dtype, made_dtype, maps, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    for last in (False, True):
        values = inputs((2, 40, 3, 3, 3), dtype, last=last, attention_dtype=attention_dtype, made_dtype=made_dtype)
        compare(values, TOLERANCE[torch.bfloat16 if torch.bfloat16 in (dtype, attention_dtype) else dtype], maps=maps)


def test_without_teacher_or_reconstruction(emulated):
    features, attention, taught, made = inputs((2, 40, 3, 3, 3))
    for maps in (False, True):
        for values in ((features, attention, None, None), (features, attention, taught, None),
                       (features, attention, None, made)):  # fmt: skip
            compare(values, 2e-6, maps=maps)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_features_without_activity_are_zero_with_finite_gradients(request, kernels):
    if kernels:
        request.getfixturevalue("emulated")
    features, attention, taught, made = inputs((2, 8, 3, 3, 3))
    features[1] = 0
    for maps in (False, True):
        got, grads = run(op, (features, attention, taught, made), maps=maps)
        assert (got[0][1] == 0).all() and got[0].isfinite().all()
        assert all(grad.isfinite().all() for grad in grads)
    # All attention on one side: the other map has no sum to divide by.
    got, grads = run(op, (features, torch.ones_like(attention), None, None), maps=True)
    assert (got[1] == 0).all() and torch.equal(got[0], features) and all(g is None or g.isfinite().all() for g in grads)


def test_ratio_and_pooling_by_hand():
    features = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1, 1)
    attention = torch.tensor([[[0.5, 0.25]]])
    # sum F = 4, sum F*a = 1.25, r = 3.2: foreground 1.6 and 2.4, mean 2; background 1 and 4.5 / 2.75 of it.
    assert op(features, attention).foreground.item() == pytest.approx(2.0)
    maps = op(features, attention, maps=True)
    assert maps.foreground.flatten().tolist() == pytest.approx([1.6, 2.4])
    assert maps.background.flatten().tolist() == pytest.approx([0.5 * 4 / 2.75, 2.25 * 4 / 2.75])


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
def test_gradcheck(maps, logits, per_batch):
    features, attention, taught, made = (value.double() for value in inputs((2, 3, 3, 2, 2), logits=logits))
    leaves = [(value + 0.1).requires_grad_() for value in (features, attention, made)]

    def function(features, attention, made):
        found = op(features, attention, taught, made, maps=maps, logits=logits, per_batch=per_batch)
        return tuple(value for value in found if value is not None)

    assert torch.autograd.gradcheck(function, leaves)


def turned(values):
    """The same (N,C,T) values, with the channels next to each other in memory."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


def test_opcheck():
    for shape, maps, last in (
        ((2, 8, 3, 3, 3), False, True),
        ((1, 5, 1, 2, 2), True, False),
        ((2, 8, 3, 3, 3), True, True),
    ):
        features, attention, taught, made = inputs(shape, last=last)
        if maps and last:
            attention, taught = turned(attention), turned(taught)
        features, attention, made = (value.requires_grad_() for value in (features, attention, made))
        for arguments in ((features, attention, taught, made), (features, attention, None, None)):
            torch.library.opcheck(torch.ops.genkd.attention_kd, (*arguments, maps, False, False))


@pytest.mark.parametrize(
    ("maps", "compiler"),
    [(False, "aot_eager"), (True, "aot_eager"), pytest.param(True, "inductor", marks=pytest.mark.slow)],
)
def test_compiled_whole_graph(maps, compiler):
    """inductor relies on the strides that the ops promise; it takes a while."""
    features, attention, taught, made = inputs((2, 8, 3, 3, 3), last=True)
    values = features, turned(attention), turned(taught), made

    def loss(features, attention, taught, made):
        found = op(features * 2, attention, taught, made, maps=maps)
        return found.foreground.square().sum() + found.attention_loss + 3 * found.reconstruction_loss

    def gradients(function):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        function(leaves[0], leaves[1], values[2], leaves[3]).backward()
        return [leaves[number].grad for number in (0, 1, 3)]

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for got, want in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_what_is_not_a_number_stays_so(request, kernels):
    """One value of attention spoils its sample's sums, and so all of its foreground, and no other sample."""
    if kernels:
        request.getfixturevalue("emulated")
    features, attention, *_ = inputs((2, 8, 3, 3, 3))
    attention[0, 2, 1] = torch.nan
    for maps in (False, True):
        found = op(features, attention, maps=maps).foreground
        assert found[0].isnan().all() and found[1].isfinite().all()


def test_types_that_the_kernels_do_not_mix_run_in_torch(emulated):
    """By the op's name, where nothing converts them first."""
    features, attention, taught, made = inputs((1, 8, 2, 3, 3))
    att = torch.ops.genkd.attention_kd(features, attention, taught.double(), made, False, False, False)[2]
    torch.testing.assert_close(att.float(), (attention - taught).square().mean())


def test_same_bits_twice_and_layout_kept(emulated):
    for last in (False, True):
        values = inputs((2, 40, 3, 7, 7), last=last)
        for maps in (False, True):
            first, second = run(op, values, maps=maps), run(op, values, maps=maps)
            for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
                assert a is None or torch.equal(a, b)
            assert layout_of(first[1][0]) == layout_of(values[0])


def test_inputs_that_lie_otherwise_in_memory(emulated):
    """A slice that starts in the middle of 16 bytes, a transposed tensor, and a reconstruction of another layout."""
    features, attention, taught, made = inputs((2, 40, 3, 3, 3))
    shifted = torch.empty(features.numel() + 1)[1:].view(features.shape).copy_(features)
    turned = attention.transpose(1, 2).contiguous().transpose(1, 2)
    for values in (
        (shifted, turned, taught, made),
        (features, attention, taught, made.contiguous(memory_format=torch.channels_last_3d)),
        (features.transpose(3, 4).contiguous().transpose(3, 4), attention, taught, made),
    ):
        compare(values, 2e-6)
        compare(values, 2e-6, maps=True)


def test_bad_shapes_name_what_is_wrong():
    features, attention, taught, made = inputs((2, 8, 3, 3, 3))
    with pytest.raises(ValueError, match=r"attention must be \(N,C,T\) = \(2, 8, 3\).*not \(2, 3, 8\)"):
        op(features, attention.transpose(1, 2))
    with pytest.raises(ValueError, match=r"reconstruction must have the features' shape"):
        op(features, attention, taught, made[:1])
    with pytest.raises(ValueError, match=r"features must be \(N,C,T,H,W\)"):
        op(features[0], attention)
    with pytest.raises(ValueError, match="attention is on meta, the features on cpu; move it there"):
        op(features, attention.to("meta"))


def test_float64_runs_in_torch_whatever_is_selected():
    features, attention, *_ = (value.double() for value in inputs((1, 4, 2, 2, 2)))
    with backend.selected("cuda"):
        assert op(features, attention).foreground.dtype == torch.float64
