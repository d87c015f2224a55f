"""The phase's own stages under compat=reference against the original's losses: as it adds them up, window by window."""

import numpy as np
import pytest
import torch

from genkd.benchmarks.detect_schedule import OriginalTraining, Window, _gaps, segment_losses
from genkd.configs.load import load
from genkd.models.checkpoints import from_reference, load_cvae, load_detector, save_weights
from genkd.models.detector import DetectorOutput
from genkd.pipelines.loader import Batch, Windows
from genkd.trainers import phases
from genkd.trainers.phases import Noise, Turn

PARTS = ("loc", "conf", "prop_loc", "prop_conf", "center")
EPOCH = 5


def noises(shapes):
    return {
        name: torch.randn(1, time, channels, generator=torch.Generator().manual_seed(channels))
        for name, (channels, time, _, _) in shapes.items()
    }


def stages_of(phase, window, length):
    """What the phase says of the window: the terms of stage A and of stage B, without updates."""
    windows = Windows(
        torch.zeros(1, dtype=torch.int64), (window.actions * torch.tensor([length, length, 1.0]),), window.boundaries,
        window.spliced, None, window.segments[None], torch.tensor([True]), (0,),
    )  # fmt: skip
    batch = Batch(
        window.clip, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1, 1, None, windows
    )
    phase.train()
    noise = noises(phase.card.shapes)
    found = list(phase.stages(batch, Turn(EPOCH, 0, Noise(noise, noise, noise), None)))
    assert [stage.module for stage in found] == ["cvae", "detector"]
    return [{key: value.item() for key, value in stage.terms.items()} for stage in found]


def original_of(phase, teacher):
    """The original's loop on the phase's own networks, with the same noise."""
    schedule = OriginalTraining(
        phase.network, phase.cvae, load_detector(teacher)[0], load_cvae(teacher), torch.device("cpu")
    )
    noise = {value.shape: value for value in noises(phase.card.shapes).values()}
    schedule.noise = lambda attention: noise[attention.transpose(1, 2).shape]
    return schedule


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A phase of small random networks, and its teacher's folder."""
    place = tmp_path_factory.mktemp("parity") / "teacher"
    options = ["data.size=32", "model.width=0.0625", "compat=reference", "model.freeze_bn=always"]
    classes = ("Background", "A", "B", "C")
    teacher = phases.build(load("detect-demo", "detect-representation", [*options, "seed=1"]), classes)
    generator = torch.Generator().manual_seed(0)

    def stir(phase):
        """Fresh heads say nearly the same of every input."""
        for module in phase.modules.values():
            for parameter in module.parameters():
                scale = 0.5 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.05
                parameter.data += scale * torch.randn(parameter.shape, generator=generator)

    stir(teacher)
    save_weights(place, teacher.card, teacher.modules)
    phase = phases.build(load("detect-demo", "detect-distill", [*options, f"teacher={place}"]), classes)
    stir(phase)
    phase.network.pyramid.loc_head.conv1d.bias.data += 3.0  # 20 frames to either side, so that some anchors are refined
    return phase, place


def test_both_stages_add_up_to_the_originals_totals(small):
    phase, teacher = small
    generator = torch.Generator().manual_seed(3)
    clip, spliced = (300 * torch.randn(1, 3, 128, 32, 32, generator=generator) for _ in range(2))
    window = Window(
        clip, torch.tensor([[0.1, 0.3, 2.0], [0.35, 0.9, 1.0]]),
        (torch.rand(1, 2, 128, generator=generator) > 0.8).float(),
        spliced, torch.tensor([[12.0, 40.0], [61.0, 90.0], [41.0, 60.0]]),
    )  # fmt: skip
    cvae, detector = stages_of(phase, window, 128)
    schedule = original_of(phase, teacher)
    with torch.no_grad():
        total, follow = schedule.vae_losses(window)
        want = {key: value.item() for key, value in schedule.detector_losses(window, EPOCH).items()}
    assert cvae["total"] == pytest.approx(total.item(), rel=1e-5) and cvae["kd"] == pytest.approx(
        follow.item(), rel=1e-5
    )
    # A boundary that falls on a step of the features may be pooled from either side of it, as rounding goes.
    refined = {name for name in want if name.startswith("prop")} | {"total"}
    assert {name: value for name, value in detector.items() if name not in refined} == pytest.approx(
        {name: value for name, value in want.items() if name not in refined}, rel=1e-4
    )
    assert detector == pytest.approx(want, rel=1e-3)
    assert all(value > 1e-4 for value in want.values()), "every term says something"


