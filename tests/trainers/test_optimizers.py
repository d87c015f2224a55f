import sys
import types

import pytest
import torch

from genkd.configs.schema import OptimizerConfig
from genkd.errors import UserError
from genkd.trainers import optimizers


def test_cosine_with_warm_up():
    config = OptimizerConfig(lr=1.0, warmup_epochs=2.0)
    rates = [optimizers.learning_rate(config, step, 5, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.5) and rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    constant = OptimizerConfig(lr=0.3, schedule="constant")
    assert {optimizers.learning_rate(constant, step, 5, 110) for step in range(110)} == {0.3}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(name):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = optimizers.build(OptimizerConfig(name=name, weight_decay=0.1), module, torch.device("cpu"))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(module[0].weight)] == 0.1
    assert [decays[id(p)] for p in (module[0].bias, module[1].weight, module[1].bias)] == [0, 0, 0]


def test_a_missing_or_foreign_apex_is_told_apart(monkeypatch):
    config = OptimizerConfig(backend="apex")
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"not installed.*optimizer\.backend=torch"):
        optimizers.build(config, torch.nn.Linear(1, 1), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(UserError, match="another project"):
        optimizers.build(config, torch.nn.Linear(1, 1), torch.device("cpu"))
    bare = types.ModuleType("apex.optimizers")
    monkeypatch.setitem(sys.modules, "apex.optimizers", bare)
    with pytest.raises(UserError, match="without its fused optimizers"):
        optimizers.build(config, torch.nn.Linear(1, 1), torch.device("cpu"))


def test_apex_is_used_when_it_is_there(monkeypatch):
    made = {}

    class Fused(torch.optim.SGD):
        def __init__(self, groups, **options):
            made.update(options)
            super().__init__(groups, options["lr"])

    apex = types.ModuleType("apex.optimizers")
    apex.FusedSGD = Fused
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    config = OptimizerConfig(backend="apex", lr=0.3, momentum=0.8)
    assert isinstance(optimizers.build(config, torch.nn.Linear(1, 1), torch.device("cpu")), Fused)
    assert made == {"lr": 0.3, "momentum": 0.8}
