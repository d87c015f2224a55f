import contextlib
import dataclasses
import errno
import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from genkd.cli import main
from genkd.configs.schema import DataConfig, ModelConfig
from genkd.errors import UserError
from genkd.evaluation import recognition, scores
from genkd.evaluation.splits import evaluate_splits
from genkd.models.checkpoints import ModelCard, save_weights
from genkd.preprocessing import flow as flows
from genkd.preprocessing.convert import convert
from genkd.preprocessing.interop import dataset_sources
from genkd.preprocessing.shards import Dataset

ONE = recognition.Settings(clips=1)


def card_for(data, length=16, **changes):
    """A narrow network for clips of 32 pixels that knows the data set's classes."""
    fed = DataConfig(clip_length=length, size=32).model_dump(mode="json")
    card = ModelCard(ModelConfig(width=0.0625), tuple(data.classes), length, 32, False, "none", fed)
    return dataclasses.replace(card, **changes)


def write_weights(folder, card, seed=0):
    """Fresh weights whose classifier is far enough from zero that its scores differ."""
    torch.manual_seed(seed)
    model = card.build()
    torch.nn.init.normal_(model.logits.weight, std=0.5)
    save_weights(folder, card, {"recognizer": model})
    return folder


@pytest.fixture
def weights(data, tmp_path):
    return [write_weights(tmp_path / f"w{seed}", card_for(data), seed) for seed in range(3)]


@pytest.fixture
def runs(monkeypatch):
    """The weights that were run, in order; a KeyboardInterrupt comes in place of the run whose number is in `stop`."""
    done, stop, run = [], set(), recognition.Task.run

    def counted(self, *arguments):
        if len(done) in stop:
            raise KeyboardInterrupt
        done.append(self.weights.name)
        return run(self, *arguments)

    monkeypatch.setattr(recognition.Task, "run", counted)
    return done, stop