@pytest.fixture(scope="module")
def losses(reference):
    return {name: torch.from_numpy(value) for name, value in np.load(reference / "open/detection_losses.npz").items()}


def test_the_loops_losses_of_segments_are_the_originals(losses):
    """So that the totals above and below are its own, and not genkd's said twice."""
    output = DetectorOutput(*(losses[f"pred_{name}"] for name in PARTS), losses["priors"], *[None] * 6)
    for targets, want in (
        ([losses["target_0"], losses["target_1"]], losses["losses"]),
        ([losses["interval_0"], losses["interval_1"]], losses["losses_background"]),
    ):
        found = segment_losses(output, targets, 256)
        torch.testing.assert_close(torch.stack([found[name] for name in PARTS]), want, rtol=1e-5, atol=1e-6)
    for number in range(2):
        gaps = torch.tensor(_gaps(losses[f"target_{number}"].numpy()))
        torch.testing.assert_close(gaps, losses[f"interval_{number}"].float())


@pytest.mark.slow
def test_the_total_of_stage_b_at_full_size(reference, helper, losses, tmp_path):
    """The networks, VAEs and clip of the reference arrays. From these come the parts loc, conf, prop_loc, prop_conf and
    center (losses of stored outputs), att (of stored attention) and triplet (stored); start, end, background and rec,
    whose inputs are not stored whole, from the loop on genkd's networks. The clip is its own spliced twin, as the
    stored triplet loss has it."""
    want = {
        name: torch.from_numpy(value) for name, value in np.load(reference / "open/detection_student_cells.npz").items()
    }
    taught = {
        name: torch.from_numpy(value) for name, value in np.load(reference / "open/detection_teacher_cells.npz").items()
    }

    def network(kind, salt=""):
        return from_reference(helper.make_state_dict(str(reference / "keys" / f"detection_{kind}.json"), salt))[0]

    classes = ("Background", *(f"action {number}" for number in range(20)))
    options = ["compat=reference", "model.freeze_bn=always"]
    teacher = phases.build(load("thumos14", "detect-representation", options), classes)
    save_weights(tmp_path, teacher.card, {"detector": network("teacher"), "cvae": network("cvae_teacher", "teacher.")})
    del teacher
    phase = phases.build(load("thumos14", "detect-distill", [*options, f"teacher={tmp_path}"]), classes)
    phase.network.load_state_dict(network("student").state_dict())
    phase.network.pyramid.loc_head.conv1d.bias.data += want["loc_bias_shift"]
    phase.cvae.load_state_dict(network("cvae_student").state_dict())
    clip = helper.make_clip("det_clip", (1, 3, 256, 96, 96), scale=300)
    window = Window(clip, losses["target_0"], losses["bce_scores"][:1], clip, want["ssl_proposals"].float())
    with torch.no_grad():
        _, found = stages_of(phase, window, 256)
        parts = {
            key: value.item() for key, value in original_of(phase, tmp_path).detector_losses(window, EPOCH).items()
        }
    output = DetectorOutput(*(want[f"weighted_{name}"] for name in PARTS), want["priors"], *[None] * 6)
    parts |= {name: value.item() for name, value in segment_losses(output, [losses["target_0"]], 256).items()}
    pairs = [(want[name], taught[name]) for name in ("att_4f", "att_5c")]
    parts |= {
        "triplet": want["weighted_ssl_loss"].item(),
        "att": 2 * sum((one - other).square().mean().item() for one, other in pairs),  # of the clip and its twin
    }
    weights = {"loc": 10, "prop_loc": 10, "background": 35, "triplet": 0.1, "rec": EPOCH / 20 * 0.5, "att": 10}
    parts["total"] = sum(weights.get(name, 1) * value for name, value in parts.items() if name != "total")
    assert found == pytest.approx(parts, rel=1e-4)
    assert all(value > 1e-3 for value in parts.values()), "every term says something"
