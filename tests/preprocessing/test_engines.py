"""Workers that die: their tasks run again, and what kills every worker is left out."""

import dataclasses
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from genkd.errors import UserError
from genkd.preprocessing import engines, sources
from genkd.preprocessing.convert import ShardTask, _Losses, convert
from genkd.preprocessing.decoding import VideoError
from genkd.preprocessing.engines import engine, run_local
from genkd.preprocessing.video import VideoSettings

# Workers import what they run, so it has to be a module of its own.
MODULE = """
import os, signal, time
from genkd.preprocessing.decoding import VideoError
from genkd.preprocessing.video import VideoSettings

def die_once(task, report):
    path, number = task
    report(2)
    if number == 3 and not os.path.exists(path):
        open(path, "w").close()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    report(3)
    return number * number

def die_always(task, report):
    os.kill(os.getpid(), signal.SIGSEGV)

def fail(task, report):
    raise KeyError("a bug")

def lose_connection(task, report):
    raise ConnectionResetError("by the task itself")

def reject(task, report):
    raise VideoError("open", "no video")

def sleep(task, report):
    report(1)
    time.sleep(60)

def blocks_interrupts(task, report):
    time.sleep(0.2)  # so that every worker gets one
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

class Deadly(VideoSettings):
    def encode(self, video, sink, on_frame):
        if "two words" in video.key or "b/good" in video.key:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().encode(video, sink, on_frame)
"""


@pytest.fixture(autouse=True)
def _as_users_have_them(monkeypatch):
    monkeypatch.setattr(engines, "CONTEXT", multiprocessing.get_context("spawn"))


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "deadly_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("deadly_module")
    sys.modules.pop("deadly_module")


def test_a_task_whose_worker_is_killed_runs_again_and_its_reports_count_once(module, tmp_path):
    events = []
    results = list(run_local(module.die_once, [(str(tmp_path / "x"), n) for n in range(8)], 2, events.append))
    assert sorted(results) == [n * n for n in range(8)]
    assert sum(events) == 8 * 5 and -2 in events


def test_ctrl_c_cannot_reach_a_worker_not_even_the_first_of_a_process(tmp_path):
    """In a process of its own, as multiprocessing starts more than the worker with the first one."""
    (tmp_path / "deadly_module.py").write_text(MODULE)
    script = """if __name__ == "__main__":
        import deadly_module
        from genkd.preprocessing.engines import run_local
        print(list(run_local(deadly_module.blocks_interrupts, [1, 2], 2, print)))
    """
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[True, True]", done.stderr


def test_a_task_that_kills_every_worker_is_given_up_with_a_sentence(module):
    with pytest.raises(UserError, match=r"killed again and again \(SIGSEGV.*--workers"):
        list(run_local(module.die_always, [1, 2], 2, lambda event: None))


def test_a_bug_in_a_task_keeps_its_traceback(module):
    with pytest.raises(KeyError, match="a bug") as caught:
        list(run_local(module.fail, [1], 1, lambda event: None))
    assert "deadly_module.py" in str(caught.value.__cause__)


def test_an_error_of_a_task_is_no_dead_worker(module):
    with pytest.raises(ConnectionResetError, match="by the task itself"):
        list(run_local(module.lose_connection, [1], 1, lambda event: None))
    with pytest.raises(VideoError, match="no video") as caught:
        list(run_local(module.reject, [1], 1, lambda event: None))
    assert (caught.value.stage, caught.value.reason) == ("open", "no video")


def test_ctrl_c_stops_a_worker_that_does_not_report(module, monkeypatch):
    monkeypatch.setattr(engines, "PATIENCE", 0.5)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_local(module.sleep, [1], 1, lambda event: os.kill(os.getpid(), signal.SIGINT)))
    assert time.monotonic() - began < 20 and not multiprocessing.active_children()


@pytest.mark.parametrize("reason", ["SIGKILL", engines.OUTSIDE])
def test_a_worker_that_the_system_kills_at_a_video_stops_the_run_and_blames_no_source(reason):
    losses, task = _Losses(), ShardTask("train-00000", "", "", (), (), None, False, "")
    for _ in range(2):
        assert losses(task, "a/good", reason) is task
    with pytest.raises(UserError, match=rf"{reason} ended the process that converted a/good.*--workers"):
        losses(task, "a/good", reason)


def test_an_unknown_engine_is_refused():
    with pytest.raises(UserError, match="local and ray"):
        engine("slurm", 1)


def test_a_video_that_kills_every_worker_is_rejected_and_the_rest_converted(module, videos, tmp_path):
    import shutil

    good = sorted((videos / "UCF-101" / "Bob").iterdir())
    for place in ("a/good.avi", "a/two words.avi", "b/good.avi", "b/other.avi"):
        (tmp_path / "root" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good[len(place) % 4], tmp_path / "root" / place)
    settings = module.Deadly("mjpeg", short_side=48)
    summary = convert(sources.folder(tmp_path / "root"), tmp_path / "data", settings, workers=2)
    assert [entry.path for entry in summary.rejected] == ["a/two words.avi", "b/good.avi"]
    assert all("died of it 3 times (SIGSEGV)" in entry.reason for entry in summary.rejected)
    assert summary.info["splits"]["train"]["videos"] == 2
    assert not list((tmp_path / "data").glob("**/.*.tmp"))
    assert dataclasses.asdict(settings) == summary.info["video"]


def test_a_conversion_survives_the_loss_of_workers(videos, tmp_path, content):
    settings = VideoSettings("vp9", short_side=96)
    everything = sources.ucf101(videos)
    few = dataclasses.replace(everything, videos=everything.videos[:6])
    convert(few, tmp_path / "plain", settings, workers=2)
    killed = []

    def kill(event):
        workers = multiprocessing.active_children()  # none while both are being replaced
        if event.frames and len(killed) < 2 and workers:
            killed.append(workers[0].pid)
            workers[0].kill()

    summary = convert(few, tmp_path / "data", settings, workers=2, on_progress=kill)
    assert len(killed) == 2 and not summary.rejected
    assert content(tmp_path / "data") == content(tmp_path / "plain")
