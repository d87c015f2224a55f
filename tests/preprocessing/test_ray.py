"""Conversion on a Ray cluster of several nodes on this machine, one of which is killed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from genkd.errors import UserError
from genkd.preprocessing import sources
from genkd.preprocessing.convert import Progress, convert
from genkd.preprocessing.engines import OUTSIDE, Note
from genkd.preprocessing.video import VideoSettings

SETTINGS = VideoSettings("vp9", short_side=96)


@pytest.fixture(scope="module")
def few(videos, tmp_path_factory):
    root = tmp_path_factory.mktemp("few") / "few"
    for name in ("Bob", "Orbit"):
        shutil.copytree(videos / "UCF-101" / name, root / name)
    (root / "Bob" / "broken.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def plain(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "data"
    convert(sources.folder(few), out, SETTINGS, workers=2)
    return out


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, so that all work is on nodes that may be lost."""
    pytest.importorskip("ray", reason="needs the package ray")
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_health_check_period_ms", "500")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


def test_a_node_that_is_killed_costs_only_time(cluster, few, plain, tmp_path, content):
    cluster.add_node(num_cpus=1)
    doomed = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    events: list[Progress] = []
    killed = threading.Event()

    def kill_when_it_works() -> None:
        while sum(event.frames for event in list(events)) < 64:
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)
        killed.set()

    killer = threading.Thread(target=kill_when_it_works, daemon=True)
    killer.start()
    out = tmp_path / "data"
    summary = convert(
        sources.folder(few), out, SETTINGS, workers=None, engine="ray", address=cluster.address,
        on_progress=events.append,
    )  # fmt: skip
    killer.join(timeout=60)
    assert killed.is_set()
    assert content(out) == content(plain)
    assert [entry.path for entry in summary.rejected] == ["Bob/broken.mp4"]
    # What a lost worker had reported was taken back: the sum is what was really done, once.
    assert sum(event.videos for event in events) == 11 and sum(event.rejected for event in events) == 1
    assert sum(event.frames for event in events) == 400


@pytest.mark.slow
def test_the_command_survives_the_power_cut_of_one_of_two_nodes(cluster, videos, tmp_path, genkd, content):
    """All processes of a node are killed at once while one of them converts."""
    whole = tmp_path / "whole"
    genkd("shard", "ucf101", videos, whole, "--codec", "vp9", "--short-side", 96)
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    cluster.add_node(num_cpus=1)
    doomed = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    raylet = doomed.all_processes["raylet"][0].process.pid
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "genkd", "shard", "ucf101", videos, out, "--codec", "vp9", "--short-side", "96",
               "--engine", "ray", "--address", cluster.address]  # fmt: skip
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def finished():
        return len(list(out.glob("shards/*.parquet")))

    def children():
        found = subprocess.run(["pgrep", "-P", str(raylet)], capture_output=True, text=True).stdout.split()
        return {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in found if Path(f"/proc/{pid}").exists()}

    while finished() < 5 or not any("ray::_call" in name for name in children().values()):
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    for pid in (raylet, *children()):
        os.kill(pid, signal.SIGKILL)
    then = finished()
    assert process.wait(timeout=200) == 0, log.read_text()
    assert 5 <= then < len(list(whole.glob("shards/*.parquet")))
    assert content(out) == content(whole)
    cluster.remove_node(doomed, allow_graceful=False)


def test_what_is_wrong_in_a_task_reaches_the_user(cluster, few, tmp_path):
    with pytest.raises(UserError, match=r"broken\.mp4: open: not a video"):
        convert(
            sources.folder(few), tmp_path / "data", SETTINGS, workers=1, engine="ray", address=cluster.address,
            on_error="fail",
        )  # fmt: skip
    assert not list(tmp_path.glob("data/**/.*.tmp"))


def _die(task, report):
    os.kill(os.getpid(), 9)


def test_a_task_that_kills_every_worker_is_given_up_with_a_sentence(cluster):
    from genkd.preprocessing.ray_engine import run_ray

    with pytest.raises(UserError, match="lost 3 times"):
        list(run_ray(_die, [1], lambda event: None, address=cluster.address))


def _end(task, report):
    report(Note(f"video {task}"))
    time.sleep(0.2)
    if task:
        os.kill(os.getpid(), task)


def test_a_crash_is_told_from_a_kill(cluster):
    """So that a video is blamed for the one and not for the other, which the system does for lack of memory."""
    from genkd.preprocessing.ray_engine import run_ray

    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    told, tasks = [], [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, 0]
    again = lambda task, note, reason: told.append((note, reason)) or 0  # noqa: E731
    list(run_ray(_end, [int(number) for number in tasks], lambda event: None, again, address=cluster.address))
    assert sorted(told) == [("video 11", "SIGSEGV"), ("video 6", "SIGABRT"), ("video 9", OUTSIDE)]
    assert not [path for path in Path(tempfile.gettempdir()).glob("genkd-crash-*") if path.stat().st_size]


def test_an_address_without_a_cluster_is_one_sentence(few, tmp_path, genkd_process):
    pytest.importorskip("ray", reason="needs the package ray")
    told = genkd_process(
        "shard", "folder", few, tmp_path / "data", "--engine", "ray", "--address", "127.0.0.1:1", check=False
    )
    assert told.returncode == 1 and "no Ray cluster" in told.stderr and "Traceback" not in told.stderr