def test_each_split_is_evaluated_and_their_mean_and_deviation_follow(data, weights, tmp_path):
    names = []

    class Silent:
        def __init__(self, name):
            names.append(name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def start(self, total):
            assert total == 40

        def add(self, items):
            pass

    values = evaluate_splits(weights, [data.path], tmp_path / "out", ONE, progress=Silent)
    assert names == ["split 1 of 3", "split 2 of 3", "split 3 of 3"]
    alone = [recognition.evaluate_weights(place, data.path, clips=1) for place in weights]
    for name in ("top1", "top5", "mean_class_accuracy", "ece", "loss"):
        column = [entry[name] for entry in alone]
        assert [entry[name] for entry in values["splits"]] == pytest.approx(column)
        mean = sum(column) / 3
        assert values["mean"][name] == pytest.approx(mean)
        assert values["std"][name] == pytest.approx((sum((x - mean) ** 2 for x in column) / 2) ** 0.5)
    assert len({entry["loss"] for entry in alone}) == 3
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == values
    for number in (1, 2, 3):
        folder = tmp_path / "out" / str(number)
        assert json.loads((folder / "results.json").read_text()) == values["splits"][number - 1]
        assert pq.read_table(folder / "scores.parquet").num_rows == 40


def test_an_interrupted_evaluation_goes_on_and_only_what_changed_is_made_again(data, weights, tmp_path, runs, caplog):
    done, stop = runs
    out = tmp_path / "out"
    stop.add(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_splits(weights, [data.path], out, ONE)
    assert done == ["w0", "w1"] and not (out / "results.json").exists()
    stop.clear()
    values = evaluate_splits(weights, [data.path], out, ONE)
    assert done == ["w0", "w1", "w2"]
    assert evaluate_splits(weights, [data.path], out, ONE) == values and len(done) == 3
    write_weights(tmp_path / "w1", card_for(data), 7)
    with caplog.at_level(logging.INFO, "genkd"):
        changed = evaluate_splits(weights, [data.path], out, ONE)
    assert done[3:] == ["w1"] and "2: weights changed, so it is evaluated again" in caplog.text
    assert changed["splits"][0] == values["splits"][0] and changed["splits"][1]["loss"] != values["splits"][1]["loss"]
    evaluate_splits(weights, [data.path], out, recognition.Settings(clips=2))
    assert done[4:] == ["w0", "w1", "w2"]
    (out / "3" / "scores.parquet").unlink()
    (out / "2" / "results.json").write_text("{")
    evaluate_splits(weights, [data.path], out, recognition.Settings(clips=2))
    assert done[7:] == ["w1", "w2"]
    whole = (out / "1" / "scores.parquet").read_bytes()
    (out / "1" / "scores.parquet").write_bytes(whole[: len(whole) // 2])
    evaluate_splits(weights, [data.path], out, recognition.Settings(clips=2))
    assert done[9:] == ["w0"] and (out / "1" / "scores.parquet").read_bytes() == whole
    (out / "2" / "results.json").unlink()
    stop.add(len(done))
    with pytest.raises(KeyboardInterrupt):
        evaluate_splits(weights, [data.path], out, recognition.Settings(clips=2))
    assert not (out / "results.json").exists(), "the mean is not of these splits any more"


def test_batch_size_counts_only_where_scores_depend_on_it(data, tmp_path, runs):
    done, _ = runs
    for compat, again in (("none", 0), ("reference", 2)):
        places = [write_weights(tmp_path / f"{compat}{n}", card_for(data, compat=compat), n) for n in range(2)]
        evaluate_splits(places, [data.path], tmp_path / compat, ONE)
        before = len(done)
        evaluate_splits(places, [data.path], tmp_path / compat, recognition.Settings(clips=1, batch_size=7))
        assert len(done) - before == again


def test_what_does_not_fit_is_refused_before_the_first_clip(data, weights, tmp_path, runs, monkeypatch):
    done, _ = runs
    card, out = card_for(data), tmp_path / "out"
    last = tuple(reversed(card.classes))

    def refused(words, bad=None, datasets=(data.path,), **settings):
        places = weights[:2] if bad is None else [weights[0], write_weights(tmp_path / "bad", bad)]
        with pytest.raises(UserError, match=words):
            evaluate_splits(places, datasets, out, recognition.Settings(**{"clips": 1, **settings}))
        assert not done and not out.exists()

    refused("2 weights, but 3 data sets", datasets=[data.path] * 3)
    refused("no videos in a split 'val'", split="val")
    refused(r"in another order \(label 0 is 'Bob', not 'Sway'\)", dataclasses.replace(card, classes=last))
    refused("knows 9 classes, .* has 10 others, e.g. 'Sway'", dataclasses.replace(card, classes=card.classes[:9]))
    refused("takes optical flow, but .* holds RGB", dataclasses.replace(card, modality="flow"))
    refused("do not fit this version of genkd: data.warp", dataclasses.replace(card, data={"warp": 1}))
    with pytest.raises(UserError, match="two or more"):
        evaluate_splits(weights[:1], [data.path])
    for label, words in ((-1, "2 of the 40 videos .* without a class, e.g. .* with label -1"),
                         (10, r"2 of the 40 videos .* labels outside 0\.\.9, e.g. .* with label 10")):  # fmt: skip
        labels = data.labels.copy()
        labels[data.rows("test")[[3, 5]]] = label
        altered = Dataset(data.storage, data.info, data.table)
        altered.labels = labels
        with monkeypatch.context() as patch:
            patch.setattr(Dataset, "open", classmethod(lambda cls, place, altered=altered, **_: altered))
            refused(words)


def test_clips_are_of_the_size_that_the_network_is_built_for(data):
    card = card_for(data)
    config = recognition.data_config(dataclasses.replace(card, data={**card.data, "clip_length": 64, "size": 224}))
    assert (config.clip_length, config.size) == (16, 32)


def test_results_of_another_kind_are_not_mixed_up(data, weights, tmp_path):
    evaluate_splits(weights, [data.path], tmp_path / "several", ONE)
    recognition.evaluate_weights(weights[0], data.path, tmp_path / "one", clips=1)
    with pytest.raises(UserError, match="holds the results of several splits"):
        recognition.evaluate_weights(weights[0], data.path, tmp_path / "several", clips=1)
    with pytest.raises(UserError, match="holds the results of one evaluation"):
        evaluate_splits(weights, [data.path], tmp_path / "one", ONE)
    with pytest.raises(UserError, match="more splits than these 2"):
        evaluate_splits(weights[:2], [data.path], tmp_path / "several", ONE)


@pytest.mark.parametrize("compat", ["none", "reference"])
def test_stored_scores_follow_from_stored_logits(data, tmp_path, compat):
    """With one view a video: softmax of the mean over time, or under the reference the sum of each step's softmax."""
    place = write_weights(tmp_path / "w", card_for(data, 32, compat=compat))
    recognition.evaluate_weights(place, data.path, tmp_path / "out", clips=1)
    found = scores.read_scores(tmp_path / "out" / "scores.parquet")
    assert found.logits.shape == (40, 3, 10) and found.logits.dtype == np.float32  # 4 time steps, pooled by 2
    logits = torch.tensor(found.logits).double()
    wanted = logits.mean(1).softmax(1) if compat == "none" else logits.softmax(2).sum(1)
    np.testing.assert_allclose(found.scores, wanted, atol=1e-6)
    assert found.keys == data.table["key"].take(data.rows("test")).to_pylist()
    about = found.about
    assert (about["classes"], about["modality"], about["split"]) == (data.classes, "rgb", "test")
    assert (about["clips"], about["crops"], about["compat"], about["model"]["width"]) == (1, 1, compat, 0.0625)
    assert about["weights"] == str(place) and about["dataset"] == str(data.path)


def test_logits_are_averaged_over_views(data, weights, tmp_path):
    """Four clips a video: each view's logits, from the loader itself."""
    recognition.evaluate_weights(weights[0], data.path, tmp_path / "out", clips=4)
    found = scores.read_scores(tmp_path / "out" / "scores.parquet")
    model, card = recognition.load_recognizer(weights[0])
    config, rows = recognition.data_config(card), data.rows("test")
    with recognition.Loader(data, "test", config, batch_size=4, training=False, views=(4, 1)) as loader:
        with torch.inference_mode():
            first = next(iter(loader))
            assert first.ids.tolist() == [rows[0]] * 4
            wanted = model(first.clips).logits.mean(0).T
    np.testing.assert_allclose(found.logits[0], wanted, atol=1e-5)


def test_flow_is_evaluated_and_fused_with_rgb(data, weights, tmp_path):
    settings = flows.FlowSettings("dis", 20.0, "vp9", 8, None)
    convert(dataset_sources(data, "test"), tmp_path / "flow-data", settings, workers=0)
    flow = Dataset.open(tmp_path / "flow-data")
    place = write_weights(tmp_path / "flow-weights", card_for(data, modality="flow"))
    runner = CliRunner()
    for weight, dataset, out in ((weights[0], data, "rgb"), (place, flow, "flow")):
        run = runner.invoke(main, ["evaluate", "recognition", str(weight), "--data", str(dataset.path), "--clips", "1",
                                   "--out", str(tmp_path / out), "--json"])  # fmt: skip
        assert run.exit_code == 0 and json.loads(run.stdout)["modality"] == out
    values = json.loads(runner.invoke(main, ["fuse", str(tmp_path / "rgb"), str(tmp_path / "flow"), "--json"]).stdout)
    streams = [scores.read_scores(tmp_path / name / "scores.parquet") for name in ("rgb", "flow")]
    mean = (streams[0].scores + streams[1].scores) / 2
    assert values["modality"] == "rgb+flow"
    assert values["top1"] == pytest.approx((mean.argmax(1) == streams[0].labels).mean())
    run = runner.invoke(main, ["evaluate", "recognition", str(weights[0]), "--data", str(flow.path)])
    assert run.exit_code == 1 and "takes RGB, but" in run.output and "holds optical flow" in run.output


def test_an_out_that_cannot_be_written_is_found_before_the_first_clip(data, weights, tmp_path, runs):
    done, _ = runs
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=f"{tmp_path / 'file'} is a file; name a folder"):
            recognition.evaluate_weights(weights[0], data.path, out, clips=1)
        with pytest.raises(UserError, match="is a file; name a folder"):
            evaluate_splits(weights, [data.path], out, ONE)
    assert not done and (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_found_before_the_first_clip(data, weights, runs, small_disk):
    done, _ = runs
    disk = small_disk("64k")
    with contextlib.suppress(OSError):
        (disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(UserError, match="no space left on the disk while writing into"):
        recognition.evaluate_weights(weights[0], data.path, disk, clips=1)
    assert not done and [path.name for path in disk.iterdir()] == ["filler"]


def test_metrics_are_printed_even_where_they_cannot_be_written_any_more(data, weights, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    wanted = recognition.evaluate_weights(weights[0], data.path, clips=1)
    monkeypatch.setattr(recognition, "write_scores", full)
    command = ["evaluate", "recognition", "--data", str(data.path), "--clips", "1", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, [*command, str(weights[0]), "--json"])
    assert run.exit_code == 1 and "no space left on the disk" in run.stderr
    assert json.loads(run.stdout)["loss"] == pytest.approx(wanted["loss"])
    run = CliRunner().invoke(main, [*command, *map(str, weights)])
    assert run.exit_code == 1 and f"{wanted['loss']:.4f}" in run.stdout


def test_the_command_takes_several_weights(data, weights, tmp_path):
    command = ["evaluate", "recognition", *map(str, weights), "--clips", "1", "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, [*command, "--data", str(data.path)])
    assert run.exit_code == 0 and "test: 3 evaluations" in run.stdout and "mean" in run.stdout
    run = CliRunner().invoke(main, [*command, *["--data", str(data.path)] * 3, "--json"])
    assert len(json.loads(run.stdout)["splits"]) == 3
    run = CliRunner().invoke(main, [*command, *["--data", str(data.path)] * 2])
    assert run.exit_code == 1 and "3 weights, but 2 data sets" in run.output
