import pytest
import torch
from torch import nn

from genkd.trainers.ema import Averages
from genkd.trainers.selection import Selection


def test_averages_follow_by_hand():
    """Decay 0.5: the first step's own decay is 1/10, the second's 2/11; from the ninth on it would be one half."""
    module = nn.BatchNorm1d(1)
    averages = Averages({"net": module}, 0.5)
    with torch.no_grad():
        module.weight.fill_(2.0)  # it was 1
    module.running_mean.fill_(7.0)
    averages.update("net", 0)
    assert averages.modules["net"].weight.item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    with torch.no_grad():
        module.weight.fill_(0.0)
    averages.update("net", 1)
    assert averages.modules["net"].weight.item() == pytest.approx(2 / 11 * 1.9)
    averages.update("net", 1000)
    assert averages.modules["net"].weight.item() == pytest.approx(0.5 * 2 / 11 * 1.9)
    assert averages.modules["net"].running_mean.item() == 7 and not averages.modules["net"].training
    assert module.weight.requires_grad and not averages.modules["net"].weight.requires_grad
    restored = Averages({"net": nn.BatchNorm1d(1)}, 0.5)
    restored.load_state_dict(averages.state_dict())
    assert torch.equal(restored.modules["net"].weight, averages.modules["net"].weight)


def test_the_best_evaluation_has_the_highest_top1_then_the_lowest_loss():
    selection = Selection(patience=2)
    assert selection.take(1, 0.5, 1.0)
    assert selection.take(2, 0.5, 0.9) and not selection.take(3, 0.5, 0.95)
    assert not selection.exhausted
    assert not selection.take(4, 0.4, 0.1)
    assert selection.exhausted and selection.best == {"epoch": 2, "top1": 0.5, "loss": 0.9}
    again = Selection(patience=2)
    again.load_state_dict(selection.state_dict())
    assert again.exhausted and again.take(5, 0.6, 2.0) and not again.exhausted
    patient = Selection()
    assert patient.take(1, 1.0, 0.0) and not any(patient.take(n, 0.0, 1.0) for n in range(2, 99))
    assert not patient.exhausted
