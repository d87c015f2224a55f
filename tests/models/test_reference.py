"""Imported networks give the original implementation's numbers, for weights and clips rebuilt from names.

Files of the reference that end in _cells come from clips with structure, the others from white noise, which any clip
nearly equals: those are slow.
"""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from genkd.configs.schema import LossConfig, ModelConfig
from genkd.kernels.attention_kd import foreground
from genkd.models import checkpoints
from genkd.models.recognizer import Recognizer, build, build_cvae
from genkd.trainers import losses

CLIP = (1, 3, 64, 224, 224)
SETS = ["_cells", pytest.param("", marks=pytest.mark.slow)]


def close(got, want):
    """Within 1e-4 of the largest value, the reference's own bound."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got.detach()), want, rtol=0, atol=1e-4 * np.abs(want).max())


def close_map(features, want, name):
    """Mean over the plane, mean and standard deviation, and a corner of a map (1,C,T,H,W)."""
    close(features.mean((3, 4)), want[f"{name}_mean_hw"])
    close(torch.stack([features.mean(), features.std(correction=0)]), want[f"{name}_stats"])
    if f"{name}_corner" in want:
        close(features[0, :4, :2], want[f"{name}_corner"])


@pytest.fixture(scope="module")
def make(helper, reference):
    """A function: name of a key file -> the module with its weights, and the report."""

    def load(name, salt="", **options):
        return checkpoints.from_reference(helper.make_state_dict(reference / "keys" / f"{name}.json", salt, **options))

    return load


@pytest.fixture(scope="module", params=SETS)
def suffix(request):
    return request.param


@pytest.fixture(scope="module")
def clip(helper):
    """A function: name -> a clip, of a set."""

    def draw(name, suffix):
        return helper.make_clip(name, CLIP) if suffix else helper.make_input(name, CLIP)

    return draw


@pytest.fixture(scope="module")
def arrays(reference):
    """A function: name -> arrays of the reference."""
    return lambda name: dict(np.load(reference / "open" / f"{name}.npz"))


@pytest.fixture(scope="module")
def noise(helper):
    return helper.make_input("eps", (1, 8, 1024))


@pytest.fixture(scope="module")
def student_net(make):
    model, report = make("recognition_student")
    assert (report.kind, len(report.used), report.unused, report.missing) == ("recognition student", 354, (), ())
    return with_both_maps(model)


@pytest.fixture(scope="module")
def student(student_net, clip, suffix):
    """The student, and its output for clip_a with everything that gradients need."""
    return student_net, student_net(clip("clip_a", suffix))


@pytest.fixture(scope="module")
def cvae(make):
    model, report = make("recognition_cvae_student", prefixes=("cencoder.", "cdecoder."))
    assert (report.kind, len(report.used)) == ("recognition cvae", 20)
    return model


@pytest.fixture(scope="module")
def teacher_cvae(make):
    return make("recognition_cvae", "teacher.", prefixes=("cencoder.", "cdecoder."))[0].requires_grad_(False)


def with_both_maps(model):
    model.backbone.endpoints = ("Mixed_4f", "Mixed_5c")
    return model


class Given(torch.nn.Module):
    """Stands for a backbone whose maps are known."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, clips):
        return {"Mixed_5c": self.maps}


def head(model, maps, channels=3):
    """What a network makes of known maps; channels 2: as for flow."""
    backbone, model.backbone, model.in_channels = model.backbone, Given(maps), channels
    try:
        with torch.inference_mode():
            return model(torch.empty(len(maps), channels, *CLIP[2:]))
    finally:
        model.backbone, model.in_channels = backbone, 3


def check_network(model, first, second, want):
    """first, second: outputs for clip_a and clip_b, alone."""
    close_map(first.features["Mixed_4f"], want, "Mixed_4f")
    close_map(first.features["Mixed_5c"], want, "Mixed_5c")
    close(first.attention, want["att"])
    close(first.logits, want["logits_fg_b1"])
    close(first.scores, want["scores_b1"])
    alone = first.features["Mixed_5c"].detach()
    pair = torch.cat([alone, second.features["Mixed_5c"].detach()])
    together = head(model, pair)
    close(together.logits, want["logits_fg_b2"])
    close(together.scores, want["scores_b2"])
    for maps, attention, key in ((alone, first.attention, "b1"), (pair, together.attention, "b2")):
        ratio = foreground(maps, attention, per_batch=True).sum() / (maps * attention[..., None, None]).sum()
        close(ratio, want[f"norm_ratio_{key}"])
    close(head(model, alone, channels=2).logits, want["logits_plain_b1"])


