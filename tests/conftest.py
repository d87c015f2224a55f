"""What all tests share: synthetic videos and their shards, the command line, FFmpeg, and why tests were skipped."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections import Counter
from pathlib import Path

# Each worker computes in one thread, and so do the processes that tests start: the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from click.testing import CliRunner

from genkd.cli import main
from genkd.preprocessing import engines, plan, sources
from genkd.preprocessing.convert import convert
from genkd.preprocessing.shards import Dataset
from genkd.preprocessing.synthetic import SynthSettings, synthesize
from genkd.preprocessing.video import VideoSettings
from genkd.tests.support import processes
from genkd.tests.support.shared import SharedFolders

SHARED = Path(__file__).resolve().parents[2] / "shared"
# Ten classes of five videos: groups of four and one, so 10 test and 40 train videos or the other way round.
SYNTH = SynthSettings(videos_per_class=5, seconds=1.6, fps=25, width=64, height=48, test_share=0.5)
# The files that take longest, which begin first, so that no worker is left with one at the end.
LONGEST = (
    "test_compiled", "test_detection_learns", "test_remux", "test_soak",  # the slow ones
    "test_ranks", "test_loop", "test_export", "test_recipes", "test_reference", "test_remote", "test_convert",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--shuffle-files", metavar="SEED", help="Run the files in a random order instead of the longest ones first."
    )


def pytest_configure(config):
    """FFmpeg's command comes from a package, as another version than a system's may judge videos differently; workers
    of a conversion are forked from the server that has imported everything."""
    engines.CONTEXT = multiprocessing.get_context("forkserver")
    if importlib.util.find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        folder = tempfile.TemporaryDirectory(prefix="genkd-ffmpeg-")
        config.add_cleanup(folder.cleanup)
        os.symlink(imageio_ffmpeg.get_ffmpeg_exe(), Path(folder.name, "ffmpeg"))
        os.environ["PATH"] = os.pathsep.join((folder.name, os.path.dirname(sys.executable), os.environ["PATH"]))


def pytest_collection_modifyitems(config, items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("ffmpeg") and not shutil.which("ffmpeg"):
            item.add_marker(pytest.mark.skip(reason="needs FFmpeg: pip install imageio-ffmpeg"))
    if seed := config.getoption("--shuffle-files"):
        names = sorted({item.path for item in items})
        random.Random(seed).shuffle(names)
        order = {path: number for number, path in enumerate(names)}
    else:
        order = {item.path: LONGEST.index(item.path.stem) - 99 for item in items if item.path.stem in LONGEST}
    items.sort(key=lambda item: order.get(item.path, 0))  # in a file as they stand there


def pytest_terminal_summary(terminalreporter):
    """Of the tests that were skipped the reasons, with their counts."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} skipped")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5}  {reason}")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A function: name, make -> the folder that make(folder) has made, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folders = SharedFolders((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared")
    yield folders
    folders.assert_untouched()


@pytest.fixture(scope="session")
def videos(shared_folder) -> Path:
    """The AVI files of a small synthetic data set, UCF101 layout."""
    return shared_folder("videos", lambda out: synthesize(out, SYNTH, workers=0))


@pytest.fixture(scope="session")
def shard_sets(videos, shared_folder):
    """A function: codec -> the synthetic videos as an opened data set with that codec, GOP 8, 3 videos a shard."""
    opened: dict[str, Dataset] = {}

    def get(codec: str) -> Dataset:
        def make(out):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plan, "MIN_SHARDS", 16)
                convert(sources.ucf101(videos), out, VideoSettings(codec, short_side=48, gop=8), workers=0)

        if codec not in opened:
            opened[codec] = Dataset.open(shared_folder(f"shards-{codec}", make))
        return opened[codec]

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
def genkd(tmp_path, monkeypatch):
    """Runs the command line in this process, in tmp_path; returns what a finished process would be."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="genkd")
        stderr = result.stderr
        if result.exception and not isinstance(result.exception, SystemExit):
            stderr += "".join(traceback.format_exception(result.exception))
        if check and result.exit_code:
            raise AssertionError(f"genkd {arguments} exited with {result.exit_code}:\n{result.stdout}\n{stderr}")
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, stderr)

    return run


@pytest.fixture
def genkd_process(tmp_path):
    """The same in a process of its own, for what depends on one."""

    def run(*arguments: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        return processes.run("-m", "genkd", *arguments, check=check, **{"cwd": tmp_path, **options})

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
