import json

import pytest
import torch

from genkd.configs.schema import ModelConfig
from genkd.models.complexity import complexity
from genkd.models.i3d import feature_shape
from genkd.models.recognizer import Recognizer, build

# Of the original implementation, 64 frames of 224 px, 101 classes.
BACKBONE = {"full": (12_287_264, 222_300_553_216), "top_heavy": (10_429_088, 90_712_588_288)}
ATTENTION, CLASSIFIER = (25_691_648 + 1_584_136, 3_649_044_480), (103_525, 1_447_936)


def published(temporal, classes=101, **options):
    with torch.device("meta"):
        config = ModelConfig(temporal=temporal, stem="strided")
        return Recognizer(config, classes, feature_shape(64, 224, 1.0), **options)


@pytest.mark.parametrize("temporal", ["full", "top_heavy"])
def test_counts_are_the_original_implementations(temporal):
    found = complexity(published(temporal), 64, 224)
    for part, (parameters, flops) in (
        ("backbone", BACKBONE[temporal]),
        ("attention", ATTENTION),
        ("classifier", CLASSIFIER),
    ):
        assert (found.parameters[part], found.flops[part]) == (parameters, flops), part
    total = found.to_json()["parameters"]["total"]
    assert total == {"full": 39_666_573, "top_heavy": 37_808_397}[temporal]


@pytest.mark.parametrize(
    ("temporal", "channels", "parameters", "flops"),
    [
        ("full", 3, 12_697_264, 222_300_553_216),
        ("full", 2, 12_675_312, 204_677_136_384),
        ("top_heavy", 3, 10_839_088, 90_712_588_288),
        ("top_heavy", 2, 10_835_952, 88_194_957_312),
    ],
)
def test_counts_of_the_published_i3d_without_attention(temporal, channels, parameters, flops):
    found = complexity(published(temporal, 400, attention=False, in_channels=channels), 64, 224)
    assert found.to_json()["parameters"]["total"] == parameters
    assert found.flops["backbone"] == flops
    assert found.parameters["attention"] == found.flops["attention"] == 0


def test_the_constants_above_are_those_of_the_reference_numbers(reference):
    stated = json.loads((reference / "params_flops.json").read_text())["recognition 1x3x64x224x224"]
    for name, temporal in (("teacher", "full"), ("student", "top_heavy")):
        entry = stated[name]
        assert entry["flops_backbone"] == BACKBONE[temporal][1]
        assert entry["params_backbone_with_logits"] == BACKBONE[temporal][0] + CLASSIFIER[0]
        assert entry["params_deconv1"] + entry["params_att_head"] == ATTENTION[0]
        assert (entry["flops_attention"], entry["flops_logits"]) == (ATTENTION[1], CLASSIFIER[1])


def test_the_first_convolution_by_hand():
    """1x7x7, 3 -> 16 channels, on 8 x 16 x 16 positions; only the stem differs between "mean" and "strided"."""
    strided, mean, paired = (
        complexity(build(ModelConfig(temporal="top_heavy", width=0.25, stem=stem), 5, 16, 32), 16, 32).flops["backbone"]
        for stem in ("strided", "mean", "paired")
    )
    assert mean == strided, "averaging two frames multiplies nothing"
    assert paired - strided == 2 * (7 * 7 * 3) * 16 * (8 * 16 * 16)


def test_counting_leaves_the_network_as_it_was():
    model = build(ModelConfig(width=0.25), 5, 16, 32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    complexity(model, 16, 32)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="do not fit this network"):
        complexity(model, 32, 32)
