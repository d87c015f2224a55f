import contextlib
import errno
import os
import subprocess
import sys
import threading

import pytest

from genkd import files
from genkd.errors import UserError


def test_what_a_killed_process_left_is_a_leftover_even_before_anybody_has_waited_for_it(tmp_path):
    """In a container whose first process collects nothing, the dead stay in /proc."""
    script = f"""
from pathlib import Path
from genkd.files import replacing
with replacing(Path({str(tmp_path / "shard.tar")!r})) as temporary:
    temporary.touch()
    print(flush=True)
    input()
"""
    writer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    writer.stdout.readline()
    (name,) = os.listdir(tmp_path)
    assert not files.is_leftover(name, ["shard."])
    writer.kill()
    os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and stays as it is
    assert os.path.exists(f"/proc/{writer.pid}")
    assert files.is_leftover(name, ["shard."]) and not files.is_leftover(name, ["other."])
    files.remove_leftovers(tmp_path, ["shard."])
    assert not os.listdir(tmp_path)
    writer.communicate()


def test_a_lock_that_goes_in_time_is_taken(tmp_path):
    """As a file server's of a node that is dead."""
    with files.locked(tmp_path, "busy"):
        with pytest.raises(UserError, match=r"^busy$"):
            with files.locked(tmp_path, "busy", patience=0.6):
                pass
    held = contextlib.ExitStack()
    held.enter_context(files.locked(tmp_path, "busy"))
    threading.Timer(0.7, held.close).start()
    with files.locked(tmp_path, "busy", patience=20):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(
        UserError, match=f"{tmp_path} cannot be locked .Function not implemented.; mount its file system"
    ):
        with files.locked(tmp_path, "busy"):
            pass
