import json

import pytest

from genkd.benchmarks import loader_tune
from genkd.configs.load import load
from genkd.configs.schema import DataConfig
from genkd.errors import UserError


def test_of_each_group_the_clearly_fastest_is_kept_and_built_upon():
    asked = []

    def rate(settings):
        asked.append(dict(settings))
        gains = {"decoder": {"pyav": 1.0, "dali": 2.0}, "prefetch": {2: 1.0, 4: 1.01}, "decoder_threads": {0: 1, 4: 3}}
        value = 10.0
        for name, chosen in settings.items():
            value *= gains[name][chosen]
        return value

    groups = [
        [{"decoder": "pyav"}, {"decoder": "dali"}],
        [{"prefetch": 2}, {"prefetch": 4}],
        [{"decoder_threads": 0}, {"decoder_threads": 4}],
    ]
    best, rows = loader_tune.search(groups, rate, 2)
    # A gain of one per cent is noise: the first of its group stays.
    assert best == {"decoder": "dali", "prefetch": 2, "decoder_threads": 4}
    assert asked[4:8] == [{"decoder": "dali", "prefetch": number} for number in (2, 4, 2, 4)]
    assert [row["ratio"] for row in rows] == [1, 2, 2, 2.02, 2, 6]
    assert [bool(row["extra"]) for row in rows] == [False, True, True, False, False, True]


@pytest.mark.parametrize(
    ("codec", "device", "decoders"),
    [
        ("h264", "cpu", ["pyav"]),
        ("vp9", "cpu", ["pyav", "dali", "hybrid", "hybrid", "hybrid", "hybrid"]),
        ("h264", "cuda", ["pyav", "dali", "hybrid", "hybrid", "hybrid", "hybrid"]),
    ],
)
def test_what_is_tried_is_what_a_machine_can_do(shard_sets, codec, device, decoders):
    groups = loader_tune.knobs(shard_sets(codec), device, 4)
    assert [settings["decoder"] for settings in groups[0]] == decoders
    assert any("pipelines_per_gpu" in settings for group in groups for settings in group) == (device == "cuda")
    for group in groups:
        for settings in group:
            DataConfig(**settings)


@pytest.mark.slow
def test_the_command_prints_overrides_that_training_takes(data, genkd, monkeypatch, tmp_path):
    monkeypatch.setattr(loader_tune, "SECONDS", 0.1)
    result = loader_tune.run(data.path, 1)
    overrides = [f"{name}={json.dumps(value)}" for name, value in result["best"].items()]
    assert load("small", "teacher", overrides).data.prefetch == result["best"]["data.prefetch"]
    assert all(row["median"] > 0 for row in result["rows"])
    with pytest.raises(UserError, match="one workload of 16x224, 64x224"):
        loader_tune.run(data.path, 1, "256x96-long")
    told = genkd("bench", "train", "--tune", check=False)
    assert told.returncode == 1 and "genkd bench train has no --tune" in told.stderr
