"""A moving average of the weights that are trained."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Averages:
    """Copies of modules whose parameters follow the trained ones: p <- d*p + (1-d)*trained after every step.

    d is the decay, but (1+n)/(10+n) while that is less, with n the module's steps before, so that the first weights are
    soon forgotten. Buffers, such as batch norm's statistics, are averages already and are copied. Polyak and Juditsky,
    1992.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float):
        self._trained, self._decay = modules, decay
        self.modules = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}

    @torch.no_grad()
    def update(self, name: str, step: int) -> None:
        """After an optimizer step of a module; step counts the module's own, from 0."""
        rest = 1 - min(self._decay, (1 + step) / (10 + step))
        average, trained = self.modules[name], self._trained[name]
        torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), rest)
        for own, new in zip(average.buffers(), trained.buffers(), strict=True):
            own.copy_(new)

    def state_dict(self) -> dict:
        return {name: module.state_dict() for name, module in self.modules.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
