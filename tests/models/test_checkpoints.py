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


def close(got, want):
    """Within 1e-4 of the largest value, the reference's own bound."""
    want = np.asarray(want)
    np.testing.assert_allclose(np.asarray(got.detach()), want, rtol=0, atol=1e-4 * np.abs(want).max())


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


@pytest.fixture(scope="module")
def helper(reference):
    sys.path.insert(0, str(reference))
    import reference_state

    yield reference_state
    sys.path.remove(str(reference))


@pytest.fixture(scope="module")
def student(helper, reference):
    """The reference's student and its outputs for clip_a."""
    model, report = checkpoints.from_reference(helper.make_state_dict(reference / "keys" / "recognition_student.json"))
    assert (report.kind, report.unused) == ("recognition student", ())
    with torch.inference_mode():
        return model, model(helper.make_clip("clip_a", (1, 3, 64, 224, 224)))


@pytest.fixture(scope="module")
def cvae(helper, reference):
    state = helper.make_state_dict(
        reference / "keys" / "recognition_cvae_student.json", prefixes=("cencoder", "cdecoder.", "cencoder_832.fc3")
    )
    state = {key: value for key, value in state.items() if "con2" not in key}
    module, report = checkpoints.from_reference(state)
    assert report.kind == "recognition cvae"
    assert report.unused and all("_832" in key for key in report.unused)
    return module


def test_the_references_student_is_matched(student, reference):
    model, output = student
    want = np.load(reference / "open" / "recognition_student_cells.npz")
    features = output.features["Mixed_5c"]
    close(features.mean((3, 4)), want["Mixed_5c_mean_hw"])
    close(features[0, :4, :2], want["Mixed_5c_corner"])
    close(output.attention, want["att"])
    close(output.logits, want["logits_fg_b1"])
    close(output.scores, want["scores_b1"])
    assert sum(p.numel() for p in model.parameters()) == 37_808_397


def test_the_references_teacher_is_matched_and_its_scores_depend_on_the_batch(helper, reference):
    model, report = checkpoints.from_reference(helper.make_state_dict(reference / "keys" / "recognition_teacher.json"))
    assert report.kind == "recognition teacher"
    want = np.load(reference / "open" / "recognition_teacher_cells.npz")
    clips = [helper.make_clip(name, (1, 3, 64, 224, 224)) for name in ("clip_a", "clip_b")]
    with torch.inference_mode():
        output = model(torch.cat(clips))
    close(output.attention[:1], want["att"])
    close(output.logits, want["logits_fg_b2"])
    close(output.scores, want["scores_b2"])


def test_the_references_cvae_and_losses_are_matched(helper, student, cvae, reference):
    want = np.load(reference / "open" / "recognition_cvae_cells.npz")
    _, output = student
    features, attention = output.features["Mixed_5c"], output.attention
    noise = helper.make_input("eps", (1, 8, 1024))
    with torch.inference_mode():
        got = cvae(features, attention, noise)
        close(got.mean, want["means"])
        close(got.logvar, want["log_var"])
        close(got.reconstruction.mean((3, 4)), want["recon_mean_hw"])
        close(cvae.decode(attention, noise).mean((3, 4)), want["inference_recon_mean_hw"])
        terms = losses.generative(LossConfig(), features, attention, got.reconstruction, got.mean, got.logvar)
    close(terms["total"], want["loss_cvae"])
    close(terms["mse"], want["recon_mse"])
    close(0.1 * terms["kl"], want["loss_cvae_kl_part"])


def test_stage_b_of_the_reference_is_matched(helper, student, cvae, reference):
    """Epoch 5, class 7, beta 0.1; the teacher is another network of the same layout."""
    want = np.load(reference / "open" / "recognition_losses_cells.npz")
    _, output = student
    noise = helper.make_input("eps", (1, 8, 1024))
    state = helper.make_state_dict(reference / "keys" / "recognition_teacher.json", salt="teacher.")
    teacher, _ = checkpoints.from_reference(state)
    with torch.inference_mode():
        taught = teacher(helper.make_clip("clip_a", (1, 3, 64, 224, 224))).attention
        class_loss = losses.classification(output.logits, torch.tensor([7]), compat="reference")
        terms = losses.distillation(
            LossConfig(), class_loss, 5, output.features["Mixed_5c"], cvae.decode(output.attention, noise),
            output.attention, taught,
        )  # fmt: skip
    for name, key in (
        ("total", "stage2_total"),
        ("class", "stage2_ce"),
        ("rec", "stage2_recon_mse"),
        ("att", "stage2_kd_att_mse"),
    ):
        close(terms[name], want[key])


def test_foreign_weights_are_refused():
    with pytest.raises(UserError, match="neither"):
        checkpoints.from_reference({"conv1.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="lack"):
        checkpoints.from_reference({"cencoder.con1.0.weight": torch.zeros(64, 64, 1, 2, 2)})
