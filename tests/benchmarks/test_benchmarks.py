import io
import json

import pytest
import torch

from genkd.benchmarks import train
from genkd.benchmarks.common import compare
from genkd.tables import benchmark_tables, show


def test_contenders_take_turns_and_are_compared_with_the_first():
    calls = []

    def contender(name, rates):
        def measure():
            calls.append(name)
            return rates.pop(0), {"note": name}

        return measure

    result = compare("x", "things/s", {"a": contender("a", [1.0, 2, 3]), "b": contender("b", [4.0, 6, 5])}, 3, {})
    assert calls == ["a", "b"] * 3
    assert [(row["median"], row["ratio"]) for row in result["rows"]] == [(2, 1), (5, 2.5)]
    assert result["machine"]["cores"] >= 1 and result["versions"]["torch"]
    json.dumps(result)


def test_the_originals_schedule_has_its_losses(data):
    """One batch, every noise zero, eval mode: its two losses are those of genkd under compat=reference."""
    from contextlib import nullcontext

    from genkd.benchmarks.train_reference import ReferenceSchedule
    from genkd.configs.schema import LossConfig, ModelConfig
    from genkd.models.recognizer import Recognizer, build_cvae
    from genkd.pipelines.loader import Batch
    from genkd.trainers import losses

    torch.manual_seed(0)
    shape = (256, 2, 1, 1)
    student, teacher = (Recognizer(ModelConfig(width=0.25), 3, shape, compat="reference") for _ in range(2))
    cvae, teacher_cvae = build_cvae(shape), build_cvae(shape)
    schedule = ReferenceSchedule(student, cvae, teacher, teacher_cvae, torch.device("cpu"), lambda name: nullcontext())
    for module in (student, cvae):
        module.eval()
    schedule._noise = lambda attention: torch.zeros_like(attention.transpose(1, 2))
    batch = Batch(torch.randn(2, 3, 16, 32, 32), torch.tensor([0, 2]), torch.arange(2), 2, 2)
    zeros, found = torch.zeros(2, 2, 256), []
    output, taught = student(batch.clips), teacher(batch.clips)
    features, attention = output.features["Mixed_5c"], output.attention
    model, followed = cvae(features, attention, zeros), teacher_cvae(features, attention, zeros)
    want = [
        losses.generative(
            LossConfig(), features, attention, model.reconstruction, model.mean, model.logvar, followed.reconstruction
        )["total"],
    ]
    # Both passes step at the end, so the losses are caught as they are made.
    original = torch.Tensor.backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda loss: (found.append(loss.item()), original(loss)))
        schedule.vae_pass([batch])
        class_loss = losses.classification(output.logits, batch.labels, compat="reference")
        terms = losses.distillation(
            LossConfig(), class_loss, 4, features, cvae.decode(attention, zeros), attention, taught.attention
        )
        want.append(terms["total"])
        before = teacher.logits.weight.clone()
        schedule.network_pass([batch], 4)
    assert found == pytest.approx([value.item() for value in want], rel=1e-5)
    assert torch.equal(teacher.logits.weight, before), "the teacher is not trained"
    assert teacher.backbone.Mixed_5c.b0.conv3d.weight.grad is not None, "but its gradients are computed"


@pytest.mark.slow
def test_train_benchmark():
    result = train.run(None, 1, preset="demo", batches=2)
    assert [row["name"] for row in result["rows"]] == [train.REFERENCE, *train.OURS]
    for row in result["rows"]:
        extra = row["extra"]
        assert sum(extra["shares"].values()) == pytest.approx(1, abs=0.02)
        assert 0 < extra["utilization"] < 2 and extra["peak_mb"] > 100 and extra["precision"] == "float32"
    (target,) = result["targets"]
    assert target["met"] == (target["measured"] >= 1.5)
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", text)
        show(benchmark_tables(result))
    assert "teacher" in text.getvalue() and "%" in text.getvalue()
    work = {row["name"]: row["extra"]["gflops_a_clip"] for row in result["rows"]}
    # The student runs once for both stages, and the teacher's gradients are left out.
    assert work[train.GENKD] < 0.7 * work[train.REFERENCE]
    assert work["genkd, distilled, teacher's outputs cached"] < work[train.GENKD]
