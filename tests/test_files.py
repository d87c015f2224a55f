import os
import subprocess
import sys

from genkd import files


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
