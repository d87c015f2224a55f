"""What `genkd predict` writes where: nothing over what it reads, nothing lost for a place that cannot be written."""

import errno
import json

import pytest
import torch
from click.testing import CliRunner

from genkd.cli import main
from genkd.configs.schema import ModelConfig
from genkd.evaluation.predict import Predictor
from genkd.models.checkpoints import ModelCard, load_recognizer, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small network for clips of 16 frames of 32 pixels."""
    card = ModelCard(ModelConfig(width=0.25), ("a", "b", "c"), 16, 32, False, "none", {})
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    save_weights(folder, card, {"recognizer": card.build()})
    return folder


@pytest.fixture
def video(videos):
    """A raw video of 40 frames."""
    return sorted(videos.glob("UCF-101/Spin/*.avi"))[0]


def run(*arguments):
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def test_inputs_and_results_are_never_overwritten(weights, video, tmp_path):
    source = tmp_path / "one.mp4"
    source.write_bytes(video.read_bytes())
    link = tmp_path / "link.json"
    link.symlink_to(source)
    file = weights / "recognizer.safetensors"
    before = file.read_bytes()
    for options, words in (
        (["--out", source], f"--out {source} would write over the video {source}"),
        (["--out", link], f"would write over the video {source}"),
        (["--out", file], f"would write over the weights {file}"),
        (["--render", tmp_path / "seen.mp4", "--out", tmp_path / "seen.mp4"], "would write over the rendering"),
    ):
        done = run(source, "--weights", weights, *options)
        assert done.exit_code == 1 and words in done.stderr
    assert source.read_bytes() == video.read_bytes() and file.read_bytes() == before and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "one.mp4"]


def test_places_that_cannot_be_written_are_found_before_the_first_window(weights, video, tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "predict", lambda *arguments: pytest.fail("a video was scored"))
    (tmp_path / "file").touch()
    for options, words in (
        (["--out", tmp_path / "file" / "found.json"], "file is a file; name a folder"),
        (["--render", tmp_path / "file" / "seen.mp4"], "file is a file; name a folder"),
        (["--out", tmp_path], "is a folder; name a file"),
    ):
        done = run(video, "--weights", weights, *options)
        assert done.exit_code == 1 and words in done.stderr


def test_what_was_found_is_printed_even_where_it_cannot_be_written_any_more(weights, video, tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("genkd.evaluation.predict.write_json", full)
    done = run(video, "--weights", weights, "--out", tmp_path / "found.json", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["videos"][0]["windows"] and "no space left" in done.stderr


def test_scores_that_are_not_finite_are_one_sentence(weights, video, tmp_path):
    folder = tmp_path / "weights"
    model, card = load_recognizer(weights)
    model.logits.bias.data[2] = float("nan")
    save_weights(folder, card, {"recognizer": model})
    done = run(video, "--weights", folder, "--json")
    assert done.exit_code == 1 and not done.stdout
    assert f"{video}: the window from frame 0 has scores that are nan or infinite" in done.stderr
    assert "--precision fp32" in done.stderr


def test_several_ranks_are_refused(weights, video, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = run(video, "--weights", weights)
    assert done.exit_code == 1 and "torchrun started 4; start it without torchrun" in done.stderr
