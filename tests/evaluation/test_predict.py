import json
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from genkd.configs.load import load
from genkd.configs.schema import DataConfig
from genkd.errors import UserError
from genkd.evaluation import recognition
from genkd.evaluation.predict import Predictor, PredictSettings, find_videos, to_json
from genkd.evaluation.raw_clips import RawClips, storing
from genkd.models.checkpoints import ModelCard, load_recognizer, save_weights
from genkd.pipelines.loader import Loader
from genkd.pipelines.store import ClipStore
from genkd.preprocessing.convert import convert
from genkd.preprocessing.decoding import VideoError
from genkd.preprocessing.flow import FlowSettings
from genkd.preprocessing.interop import dataset_sources
from genkd.preprocessing.shards import Dataset

CLASSES = ("Bob", "Fall", "Grow", "Orbit", "Pulse", "Rise", "Shrink", "Slide", "Spin", "Sway")


@pytest.fixture(scope="module")
def make_weights(tmp_path_factory):
    """A function: -> a folder with random weights of the demo preset whose scores differ."""

    def make(*overrides, attention=True, compat="none", modality="rgb", classes=CLASSES):
        config = load("demo", "representation", ["data.clip_length=16", "data.size=32", *overrides])
        card = ModelCard(
            model=config.model, classes=tuple(classes), clip_length=16, size=32, attention=attention, compat=compat,
            data=config.data.model_dump(mode="json"), modality=modality,
        )  # fmt: skip
        torch.manual_seed(3)
        model = card.build()
        torch.nn.init.normal_(model.logits.weight, std=0.5)
        folder = tmp_path_factory.mktemp("weights")
        save_weights(folder, card, {"recognizer": model})
        return folder

    return make


@pytest.fixture(scope="module")
def weights(make_weights, shard_sets):
    return make_weights(f"data.dataset={shard_sets('vp9').path}")


@pytest.fixture(scope="module")
def card(weights):
    return load_recognizer(weights)[1]


@pytest.fixture(scope="module")
def avi(videos):
    """A raw AVI of 40 frames of 64x48 at 25 frames a second, and its frames."""
    path = sorted(videos.glob("UCF-101/Spin/*.avi"))[0]
    with av.open(str(path)) as container:
        return path, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_video(path, count, rate=25):
    """Grey frames of 64x48, frame t of brightness 20 + 15 t."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(count):
            picture = np.full((48, 64, 3), 20 + 15 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def stored_video(data: Dataset, row: int, path):
    """A video of a data set as a file of its own: what its encoder wrote."""
    video = data.video(row)
    part = ClipStore(data).read(video, 0, video.num_frames - 1)
    path.write_bytes(part.data.tobytes())
    return path


def by_hand(frames, start, size=32):
    """A clip as the demo preset's evaluation makes it of 64x48 frames: 16 frames, every second, the middle square."""
    clip = np.stack([cv2.resize(frames[start + 2 * t, :, 8:56], (size, size)) for t in range(16)])
    return torch.from_numpy((clip / 255 - 0.5) / 0.25).float().permute(3, 0, 1, 2)[None]


def test_a_raw_video_is_scored_as_the_network_scores_its_frames(weights, avi):
    """40 frames, clips of 31: windows at 0 and, to reach the end, at 9."""
    path, frames = avi
    found = Predictor(weights).predict(path)
    model, _ = load_recognizer(weights)
    with torch.no_grad():
        wanted = [model(by_hand(frames, start)) for start in (0, 9)]
    np.testing.assert_allclose(found.timeline.starts, [0, 9 / 25])
    np.testing.assert_allclose(found.timeline.scores, np.concatenate([out.scores for out in wanted]), atol=1e-5)
    attention = np.concatenate([out.attention.mean(1) for out in wanted])
    np.testing.assert_allclose(found.timeline.attention, attention, atol=1e-5)
    np.testing.assert_allclose(found.timeline.ends, [32 / 25, 40 / 25])
    assert (found.fps, found.frames, found.timeline.duration_s, found.error) == (25, 40, 1.6, None)
    assert np.ptp(found.timeline.scores) > 0.05, "scores that are all alike would show nothing"