def test_the_student_is_matched(student, clip, suffix, arrays):
    model, first = student
    with torch.inference_mode():
        second = model(clip("clip_b", suffix))
    check_network(model, first, second, arrays(f"recognition_student{suffix}"))


@pytest.mark.slow
def test_the_student_is_matched_on_white_noise(student_net, clip, arrays):
    want = arrays("recognition_student")
    with torch.inference_mode():
        output = student_net(clip("clip_a", ""))
    close_map(output.features["Mixed_4f"], want, "Mixed_4f")
    close_map(output.features["Mixed_5c"], want, "Mixed_5c")
    close(output.attention, want["att"])
    close(output.logits, want["logits_fg_b1"])
    close(output.scores, want["scores_b1"])


@pytest.mark.slow
def test_the_teacher_is_matched(make, clip, suffix, arrays):
    model, report = make("recognition_teacher")
    assert (report.kind, len(report.used), report.unused, report.missing) == ("recognition teacher", 354, (), ())
    with_both_maps(model)
    with torch.inference_mode():
        first, second = (model(clip(name, suffix)) for name in ("clip_a", "clip_b"))
    check_network(model, first, second, arrays(f"recognition_teacher{suffix}"))


def test_the_cvae_is_matched(student, cvae, teacher_cvae, noise, suffix, arrays):
    want = arrays(f"recognition_cvae{suffix}")
    features, attention = (x.detach() for x in (student[1].features["Mixed_5c"], student[1].attention))
    with torch.inference_mode():
        got = cvae(features, attention, noise)
        taught = teacher_cvae(features, attention, noise).reconstruction
        drawn = cvae.decode(attention, noise)
        terms = losses.generative(
            LossConfig(), features, attention, got.reconstruction, got.mean, got.logvar, taught
        )  # fmt: skip
    close(got.mean, want["means"])
    close(got.logvar, want["log_var"])
    close(got.mean + noise * torch.exp(got.logvar / 2), want["z"])
    close_map(got.reconstruction, want, "recon")
    close_map(taught, want, "teacher_recon")
    close_map(drawn, want, "inference_recon")
    close((drawn - features).square().mean(), want["inference_recon_mse"])
    close(terms["mse"], want["recon_mse"])
    close(0.1 * terms["kl"], want["loss_cvae_kl_part"])
    close(terms["mse"] + 0.1 * terms["kl"], want["loss_cvae"])
    close(terms["kd"], want["kd_mse"])


def norms(module, names):
    """L2 norms of the gradients of some parameters, and of all together.

    In float64: a float32 sum over 25 million squares is off by 1e-3 on a CPU.
    """
    gradients = {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}
    every = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return torch.stack([gradients[name].norm() for name in names]), every


def test_stage_a_and_its_gradients_are_matched(student, cvae, teacher_cvae, noise, suffix, arrays):
    want = arrays(f"recognition_losses{suffix}")
    features, attention = (x.detach() for x in (student[1].features["Mixed_5c"], student[1].attention))
    cvae.zero_grad()
    got = cvae(features, attention, noise)
    taught = teacher_cvae(features, attention, noise).reconstruction
    terms = losses.generative(LossConfig(), features, attention, got.reconstruction, got.mean, got.logvar, taught)
    terms["total"].backward()
    close(terms["total"], want["stage1_total"])
    close(terms["mse"] + 0.1 * terms["kl"], want["stage1_loss_cvae"])
    close(terms["kd"], want["stage1_kd_mse"])
    assert list(want["stage1_grad_names"]) == ["cencoder.fc1.weight", "cdecoder.fc3.weight"]
    some, every = norms(cvae, ["encoder.mlp.0.weight", "decoder.mlp.4.weight"])
    close(some, want["stage1_grad_norms"])
    close(every, want["stage1_grad_norm_all"])
    cvae.zero_grad()


