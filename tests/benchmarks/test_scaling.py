import itertools
import json
import os
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from genkd.benchmarks import scaling, scaling_plot
from genkd.benchmarks import scaling_model as model
from genkd.benchmarks.scaling_rank import count
from genkd.cli import main
from genkd.errors import UserError

MIB = 2**20
# Round numbers to reckon with: steps of a second, clips of 1 MB and 10 core-milliseconds, links of 1 and 10 GB/s.
ROUND = model.Assumptions(
    clips_per_gpu=10, step_s=1, recognizer_backward_share=0.5, recognizer_gradient_mb=400,
    gpus_per_host=4, nvlink_gb_s=10, inter_host_gb_s=1, nvlink_latency_us=0, inter_host_latency_us=0,
    link_utilization=1, cores_per_host=100, cpu_s_per_clip=0.01, storage_gb_s=100, mb_per_clip=1, first_bucket_mib=1e9,
)  # fmt: skip
GRADIENTS = {"recognizer": [400e6]}


def test_a_ring_moves_twice_what_it_reduces():
    # 4 ranks, 100 MB at 10 MB/s: 6 pieces of 25 MB, one after the other, and 6 hops.
    assert model.ring_s(4, 100e6, 10e6, 0.5) == pytest.approx(6 * 2.5 + 6 * 0.5)
    assert model.ring_s(1, 100e6, 10e6, 0.5) == 0


def test_rings_in_hosts_and_between_them():
    a = ROUND.but("test", nvlink_latency_us=1e4, inter_host_latency_us=1e5)
    # In a host of 4: 2 * 3/4 * 400 MB / 10 GB/s + 6 * 10 ms. Between 2 hosts: 2 * 1/2 * 400 MB / 1 GB/s + 2 * 100 ms.
    assert model.all_reduce_s(a, 4, 400e6) == pytest.approx(0.06 + 0.06)
    assert model.all_reduce_s(a, 8, 400e6) == pytest.approx(0.12 + 0.4 + 0.2)
    # One ring of 8, as fast as its slowest link: 2 * 7/8 * 0.4 s + 14 * 100 ms.
    single = a.but("test", hierarchical=0)
    assert model.all_reduce_s(single, 8, 400e6) == pytest.approx(0.7 + 1.4)
    assert model.all_reduce_s(single, 4, 400e6) == pytest.approx(0.12)
    half = a.but("test", link_utilization=0.5, nvlink_latency_us=0)
    assert model.all_reduce_s(half, 4, 400e6) == pytest.approx(0.12)


@pytest.mark.parametrize("sizes", [[3, 30, 1, 200, 5], [1], [24, 1, 25, 26, 2], [0.5, 0.5, 24.5, 0.5, 3]])
def test_buckets_are_ddps(sizes):
    tensors = [torch.empty(int(size * MIB / 4), device="meta") for size in sizes]
    # As DDP arranges them after its first step, in the order in which gradients came.
    found, _ = dist._compute_bucket_assignment_by_size(tensors, [MIB, 25 * MIB])
    want = [sum(sizes[number] for number in bucket) * MIB for bucket in found]
    assert model.buckets([size * MIB for size in sizes], MIB, 25 * MIB) == want


def test_only_what_backward_does_not_hide_counts():
    # Four buckets are ready at 1, 2, 3, 4 s of a backward pass of 4 s. Each takes 0.5 s: the last one shows.
    assert model.exposed_s(4, [1] * 4, [0.5] * 4, 1) == pytest.approx(0.5)
    # Each takes 2 s: they queue from 1 s on and end at 9 s.
    assert model.exposed_s(4, [1] * 4, [2.0] * 4, 1) == pytest.approx(5)
    assert model.exposed_s(4, [1] * 4, [2.0] * 4, 0) == pytest.approx(8)
    assert model.exposed_s(4, [1] * 4, [2.0] * 4, 0.5) == pytest.approx(6.5)
    # A first layer that holds most parameters is ready last: it shows whole.
    assert model.exposed_s(4, [1, 9], [0.1, 0.9], 1) == pytest.approx(0.9)
    assert model.exposed_s(0, [1, 9], [0.1, 0.9], 1) == pytest.approx(1)


