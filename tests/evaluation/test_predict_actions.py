"""Actions in raw videos by a detector: the same as `genkd detect` finds in the shards made of them."""

import json

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from genkd.cli import main
from genkd.configs.load import load
from genkd.errors import UserError
from genkd.evaluation import detect
from genkd.evaluation.predict import Predictor, PredictSettings, to_json
from genkd.evaluation.predict_actions import ActionPredictor
from genkd.models.checkpoints import ModelCard, save_weights
from genkd.pipelines.store import ClipStore
from genkd.preprocessing import thumos
from genkd.preprocessing.convert import convert
from genkd.preprocessing.flow import FlowSettings
from genkd.preprocessing.interop import dataset_sources
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.untrimmed import UntrimmedSettings, synthesize_untrimmed
from genkd.preprocessing.video import VideoSettings

CLASSES = ("Background", "Slide", "Spin")
KEY = "video_test_0000001"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one untrimmed test video of 20 s, as a file and as shards of 10 frames a second."""
    place = tmp_path_factory.mktemp("untrimmed")
    settings = UntrimmedSettings(
        validation_videos=1, test_videos=1, seconds=(20, 20), width=48, height=48, fps=30, classes=CLASSES[1:]
    )
    synthesize_untrimmed(place / "videos", settings, workers=0)
    convert(thumos.thumos14(place / "videos"), place / "data", VideoSettings("h264", 32, fps=10.0, crf=1), workers=0)
    return place


@pytest.fixture(scope="module")
def raw(place):
    return place / "videos" / "test" / f"{KEY}.mp4"


@pytest.fixture(scope="module")
def make_weights(tmp_path_factory):
    """A function: -> a folder with random weights of a small detector whose scores differ."""

    def make(*overrides, modality="rgb", compat="none"):
        small = ("data.size=32", "data.eval_window_stride=32", "model.width=0.0625")
        config = load("detect-demo", "detect-teacher", [*small, *overrides])
        card = ModelCard(
            config.model, CLASSES, config.data.clip_length, 32, False, compat, config.data.model_dump(mode="json"),
            modality, "detection",
        )  # fmt: skip
        torch.manual_seed(3)
        model = card.build()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "conf" in name and value.ndim > 1:
                    value.normal_(std=0.5)
        folder = tmp_path_factory.mktemp("weights")
        save_weights(folder, card, {"detector": model})
        return folder

    return make


@pytest.fixture(scope="module")
def weights(make_weights, place):
    return make_weights(f"data.dataset={place / 'data'}")


def found_in(weights, path, **settings):
    """All actions that a predictor finds in a file, best first, of how many windows, and the predictor."""
    predictor = ActionPredictor(weights, PredictSettings(threshold=0, device="cpu", precision="fp32", **settings))
    prediction = predictor.predict(path)
    assert prediction.error is None
    names = predictor.card.classes
    actions = sorted(prediction.timeline.actions, key=lambda action: -action.score)
    return (
        [(names[action.label], action.start_s, action.end_s, action.score) for action in actions],
        prediction.timeline.windows,
        predictor,
    )


def detected(weights, data, key=KEY):
    """What `genkd detect` finds, best first."""
    values = detect.detect_weights(weights, data, device="cpu", precision="fp32")["results"][key]
    return [(entry["label"], *entry["segment"], entry["score"]) for entry in values]


def assert_same(found, wanted):
    assert len(found) == len(wanted) > 50
    found, wanted = sorted(found), sorted(wanted)  # scores may lie nearer to each other than to those of other sums
    assert [entry[0] for entry in found] == [entry[0] for entry in wanted]
    numbers = [np.array([entry[1:] for entry in actions]) for actions in (found, wanted)]
    np.testing.assert_allclose(*numbers, atol=1e-3)
    assert np.ptp(numbers[1][:, 2]) > 0.1, "scores that are all alike would show nothing"


@pytest.fixture(scope="module")
def stored(place):
    """A video of the shards as a file of its own: what its encoder wrote, so the same frames."""
    data = Dataset.open(place / "data")
    video = data.video(data.table["key"].to_pylist().index(KEY))
    path = place / "stored.mp4"
    path.write_bytes(ClipStore(data).read(video, 0, video.num_frames - 1).data.tobytes())
    return path


@pytest.mark.parametrize(
    ("overrides", "windows"), [((), 4), (("data.clip_length=256",), 1), (("data.eval_window_stride=50",), 3)]
)
def test_actions_are_those_of_the_shards(make_weights, place, stored, overrides, windows):
    """200 frames: windows of 128 at 0, 32, 64 and 72, one that is filled up, and at 0, 50 and 72."""
    weights = make_weights(f"data.dataset={place / 'data'}", *overrides)
    found, count, _ = found_in(weights, stored, batch_size=3)
    assert_same(found, detected(weights, place / "data"))
    assert count == windows


def test_actions_of_a_raw_source_are_those_of_its_shards(weights, place, raw):
    """The file that the shards were made of, at another rate and size: what differs is H.264's loss."""
    with av.open(str(raw)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (48, 48) and stream.average_rate == 30
    found, _, predictor = found_in(weights, raw)
    assert (predictor.storing.video.fps, predictor.storing.video.short_side) == (10.0, 32)
    sure = [entry for entry in detected(weights, place / "data") if entry[3] > 0.25]
    assert len(sure) > 10
    changes = []
    for name, start, end, score in sure:
        overlaps = [
            ((min(end, other[2]) - max(start, other[1])) / (max(end, other[2]) - min(start, other[1])), other[3])
            for other in found
            if other[0] == name
        ]
        overlap, near = max(overlaps)
        assert overlap > 0.8
        changes.append(abs(near - score))
    assert np.mean(changes) < 0.03 and max(changes) < 0.15


def test_flow_is_that_of_the_flow_data_set(make_weights, place, stored, tmp_path):
    """Computed again from the stored frames; the shards' flow is coded, with levels of one or two to each side."""
    convert(dataset_sources(Dataset.open(place / "data"), "test"), tmp_path / "flow", FlowSettings("dis"), workers=0)
    weights = make_weights(f"data.dataset={tmp_path / 'flow'}", modality="flow")
    found, _, predictor = found_in(weights, stored)
    assert predictor.storing.flow.method == "dis" and predictor.storing.video.fps == 10
    # Soft-NMS of flow has another width, which decides how many are left.
    assert predictor.decoding.sigma == 0.5
    wanted = detected(weights, tmp_path / "flow")
    assert len(found) == pytest.approx(len(wanted), rel=0.1)
    scores = [np.array([entry[3] for entry in actions[:20]]) for actions in (found, wanted)]
    assert np.abs(scores[0] - scores[1]).mean() < 0.04 < np.ptp(scores[1])


def test_the_originals_weighting_does_not_hang_on_neighbours(make_weights, place, stored):
    weights = make_weights(f"data.dataset={place / 'data'}", compat="reference")
    one, three = (found_in(weights, stored, batch_size=size)[0] for size in (1, 3))
    assert_same(one, three)


def test_threshold_and_top_choose_among_all(weights, raw):
    every = found_in(weights, raw)[0]
    scores = [entry[3] for entry in every]
    at = ActionPredictor(weights, PredictSettings(threshold=0.3, device="cpu")).predict(raw).timeline
    assert 0 < len(at.actions) < len(scores) and len(at.actions) == sum(score >= 0.3 for score in scores)
    assert at.left_out == len(scores) - len(at.actions) and at.best_left_out.score == pytest.approx(
        max(score for score in scores if score < 0.3), abs=1e-5
    )
    assert [action.start_s for action in at.actions] == sorted(action.start_s for action in at.actions)
    best = ActionPredictor(weights, PredictSettings(threshold=0.3, top=2, device="cpu")).predict(raw).timeline
    assert sorted(action.score for action in best.actions) == pytest.approx(scores[1::-1], abs=1e-5)


def test_windows_may_lie_elsewhere(weights, raw):
    """200 frames, windows of 128: at 0 and 72 where they do not overlap more, and every second."""
    for settings, windows in (({"hop": 1.0}, 2), ({"stride_seconds": 1.0}, 9)):
        assert found_in(weights, raw, **settings)[1] == windows


def test_without_its_data_set_a_detector_sees_what_thumos14_is_stored_as(make_weights, caplog):
    predictor = ActionPredictor(make_weights("data.dataset=gone"))
    assert (predictor.storing.video.fps, predictor.storing.video.size) == (10.0, "112x112")
    (told,) = (record.getMessage() for record in caplog.records)
    assert "10 frames a second (--fps)" in told and "112x112 pixels (--short-side)" in told
    settings = ActionPredictor(make_weights(), PredictSettings(fps=5, short_side=64)).storing.video
    assert (settings.fps, settings.short_side, settings.size) == (5, 64, None)


def run(*arguments):
    return CliRunner().invoke(main, ["predict", *map(str, arguments), "--device", "cpu"])


def test_from_the_command_line(weights, raw, tmp_path):
    results = {name: tmp_path / "new" / f"found{name}" for name in (".png", ".mp4", ".json")}
    places = ("--timeline", results[".png"], "--render", results[".mp4"], "--out", results[".json"])
    done = run(raw, "--weights", weights, *places, "--threshold", 0.4)
    assert done.exit_code == 0, done.output
    values = json.loads(results[".json"].read_text())
    assert values["failed"] == 0 and (values["settings"]["threshold"], values["settings"]["hop"]) == (0.4, 0.25)
    (video,) = values["videos"]
    assert (video["fps"], video["frames"], video["duration_s"], video["windows"]) == (10, 200, 20, 4)
    assert (video["timeline"], video["rendered"]) == (str(results[".png"]), str(results[".mp4"]))
    assert all(entry["score"] >= 0.4 and entry["class"] in CLASSES[1:] for entry in video["segments"])
    count = len(video["segments"])
    assert f"00:20.0 at 10 frames/s, 4 windows, {count} actions" in done.stdout and count > 1
    assert done.stdout.count("%") == count
    assert results[".png"].read_bytes()[:4] == b"\x89PNG"
    with av.open(str(results[".mp4"])) as container, av.open(str(raw)) as source:
        assert sum(1 for _ in container.decode(video=0)) == sum(1 for _ in source.decode(video=0))
    printed = run(raw, "--weights", weights, "--json", "--top", 1)
    (entry,) = json.loads(printed.stdout)["videos"][0]["segments"]
    assert entry["score"] == max(one["score"] for one in video["segments"])


def test_no_action_is_said(weights, raw, tmp_path):
    done = run(raw, "--weights", weights, "--threshold", 1, "--timeline", tmp_path, "--render", tmp_path / "seen.mp4")
    assert done.exit_code == 0, done.output
    assert "0 actions" in done.stdout and "no action has a score of 100 % (--threshold 1); the best is" in done.stdout
    assert (tmp_path / f"{KEY}.png").is_file() and (tmp_path / "seen.mp4").is_file()


def test_bad_input_is_one_sentence(weights, make_weights, raw, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    done = run(tmp_path / "broken.mp4", raw, "--weights", weights, "--json", "--timeline", tmp_path / "charts")
    values = json.loads(done.stdout)
    assert done.exit_code == 1 and values["failed"] == 1
    assert "not a video" in values["videos"][0]["error"] and values["videos"][1]["segments"]
    assert "not a video" in done.stderr and len(list((tmp_path / "charts").rglob("*.png"))) == 1
    looping = make_weights(f"data.dataset={raw}", "data.padding=loop", "data.clip_length=256")
    for options, words in (
        (["--weights", tmp_path / "none"], "neither a training run"),
        (["--weights", looping, "--fps", 10, "--short-side", 32], "200 frames are fewer than the 256"),
        (["--weights", weights, "--threshold", 2], "--threshold"),
        (["--weights", weights, "--flow-method", "dis"], "take RGB clips"),
        (["--weights", weights, "--timeline", tmp_path / "a.jpg"], "timelines are PNG only"),
        (["--weights", weights, "--timeline", tmp_path / "a.png", "--out", tmp_path / "a.png"], "over the timeline"),
    ):
        done = run(raw, *options)
        assert done.exit_code and words in done.stderr and "Traceback" not in done.stderr


def test_a_threshold_is_for_detectors(tmp_path):
    config = load("demo", "teacher", ["data.clip_length=16", "data.size=32", "model.width=0.0625"])
    card = ModelCard(config.model, ("a", "b"), 16, 32, False, "none", config.data.model_dump(mode="json"))
    save_weights(tmp_path, card, {"recognizer": card.build()})
    with pytest.raises(UserError, match=r"--threshold 0\.5 is for detectors"):
        Predictor(tmp_path, PredictSettings(threshold=0.5))


def test_what_is_written_about_a_video_that_could_not_be_read(weights, tmp_path):
    predictor = ActionPredictor(weights)
    (video,) = to_json(predictor, [predictor.predict(tmp_path / "gone.mp4")])["videos"]
    assert video["segments"] == [] and video["windows"] == 0 and video["duration_s"] is None and video["error"]
