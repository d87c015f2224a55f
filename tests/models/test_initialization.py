"""What a network takes from other weights: by hand, on tiny networks."""

import logging

import pytest
import torch

from genkd.configs.load import load
from genkd.configs.schema import ModelConfig
from genkd.errors import UserError
from genkd.models import checkpoints
from genkd.models.checkpoints import ModelCard, initialize_from
from genkd.trainers import phases

CLASSES = ("a", "b")
STEM = "backbone.Conv3d_1a_7x7.conv3d.weight"
DATA = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "stride": 1}


def card(classes=CLASSES, *, attention=False, modality="rgb", clip_length=16, width=0.25, data=DATA, **model):
    config = ModelConfig(width=width, **model)
    return ModelCard(config, tuple(classes), clip_length, 64, attention, "none", data, modality)


def store(folder, seed=0, **about):
    """Weights of a network with batch norm statistics of its own; returns them."""
    made = card(**about)
    torch.manual_seed(seed)
    network = made.build()
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            value.fill_(41)
    checkpoints.save_weights(folder, made, {"recognizer": network})
    return network.state_dict()


def test_everything_is_copied_with_batch_norms_statistics(tmp_path):
    stored = store(tmp_path)
    target = card(attention=True).build()
    assert initialize_from(target, tmp_path) == ["attention"]
    own = target.state_dict()
    assert all(torch.equal(own[name], value) for name, value in stored.items())
    assert own["backbone.Mixed_5c.b0.bn.num_batches_tracked"] == 41


def test_an_attention_head_of_another_data_set_comes_along(tmp_path):
    stored = store(tmp_path, classes="cdefg", attention=True)
    target = card(attention=True).build()
    before = target.logits.weight.clone()
    assert initialize_from(target, tmp_path, classifier=False) == ["logits"]
    assert torch.equal(target.attention.linear.weight, stored["attention.linear.weight"])
    assert torch.equal(target.logits.weight, before)


def test_flow_takes_the_mean_of_rgbs_first_kernels(tmp_path, caplog):
    stored = store(tmp_path)
    target = card(modality="flow").build()
    with caplog.at_level(logging.INFO, "genkd"):
        assert initialize_from(target, tmp_path) == []
    kernel = target.state_dict()[STEM]
    red, green, blue = stored[STEM].unbind(1)
    for channel in (0, 1):
        torch.testing.assert_close(kernel[:, channel], (red + green + blue) / 3)
    assert "averaged over the channels" in caplog.text
    store(tmp_path, modality="flow")
    with pytest.raises(UserError, match=r"Conv3d_1a_7x7.*\(16, 2, 7, 7, 7\) there and \(16, 3, 7, 7, 7\) here"):
        initialize_from(card().build(), tmp_path)


@pytest.mark.parametrize(("stem", "steps"), [("strided", 1), ("mean", 1), ("paired", 2)])
def test_a_top_heavy_network_takes_sums_over_time(tmp_path, caplog, stem, steps):
    stored = store(tmp_path)
    target = card(temporal="top_heavy", stem=stem).build()
    with caplog.at_level(logging.INFO, "genkd"):
        assert initialize_from(target, tmp_path) == []
    own = target.state_dict()
    whole = sum(stored[STEM][:, :, step] for step in range(7))
    for step in range(steps):
        torch.testing.assert_close(own[STEM][:, :, step], whole / steps)
    name = "backbone.Mixed_3b.b1b.conv3d.weight"
    torch.testing.assert_close(own[name], sum(stored[name][:, :, step] for step in range(3))[:, :, None])
    kept = "backbone.Mixed_5b.b1b.conv3d.weight"
    assert own[kept].shape[2] == 3 and torch.equal(own[kept], stored[kept])
    # The stem, 2c and two 3x3s each of Mixed_3b, 3c, 4b and 4c.
    assert "10 kernels were summed over time" in caplog.text


def test_a_still_clip_gives_the_same_before_and_after_the_sum(tmp_path):
    """A frame that does not change looks the same to a full stem, away from the padding, and to one summed over it."""
    store(tmp_path)
    full, _ = checkpoints.load_recognizer(tmp_path)
    target = card(temporal="top_heavy", stem="paired").build().eval()
    initialize_from(target, tmp_path)
    clips = torch.rand(1, 3, 1, 64, 64).expand(-1, -1, 16, -1, -1).contiguous()
    with torch.inference_mode():
        inner = full.backbone.Conv3d_1a_7x7(clips)[:, :, 4]
        torch.testing.assert_close(target.backbone.Conv3d_1a_7x7(clips)[:, :, 4], inner, atol=1e-4, rtol=1e-4)


