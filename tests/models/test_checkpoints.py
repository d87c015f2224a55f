import pytest
import safetensors.torch
import torch

from genkd.configs.schema import ModelConfig
from genkd.errors import UserError
from genkd.models import checkpoints
from genkd.models.recognizer import build_cvae

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


def test_weights_that_differ_from_their_card_are_refused_in_one_sentence(tmp_path):
    card = checkpoints.ModelCard(**{**CARD.__dict__, "model": ModelConfig(width=0.5)})
    flat = checkpoints.ModelCard(**{**CARD.__dict__, "model": ModelConfig(width=0.25, temporal="top_heavy")})
    plain = checkpoints.ModelCard(**{**CARD.__dict__, "attention": False})
    network = CARD.build()
    for other, problem in (
        (card, r"Conv3d_1a_7x7.conv3d.weight is \(16, 3, 7, 7, 7\) in the file, \(32, 3, 7, 7, 7\) in the network"),
        (flat, r"backbone.Conv3d_1a_7x7.conv3d.weight is \(16, 3, 7, 7, 7\) in the file, \(16, 3, 1, 7, 7\) in the"),
        (plain, r"attention.conv.bias is \(256,\) in the file, nothing in the network"),
    ):
        checkpoints.save_weights(tmp_path, other, {"recognizer": network})
        with pytest.raises(UserError, match=problem):
            checkpoints.load_recognizer(tmp_path)


def test_a_vae_of_another_network_is_refused_in_one_sentence(tmp_path):
    checkpoints.save_weights(tmp_path, CARD, {"recognizer": CARD.build(), "cvae": build_cvae((256, 2, 3, 3))})
    problem = r"cvae.safetensors does not fit the recognizer beside it: encoder.conv.0.weight is \(256, 256, 1, 3, 3\)"
    with pytest.raises(UserError, match=problem):
        checkpoints.load_cvae(tmp_path)


def test_a_card_of_another_version_is_told_in_one_sentence(tmp_path):
    checkpoints.save_weights(tmp_path, CARD, {"recognizer": CARD.build()})
    path = tmp_path / "recognizer.safetensors"
    text = CARD.to_json().replace('"strided"', '"braided"')
    assert "braided" in text
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(path), metadata={"genkd": text}))
    with pytest.raises(UserError, match=r"this version of genkd: model\.stem: .* \(got 'braided'\)$") as caught:
        checkpoints.load_recognizer(tmp_path)
    assert "\n" not in str(caught.value)
