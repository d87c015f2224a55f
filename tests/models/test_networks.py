import math

import numpy as np
import pytest
import torch
from torch import nn

from genkd.configs.schema import ModelConfig
from genkd.errors import UserError
from genkd.kernels.attention_kd import foreground
from genkd.models.attention import AttentionHead
from genkd.models.cvae import ConditionalVAE
from genkd.models.i3d import I3D, feature_shape, fold_batch_norm, same_padding
from genkd.models.recognizer import Recognizer, build, build_cvae

SMALL = ModelConfig(width=0.25, dropout=0.0)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (224, 7, 2, (2, 3)),
        (64, 7, 2, (2, 3)),
        (7, 3, 1, (1, 1)),
        (112, 3, 2, (0, 1)),
        (7, 2, 2, (0, 1)),
        (5, 1, 2, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size, kernel, stride, padding):
    assert same_padding(size, kernel, stride) == padding
    assert (size + sum(padding) - kernel) // stride + 1 == math.ceil(size / stride)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_are_the_published_ones():
    """12,697,264 of the Kinetics-400 I3D with its classifier; the rest from the reference's table."""
    with torch.device("meta"):
        i3d = Recognizer(ModelConfig(), 400, (1024, 8, 7, 7), attention=False)
        assert count(i3d) == 12_697_264
        flow = Recognizer(ModelConfig(), 400, (1024, 8, 7, 7), attention=False, in_channels=2)
        assert count(flow) == 12_675_312
        assert count(build(ModelConfig(), 101, 64, 224)) == 39_666_573
        assert count(build(ModelConfig(temporal="top_heavy"), 101, 64, 224)) == 37_808_397
        assert count(build_cvae((1024, 8, 7, 7))) == 112_210_944


@pytest.mark.parametrize(("clip_length", "size"), [(16, 64), (32, 112), (9, 33)])
@pytest.mark.parametrize("temporal", ["full", "top_heavy"])
def test_shapes_are_as_announced(clip_length, size, temporal):
    model = build(SMALL.model_copy(update={"temporal": temporal}), 5, clip_length, size)
    channels, time, height, width = feature_shape(clip_length, size, 0.25)
    assert (channels, time) == (256, math.ceil(clip_length / 8))
    output = model(torch.randn(2, 3, clip_length, size, size))
    assert output.features["Mixed_5c"].shape == (2, channels, time, height, width)
    assert output.attention.shape == (2, channels, time)
    assert output.attention.min() > 0 and output.attention.max() < 1
    assert output.logits.shape == (2, 5, time - min(2, time) + 1)
    torch.testing.assert_close(output.scores.sum(1), torch.ones(2))


