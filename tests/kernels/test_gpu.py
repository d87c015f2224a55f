"""The kernels on a GPU: against the formulas, in graphs, streams, AMP, torch.compile, on every device, past 2^31."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genkd.kernels import attention_kd, backend, boundary_max_pool, generative_kd
from genkd.kernels import compile as compiler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def helpers(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attention_tests, generative_tests, pooling_tests = map(
    helpers, ("test_attention_kd", "test_generative_kd", "test_boundary_max_pool")
)
SHAPES = [*attention_tests.SHAPES, (4, 1024, 8, 7, 7), (1, 832, 64, 6, 6), (1, 1024, 32, 3, 3)]


@pytest.fixture(autouse=True)
def kernels_or_failure():
    with backend.selected("cuda"):
        yield


def on(device, values):
    return [None if value is None else value.to(device) for value in values]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("maps", [False, True], ids=["pooled", "maps"])
def test_attention_kd_equals_the_formula(shape, last, maps):
    for dtype, made_dtype in ((torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None)):
        values = attention_tests.inputs(shape, dtype, last=last, made_dtype=made_dtype)
        tolerance = {torch.float32: 5e-6}.get(dtype, attention_tests.TOLERANCE[dtype])
        attention_tests.compare(on("cuda", values), tolerance, maps=maps)
    values = attention_tests.inputs(shape, last=last, logits=True)
    attention_tests.compare(on("cuda", values), 5e-6, maps=maps, logits=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_generative_kd_equals_the_formula(shape):
    half, full = torch.bfloat16, torch.float32
    for last in (False, True):
        generative_tests.compare(on("cuda", generative_tests.inputs(shape, last=last)), 5e-6)
        mixed = generative_tests.inputs(shape, (half, full, half, half, half, full), last=last)
        generative_tests.compare(on("cuda", mixed), 1e-2)


@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (2, 6, 3, 7), (2, 512, 256, 126), (2, 4, 300, 300)])
def test_boundary_max_pool_equals_the_formula(shape):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        features, segments = pooling_tests.inputs(*shape, dtype=dtype)
        pooled, grad = pooling_tests.run(boundary_max_pool.boundary_max_pool, features.cuda(), segments.cuda())
        want, want_grad = pooling_tests.run(boundary_max_pool.reference, features, segments)
        assert torch.equal(pooled.cpu(), want)
        torch.testing.assert_close(grad.cpu(), want_grad, rtol=tolerance, atol=4 * tolerance)


def step(features, attention, made, taught, maps=False):
    found = attention_kd.attention_kd(features, attention, taught, made, maps=maps)
    outputs = [value for value in found if value is not None]
    return [*outputs, *torch.autograd.grad(outputs, (features, attention, made), [v * 0 + 0.5 for v in outputs])]


def leaves(shape=(2, 1024, 8, 7, 7), device="cuda", seed=0):
    features, attention, taught, made = on(device, attention_tests.inputs(shape, last=True, seed=seed))
    return features.requires_grad_(), attention.requires_grad_(), made.requires_grad_(), taught


@pytest.mark.parametrize("maps", [False, True])
def test_same_bits_twice(maps):
    values = leaves()
    for first, second in zip(step(*values, maps=maps), step(*values, maps=maps), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("maps", [False, True])
def test_inside_a_cuda_graph(maps):
    values = leaves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*values, maps=maps)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*values, maps=maps)
    with torch.no_grad():
        for target, source in zip(values, leaves(seed=5), strict=True):
            target.copy_(source)
    graph.replay()
    for got, want in zip(captured, step(*values, maps=maps), strict=True):
        assert torch.equal(got, want)


def test_without_host_synchronization():
    values = leaves()
    step(*values)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_backward_pass_that_is_the_first_of_its_thread():
    """In a process of its own: autograd's thread has no context until something makes one current."""
    code = (
        "import torch; from genkd.kernels.attention_kd import attention_kd; from genkd.kernels import backend;"
        "backend.select('cuda');"
        "f = torch.rand(2, 8, 2, 3, 3, device='cuda', requires_grad=True); a = torch.rand(2, 8, 2, device='cuda');"
        "cached = [torch.empty(1 << 20, device='cuda') for _ in range(8)]; del cached;"
        "out = attention_kd(f, a).foreground; g = torch.ones_like(out);"
        "print(torch.autograd.grad(out, f, g)[0].isfinite().all().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_on_the_current_stream():
    """Inputs are written on a side stream by a kernel that takes long; the ops on it must come after."""
    values = leaves()
    want = step(*values)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = [torch.zeros_like(value).requires_grad_(value.requires_grad) for value in values]
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for target, source in zip(late, values, strict=True):
                target.copy_(source)
        got = step(*late)
    side.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_every_device():
    want = step(*leaves(device="cuda:0"))
    for number in range(1, torch.cuda.device_count()):
        got = step(*leaves(device=f"cuda:{number}"))
        assert got[0].device.index == number
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.cpu(), b.cpu())


def test_compiled_whole_graph_under_autocast():
    features, attention, made, taught = leaves()
    layer = torch.nn.Conv3d(1024, 1024, 1, device="cuda")

    def loss(features, attention, made, taught):
        with torch.autocast("cuda", torch.bfloat16):
            found = attention_kd.attention_kd(layer(features).relu(), attention, taught, made)
            return found.foreground.float().square().sum() + found.attention_loss + found.reconstruction_loss

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(features, attention, made, taught), attention)[0]
    want = torch.autograd.grad(loss(features, attention, made, taught), attention)[0]
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2 * want.abs().max().item())


def test_opcheck():
    features, attention, made, taught = leaves((2, 8, 3, 3, 3))
    torch.library.opcheck(torch.ops.genkd.attention_kd, (features, attention, taught, made, False, False, False))
    torch.library.opcheck(torch.ops.genkd.attention_kd, (features, attention, taught, made, True, False, False))


def test_more_than_2_to_the_31_elements():
    """bfloat16, in place of a comparison by value, sums that are known."""
    shape = (47, 1024, 930, 7, 7)
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    features = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    features[-1, -1, -1] = 2.0
    features[0, 0, 0] = 1.0
    attention = torch.full(shape[:3], 0.25, dtype=torch.bfloat16, device="cuda")
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        values = features.detach().contiguous(memory_format=layout).requires_grad_()
        found = attention_kd.attention_kd(values, attention)
        # The only active row of its sample: F * a * r = F, averaged over two steps.
        assert found.foreground[-1, -1, -1].item() == 1.0 and found.foreground[0, 0, 0].item() == 0.5
        found.foreground.sum().backward()
        assert values.grad[-1].isfinite().all()
        del values, found
        torch.cuda.empty_cache()


def test_the_machine_code_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKD_CACHE", str(tmp_path))
    compiler._library.cache_clear()
    step(*leaves((1, 8, 2, 3, 3)))
    assert list(tmp_path.glob("kernels/attention_kd-sm_*.cubin"))
    compiler._library.cache_clear()


def test_losses_of_stage_a():
    values = on("cuda", generative_tests.inputs((2, 1024, 8, 7, 7), last=True))
    made = values[1].requires_grad_()
    found = generative_kd.generative_kd(values[0], made, *values[2:])
    want = generative_kd.reference(*values)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
