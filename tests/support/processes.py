"""Python processes forked from a server that has imported torch and genkd, in place of new interpreters.

A new interpreter imports for two seconds before `genkd train` begins, and `torchrun` starts one of its own and one a
rank. What is started here behaves as if it were new: arguments, environment, folder, output, signals, exit codes,
process group, and the functions that run at exit. Ranks of torchrun are forked from it in the same way.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([f"{__package__}.preload"])

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


class Process:
    """A started process, with the interface of subprocess.Popen as far as tests need it.

    stdout, stderr: paths of the files that its output goes to.
    """

    def __init__(self, process: multiprocessing.process.BaseProcess, stdout: Path, stderr: Path):
        self._process, self.stdout, self.stderr = process, stdout, stderr
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr until it ended."""
        self.wait(timeout)
        return self.stdout.read_text(), self.stderr.read_text()

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: object, cwd: os.PathLike | str | None = None, env: Mapping[str, str] | None = None,
    start_new_session: bool = False, output: Path | None = None,
) -> Process:  # fmt: skip
    """Starts `python ARGUMENTS...`: -m MODULE or a script, then its own arguments.

    output: a file that stdout and stderr are appended to, in place of one for each.
    """
    folder = Path(tempfile.mkdtemp(prefix="genkd-process-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stdout, stderr = (folder / "stdout", folder / "stderr") if output is None else (output, output)
    for path in (stdout, stderr):
        path.touch()
    process = _CONTEXT.Process(
        target=_enter,
        args=(list(map(str, arguments)), dict(os.environ if env is None else env), str(cwd or os.getcwd()),
              start_new_session, str(stdout), str(stderr)),
    )  # fmt: skip
    process.start()
    return Process(process, stdout, stderr)


def run(*arguments: object, timeout: float = 240, check: bool = False, **options) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS...` to its end; the output as text. Raises AssertionError with it where check fails."""
    process = start(*arguments, **options)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        process.kill()
    command = " ".join(map(str, arguments))
    if check and process.returncode:
        raise AssertionError(f"python {command} exited with {process.returncode}:\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _enter(
    arguments: list[str], environment: dict[str, str], cwd: str, session: bool, stdout: str, stderr: str
) -> None:
    if session:
        os.setsid()
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    become_python(arguments, environment)


def become_python(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Goes on in this process as `python ARGUMENTS...` would, and ends it."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # to be looked up in this environment
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the server may have been started where some were blocked
    code = _exit_code(list(arguments))
    threading._shutdown()  # as the interpreter does: waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _exit_code(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = _popen
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=arguments[0] == "-u" or stream is sys.stderr)
    arguments = arguments[arguments[0] == "-u" :]
    try:
        if arguments[0] == "-m":
            sys.argv[:] = arguments[1:]
            sys.modules.pop(arguments[1] if "." in arguments[1] else "", None)  # it is to run, not to be imported
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = arguments
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _popen(args: Sequence[str], env: Mapping[str, str], **options) -> subprocess.Popen:
    """subprocess.Popen as torchrun calls it for a rank: the child that it forks runs Python here and now."""

    def enter() -> None:
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:  # as exec would; one of them tells Popen that the child is running
                with contextlib.suppress(OSError):
                    os.close(number)
        become_python(args[1:], env)

    return subprocess.Popen(args, env=env, preexec_fn=enter, **options)


def wait_until(condition, seconds: float = 60.0, pause: float = 0.01, process: Process | None = None) -> None:
    """Waits until condition() holds, looking every `pause` seconds; AssertionError after `seconds`, or where process
    ends before it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended and condition():
            return
        assert not ended, f"the process ended with {process.returncode} first"
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(pause)


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == pid and state not in "ZX":
                found.append(int(path.parent.name))
    return sorted(found)