def test_the_top_heavy_net_is_flat_up_to_mixed_4c():
    net = I3D(temporal="top_heavy", width=0.25)
    kernels = {name: m.kernel[0] for name, m in net.named_modules() if hasattr(m, "kernel") and name.endswith("b1b")}
    assert kernels == {f"Mixed_{n}.b1b": 1 if n in ("3b", "3c", "4b", "4c") else 3 for n in
                       ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")}  # fmt: skip
    assert net.Conv3d_1a_7x7.kernel == (1, 7, 7) and I3D(width=0.25).Conv3d_1a_7x7.kernel == (7, 7, 7)


def test_folding_batch_norm_changes_no_output():
    torch.manual_seed(0)
    model = build(SMALL, 5, 16, 64)
    clips = torch.randn(2, 3, 16, 64, 64)
    model.train()
    model(3 * clips + 1)  # statistics that are not 0 and 1
    for name, value in model.named_parameters():
        if ".bn." in name:
            nn.init.uniform_(value, 0.5, 1.5)
    model.eval()
    with torch.inference_mode():
        want = model(clips)
        fold_batch_norm(model)
        got = model(clips)
        fold_batch_norm(model)  # once is enough
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    for one, other in ((got.logits, want.logits), (got.attention, want.attention)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert want.features["Mixed_5c"].std() > 0.01


def test_clips_that_are_too_small_are_refused():
    with pytest.raises(UserError, match=r"data\.clip_length, data\.size"):
        feature_shape(4, 224, 1.0)
    with pytest.raises(UserError, match="too small"):
        feature_shape(16, 16, 1.0)


def test_foreground_keeps_each_samples_sum():
    random = torch.Generator().manual_seed(0)
    features, attention = torch.rand(3, 8, 2, 4, 4, generator=random), torch.rand(3, 8, 2, generator=random)
    weighted = foreground(features, attention)
    torch.testing.assert_close(weighted.sum((1, 2, 3, 4)), features.sum((1, 2, 3, 4)))
    assert torch.equal(foreground(features[:1], attention[:1]), weighted[:1])
    # The reference's sums run over the batch, so a sample depends on its neighbours.
    coupled = foreground(features, attention, per_batch=True)
    torch.testing.assert_close(coupled.sum(), features.sum())
    assert not torch.allclose(coupled, weighted)


def test_foreground_of_zeros_is_zero_with_finite_gradients():
    features, attention = torch.zeros(2, 4, 2, 3, 3, requires_grad=True), torch.rand(2, 4, 2, requires_grad=True)
    result = foreground(features, attention)
    assert not result.any()
    result.sum().backward()
    assert features.grad.isfinite().all() and attention.grad.isfinite().all()


def test_attention_head_refuses_another_clip_length():
    with pytest.raises(ValueError, match="built for 4 time steps was given 3"):
        AttentionHead(64, 4, 2, 2)(torch.randn(1, 64, 3, 2, 2))


def test_cvae_without_noise_decodes_its_mean_and_frozen_decoding_spares_the_parameters():
    torch.manual_seed(0)
    cvae = ConditionalVAE(64, 2, 2)
    features, attention = torch.rand(2, 64, 3, 2, 2), torch.rand(2, 64, 3, requires_grad=True)
    zero = torch.zeros(2, 3, 64)
    output = cvae(features, attention, zero)
    torch.testing.assert_close(output.reconstruction, cvae.decoder(output.mean, attention))
    noise = torch.randn(2, 3, 64)
    frozen = cvae.decode_frozen(attention, noise)
    torch.testing.assert_close(frozen, cvae.decode(attention, noise))
    frozen.sum().backward()
    assert attention.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in cvae.parameters())


def test_channels_last_gives_the_same_result():
    torch.manual_seed(0)
    model = build(SMALL, 5, 16, 64).eval()
    clips = torch.randn(2, 3, 16, 64, 64)
    want = model(clips).logits
    model.to(memory_format=torch.channels_last_3d)
    got = model(clips.to(memory_format=torch.channels_last_3d)).logits
    np.testing.assert_allclose(got.detach(), want.detach(), atol=1e-5)


@pytest.mark.gpu
def test_bf16_follows_fp32():
    torch.manual_seed(0)
    model = build(SMALL, 5, 16, 64).eval().cuda().to(memory_format=torch.channels_last_3d)
    clips = torch.randn(4, 3, 16, 64, 64, device="cuda").to(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        exact = model(clips)
        with torch.autocast("cuda", torch.bfloat16):
            fast = model(clips)
    assert (exact.attention - fast.attention).abs().max() < 0.05
    assert (exact.scores - fast.scores).abs().max() < 0.05


@pytest.mark.parametrize("attention", [False, True])
def test_dropout_that_is_given_takes_the_place_of_torchs(attention):
    torch.manual_seed(0)
    network = build(ModelConfig(width=0.25, dropout=0.5), 5, 16, 32, attention=attention)
    clips, (channels, times) = torch.randn(2, 3, 16, 32, 32), network.pooled_shape
    network.eval()
    plain = network(clips).logits
    assert plain.shape[2] == times
    torch.testing.assert_close(network(clips, dropped=torch.zeros(2, channels, times)).logits, plain)
    network.logits.train()
    network.training = True  # batch norm stays as it is
    nothing = network(clips, dropped=torch.zeros(2, channels, times)).logits
    torch.testing.assert_close(nothing, network.logits.bias[None, :, None].expand_as(nothing))
    torch.testing.assert_close(network(clips, dropped=torch.ones(2, channels, times)).logits, plain)
    dropped = torch.ones(2, channels, times)
    dropped[1] = 0
    one = network(clips, dropped=dropped).logits
    torch.testing.assert_close(one[0], plain[0])
    torch.testing.assert_close(one[1], nothing[1])