@pytest.mark.parametrize(("codec", "size", "scale"), [("vp9", 32, 1.0), ("h264", 24, 0.8), ("mjpeg", 16, 1.0)])
def test_frames_are_those_of_the_evaluation(shard_sets, card, tmp_path, codec, size, scale):
    """A stored video as a raw one: decoded, cropped and resized to the same bytes, with and without averaging."""
    data = shard_sets(codec)
    config = DataConfig(clip_length=16, stride=2, size=size, eval_scale=scale, dtype="uint8", decoder="pyav")
    row = data.rows("test")[:1]
    with Loader(data, "test", config, batch_size=1, training=False, rows=row) as loader:
        (batch,) = loader
    clips = RawClips(stored_video(data, int(row[0]), tmp_path / "video.mp4"), config, storing(card), lambda fps: 1)
    windows = {window.start: window.pixels for window in clips}
    assert sorted(windows) == list(range(10)) and clips.problem is None
    evaluated = batch.clips[0].permute(1, 2, 3, 0).numpy()
    difference = np.abs(windows[4].astype(int) - evaluated)
    if codec == "mjpeg":  # full range, which sharding makes of its sources, not of itself
        assert difference.max() <= 4
    else:
        np.testing.assert_array_equal(windows[4], evaluated)
    assert np.abs(windows[0].astype(int) - evaluated).max() > 20, "another window has other pixels"


def test_scores_equal_those_of_the_evaluation(weights, data, tmp_path):
    recognition.evaluate_weights(weights, data.path, tmp_path / "out", clips=1)
    table = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    predictor = Predictor(weights, PredictSettings(stride_seconds=1 / 25, batch_size=3))
    for row, entry in list(zip(data.rows("test").tolist(), table, strict=True))[::9]:
        found = predictor.predict(stored_video(data, row, tmp_path / "video.mp4"))
        assert len(found.timeline.scores) == 10
        np.testing.assert_allclose(found.timeline.scores[4], entry["scores"], atol=1e-5)


def test_only_one_window_of_a_video_is_held(card, avi):
    config = recognition.data_config(card)
    clips = RawClips(avi[0], config, storing(card), lambda fps: 4)
    seen = [(window.start, clips.count) for window in clips]
    assert seen == [(0, 31), (4, 35), (8, 39), (9, 40)], "each comes with the frame that completes it"


@pytest.mark.parametrize("padding", ["loop", "black", "zero"])
def test_a_short_video_is_filled_up_as_in_training(make_weights, tmp_path, padding):
    folder = make_weights(f"data.padding={padding}")
    path = write_video(tmp_path / "short.avi", 10)
    predictor = Predictor(folder)
    (window,) = RawClips(path, predictor.config, predictor.storing, predictor.hop)
    grey = window.pixels[:, 16, 16, 0].astype(int)
    played = np.arange(0, 32, 2)
    if padding == "loop":
        np.testing.assert_allclose(grey, 20 + 15 * (played % 10), atol=6)
    else:
        np.testing.assert_allclose(grey[:5], 20 + 15 * played[:5], atol=6)
        assert window.known == 5
    # Black is -2 after normalization by mean 0.5 and std 0.25, zero is 0.
    clip = (torch.from_numpy(window.pixels).float() / 255 - 0.5) / 0.25
    if padding == "zero":
        clip[5:] = 0
    with torch.no_grad():
        wanted = load_recognizer(folder)[0](clip.permute(3, 0, 1, 2)[None]).scores.numpy()
    found = predictor.predict(path)
    np.testing.assert_allclose(found.timeline.scores, wanted, atol=1e-5)
    assert found.timeline.duration_s == pytest.approx(0.4) and found.timeline.ends.tolist() == [0.4]


def test_a_short_video_is_refused_where_training_would(make_weights, tmp_path):
    predictor = Predictor(make_weights("data.padding=fail"))
    found = predictor.predict(write_video(tmp_path / "short.avi", 10))
    assert found.timeline is None and "10 frames are fewer than the 31" in found.error


def test_frame_rate_and_size_are_those_of_the_data_set_or_as_told(make_weights, shard_sets, videos, tmp_path, avi):
    data = shard_sets("vp9")
    own = Predictor(make_weights(f"data.dataset={data.path}")).storing
    assert (own.video.fps, own.video.short_side, own.origin) == (None, 48, str(data.path))
    for place in (tmp_path / "gone", data.path):  # a folder of that name with another data set is not the right one
        other = Predictor(make_weights(f"data.dataset={place}", classes=("A", "B"))).storing
        assert (other.video.fps, other.video.short_side) == (None, 256) and "not on this machine" in other.origin
    folder = make_weights(f"data.dataset={data.path}")
    told = Predictor(folder, PredictSettings(fps=12.5, short_side=32))
    assert told.storing.video.short_side == 32
    found = told.predict(avi[0])
    assert (found.fps, found.frames, found.timeline.duration_s) == (12.5, 20, 1.6)
    with pytest.raises(UserError, match="fps 0"):
        Predictor(folder, PredictSettings(fps=0))
    with pytest.raises(UserError, match="take RGB clips"):
        Predictor(folder, PredictSettings(flow_method="dis"))