def test_a_step_and_its_limits():
    # One host of 4: 0.06 s of exchange in one bucket, which is ready when the backward pass ends.
    one = model.predict(ROUND, GRADIENTS, 4)
    assert (one.step_s, one.exposed_s) == (pytest.approx(1.06), pytest.approx(0.06))
    assert one.clips_per_s == pytest.approx(40 / 1.06) and one.efficiency == pytest.approx(1 / 1.06)
    assert (one.limit, one.ideal, one.loader, one.storage) == ("compute", 40, 10_000, 100_000)
    # Half the bytes: half the time.
    assert model.predict(ROUND.but("", gradient_bytes=2), GRADIENTS, 4).exposed_s == pytest.approx(0.03)
    # Two hosts: another 0.4 s. Loaders of 0.1 cores a host give 10 clips/s each; storage of 15 MB/s gives 15.
    two = model.predict(ROUND, GRADIENTS, 8)
    assert two.exposed_s == pytest.approx(0.46) and two.limit == "compute"
    slow = model.predict(ROUND.but("", cores_per_host=0.1), GRADIENTS, 8)
    assert (slow.limit, slow.clips_per_s, slow.efficiency) == ("loader", pytest.approx(20), pytest.approx(0.25))
    assert slow.without_limits == pytest.approx(two.clips_per_s)
    slow = model.predict(ROUND.but("", cores_per_host=0.1, storage_gb_s=0.015), GRADIENTS, 8)
    assert (slow.limit, slow.clips_per_s) == ("storage", pytest.approx(15))
    assert model.predict(ROUND.but("", inter_host_gb_s=0.1), GRADIENTS, 8).limit == "communication"
    # Cores that train and load in turn: 10 clips of 10 ms more.
    assert model.predict(ROUND.but("", loader_overlap=0), GRADIENTS, 1).step_s == pytest.approx(1.1)


def test_the_vaes_gradients_come_in_a_stage_of_their_own():
    both = ROUND.but("", cvae_gradient_mb=800, cvae_backward_share=0.1)
    found = model.predict(both, {**GRADIENTS, "cvae": [800e6]}, 4)
    assert found.exposed_s == pytest.approx(0.06 + 0.12) and found.exchange_s == pytest.approx(0.18)
    # Other megabytes than were counted, in the same proportions.
    assert model.predict(both, {**GRADIENTS, "cvae": [8.0]}, 4).exposed_s == pytest.approx(0.18)


def test_more_gpus_give_more_clips_and_no_better_efficiency():
    a = ROUND.but("", nvlink_latency_us=5, inter_host_latency_us=10, first_bucket_mib=1, storage_gb_s=1)
    found = [model.predict(a, {"recognizer": [4e6] * 100}, gpus) for gpus in (1, *scaling.GPUS)]
    for before, after in itertools.pairwise(found):
        assert after.clips_per_s >= before.clips_per_s and after.efficiency <= before.efficiency
        assert after.exposed_s > before.exposed_s and after.clips_per_s <= after.ideal
    assert found[0].efficiency == 1 and found[-1].limit == "storage"


def test_step_seconds_follow_from_flops_unless_they_are_known():
    base = model.Assumptions(clips_per_gpu=32, gflop_per_clip=500)
    # 16 TFLOP at 40 % of 989 TFLOP/s.
    assert model.assume(base, {}).step_s == pytest.approx(16 / 395.6)
    assert model.assume(base, {"utilization": 0.2}).step_s == pytest.approx(16 / 197.8)
    assert model.assume(base, {"step_s": 0.2, "utilization": 0.2}).step_s == 0.2
    measured = base.but("measured on a GPU", step_s=0.1)
    assert model.assume(measured, {}).step_s == 0.1
    assert model.assume(measured, {"clips_per_gpu": 64}).step_s == pytest.approx(0.2)
    assert model.assume(measured, {"utilization": 0.2}).step_s == pytest.approx(16 / 197.8)
    told = {row["name"]: row for row in model.assume(measured, {"inter_host_gb_s": 25}).table()}
    assert told["inter_host_gb_s"] == {
        "name": "inter_host_gb_s", "value": 25, "unit": "GB/s a host", "source": "--assume"
    }  # fmt: skip
    assert told["step_s"]["source"] == "measured on a GPU" and told["nvlink_gb_s"]["source"] == "stated: NVLink 4"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("inter_host=25", "no assumption 'inter_host'; did you mean inter_host_gb_s?"),
        ("zzz=1", "there are clips_per_gpu, "),
        ("sources=1", "no assumption 'sources'"),
        ("step_s", "is not of the form name=value"),
        ("step_s=fast", "'fast' is not a number"),
        ("step_s=0", "step_s is a number above 0"),
        ("step_s=nan", "step_s is a number above 0"),
        ("storage_gb_s=inf", "storage_gb_s is a number above 0"),
        ("overlap=1.5", "overlap is a number from 0 up to 1"),
        ("gpus_per_host=2.5", "gpus_per_host is a whole number from 1"),
        ("hierarchical=0.5", "hierarchical is a whole number from 0 up to 1"),
    ],
)
def test_bad_assumptions_are_refused_before_anything_is_measured(text, why):
    found = CliRunner().invoke(main, ["bench", "scaling", "--assume", text])
    assert found.exit_code == 1 and why in found.output and found.output.count("\n") == 1


