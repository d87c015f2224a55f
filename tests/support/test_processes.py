"""Forked processes behave as new ones do, and folders that tests share are made once and guarded."""

import os
import signal
import subprocess
import sys

import pytest

from genkd.tests.support import processes
from genkd.tests.support.shared import SharedFolders

SCRIPT = """
import atexit, os, sys, tempfile, time
atexit.register(print, "at exit")
print(sys.argv[1:], __name__, os.getcwd(), os.environ.get("NAME"), tempfile.gettempdir(), os.getpgrp() == os.getpid())
print("told", file=sys.stderr)
if sys.argv[1:] == ["wait"]:
    open("up", "w").close()
    time.sleep(60)
sys.exit({"text": "a sentence", "code": 7, "nothing": None}[sys.argv[1]])
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(("argument", "code", "stderr"), [("text", 1, "told\na sentence\n"), ("code", 7, "told\n"),
                                                          ("nothing", 0, "told\n")])  # fmt: skip
def test_a_script_runs_as_in_a_new_interpreter(script, tmp_path, argument, code, stderr):
    environment = {"PATH": os.environ["PATH"], "NAME": "x", "TMPDIR": str(tmp_path)}
    done = processes.run(script, argument, cwd=tmp_path, env=environment, start_new_session=True)
    real = subprocess.run(
        [sys.executable, script, argument], cwd=tmp_path, env=environment, start_new_session=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr)
    assert (done.returncode, done.stderr) == (code, stderr) and "at exit" in done.stdout


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(script, tmp_path, signum):
    process = processes.start(script, "wait", cwd=tmp_path)
    processes.wait_until((tmp_path / "up").exists, process=process)
    assert process.poll() is None
    process.send_signal(signum)
    assert process.wait(20) == -signum


def test_a_traceback_is_code_1(tmp_path):
    (tmp_path / "script.py").write_text("raise KeyError('a bug')")
    done = processes.run(tmp_path / "script.py")
    assert done.returncode == 1 and "KeyError: 'a bug'" in done.stderr
    with pytest.raises(AssertionError, match="exited with 1"):
        processes.run(tmp_path / "script.py", check=True)


def test_a_shared_folder_is_made_once_and_a_write_into_it_is_found(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        folder.mkdir()
        (folder / "file").write_text("one")

    first, second = SharedFolders(tmp_path / "shared"), SharedFolders(tmp_path / "shared")
    assert first("data", make) == second("data", make) == tmp_path / "shared" / "data" and len(made) == 1
    first.assert_untouched()
    (tmp_path / "shared" / "data" / "more").touch()
    with pytest.raises(AssertionError, match="shared folder data: more"):
        second.assert_untouched()
