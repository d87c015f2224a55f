"""The phases' losses and gradients are the same through the fused ops and through the formulas."""

import contextlib

import pytest
import torch

from genkd.kernels import backend
from genkd.pipelines.loader import Batch
from genkd.trainers import phases
from genkd.trainers.phases import Noise, Turn


@pytest.mark.parametrize("compat", ["none", "reference"])
def test_stages_through_the_ops_equal_the_formulas(tiny, compat):
    generator = torch.Generator().manual_seed(0)
    config = tiny("representation", f"compat={compat}", "alternate=step", "model.dropout=0", "model.width=0.25")
    taught = {}

    def run(formulas):
        phase = phases.build(config, ("a", "b", "c"))
        phase.train()
        channels, time, height, width = phase.card.feature_shape
        if not taught:
            taught["clips"] = torch.randn(4, 3, 16, 32, 32, generator=generator)
            taught["attention"] = torch.rand(4, channels, time, generator=generator)
            taught["maps"] = torch.rand(4, channels, time, height, width, generator=generator)
            taught["noise"] = torch.randn(4, time, channels, generator=generator)
        phase.teacher_attention = lambda batch, turn: taught["attention"]
        phase.teacher_reconstruction = lambda features, attention, noise: taught["maps"]
        batch = Batch(taught["clips"], torch.tensor([0, 1, 2, 0]), torch.arange(4), 4, 4)
        noise = taught["noise"]
        found, gradients = [], {}
        with backend.as_formulas() if formulas else contextlib.nullcontext():
            for stage in phase.stages(batch, Turn(3, 2, Noise(noise, noise, noise), None)):
                module = phase.modules[stage.module]
                module.zero_grad()
                stage.terms["total"].backward()
                found.append({name: value.item() for name, value in stage.terms.items()})
                gradients |= {f"{stage.module}.{name}": p.grad for name, p in module.named_parameters()}
        return found, gradients

    got, want = run(False), run(True)
    assert [sorted(terms) for terms in got[0]] == [["kd", "kl", "mse", "total"], ["att", "class", "rec", "total"]]
    for ours, formulas in zip(got[0], want[0], strict=True):
        assert ours == pytest.approx(formulas, rel=1e-6)
    assert got[1].keys() == want[1].keys() and any(key.startswith("recognizer.logits") for key in got[1])
    for name, gradient in want[1].items():
        largest = gradient.abs().max().clamp_min(1e-9)
        assert (got[1][name] - gradient).abs().max() <= 2e-5 * largest, name
