"""The original implementation's training schedule on genkd's networks, to measure ours against.

Written down from what it does ("Generative Model-based Feature Knowledge Distillation for Action Recognition", AAAI
2024, recognition, distillation phase), with every circumstance that costs time or memory: an epoch is a pass over the
data for the VAE and another one for the network; float32 in NCDHW; the teacher and its VAE run in eval mode, but with
gradients, which are computed and never used; losses are fetched from the device in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn import functional as F

from ..models.cvae import ConditionalVAE
from ..models.recognizer import ENDPOINT, Recognizer
from ..pipelines.loader import Batch


class ReferenceSchedule:
    """student and cvae are trained, with SGD and Adam; teacher and teacher_cvae are followed. part: times a part."""

    def __init__(
        self, student: Recognizer, cvae: ConditionalVAE, teacher: Recognizer, teacher_cvae: ConditionalVAE,
        device: torch.device, part: Callable[[str], AbstractContextManager],
    ):  # fmt: skip
        self.device, self.part = device, part
        self.student, self.cvae = student.to(device).train(), cvae.to(device).train()
        self.teacher, self.teacher_cvae = teacher.to(device).eval(), teacher_cvae.to(device).eval()
        self.optimizer = torch.optim.SGD(student.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
        self.cvae_optimizer = torch.optim.Adam(cvae.parameters(), lr=1e-4, betas=(0.8, 0.999))
        self.mse = nn.MSELoss()

    def vae_pass(self, batches: Iterable[Batch]) -> None:
        """The first half of an epoch: the VAE learns the student's features, whose weights rest."""
        self.student.requires_grad_(False)
        self.cvae.requires_grad_(True)
        for batch in batches:
            clips = batch.clips.to(self.device).contiguous()
            with self.part("student"):
                features, attention = self._look(self.student, clips)
            with self.part("cvae"):
                found = self.cvae(features, attention, self._noise(attention))
            with self.part("teacher"):
                taught = self.teacher_cvae(features, attention, self._noise(attention)).reconstruction
            with self.part("losses"):
                shift = found.mean - attention.transpose(1, 2)
                kl = -0.5 * (1 + found.logvar - shift.pow(2) - found.logvar.exp()).mean()
                follow = self.mse(found.reconstruction, taught)
                loss = (found.reconstruction - features).pow(2).mean() + 0.1 * kl + 0.01 * follow
            with self.part("cvae"):
                loss.backward()
            with self.part("optimizer"):
                self.cvae_optimizer.step()
                self.cvae_optimizer.zero_grad()
            loss.item(), follow.item()

    def network_pass(self, batches: Iterable[Batch], epoch: int) -> None:
        """The second half: the student learns classes, and to be what the VAE expects and the teacher attends to."""
        self.student.requires_grad_(True)
        self.cvae.requires_grad_(False)
        for batch in batches:
            clips, labels = batch.clips.to(self.device).contiguous(), batch.labels.to(self.device)
            with self.part("student"):
                features, attention = self._look(self.student, clips)
                weighted = features * attention[..., None, None]
                weighted = weighted / weighted.sum() * features.sum()
                pooled = self.student.dropout(F.avg_pool3d(weighted, self.student.pool, stride=1))
                scores = self.student.logits(pooled).flatten(2).softmax(1).sum(2)
            with self.part("cvae"):
                expected = self.cvae.decode(attention, self._noise(attention))
            with self.part("teacher"):
                _, taught = self._look(self.teacher, clips)
            with self.part("losses"):
                reconstruction = (expected - features).pow(2).mean()
                follow = self.mse(attention, taught)
                loss = F.cross_entropy(scores, labels) + min(epoch, 20) / 40 * reconstruction + 0.1 * follow
            with self.part("student"):
                loss.backward()
            with self.part("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss.item(), reconstruction.item(), follow.item()

    @staticmethod
    def _look(net: Recognizer, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = net.backbone(clips)[ENDPOINT]
        assert net.attention is not None
        return features, net.attention(features)

    @staticmethod
    def _noise(attention: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(attention.transpose(1, 2))
