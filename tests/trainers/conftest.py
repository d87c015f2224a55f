"""A configuration that trains in a moment."""

import pytest

from genkd.configs.load import load

# 10 training videos, 3 steps an epoch.
TINY = """
epochs: 2
batch_size: 4
log_every: 1
eval_every: 0
checkpoint_every: 1
tensorboard: false
precision: fp32
data: {clip_length: 16, size: 32, scales: [1.0, 0.875]}
model: {width: 0.0625, bn_momentum: 0.1}
optimizer: {name: adamw, lr: 0.001}
phases: {distill: {model: {temporal: top_heavy}}}
"""


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory):
    """The configuration as a file."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny(tiny_yaml, data):
    """A function: phase, overrides -> configuration on the synthetic data set."""

    def make(phase, *overrides):
        return load(str(tiny_yaml), phase, [f"data.dataset={data.path}", *overrides])

    make.path = tiny_yaml
    return make
