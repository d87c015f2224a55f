import json

import av
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from genkd.configs.load import load
from genkd.errors import UserError
from genkd.evaluation.panels import drawable, font, shortened
from genkd.evaluation.predict import Prediction
from genkd.evaluation.render import Overlay, render
from genkd.evaluation.timeline import Timeline
from genkd.models.checkpoints import ModelCard, save_weights

CLASSES = ("jump", "run", "a class whose name is much too long for any panel that is drawn into a picture")


def timeline(duration=2.0, attention=True):
    """Two windows: first "run" alone, then "jump" alone."""
    curve = np.array([[0.2, 0.4], [0.6, 0.8]]) if attention else None
    starts = np.array([0, duration / 2])
    return Timeline(starts, duration / 2, duration, np.array([[0.0, 1, 0], [1.0, 0, 0]]), curve)


def write_video(path, count, size=(64, 48), rate=25):
    """Frames of one middle grey."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 128, np.uint8), format="rgb24")
        for number in range(count):
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        about = (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate))
        seconds = float(stream.duration * stream.time_base)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), about, seconds


def heads(frames, overlay):
    """The columns in which a frame has a white line over the whole height of the curve."""
    left, top, right, bottom = overlay.plot
    plots = frames[:, top + 1 : bottom - 1, left : right + 1].min((1, 3))
    assert (plots.max(1) > 200).all(), "every frame has a play head"
    return left + plots.argmax(1)


@pytest.mark.parametrize(
    ("size", "most", "drawn"),
    [((64, 48), 720, (320, 240)), ((640, 480), 240, (320, 240)), ((242, 322), 720, (242, 322))],
)
def test_the_rendering_has_the_frames_and_the_shape_of_the_video(tmp_path, size, most, drawn):
    source = write_video(tmp_path / "in.avi", 50, size)
    found = Prediction(source, 25.0, 50, timeline())
    ticks = []
    assert render(found, CLASSES, tmp_path / "new" / "out.mp4", most_side=most, on_frame=lambda: ticks.append(1)) == 50
    frames, about, seconds = read(tmp_path / "new" / "out.mp4")
    assert frames.shape == (50, drawn[1], drawn[0], 3) and about == ("h264", "yuv420p", 25.0)
    assert seconds == pytest.approx(2.0, abs=0.01) and len(ticks) == 50
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.mp4"]
    middle = frames[:, drawn[1] // 2, drawn[0] // 2].astype(int)
    assert np.abs(middle - 128).max() <= 4, "colours stay, and the panels leave the middle free"


def test_the_play_head_moves_with_time(tmp_path):
    found = Prediction(write_video(tmp_path / "in.avi", 50), 25.0, 50, timeline())
    render(found, CLASSES, tmp_path / "out.mp4")
    frames, _, _ = read(tmp_path / "out.mp4")
    overlay = Overlay(timeline(), CLASSES, 320, 240)
    left, _, right, _ = overlay.plot
    expected = left + np.arange(50) / 25 / 2.0 * (right - left)
    np.testing.assert_allclose(heads(frames, overlay), expected, atol=2.5)


def test_bars_are_as_long_as_the_scores():
    """Blue pixels in the first row: all of it where the score is 1, half where two classes share."""
    overlay = Overlay(timeline(), CLASSES, 320, 240)

    def blue(seconds):
        picture = Image.new("RGB", (320, 240), (128, 128, 128))
        overlay.draw(picture, seconds)
        pixels = np.asarray(picture).astype(int)[:120]
        return ((pixels[..., 2] - pixels[..., 0]) > 80).sum(1)

    early, middle, late = blue(0.4), blue(1.0), blue(1.6)
    row = int(early.argmax())
    assert early.max() > 100 and late[row] > 100 and early[row + 20 :].max() == 0
    assert middle[row] == pytest.approx(early[row] / 2, rel=0.12)
    assert middle[row + 14 :].max() > 40, "the second class has a bar of its own"


def test_the_curve_rises_with_attention():
    """Steps 0.2, 0.4, 0.6, 0.8: the topmost blue or grey pixel of the curve stands higher from quarter to quarter."""
    overlay = Overlay(timeline(), CLASSES, 640, 480)
    picture = Image.new("RGB", (640, 480))
    overlay.draw(picture, 0.0)
    left, top, right, bottom = overlay.plot
    plot = np.asarray(picture).astype(int)[top:bottom, left : right + 1].sum(2)
    heights = [plot[:, round((right - left) * share)].argmax() for share in (0.125, 0.375, 0.625, 0.875)]
    assert heights == sorted(heights, reverse=True) and heights[0] - heights[3] > 0.6 * (bottom - top)
    assert np.diff(heights) == pytest.approx(np.diff(heights).mean(), abs=2)


def test_without_attention_the_top_score_is_drawn():
    flat, falling = timeline(attention=False), timeline()
    pictures = []
    for line in (flat, falling):
        pictures.append(Image.new("RGB", (320, 240)))
        Overlay(line, CLASSES, 320, 240).draw(pictures[-1], 0.5)
    assert np.abs(np.asarray(pictures[0]).astype(int) - np.asarray(pictures[1]))[180:].max() > 100


def test_names_that_do_not_fit_or_cannot_be_drawn():
    small = font(11)
    short = shortened(CLASSES[2], 90, small)
    assert short.endswith("…") and CLASSES[2].startswith(short[:-1]) and 60 < small.getlength(short) <= 90
    assert shortened("run", 90, small) == "run"
    assert drawable("Chute d’été — Падение", 0) == "Chute d’été — Падение"
    assert drawable("跳跃", 7) == "class 7" and drawable("跳 jump", 7) == "? jump" and drawable("a\nb", 7) == "a?b"
    assert drawable("e\u0301", 0) == "é", "a letter and its accent are one glyph"


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (1920, 1080), (240, 4000), (4000, 240)])
def test_panels_stay_in_pictures_of_any_shape(size):
    picture = Image.new("RGB", size, (128, 128, 128))
    Overlay(timeline(), CLASSES, *size).draw(picture, 2.0)
    pixels = np.asarray(picture)
    border = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    assert all((line == 128).all() for line in border), "nothing is drawn on the outermost pixels"


def test_a_damaged_video_ends_where_it_is_damaged(tmp_path):
    source = write_video(tmp_path / "in.avi", 50, (320, 240))
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) * 3 // 5])
    count = render(Prediction(source, 25.0, 30, timeline()), CLASSES, tmp_path / "out.mp4")
    frames, _, _ = read(tmp_path / "out.mp4")
    assert 10 < count < 50 and len(frames) == count


def test_what_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be rendered: the file is gone"):
        render(Prediction(tmp_path / "gone.mp4", 25.0, 50, timeline()), CLASSES, tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    config = load("demo", "representation", ["data.clip_length=16", "data.size=32"])
    card = ModelCard(
        model=config.model, classes=CLASSES, clip_length=16, size=32, attention=True, compat="none",
        data=config.data.model_dump(mode="json"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("weights")
    save_weights(folder, card, {"recognizer": card.build()})
    return folder


def run(*arguments):
    from genkd.cli import main

    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def test_renderings_from_the_command_line(weights, tmp_path):
    for name in ("a/one.avi", "b/one.avi", "b/one.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "in" / name, 12)
    (tmp_path / "in" / "broken.avi").write_bytes(b"x")
    done = run(tmp_path / "in", "--weights", weights, "--render", tmp_path / "out", "--json")
    assert done.exit_code == 1, "one is broken"
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.mp4"))
    assert made == ["a/one.mp4", "b/one.avi.mp4", "b/one.mp4.mp4"]
    named = [video["rendered"] for video in json.loads(done.stdout)["videos"]]
    assert sorted(filter(None, named)) == [str(tmp_path / "out" / name) for name in made] and None in named
    assert all(len(read(tmp_path / "out" / name)[0]) == 12 for name in made)


def test_a_rendering_that_fails_does_not_stop_the_others(weights, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a.avi", "b.avi", "c.avi"):
        write_video(tmp_path / "in" / name, 12)

    def fails(found, *arguments, **options):
        if found.path.name == "b.avi":
            raise UserError("b cannot be encoded")
        return render(found, *arguments, **options)

    monkeypatch.setattr("genkd.evaluation.render.render", fails)
    done = run(tmp_path / "in", "--weights", weights, "--render", tmp_path / "out", "--out", tmp_path / "found.json")
    assert done.exit_code == 1 and "b.avi: b cannot be encoded" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.mp4", "c.mp4"]
    videos = json.loads((tmp_path / "found.json").read_text())["videos"]
    assert [video["rendered"] for video in videos] == [
        str(tmp_path / "out" / "a.mp4"), None, str(tmp_path / "out" / "c.mp4"),
    ]  # fmt: skip
    assert [video["render_error"] for video in videos] == [None, "b cannot be encoded", None]
    assert all(video["windows"] and video["error"] is None for video in videos)


def test_what_a_killed_rendering_left_is_removed(tmp_path):
    (tmp_path / ".out.mp4.elsewhere-1.tmp").touch()
    (tmp_path / ".other.mp4.elsewhere-1.tmp").touch()
    render(Prediction(write_video(tmp_path / "in.avi", 12), 25.0, 12, timeline()), CLASSES, tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.mp4.elsewhere-1.tmp", "in.avi", "out.mp4"]


def test_renderings_never_replace_their_videos(weights, tmp_path):
    source = write_video(tmp_path / "one.mp4", 12)
    before = source.read_bytes()
    for place in (source, tmp_path):
        done = run(source, "--weights", weights, "--render", place)
        assert done.exit_code == 1 and "write over the video" in done.stderr
    assert source.read_bytes() == before
    (tmp_path / "out.mov").touch()
    done = run(source, "--weights", weights, "--render", tmp_path / "out.mov")
    assert done.exit_code == 1 and "does not end in .mp4" in done.stderr