def test_sums_over_a_batch_do_not_reach_other_windows(make_weights, avi):
    """The reference's scores are sums of softmaxes over time, weighted by sums over the batch."""
    folder = make_weights(compat="reference")
    settings = [PredictSettings(stride_seconds=0.1, batch_size=size, short_side=48) for size in (1, 4)]
    one, four = (Predictor(folder, entry).predict(avi[0]).timeline.scores for entry in settings)
    np.testing.assert_array_equal(one, four)
    np.testing.assert_allclose(one.sum(1), 1, atol=1e-9)


def test_flow_is_computed_as_for_the_flow_data_set(make_weights, shard_sets, tmp_path):
    """Of a stored video, against its stored flow; H.264 moves levels by one or two."""
    data = shard_sets("vp9")
    convert(dataset_sources(data, "train"), tmp_path / "flow", FlowSettings("farneback", 10.0, gop=8), workers=0)
    flow = Dataset.open(tmp_path / "flow")
    predictor = Predictor(make_weights(f"data.dataset={flow.path}", modality="flow"))
    assert predictor.storing.flow == FlowSettings("farneback", 10.0)
    assert (predictor.storing.video.fps, predictor.storing.video.short_side) == (25.0, 48)
    key = flow.table["key"][0].as_py()
    path = stored_video(data, data.table["key"].to_pylist().index(key), tmp_path / "video.mp4")
    config = predictor.config.model_copy(update={"dtype": "uint8", "decoder": "pyav"})
    with Loader(flow, "train", config, batch_size=1, training=False, rows=np.array([0])) as loader:
        (batch,) = loader
    clips = RawClips(path, predictor.config, predictor.storing, lambda fps: 1)
    own = {window.start: window.pixels.astype(int) for window in clips}[4]
    stored = batch.clips[0].permute(1, 2, 3, 0).numpy().astype(int)
    assert np.abs(own - 128).max() > 15, "something moves"
    assert np.abs(own - stored).mean() < 1 < np.abs(own[..., ::-1] - stored).mean()
    found = predictor.predict(path)
    assert found.error is None and found.frames == 40
    assert Predictor(predictor.weights, PredictSettings(flow_method="dis")).storing.flow.method == "dis"


def test_what_is_written_about_a_video(weights, avi):
    predictor = Predictor(weights, PredictSettings(top=2))
    found = predictor.predict(avi[0])
    values = json.loads(json.dumps(to_json(predictor, [found])))
    assert values["failed"] == 0 and values["classes"] == list(CLASSES)
    assert set(values["versions"]) == {"genkd", "torch", "av"}
    assert values["model"]["clip_length"] == 16 and values["settings"]["short_side"] == 48
    (video,) = values["videos"]
    assert (video["fps"], video["frames"], video["duration_s"], video["error"]) == (25, 40, 1.6, None)
    order = np.argsort(-found.timeline.scores.mean(0))[:2]
    assert [entry["class"] for entry in video["top"]] == [CLASSES[label] for label in order]
    assert video["top"][0]["score"] == pytest.approx(found.timeline.scores.mean(0).max(), abs=1e-6)
    assert [(entry["start_s"], entry["end_s"]) for entry in video["windows"]] == [(0, 1.28), (0.36, 1.6)]
    assert all(len(entry["top"]) == 2 and len(entry["attention"]) == 2 for entry in video["windows"])
    assert video["segments"][0]["start_s"] == 0 and video["segments"][-1]["end_s"] == 1.6
    assert video["attention"]["step_s"] == 1 and len(video["attention"]["values"]) == 2


def test_a_network_without_attention_says_so(make_weights, avi):
    predictor = Predictor(make_weights(attention=False))
    (video,) = to_json(predictor, [predictor.predict(avi[0])])["videos"]
    assert video["attention"] is None and video["windows"][0]["attention"] is None and video["segments"]


def test_places_become_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.mp4", "sub/a.AVI", "sub/deep/c.webm", "notes.txt", ".hidden.mp4", "odd[1].mp4", "raw.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [str(path) for path in find_videos(["sub", ".", "b.mp4"])]
    assert names == ["sub/a.AVI", "sub/deep/c.webm", "b.mp4", "odd[1].mp4"]
    assert [str(path) for path in find_videos(["**/*.webm", "odd[1].mp4"])] == ["sub/deep/c.webm", "odd[1].mp4"]
    assert [str(path) for path in find_videos(["*.bin"])] == ["raw.bin"], "what is named is tried"
    (tmp_path / "empty").mkdir()
    for place, words in (("*.mov", "no file or folder matches"), ("empty", "holds no file"), ("s3://x/y", "is a URL")):
        with pytest.raises(UserError, match=words):
            find_videos(["b.mp4", place])


