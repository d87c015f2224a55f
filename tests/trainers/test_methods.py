import math
import typing

import pytest
import torch
from torch.nn import functional as F

from genkd.configs.schema import DistillConfig, LossConfig, TrainConfig
from genkd.trainers.methods import METHODS, attention_transfer, features, logits


def test_the_registry_and_the_schema_name_the_same_methods():
    assert set(typing.get_args(DistillConfig.model_fields["method"].annotation)) == set(METHODS)
    for name, method in METHODS.items():
        config = TrainConfig(phase="distill", alternate="epoch", distill=DistillConfig(method=name))
        assert config.passes == (2 if method.vae else 1), name
        assert method.needs_teacher == (name != "none")


def test_logit_distillation_by_hand():
    """Teacher (1/2, 1/2), student (1/4, 3/4) at temperature 1: KL = 1/2 log 2 + 1/2 log(2/3). Two equal time steps."""
    student = {"logits": torch.tensor([0.0, math.log(3)]).reshape(1, 2, 1).repeat(1, 1, 2)}
    teacher = {"logits": torch.zeros(1, 2, 2)}
    got = logits.loss(LossConfig(temperature=1.0, logits=1.0), student, teacher)
    assert got.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    # At t = 2 the student's odds are sqrt(3) to 1, and the loss is four times its divergence.
    own = torch.tensor([1, math.sqrt(3)]) / (1 + math.sqrt(3))
    want = 0.25 * 4 * sum(0.5 * math.log(0.5 / p) for p in own.tolist())
    got = logits.loss(LossConfig(temperature=2.0, logits=0.25), student, teacher)
    assert got.item() == pytest.approx(want, rel=1e-5)
    assert logits.loss(LossConfig(), teacher, teacher).item() == 0


def test_feature_distillation_is_a_share_of_the_teachers_energy():
    """Student 0 misses all of it: 1. A student at half the teacher's features misses a quarter."""
    taught = torch.rand(2, 3, 2, 2, 2) + 0.1
    for factor, want in ((0.0, 1.0), (0.5, 0.25), (1.0, 0.0)):
        got = features.loss(LossConfig(features=2.0), {"features": factor * taught}, {"features": taught})
        assert got.item() == pytest.approx(2 * want, abs=1e-6)
    silent = features.loss(LossConfig(), {"features": taught}, {"features": 0 * taught})
    assert silent.isfinite()


def test_attention_transfer_by_hand():
    """Energy (1, 0) against (0, 1) in two places: maps of length 1 at a right angle, squared distance 2."""
    one, other = torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 2)
    one[..., 0], other[..., 1] = 5.0, 0.1
    loss = attention_transfer.loss(LossConfig(attention_transfer=3.0), {"features": one}, {"features": other})
    assert loss.item() == pytest.approx(6.0)
    assert attention_transfer.loss(LossConfig(), {"features": one}, {"features": 7 * one}).item() == 0
    random = torch.rand(2, 4, 3, 2, 2)
    want = F.normalize(random.pow(2).mean(1).flatten(1))  # as its authors write it; the mean's factor cancels
    torch.testing.assert_close(attention_transfer.attention_map(random), want)
    assert not attention_transfer.attention_map(torch.zeros(1, 2, 1, 2, 2)).any()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.loss])
def test_losses_send_gradients_to_the_student_alone(method):
    random = torch.Generator().manual_seed(0)
    shapes = {"logits": (2, 5, 3), "features": (2, 4, 3, 2, 2)}
    own = {name: torch.rand(shape, generator=random, requires_grad=True) for name, shape in shapes.items()}
    taught = {name: torch.rand(shape, generator=random) for name, shape in shapes.items()}
    METHODS[method].loss(LossConfig(), own, taught).backward()
    (name,) = METHODS[method].teacher
    assert own[name].grad.abs().sum() > 0 and taught[name].grad is None
