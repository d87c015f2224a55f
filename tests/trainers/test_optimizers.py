import sys
import types

import pytest
import torch

from genkd.configs.load import load
from genkd.configs.schema import OptimizerConfig
from genkd.errors import UserError
from genkd.trainers import optimizers
from genkd.trainers.loop import train


def test_cosine_with_warm_up():
    config = OptimizerConfig(lr=1.0, warmup_epochs=2.0)
    rates = [optimizers.learning_rate(config, step, 5, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.5) and rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    constant = OptimizerConfig(lr=0.3, schedule="constant")
    assert {optimizers.learning_rate(constant, step, 5, 110) for step in range(110)} == {0.3}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_norms_and_biases_are_not_decayed(name):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizer = optimizers.build(OptimizerConfig(name=name, weight_decay=0.1), module, torch.device("cpu"))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(module[0].weight)] == 0.1
    assert [decays[id(p)] for p in (module[0].bias, module[1].weight, module[1].bias)] == [0, 0, 0]


def test_adam_has_its_decay_in_the_gradient_and_adamw_beside_it():
    """The first step of Adam is lr against the gradient's sign, whatever its size. Here the loss pulls the weight 2 up
    by 1, the decay of 0.6 pulls it down by 1.2."""
    module = torch.nn.Linear(1, 1, bias=False)
    weights = {}
    for name in ("adam", "adamw"):
        with torch.no_grad():
            module.weight.fill_(2.0)
        config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.6, betas=(0.8, 0.99))
        optimizer = optimizers.build(config, module, torch.device("cpu"))
        module.weight.grad = torch.full((1, 1), -1.0)
        optimizer.step()
        weights[name] = module.weight.item()
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    assert weights == pytest.approx({"adam": 2 - 0.1, "adamw": 2 * (1 - 0.1 * 0.6) + 0.1})


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_on_a_gpu_they_are_fused(name, kind):
    module = torch.nn.Linear(2, 2, device="cuda")
    optimizer = optimizers.build(OptimizerConfig(name=name), module, torch.device("cuda"))
    assert type(optimizer) is kind and all(group["fused"] for group in optimizer.param_groups)
    module(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()


def test_thumos14_has_the_originals_optimizers():
    """train.py: Adam for both, betas 0.9 and 0.999 with the decay for the detector, 0.8 and 0.999 without for the VAEs;
    rates and decays of its two configurations."""
    for preset, rate in (("thumos14", 1e-6), ("thumos14-flow", 1e-5)):
        config = load(preset, "detect-distill")
        own, cvae = config.optimizer, config.cvae_optimizer
        assert (own.name, own.lr, own.betas, own.weight_decay) == ("adam", rate, (0.9, 0.999), 1e-3)
        assert (cvae.name, cvae.lr, cvae.betas, cvae.weight_decay) == ("adam", 1e-4, (0.8, 0.999), 0.0)
        assert {own.schedule, cvae.schedule} == {"constant"} and own.warmup_epochs == cvae.warmup_epochs == 0


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


def test_apex_is_used_when_it_is_there(monkeypatch, tiny, tmp_path):
    made = {}

    class Fused(torch.optim.SGD):
        def __init__(self, groups, **options):
            made.clear()
            made.update(options)
            super().__init__(groups, options["lr"])

        def zero_grad(self):
            """As in NVIDIA's FusedAdam, which takes no argument."""
            raise AssertionError("FusedSGD's takes one")

    apex = types.ModuleType("apex.optimizers")
    apex.FusedSGD = apex.FusedAdam = Fused
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    config = OptimizerConfig(backend="apex", lr=0.3, momentum=0.8)
    assert isinstance(optimizers.build(config, torch.nn.Linear(1, 1), torch.device("cpu")), Fused)
    assert made == {"lr": 0.3, "momentum": 0.8}
    for name in ("adam", "adamw"):
        config = OptimizerConfig(backend="apex", name=name, lr=0.3)
        optimizers.build(config, torch.nn.Linear(1, 1), torch.device("cpu"))
        assert made == {"lr": 0.3, "betas": (0.9, 0.999), "adam_w_mode": name == "adamw"}
    options = ["epochs=1", "eval_every=0", "optimizer={backend: apex}"]
    assert train(tiny("teacher", *options), tmp_path / "run", lambda text: None)["epochs"] == 1