def run(*arguments):
    from genkd.cli import main

    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def test_a_broken_file_does_not_stop_the_others(weights, avi, tmp_path):
    good = tmp_path / "in" / "good.avi"
    good.parent.mkdir()
    good.write_bytes(avi[0].read_bytes())
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video" * 100)
    cut = tmp_path / "in" / "cut.avi"
    cut.write_bytes(avi[0].read_bytes()[: int(avi[0].stat().st_size * 0.7)])
    done = run(tmp_path / "in", "--weights", weights, "--json", "--out", tmp_path / "new" / "found.json")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    values = json.loads(done.stdout)
    assert values == json.loads((tmp_path / "new" / "found.json").read_text()) and values["failed"] == 2
    by_name = {video["path"].rpartition("/")[2]: video for video in values["videos"]}
    assert by_name["good.avi"]["error"] is None and by_name["good.avi"]["top"]
    assert "not a video" in by_name["broken.mp4"]["error"] and not by_name["broken.mp4"]["windows"]
    assert "cut off" in by_name["cut.avi"]["error"] and by_name["cut.avi"]["windows"], "what could be read is scored"
    lines = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert len(lines) == 2 and all(name in done.stderr for name in ("broken.mp4: ", "cut.avi: "))


def test_a_relative_data_set_is_found_from_any_working_directory(
    make_weights, shard_sets, tmp_path, monkeypatch, caplog
):
    """PROJECT/runs/w was trained in PROJECT on data/own."""
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "own").symlink_to(shard_sets("vp9").path)
    (project / "runs").mkdir()
    made = make_weights("data.dataset=data/own").rename(project / "runs" / "w")
    for folder, place in ((project, "runs/w"), (project / "runs", "w"), (tmp_path, made)):
        monkeypatch.chdir(folder)
        found = Predictor(Path(place)).storing
        assert found.video.short_side == 48 and found.origin.endswith("data/own")
    assert not caplog.records
    moved = made.rename(tmp_path / "w")
    assert Predictor(moved).storing.video.short_side == 256
    (told,) = (record.getMessage() for record in caplog.records)
    assert "the data set data/own of these weights is not here" in told
    assert "own frame rate (--fps)" in told and "a short side of 256 pixels (--short-side)" in told
    Predictor(moved, PredictSettings(fps=25, short_side=48))
    assert len(caplog.records) == 1, "what is given needs no warning"


def test_on_the_terminal(weights, avi):
    done = run(avi[0], "--weights", weights, "--top", 3)
    assert done.exit_code == 0 and "00:01.6 at 25 frames/s, 2 windows" in done.stdout
    assert done.stdout.count("%") >= 4 and "00:00.0" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{avi}", "--hop", 0], "--hop 0"),
        (["{avi}", "--stride-seconds", -1], "--stride-seconds -1"),
        (["{avi}", "--fps", 5000], "fps 5000"),
        (["nowhere.mp4"], "no file or folder matches"),
        (["{avi}", "--device", "cuda"], "device=cuda"),
        (["{avi}", "{other}", "--render", "one.mp4"], "is one file, but there are 2 videos"),
        (["{avi}", "--render", "seen.avi"], "renderings are MP4 only; name a folder or a .mp4 file"),
    ],
)
def test_bad_input_is_one_sentence(weights, avi, videos, arguments, words):
    if words == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    other = sorted(videos.glob("UCF-101/Bob/*.avi"))[0]
    done = run(*(str(word).format(avi=avi[0], other=other) for word in arguments), "--weights", weights)
    assert done.exit_code == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_weights_that_are_none(avi, tmp_path):
    done = run(avi[0], "--weights", tmp_path)
    assert done.exit_code == 1 and "neither a training run" in done.stderr


def test_an_unreadable_video_is_a_video_error(card, tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="empty"):
        list(RawClips(tmp_path / "empty.mp4", recognition.data_config(card), storing(card), lambda fps: 1))


@pytest.mark.real
def test_real_videos(make_weights, real_data):
    """Several streams in one file, 10 bits, HEVC, AV1, full range: all are read to their ends."""
    predictor = Predictor(make_weights(), PredictSettings(stride_seconds=10))
    clips = {path.name: predictor.predict(path) for path in find_videos([str(real_data / "clips")])}
    assert len(clips) == 9 and all(entry.error is None for entry in clips.values())
    with av.open(str(real_data / "clips" / "test.avi")) as container:
        assert clips["test.avi"].frames == sum(1 for _ in container.decode(video=0)) == 164


def test_help_has_examples():
    done = run("--help")
    assert done.exit_code == 0 and "genkd predict" in done.stdout.split("Examples:")[1]
