"""Data for the tests: small synthetic videos and their shards, made once a session."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from genkd.preprocessing import plan, sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.synthetic import SynthSettings, synthesize
from genkd.preprocessing.video import VideoSettings

SHARED = Path(__file__).resolve().parents[2] / "shared"
# Ten classes of five videos: groups of four and one, so 10 test and 40 train videos or the other way round.
SYNTH = SynthSettings(videos_per_class=5, seconds=1.6, fps=25, width=64, height=48, test_share=0.5)


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """The AVI files of a small synthetic data set, UCF101 layout."""
    out = tmp_path_factory.mktemp("synth") / "videos"
    synthesize(out, SYNTH, workers=2)
    return out


@pytest.fixture(scope="session")
def shard_sets(videos, tmp_path_factory):
    """A function: codec -> the synthetic videos as an opened data set with that codec, GOP 8, 3 videos a shard."""
    made: dict[str, Dataset] = {}

    def get(codec: str) -> Dataset:
        if codec not in made:
            out = tmp_path_factory.mktemp("data") / codec
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plan, "MIN_SHARDS", 16)
                convert(sources.ucf101(videos), out, VideoSettings(codec, short_side=48, gop=8), workers=2)
            made[codec] = Dataset.open(out)
        return made[codec]

    return get


@pytest.fixture
def data(shard_sets) -> Dataset:
    """The synthetic videos as VP9 shards."""
    return shard_sets("vp9")


@pytest.fixture(scope="session")
def reference() -> Path:
    """Numbers of the original implementation."""
    path = SHARED / "reference"
    if not path.is_dir():
        pytest.skip(f"needs the reference numbers in {path}")
    return path


@pytest.fixture(scope="session")
def helper(reference):
    """What builds weights in the names of the original implementation, a module that lies beside its numbers."""
    spec = importlib.util.spec_from_file_location("reference_state", reference / "reference_state.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real videos and splits."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"needs the real videos in {path}")
    return path


@pytest.fixture
def genkd(tmp_path):
    """Runs the command line in a process of its own; returns the finished process."""

    def run(*arguments: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "genkd", *map(str, arguments)]
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 240, **options}
        done = subprocess.run(command, **options)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A function: size -> a folder on a file system of that size."""
    mounted: list[Path] = []

    def make(size: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=False)


@pytest.fixture(scope="module")
def bucket():
    """The URL of an empty bucket, and the environment that leads to it."""
    for package in ("moto.server", "s3fs"):
        pytest.importorskip(package, reason=f"needs {package}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
                time.sleep(0.2)
        import fsspec
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # one of another module's server
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    finally:
        patch.undo()
        process.kill()
        process.wait()


def folder_bytes(path: Path) -> dict[str, bytes]:
    """Every file below path with its content."""
    return {
        str(Path(base, name).relative_to(path)): Path(base, name).read_bytes()
        for base, _, names in os.walk(path)
        for name in names
    }


@pytest.fixture
def content():
    """folder_bytes as a fixture, so that tests need not import this file."""
    return folder_bytes
