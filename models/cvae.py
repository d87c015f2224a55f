"""Conditional variational autoencoder of a feature map, conditioned on its attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .attention import group_norm


class CVAEOutput(NamedTuple):
    """mean and logvar (N,T,C) of the latent, reconstruction (N,C,T,H,W) of the features."""

    mean: Tensor
    logvar: Tensor
    reconstruction: Tensor


class Encoder(nn.Module):
    """Features (N,C,T,H,W) and attention (N,C,T) -> mean and log-variance, (N,T,C) each."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv3d(channels, channels, (1, height, width)), group_norm(channels), nn.ReLU())
        self.mlp = _mlp(2 * channels, channels, 2 * channels)

    def forward(self, features: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(features).flatten(2).transpose(1, 2)  # (N,T,C)
        mean, logvar = self.mlp(torch.cat([x, attention.transpose(1, 2)], -1)).chunk(2, -1)
        return mean, logvar


class Decoder(nn.Module):
    """Latent (N,T,C) and attention (N,C,T) -> features (N,C,T,H,W)."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.mlp = _mlp(2 * channels, channels, channels)
        self.deconv = nn.Sequential(
            nn.ConvTranspose3d(channels, channels, (1, height, width)), group_norm(channels), nn.ReLU()
        )

    def forward(self, latent: Tensor, attention: Tensor) -> Tensor:
        x = self.mlp(torch.cat([latent, attention.transpose(1, 2)], -1))
        return self.deconv(x.transpose(1, 2)[..., None, None])


class ConditionalVAE(nn.Module):
    """Models features given attention; noise comes in as an argument. "GKD", AAAI 2024."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.encoder = Encoder(channels, height, width)
        self.decoder = Decoder(channels, height, width)

    def forward(self, features: Tensor, attention: Tensor, noise: Tensor) -> CVAEOutput:
        """Encodes, samples mean + noise * exp(logvar / 2) with noise (N,T,C), decodes."""
        mean, logvar = self.encoder(features, attention)
        latent = mean + noise * torch.exp(logvar / 2)
        return CVAEOutput(mean, logvar, self.decoder(latent, attention))

    def decode(self, attention: Tensor, noise: Tensor) -> Tensor:
        """Features of a latent drawn from the prior N(attention, I): noise (N,T,C) -> (N,C,T,H,W)."""
        return self.decoder(attention.transpose(1, 2) + noise, attention)

    def decode_frozen(self, attention: Tensor, noise: Tensor) -> Tensor:
        """decode() with gradients to the attention only, not to the decoder's parameters.

        The parameters are detached for this call rather than switched off: DDP's reducer does not survive a
        requires_grad that changes.
        """
        latent = attention.transpose(1, 2) + noise
        frozen = {name: parameter.detach() for name, parameter in self.decoder.named_parameters()}
        return functional_call(self.decoder, frozen, (latent, attention))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )
