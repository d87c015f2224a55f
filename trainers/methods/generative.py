"""Generative-based feature distillation (AAAI 2024), whole and by halves. Its losses are in trainers/losses.py.

In all three the student learns with a conditional VAE of its own, as the teacher did in the representation phase.
Generative distillation lets that VAE follow the teacher's; attention distillation lets the student's attention follow
the teacher's.
"""

from __future__ import annotations

from .base import Method

BOTH = Method("generative and attention distillation", teacher=("attention",), vae=True, follows_vae=True)
GENERATIVE_ONLY = Method("generative distillation alone", teacher=(), vae=True, follows_vae=True)
ATTENTION_ONLY = Method("attention distillation alone", teacher=("attention",), vae=True)
