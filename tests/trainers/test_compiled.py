"""torch.compile in the trainers: the same losses, and what it refuses."""

import json

import numpy as np
import pytest

from genkd.errors import UserError
from genkd.trainers.loop import train


def quiet(text):
    pass


def losses(run):
    return [line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_compiled_phase_follows_the_eager_one(tiny, tmp_path):
    for name, options in (("eager", []), ("compiled", ["compile=default"])):
        train(tiny("representation", "epochs=1", "model.dropout=0", "eval_every=0", *options), tmp_path / name, quiet)
    eager, compiled = (losses(tmp_path / name) for name in ("eager", "compiled"))
    assert [line["step"] for line in eager] == [line["step"] for line in compiled]
    for a, b in zip(eager, compiled, strict=True):
        for key in (key for key in a if key.endswith("total")):
            # From the second step on AdamW has made something of the rounding of the first.
            np.testing.assert_allclose(b[key], a[key], rtol=1e-3 if a["step"] == 1 else 1e-2)


def test_graphs_need_a_compiler(tiny):
    assert tiny("teacher", "compile=off").compile == "off"  # which is false to YAML
    with pytest.raises(UserError, match="cuda_graphs=true replays what torch"):
        tiny("teacher", "cuda_graphs=true")
