import math

import pytest
import torch

from genkd.configs.schema import LossConfig
from genkd.trainers import losses


def test_class_loss_is_cross_entropy_of_time_averaged_logits():
    """Two steps of logits (0, 2) and (2, 0) average to (1, 1): the loss is log 2 for either class."""
    logits = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]])
    assert losses.classification(logits, torch.tensor([0])).item() == pytest.approx(math.log(2))


def test_the_references_class_loss_takes_the_softmax_twice():
    """Each step's softmax of (0, log 3) is (1/4, 3/4); two steps sum to (1/2, 3/2); softmax again."""
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), math.log(3)]]])
    want = math.log(1 + math.exp(-1.0))
    assert losses.classification(logits, torch.tensor([1]), compat="reference").item() == pytest.approx(want)


def test_kl_is_that_of_two_normals():
    random = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, generator=random), torch.randn(2, 3, 4, generator=random)
    attention = torch.rand(2, 4, 3, generator=random)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(attention.transpose(1, 2), torch.ones(2, 3, 4))
    want = torch.distributions.kl_divergence(posterior, prior).mean()
    torch.testing.assert_close(losses.kl_to_attention(mean, logvar, attention), want)
    assert losses.kl_to_attention(attention.transpose(1, 2), torch.zeros(2, 3, 4), attention).item() == 0


def test_stage_a_adds_its_terms_with_their_weights():
    """R = 1 against F = 0: mse 1. mean 1, logvar 0, a = 0: kl 1/2. Teacher's R = 3: kd 4."""
    zeros, attention = torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1)
    arguments = (zeros, attention, zeros + 1, torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
    terms = losses.generative(LossConfig(), *arguments)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"total": 1.05, "mse": 1.0, "kl": 0.5}
    )
    terms = losses.generative(LossConfig(), *arguments, zeros + 3)
    assert (terms["kd"].item(), terms["total"].item()) == (4.0, pytest.approx(1.09))


def test_stage_b_adds_its_terms_with_their_weights():
    features = torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    attention = torch.full((1, 2, 1), 0.5)
    terms = losses.distillation(LossConfig(), torch.tensor(1.0), 4, features, torch.full_like(features, 2.0), attention)
    assert terms["total"].item() == pytest.approx(1 + 0.1 * 4)
    terms = losses.distillation(
        LossConfig(), torch.tensor(1.0), 4, features, torch.full_like(features, 2.0), attention, attention + 0.4
    )
    assert terms["total"].item() == pytest.approx(1 + 0.1 * 4 + 0.1 * 0.16)
    terms["total"].backward()
    assert features.grad.abs().sum() > 0, "features are not detached in the reconstruction term"


def test_the_reconstruction_weight_is_a_ramp():
    """min(epoch, 20) / 40."""
    weights = [losses.reconstruction_weight(LossConfig(), epoch) for epoch in (1, 10, 20, 21, 100)]
    assert weights == [0.025, 0.25, 0.5, 0.5, 0.5]