def test_flow_and_top_heavy_at_once(tmp_path):
    stored = store(tmp_path)
    target = card(modality="flow", temporal="top_heavy", stem="paired").build()
    initialize_from(target, tmp_path)
    want = stored[STEM].mean(1).sum(1) / 2
    assert target.state_dict()[STEM].shape == (16, 2, 2, 7, 7)
    for channel in (0, 1):
        for step in (0, 1):
            torch.testing.assert_close(target.state_dict()[STEM][:, channel, step], want)


@pytest.mark.parametrize(
    ("stored", "own", "problem"),
    [
        ({}, {"width": 0.5}, r"Conv3d_1a_7x7.conv3d.weight has shape \(16, 3, 7, 7, 7\) there and \(32, 3, 7, 7, 7\)"),
        ({"temporal": "top_heavy"}, {}, r"\(16, 3, 1, 7, 7\) there and \(16, 3, 7, 7, 7\) here"),
        ({"classes": "abc"}, {}, r"logits.weight has shape \(3, 256, 1, 1, 1\) there and \(2, 256, 1, 1, 1\) here"),
        ({"attention": True}, {"attention": True, "clip_length": 32}, r"attention.linear.weight has shape \(2, 256\)"),
    ],
)
def test_other_differences_name_the_key_and_the_shapes(tmp_path, stored, own, problem):
    store(tmp_path, **stored)
    with pytest.raises(UserError, match=problem):
        initialize_from(card(**own).build(), tmp_path)


def start(place, classes=CLASSES, phase="representation", modality=None, **overrides):
    """The recognizer of a run that starts from a place."""
    values = {
        "data.clip_length": 16, "data.size": 64, "model.width": 0.25, "data.mean": DATA["mean"],
        "data.std": DATA["std"], "data.stride": 1, "init": place, **overrides,
    }  # fmt: skip
    config = load("demo", phase, [f"{key}={value}" for key, value in values.items()])
    if modality:
        return phases.Phase(config, classes, modality).network
    return phases.build(config, classes).network


def test_other_classes_are_pretraining_and_the_classifier_stays_fresh(tmp_path, caplog):
    stored = store(tmp_path, classes="cdefg")
    with caplog.at_level(logging.INFO, "genkd"):
        begun = start(tmp_path)
    assert "knows 5 other classes: pretraining, without its classifier" in caplog.text
    assert "fresh weights: attention, logits" in caplog.text
    assert begun.logits.weight.shape[0] == 2
    assert torch.equal(begun.state_dict()[STEM], stored[STEM])


def test_the_same_classes_bring_their_classifier(tmp_path):
    stored = store(tmp_path)
    assert torch.equal(start(tmp_path).logits.weight, stored["logits.weight"])


def test_likely_mistakes_with_classes_are_refused(tmp_path):
    store(tmp_path, classes=("b", "a"))
    with pytest.raises(UserError, match="in another order"):
        start(tmp_path)
    store(tmp_path, classes=("0", "1"))
    with pytest.raises(UserError, match="as many classes as the data set, 2, but no names"):
        start(tmp_path)


def test_another_normalization_is_refused_for_the_same_classes_and_mentioned_for_pretraining(tmp_path, caplog):
    half = {**DATA, "mean": [0.5, 0.5, 0.5]}
    store(tmp_path, data=half)
    with pytest.raises(UserError, match=r"data\.mean=\[0\.5, 0\.5, 0\.5\], this run has \[0\.485"):
        start(tmp_path)
    store(tmp_path, classes="cdefg", data=half)
    start(tmp_path)
    assert "data.mean=[0.5, 0.5, 0.5]" in caplog.text


def test_flow_may_start_from_rgb_but_not_rgb_from_flow(tmp_path):
    stored = store(tmp_path, classes="cdefg")
    begun = start(tmp_path, phase="teacher", modality="flow")
    torch.testing.assert_close(begun.state_dict()[STEM][:, 1], stored[STEM].mean(1))
    store(tmp_path, classes="cdefg", modality="flow", data={"flow_mean": [0.5, 0.5], "flow_std": [0.226, 0.226]})
    with pytest.raises(UserError, match="is for flow clips, this data set holds rgb"):
        start(tmp_path)


def test_a_teacher_of_other_classes_is_still_refused(tmp_path):
    store(tmp_path, classes="cdefg", attention=True)
    with pytest.raises(UserError, match="trained on 5 other classes"):
        start("''", phase="distill", teacher=tmp_path)
