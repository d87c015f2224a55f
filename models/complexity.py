"""Parameters and FLOPs of a recognizer, part by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from .recognizer import Recognizer

_PARTS = {"backbone": "backbone", "attention": "attention", "classifier": "logits"}


@dataclass(frozen=True)
class Complexity:
    """Counts by part: backbone, attention (0 without a head), classifier.

    flops are those of one clip: convolutions and matrix products, a multiply-add being 2. Pooling, normalization and
    activations are left out, as is usual; parameters are all trainable values, so no running statistics.
    """

    parameters: dict[str, int]
    flops: dict[str, int]

    def to_json(self) -> dict[str, dict[str, int]]:
        """The counts with their totals."""
        return {
            name: {"total": sum(counts.values()), **counts}
            for name, counts in (("parameters", self.parameters), ("flops", self.flops))
        }


def complexity(recognizer: Recognizer, clip_length: int, size: int) -> Complexity:
    """Counts for one clip of clip_length frames of size x size pixels, at once and without memory: shapes alone run.

    The recognizer may be on any device and is left as it is. Raises ValueError for clips that it does not take.
    """
    shapes = {name: torch.empty_like(value, device="meta") for name, value in recognizer.state_dict().items()}
    clip = torch.empty(1, recognizer.in_channels, clip_length, size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(recognizer, shapes, (clip,))
    counted, root = counter.get_flop_counts(), type(recognizer).__name__
    parameters, flops = {}, {}
    for part, module in _PARTS.items():
        found = getattr(recognizer, module)
        parameters[part] = 0 if found is None else sum(parameter.numel() for parameter in found.parameters())
        flops[part] = sum(counted.get(f"{root}.{module}", {}).values())
    assert sum(flops.values()) == sum(counted["Global"].values())
    assert sum(parameters.values()) == sum(parameter.numel() for parameter in recognizer.parameters())
    return Complexity(parameters, flops)
