import json
import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "verb",
    [[], ["synth"], ["shard"], ["shard", "folder"], ["shard", "ucf101"], ["inspect"], ["verify"], ["train"],
     ["evaluate"], ["evaluate", "recognition"], ["evaluate", "detection"], ["fuse"], ["predict"],
     ["import-checkpoint"], ["export"], ["cluster"], ["demo"], ["report"], ["bench"], ["doctor"]],
)  # fmt: skip
def test_every_verb_has_help(verb):
    from click.testing import CliRunner

    from genkd.cli import main

    result = CliRunner().invoke(main, [*verb, "--help"])
    assert result.exit_code == 0
    if verb and verb not in (["shard"], ["evaluate"], ["doctor"]):
        assert f"genkd {' '.join(verb)}" in result.output.split("Examples:")[1]


def test_from_videos_to_a_distilled_student_on_the_command_line(genkd, tmp_path):
    genkd("synth", "videos", "--videos-per-class", 5, "--seconds", 1, "--size", "64x48", "--test-share", 0.5)
    done = genkd("shard", "ucf101", "videos", "data", "--codec", "vp9", "--short-side", 48)
    assert "videos test 40, train 10; 10 classes" in done.stdout
    small = ["data.dataset=data", "data.clip_length=16", "data.size=32", "epochs=1", "batch_size=5"]
    genkd("train", "teacher", "--config", "demo", "--out", "runs/teacher", *small)
    genkd("train", "representation", "--config", "demo", "--out", "runs/rep", *small, "init=runs/teacher")
    done = genkd("train", "distill", "--config", "demo", "--out", "runs/student", *small, "teacher=runs/rep")
    assert "ETA" in done.stdout and "finished; weights are in" in done.stdout
    assert list((tmp_path / "runs" / "student" / "tensorboard").iterdir())
    evaluate = ["evaluate", "recognition", "runs/student", "--data", "data", "--clips", 1]
    assert "top-1" in genkd(*evaluate, "--out", "runs/student/evaluation").stdout
    assert json.loads(genkd(*evaluate, "--json").stdout)["videos"] == 40
    genkd("report", "runs/student")
    assert "<svg" in (tmp_path / "runs" / "student" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "teacher", "--config", "demo", "--out", "x", "epochz=3"], "did you mean 'epochs'"),
        (["train", "teacher", "--config", "nope.yaml", "--out", "x"], "no configuration file 'nope.yaml'"),
        (["train", "teacher", "--config", "demo", "--out", "x"], "data.dataset is not set"),
        (["shard", "folder", "nowhere", "out"], "there is no folder"),
        (["shard", "folder", ".", "out", "--codec", "gif"], "there are h264, hevc, vp9, mjpeg, copy"),
        (["inspect", "."], "no dataset.json"),
        (["verify", "."], "no dataset.json"),
        (["synth", "out", "--size", "big"], "WIDTHxHEIGHT"),
        (["evaluate", "recognition", "none", "--data", "."], "neither a training run"),
        (["report", "."], "no training run"),
        (["shard", "folder", ".", "../out", "--preset", "warp"], "unknown preset 'warp'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(genkd, tmp_path, arguments, words):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "video.mp4").touch()
    done = genkd(*arguments, check=False)
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists() and not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seconds", "1-2"], "trimmed videos have one length"),
        (["--seconds", "nan"], "--seconds nan is no length"),
        (["--seconds", "soon"], "neither a number of seconds nor a range"),
        (["--size", "100000x100000"], "from 32 to 4096 pixels"),
        (["--classes", "Bob,Fall"], "--classes is for untrimmed videos; it needs --untrimmed"),
        (["--untrimmed", "--videos-per-class", "5"], "--videos-per-class is for trimmed videos; leave it out"),
        (["--untrimmed", "--classes", "Bob,Slid"], "did you mean Slide"),
        (["--untrimmed", "--test-videos", "0"], "at least one video"),
        (["--untrimmed", "--seconds", "9", "--gap-seconds", "5"], "but video_validation_0000001 has 9 s; lower"),
        (["--untrimmed", "--action-seconds", "8-1"], "--action-seconds 8-1 is no length, or range"),
    ],
)
def test_impossible_data_sets_are_one_sentence(tmp_path, options, words):
    from click.testing import CliRunner

    from genkd.cli import main

    result = CliRunner().invoke(main, ["synth", str(tmp_path / "out"), *options])
    assert result.exit_code == 1 and words in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_help_tells_the_defaults():
    from click.testing import CliRunner

    from genkd.cli import main
    from genkd.preprocessing.synthetic import SynthSettings
    from genkd.preprocessing.untrimmed import UntrimmedSettings

    help_page = CliRunner().invoke(main, ["synth", "--help"]).output
    told = " ".join(help_page.split("Options:")[1].split())
    trimmed, untrimmed = SynthSettings(), UntrimmedSettings()
    for option, default in {
        "videos-per-class": trimmed.videos_per_class,
        "test-share": trimmed.test_share,
        "validation-videos": untrimmed.validation_videos,
        "test-videos": untrimmed.test_videos,
        "actions-per-minute": f"{untrimmed.actions_per_minute:g}",
        "action-seconds": "{:g}-{:g}".format(*untrimmed.action_seconds),
        "gap-seconds": f"{untrimmed.gap_seconds:g}",
        "mixed-share": untrimmed.mixed_share,
        "seconds": "{:g}; untrimmed: {:g}-{:g}".format(trimmed.seconds, *untrimmed.seconds),
        "fps": f"{trimmed.fps}; untrimmed: {untrimmed.fps}",
        "size": f"{trimmed.width}x{trimmed.height}; untrimmed: {untrimmed.width}x{untrimmed.height}",
    }.items():
        assert re.search(rf"--{option} [^\[]*\[default: ([^\]]*)\]", told)[1] == str(default), option


def test_version_and_module_entry_point():
    done = subprocess.run([sys.executable, "-m", "genkd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("0.1.0")
