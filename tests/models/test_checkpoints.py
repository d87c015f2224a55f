import sys

import numpy as np
import pytest
import torch

from genkd.configs.schema import LossConfig, ModelConfig
from genkd.errors import UserError
from genkd.models import checkpoints
from genkd.models.recognizer import build_cvae
from genkd.trainers import losses

CARD = checkpoints.ModelCard(ModelConfig(width=0.25), ("a", "b"), 16, 64, True, "none", {"size": 64})


def test_weights_describe_themselves(tmp_path):
    recognizer, cvae = CARD.build().eval(), build_cvae(CARD.feature_shape).eval()
    checkpoints.save_weights(tmp_path / "weights", CARD, {"recognizer": recognizer, "cvae": cvae})
    clips = torch.randn(1, 3, 16, 64, 64)
    for place in (tmp_path, tmp_path / "weights", tmp_path / "weights" / "recognizer.safetensors"):
        loaded, card = checkpoints.load_recognizer(place)
        assert card == CARD
        assert torch.equal(loaded(clips).logits, recognizer(clips).logits)
        restored = checkpoints.load_cvae(place)
        assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), cvae.parameters(), strict=True))


def test_a_weights_file_may_have_any_name(tmp_path):
    for seed, folder in enumerate(("a", "b")):
        torch.manual_seed(seed)
        checkpoints.save_weights(tmp_path / folder, CARD, {"recognizer": CARD.build()})
    (tmp_path / "a" / "recognizer.safetensors").rename(tmp_path / "b" / "mine.safetensors")
    mine, other = (checkpoints.load_recognizer(tmp_path / "b" / f"{n}.safetensors")[0] for n in ("mine", "recognizer"))
    assert not torch.equal(mine.logits.weight, other.logits.weight)


def test_places_without_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="neither a training run"):
        checkpoints.load_recognizer(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has not finished"):
        checkpoints.load_recognizer(tmp_path)
    (tmp_path / "recognizer.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="no weights that genkd wrote"):
        checkpoints.load_recognizer(tmp_path)


def test_initializing_keeps_only_a_missing_attention_head_fresh(tmp_path):
    plain = checkpoints.ModelCard(ModelConfig(width=0.25), ("a", "b"), 16, 64, False, "none", {})
    teacher = plain.build()
    checkpoints.save_weights(tmp_path, plain, {"recognizer": teacher})
    target = CARD.build()
    assert checkpoints.initialize_from(target, tmp_path) == ["attention"]
    assert torch.equal(target.logits.weight, teacher.logits.weight)
    for changes in (
        {"classes": ("a", "b", "c")},
        {"model": ModelConfig(width=0.5)},
        {"model": ModelConfig(width=0.25, temporal="top_heavy")},
    ):
        other = checkpoints.ModelCard(**{**CARD.__dict__, **changes}).build()
        with pytest.raises(UserError, match="does not fit"):
            checkpoints.initialize_from(other, tmp_path)


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="neither"):
        checkpoints.from_reference({"conv1.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="lack"):
        checkpoints.from_reference({"cencoder.con1.0.weight": torch.zeros(64, 64, 1, 2, 2)})
