"""The detector against numbers of the original implementation, and what it says of input that does not fit."""

import numpy as np
import pytest
import torch

from genkd.configs.schema import ModelConfig
from genkd.errors import UserError
from genkd.models.detector import Detector, detector_shapes
from genkd.trainers import detection_losses as losses

CLIP = (1, 3, 256, 96, 96)
FULL = pytest.param("", marks=pytest.mark.slow)  # white noise: nearly any clip would pass
SETS = (FULL, "_cells")


def close(got, want, tolerance=1e-4):
    want = torch.from_numpy(np.asarray(want))
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-12)


@pytest.fixture(scope="module", params=["student", pytest.param("teacher", marks=pytest.mark.slow)])
def detector(request, reference, helper):
    from genkd.models.checkpoints import from_reference

    state = helper.make_state_dict(str(reference / "keys" / f"detection_{request.param}.json"))
    module, report = from_reference(state)
    assert (report.kind, len(report.used), report.unused, report.missing) == (
        f"detection {request.param}", 462, (), (),
    )  # fmt: skip
    total = {"student": 65_887_477, "teacher": 67_745_653}[request.param]
    assert sum(p.numel() for p in module.parameters()) == total
    return request.param, module


@pytest.fixture(scope="module", params=SETS)
def run(request, detector, reference, helper):
    """Features, attention and the arrays they must equal."""
    name, module = detector
    want = dict(np.load(reference / "open" / f"detection_{name}{request.param}.npz"))
    bias = module.pyramid.loc_head.conv1d.bias.data
    before = bias.clone()
    bias += float(want.get("loc_bias_shift", 0.0))
    clip = helper.make_clip("det_clip", CLIP, scale=300) if request.param else helper.make_input("det_clip", CLIP)
    with torch.inference_mode():
        features = module.represent(clip)
        yield module, features, module.attend(features), want
    bias.copy_(before)


def test_features_and_attention_are_matched(run):
    _, features, attention, want = run
    for name in ("Mixed_4f", "Mixed_5c"):
        maps = features[name]
        close(maps.mean((3, 4)), want[f"{name}_mean_hw"])
        close(torch.stack([maps.mean(), maps.std(correction=0)]), want[f"{name}_stats"])
        close(maps[0, :4, :2], want[f"{name}_corner"])
    close(attention["Mixed_5c"], want["att_5c"])
    close(attention["Mixed_4f"], want["att_4f"])


@pytest.mark.parametrize("view", ["raw", "weighted"])
def test_the_pyramid_is_matched(run, view):
    module, features, attention, want = run
    if view == "weighted":
        features = module.foreground(features, attention)
        for name in ("Mixed_4f", "Mixed_5c"):
            stats = torch.stack([features[name].mean(), features[name].std(correction=0)])
            close(stats, want[f"weighted_{name[-2:]}_stats"])
    with torch.inference_mode():
        output = module.pyramid(features)
    for name in ("loc", "conf", "prop_loc", "prop_conf", "center"):
        close(getattr(output, name), want[f"{view}_{name}"])
    for name in ("start", "end", "start_loc_prop", "end_loc_prop", "start_conf_prop", "end_conf_prop"):
        close(getattr(output, name).mean(2), want[f"{view}_{name}_mean_c"])
    assert torch.equal(output.priors, torch.from_numpy(want["priors"]))


@pytest.mark.parametrize("detector", ["student"], indirect=True)  # whose numbers alone have it
def test_the_triplet_branch_is_matched(run):
    module, features, _, want = run
    with torch.inference_mode():
        found = module.triplet(features, torch.from_numpy(want["ssl_proposals"])[None].float())
    for number, values in enumerate(found):
        for name, value in zip(("anchor", "positive", "negative"), values, strict=True):
            close(value, want[f"raw_ssl_{name}_{number}"])
    close(losses.triplet(found), want["raw_ssl_loss"])


def test_the_cvae_of_both_endpoints_is_imported(reference, helper):
    from genkd.models.checkpoints import from_reference

    state = helper.make_state_dict(str(reference / "keys" / "detection_cvae_student.json"))
    module, report = from_reference(state)
    assert (report.kind, len(report.used), report.unused) == ("detection cvae", 40, ())
    assert sum(p.numel() for p in module.parameters()) == 84_405_824
    assert torch.equal(module["Mixed_4f"].encoder.conv[0].weight, state["cencoder_832.con2.0.weight"])
    assert torch.equal(module["Mixed_5c"].decoder.mlp[4].bias, state["cdecoder.fc3.bias"])


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Detector(ModelConfig(temporal="top_heavy", width=0.5), 4, detector_shapes(128, 32, 0.5), 128).eval()


def test_a_small_detector_sees_every_level(small):
    clips = torch.randn(2, 3, 128, 32, 32)
    with torch.inference_mode():
        output = small(clips)
    anchors = 32 + 16 + 8 + 4 + 2 + 1
    assert output.loc.shape == (2, anchors, 2) and output.conf.shape == (2, anchors, 5)
    assert output.priors[:32, 0].tolist() == pytest.approx([(step + 0.5) / 32 for step in range(32)])
    assert output.priors[-1].item() == 0.5 and (output.loc > 0).all()
    assert output.start.shape == (2, 128, 128) and output.end_conf_prop.shape == (2, 32, 256)


def test_the_foreground_is_a_samples_own_and_keeps_its_scale(small):
    """The original divides by the attention of the whole batch, which makes features ten thousand times smaller."""
    clips = torch.randn(2, 3, 128, 32, 32)
    with torch.inference_mode():
        features = small.represent(clips)
        weighted = small.foreground(features, small.attend(features))
        alone = small.foreground({k: v[:1] for k, v in features.items()},
                                 small.attend({k: v[:1] for k, v in features.items()}))  # fmt: skip
    for name, maps in features.items():
        torch.testing.assert_close(weighted[name].sum((1, 2, 3, 4)), maps.sum((1, 2, 3, 4)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weighted[name][:1], alone[name], rtol=1e-4, atol=1e-6)


def test_clips_that_do_not_fit_are_refused(small):
    with pytest.raises(ValueError, match=r"clips \(1, 3, 64, 32, 32\) do not fit this detector"):
        small(torch.randn(1, 3, 64, 32, 32))
    with pytest.raises(UserError, match=r"data\.clip_length must be a multiple of 128"):
        detector_shapes(200, 96, 1.0)