@pytest.mark.parametrize("option", ["--preset=demo", "--target=demo", "--assume=step_s=1", "--plot=x.png"])
def test_its_options_are_its_own(option):
    found = CliRunner().invoke(main, ["bench", "detect", option])
    assert found.exit_code == 1 and f"{option.split('=')[0]} is for `genkd bench scaling`" in found.output


def test_what_is_counted_is_what_ddp_reduces(tmp_path):
    from genkd.configs.load import load
    from genkd.trainers import phases

    found = count("demo", "representation", ["a", "b"], tmp_path)
    phase = phases.build(load("demo", "representation"), ("a", "b"))
    want = {name: 4 * sum(p.numel() for p in module.parameters()) for name, module in phase.modules.items()}
    assert {name: sum(sizes) for name, sizes in found["gradients"].items()} == want
    assert found["types"] == ["float32"] and found["clips"] == 16
    # Both convolutions of 1x2x2 and both networks of three layers, at 2 steps. Backward, everything twice, but the
    # encoder's convolution, which has no gradient to its input, once.
    channels, steps = 256, 2
    conv, mlp = channels * channels * 4, lambda outputs: channels * (2 * channels + channels + outputs)
    forward = steps * (2 * conv + mlp(2 * channels) + mlp(channels))
    without = steps * conv
    share = 2 * (2 * forward - without) / found["gflop_per_clip"] / 1e9
    assert found["shares"]["cvae_backward"] == pytest.approx(share, rel=0.01)


def test_the_command_on_one_core(data, tmp_path, monkeypatch):
    """Everything but the two ranks, for which there is no second core."""
    preset = tmp_path / "tiny.yaml"
    preset.write_text("base: demo\nbatch_size: 2\ndata: {size: 32}\n", encoding="utf-8")
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda _: {0})
    plot, out = tmp_path / "plots" / "scaling.png", tmp_path / "scaling.json"
    options = ["--preset", str(preset), "--target", str(preset), "--data", data.storage.path, "--repeats", "1"]
    options += [
        "--batches",
        "1",
        "--workload",
        "student",
        "--assume",
        "step_s=0.2",
        "--plot",
        str(plot),
        "--out",
        str(out),
    ]
    found = CliRunner().invoke(main, ["bench", "scaling", *options])
    assert found.exit_code == 0, found.output
    assert "one core only" in found.output and "predicted, not measured on several GPUs" in found.output
    result = json.loads(out.read_text())
    assert [row["gpus"] for row in result["prediction"]["rows"]] == list(scaling.GPUS)
    assumed = {row["name"]: row for row in result["prediction"]["assumptions"]}
    assert assumed["step_s"]["value"] == 0.2 and assumed["step_s"]["source"] == "--assume"
    assert 0 < assumed["cpu_s_per_clip"]["value"] < 1 and 0 < assumed["mb_per_clip"]["value"] < 1
    assert assumed["cvae_gradient_mb"]["value"] == 0 < assumed["recognizer_gradient_mb"]["value"]
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and os.listdir(plot.parent) == ["scaling.png"]


@pytest.mark.slow
def test_two_ranks_beside_the_model(data, tmp_path):
    preset = tmp_path / "tiny.yaml"
    preset.write_text("base: demo\nbatch_size: 4\ndata: {size: 32}\n", encoding="utf-8")
    found = scaling.run(data.path, 1, preset=str(preset), target=str(preset), names=["distilled"], batches=2)
    assert [entry["clock"] for entry in found["validation"]] == ["wall", "processor"]
    for entry in found["validation"]:
        assert [row["name"].split()[0] for row in entry["rows"]] == ["1", "2", "2"]
        for row in entry["rows"]:
            assert row["error_percent"] == pytest.approx(100 * (row["predicted_s"] / row["measured_s"] - 1))
        assert 0 < entry["predicted_exchange_s"] < entry["rows"][1]["predicted_s"]
    assert len(found["rows"]) == 4 and found["measured"]["here"]["cases"]["distilled"]["gradients"]["cvae"]["mb"] > 1


def test_the_plot_is_drawn_for_every_limit(tmp_path):
    rows = [model.predict(ROUND.but("", storage_gb_s=0.5), GRADIENTS, gpus) for gpus in scaling.GPUS]
    assert rows[-1].limit == "storage"
    prediction = {"case": "distilled", "preset": "x", "assumptions": ROUND.table(), "rows": [asdict(r) for r in rows]}
    scaling_plot.draw({**prediction, "rows_bf16": prediction["rows"]}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_folder_in_the_plots_place_is_refused_first(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        scaling.run(None, 1, plot=tmp_path)


def test_presets_that_it_cannot_model_are_refused_first(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        scaling.run(None, 1, preset="nowhere")
    turns = tmp_path / "turns.yaml"
    turns.write_text("base: demo\nalternate: epoch\n", encoding="utf-8")
    with pytest.raises(UserError, match="alternate=epoch"):
        scaling.run(None, 1, target=str(turns))
