"""Detection's losses against numbers of the original implementation, by hand, and on batches of any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import genkd
from genkd.models.detector import DetectorOutput
from genkd.trainers import detection_losses as losses

FILE = Path(genkd.__file__).parent.parent / "shared/reference/open/detection_losses.npz"
PARTS = ("loc", "conf", "prop_loc", "prop_conf", "center")


@pytest.fixture
def arrays():
    if not FILE.is_file():
        pytest.skip("the original implementation's numbers are absent (../shared/reference)")
    return {name: torch.from_numpy(value) for name, value in np.load(FILE).items()}


def output_of(arrays):
    leaves = {name: arrays[f"pred_{name}"].clone().requires_grad_() for name in PARTS}
    return leaves, DetectorOutput(*leaves.values(), arrays["priors"], *[None] * 6)


def actions_of(*targets, clip_length=256):
    """Shares of the clip -> frames, as the loader gives them."""
    return [target * torch.tensor([clip_length, clip_length, 1.0]) for target in targets]


def test_losses_and_gradients_are_the_originals(arrays):
    leaves, output = output_of(arrays)
    targets = losses.targets_of(actions_of(arrays["target_0"], arrays["target_1"]), 256)
    found = losses.multi_segment(output, targets, 256, compat="reference")
    got = torch.stack([found[name] for name in PARTS])
    torch.testing.assert_close(got, arrays["losses"], rtol=1e-5, atol=1e-6)
    got.sum().backward()
    for name, leaf in leaves.items():
        want = arrays[f"grad_{name}"]
        assert (leaf.grad - want).abs().max() <= 1e-5 * want.abs().max(), name
    want = arrays["losses_background"]
    torch.testing.assert_close(losses.background(output.conf, compat="reference"), want[1], rtol=1e-5, atol=0)


def test_the_quality_that_center_learns_is_a_constant(arrays):
    """By default: the same loss, without the original's gradients to loc and prop_loc."""
    leaves, output = output_of(arrays)
    targets = losses.targets_of(actions_of(arrays["target_0"], arrays["target_1"]), 256)
    center = losses.multi_segment(output, targets, 256)["center"]
    torch.testing.assert_close(center, arrays["losses"][4], rtol=1e-5, atol=1e-6)
    center.backward()
    assert leaves["loc"].grad is None and leaves["prop_loc"].grad is None and leaves["center"].grad.any()


def test_boundary_losses_are_the_originals(arrays):
    found = losses.boundary(arrays["bce_start"], arrays["bce_end"], arrays["bce_scores"])
    torch.testing.assert_close(torch.stack(found), arrays["bce_losses"], rtol=1e-5, atol=1e-6)
    assert torch.equal(arrays["bce_scores"][..., ::4], arrays["bce_scores_quarter"])


def test_padding_changes_nothing(arrays):
    """Each sample alone, matched without padding, against the two together."""
    _, output = output_of(arrays)
    both = losses.match(output, losses.targets_of(actions_of(arrays["target_0"], arrays["target_1"]), 256), 256, 0.5)
    for number in range(2):
        own = DetectorOutput(*(value[number : number + 1] for value in output[:5]), output.priors, *[None] * 6)
        targets = losses.targets_of(actions_of(arrays[f"target_{number}"]), 256)
        alone = losses.match(own, targets, 256, 0.5)
        assert torch.equal(alone.conf[0], both.conf[number]) and torch.equal(alone.prop_conf[0], both.prop_conf[number])
        inside = alone.conf[0] > 0
        torch.testing.assert_close(alone.loc[0][inside], both.loc[number][inside])


def test_an_anchor_takes_the_shortest_action_around_it():
    """Anchor at frame 50 of 100; actions 0-100 (label 1) and 40-60 (label 2); another anchor at 80 has the first alone,
    one at 99.9 none: the first ends at 99."""
    output = DetectorOutput(
        loc=torch.full((1, 3, 2), 10.0), conf=torch.zeros(1, 3, 3), prop_loc=torch.zeros(1, 3, 2),
        prop_conf=torch.zeros(1, 3, 3), center=torch.zeros(1, 3, 1), priors=torch.tensor([[0.5], [0.8], [0.999]]),
        **dict.fromkeys(DetectorOutput._fields[6:]),
    )  # fmt: skip
    actions = [torch.tensor([[0.0, 99.0, 1.0], [40.0, 60.0, 2.0]])]
    matched = losses.match(output, losses.targets_of(actions, 100), 100, 0.5)
    assert matched.conf.tolist() == [[2, 1, 0]]
    assert matched.loc[0, 0].tolist() == pytest.approx([10.0, 10.0], abs=1e-4)
    assert matched.loc[0, 1].tolist() == pytest.approx([80.0, 19.0], abs=1e-4)
    # 10 + 10 frames of 99: too little of the action for the refinement.
    assert matched.prop_conf.tolist() == [[2, 0, 0]]
    found = losses.multi_segment(output, losses.targets_of(actions, 100), 100)
    # GIoU of the second: 20 of 99 overlap, the hull is the action: (0 + 1 - 20/99) / 2.
    assert found["loc"].item() == pytest.approx((1 - 20 / 99) / 2, abs=1e-4)
    assert found["prop_loc"].item() == pytest.approx(0, abs=1e-4)
    # Quality 1 and 20/99 against a logit of 0.
    assert found["center"].item() == pytest.approx(np.log(2), abs=1e-4)


def test_focal_is_cross_entropy_without_its_focus():
    logits, labels = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5) / 2
    torch.testing.assert_close(losses.focal(logits, labels, alpha=0.5, gamma=0.0), want, rtol=1e-4, atol=1e-4)


def test_a_window_without_actions_gives_finite_losses_without_gradient_to_segments():
    leaves = {name: torch.rand(1, 4, 2 if "loc" in name else 3 if "conf" in name else 1).requires_grad_()
              for name in PARTS}  # fmt: skip
    output = DetectorOutput(*leaves.values(), torch.rand(4, 1), *[None] * 6)
    found = losses.multi_segment(output, losses.targets_of([torch.zeros(0, 3)], 100), 100)
    assert [found[name].item() for name in ("loc", "prop_loc", "center")] == [0, 0, 0]
    sum(found.values()).backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())
    assert not leaves["loc"].grad.any() and leaves["conf"].grad.any()


def test_the_triplet_loss_is_averaged_over_the_spliced_samples():
    generator = torch.Generator().manual_seed(0)
    features = [tuple(torch.randn(3, 8, generator=generator) for _ in range(3)) for _ in range(3)]
    chosen = [tuple(value[[0, 2]] for value in values) for values in features]
    want = sum(weight * F.triplet_margin_loss(*values) for weight, values in zip((1, 0.1, 0.1), chosen, strict=True))
    torch.testing.assert_close(losses.triplet(features, torch.tensor([True, False, True])), want)
    assert losses.triplet(features, torch.zeros(3, dtype=torch.bool)) == 0