def test_stage_b_and_its_gradients_are_matched(make, student, cvae, noise, clip, suffix, arrays):
    """Epoch 5, class 7, beta 0.1; the teacher is another network of the same layout."""
    want = arrays(f"recognition_losses{suffix}")
    model, output = student
    teacher, _ = make("recognition_teacher", "teacher.")
    with torch.inference_mode():
        taught = teacher(clip("clip_a", suffix)).attention
    taught = taught.clone()  # an inference tensor cannot be saved for the backward pass
    class_loss = losses.classification(output.logits, torch.tensor([7]), compat="reference")
    features, attention = output.features["Mixed_5c"], output.attention
    drawn = cvae.decode_frozen(attention, noise)
    terms = losses.distillation(LossConfig(), class_loss, 5, features, drawn, attention, taught)
    model.zero_grad()
    terms["total"].backward()
    for name, key in {"total": "total", "class": "ce", "rec": "recon_mse", "att": "kd_att_mse"}.items():
        close(terms[name], want[f"stage2_{key}"])
    assert list(want["stage2_grad_names"]) == [
        "Att_Head_5c.3.weight", "deconv1.0.weight", "backbone._model.Mixed_5c.b0.conv3d.weight"
    ]  # fmt: skip
    some, every = norms(
        model, ["attention.linear.weight", "attention.reduce.0.weight", "backbone.Mixed_5c.b0.conv3d.weight"]
    )
    close(some, want["stage2_grad_norms"])
    close(every, want["stage2_grad_norm_all"])
    model.zero_grad()
    assert all(parameter.grad is None for parameter in cvae.parameters())


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_parameters_are_the_references(reference):
    tables = json.loads((reference / "params_flops.json").read_text())["recognition 1x3x64x224x224"]
    with torch.device("meta"):
        for name, temporal in (("teacher", "full"), ("student", "top_heavy")):
            model, table = build(ModelConfig(temporal=temporal), 101, 64, 224), tables[name]
            assert count(model) == table["params_total"]
            assert count(model.backbone, model.logits) == table["params_backbone_with_logits"]
            assert count(model.attention.reduce) == table["params_deconv1"]
            assert count(model.attention) - count(model.attention.reduce) == table["params_att_head"]
            assert count(model.logits) == table["params_logits"]
            assert count(build_cvae((1024, 8, 7, 7))) == tables[f"cvae_{name}"]["params_1024_half"]
            prefix = "" if temporal == "full" else "top_heavy_"
            for channels in (2, 3):
                plain = Recognizer(
                    ModelConfig(temporal=temporal, stem="strided"), 400, (1024, 8, 7, 7), attention=False,
                    in_channels=channels,
                )  # fmt: skip
                assert count(plain) == tables[f"{prefix}i3d_{channels}ch_400"]["params_total"]


def flops(run, *inputs):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops()


def test_operations_are_the_references(reference):
    tables = json.loads((reference / "params_flops.json").read_text())["recognition 1x3x64x224x224"]
    meta = {"device": "meta"}
    maps, attention, noise = (
        torch.empty(shape, **meta) for shape in ((1, 1024, 8, 7, 7), (1, 1024, 8), (1, 8, 1024))
    )  # fmt: skip
    for name, temporal in (("teacher", "full"), ("student", "top_heavy")):
        with torch.device("meta"):
            model = build(ModelConfig(temporal=temporal), 101, 64, 224, compat="reference").eval()
            cvae = build_cvae((1024, 8, 7, 7))
        table = tables[name]
        assert flops(model.backbone, torch.empty(CLIP, **meta)) == table["flops_backbone"]
        assert flops(model.attention, maps) == table["flops_attention"]
        assert flops(model.logits, torch.empty(1, 1024, 7, 1, 1, **meta)) == table["flops_logits"]
        assert flops(cvae, maps, attention, noise) == tables[f"cvae_{name}"]["flops_forward_5c"]
        assert flops(cvae.decode, attention, noise) == tables[f"cvae_{name}"]["flops_inference_5c"]
