"""Tensors of more than 2^31 elements: their last blocks alone run, so only the memory those touch is ever there."""

import math
import mmap

import pytest
import torch

from genkd.kernels import attention_kd_launch as launcher

SHAPE = (47, 1024, 930, 7, 7)
ROWS, PLACES = SHAPE[1] * SHAPE[2], 49
assert math.prod(SHAPE) > 2**31
MAP_NORESERVE = 0x4000  # Linux's; Python's mmap names it from 3.13 on


def huge(last):
    """Zeros of SHAPE, float16, that take no memory until they are written."""
    memory = mmap.mmap(-1, 2 * math.prod(SHAPE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    flat = torch.frombuffer(memory, dtype=torch.float16)
    if not last:
        return flat.view(SHAPE)
    n, channels, time, height, width = SHAPE
    return flat.view(n, time, height, width, channels).permute(0, 4, 1, 2, 3)


@pytest.fixture
def emulated(emulated, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return emulated


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_attention_kd(emulated, last):
    features, made = huge(last), huge(last)
    n, channels, time = SHAPE[:3]
    features[-1, -1, -1], made[-1, -1, -1] = 2.0, 5.0
    attention = torch.full((n, channels, time), 0.25, dtype=torch.float16)
    sums, stats = torch.zeros(n, channels, time), torch.zeros(n, launcher.STATS)
    plan = launcher._geometry(features, made)
    blocks = n * plan.chunks
    partial = torch.zeros(blocks, 5)

    def run(maps, name, *arguments):
        kernels = launcher._library(plan.width, maps, features, attention, made)
        kernels.only = (blocks - 1, blocks - 1)
        try:
            kernels.launch(name, blocks, 256, *arguments)
        finally:
            kernels.only = None

    shape = (channels, time, PLACES)
    run(False, "attention_kd_sums", features, made, attention, None, sums, partial, *shape, *plan.sizes, 0)
    assert sums[-1, -1, -1] == 98 and sums.sum() == 98
    assert partial[-1].tolist() == [98, 24.5, 73.5, 9 * 49, 0]

    stats[-1, :4] = torch.tensor([4.0, 24.5, 4 / 3, 73.5])  # r = 98 / 24.5, r_b = 98 / 73.5
    foreground, background = huge(last), huge(last)
    run(True, "attention_kd_maps", features, attention, stats, foreground, background, *shape, *plan.sizes, 0)
    assert (foreground[-1, -1, -1] == 2).all() and (background[-1, -1, -1] == 2).all()

    slopes, grad_rec = torch.zeros(n, 2), torch.tensor(float(math.prod(SHAPE)) / 2)
    grad_features, grad_made = huge(last), huge(last)
    run(
        False, "attention_kd_grad", features, made, attention, stats, slopes, None, None, grad_rec, grad_features,
        grad_made, n, *shape, 2, *plan.sizes, 0,
    )  # fmt: skip
    assert (grad_features[-1, -1, -1] == -3).all() and (grad_made[-1, -1, -1] == 3).all()


def test_generative_kd(emulated):
    """The last block of a loop over the whole tensor."""
    features, made = huge(False), huge(False)
    flat, size = made.view(-1), math.prod(SHAPE)
    blocks, step = 2048, 256 * 8
    # The last step of the last block that is inside.
    at = (size // (blocks * step) * blocks + blocks - 1) * step
    at = at if at < size else at - blocks * step
    assert at > 2**31
    flat[at] = 3.0
    defines = {
        "WIDTH": 8, "HAS_TEACHER": 0, "FEATURE": "fp16", "RECONSTRUCTION": "fp16", "TAUGHT": "fp16", "LATENT": "float",
        "ATTENTION": "float",
    }  # fmt: skip
    kernels = emulated.library("generative_kd", defines, None)
    kernels.only = (blocks - 1, blocks - 1)
    latent, partial, result = torch.zeros(1), torch.zeros(blocks, 3), huge(False)
    grad = torch.tensor(float(size) / 2)
    try:
        kernels.launch(
            "generative_kd_sums", blocks, 256, features, made, None, latent, latent, latent, partial, size, 1, 1, 0
        )
        kernels.launch(
            "generative_kd_grad", blocks, 256, features, made, None, latent, latent, latent, grad, None, None, result,
            latent, latent, size, 1, 1, 0,
        )  # fmt: skip
    finally:
        kernels.only = None
    assert partial[-1].tolist() == [9, 0, 0]
    assert result.view(-1)[at] == 3 and result.view(-1)[at - 1] == 0
