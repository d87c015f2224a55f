"""Several hosts on one machine: network namespaces, each with an address of its own, on a switch that is one too."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PORT = 29400


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.multihost)


@dataclass
class Host:
    """A network namespace; what runs in it sees its own interface eth0 and nothing else."""

    namespace: str
    address: str
    switch: str
    port: str

    def start(self, command, log: Path, **environment: object) -> subprocess.Popen:
        """A process on this host, whose output is appended to a file. gloo and torchrun are told the interface."""
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0",
            # As in kubernetes-train.yaml: without it no host can come back.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **{name: str(value) for name, value in environment.items()},
        }  # fmt: skip
        with open(log, "ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *map(str, command)],
                env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def torchrun(self, head: str, script: Path, arguments, log: Path, *, nodes="3", conf="", restarts=0, **environment):
        """torchrun with one rank of the script on this host; head: the address of the rendezvous' host."""
        # The namespaces have no names that resolve, so neither could be found out; on real hosts torch asks for names.
        here = f"is_host={int(head == self.address)}"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", 1,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{head}:{PORT}", "--rdzv-id", "test",
            "--rdzv-conf", f"{here},{conf}".rstrip(","), "--local-addr", self.address, "--max-restarts", restarts,
            script, *arguments,
        ]  # fmt: skip
        return self.start(command, log, **environment)

    def plug(self, connected: bool) -> None:
        """Pulls the cable at the switch, or puts it back: nothing tells the host or those it talks to."""
        _ip("-n", self.switch, "link", "set", self.port, "up" if connected else "down")

    def kill(self) -> None:
        """Kills every process on the host at once, as a power cut would."""
        for _ in range(100):
            found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
            if not found.stdout.split():
                return
            for process in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            time.sleep(0.05)
        raise AssertionError(f"processes of {self.namespace} survive SIGKILL")


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """Hosts that reach each other, and are gone with all their processes afterwards, whatever happens between."""
    name, made = f"genkd{os.getpid()}", []
    hosts: list[Host] = []
    try:
        switch = f"{name}-switch"
        _ip("netns", "add", switch)
        made.append(switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number in range(1, count + 1):
            host = Host(f"{name}-{number}", f"10.83.0.{number}", switch, f"port{number}")
            _ip("netns", "add", host.namespace)
            made.append(host.namespace)
            hosts.append(host)
            _ip("-n", switch, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", host.port, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
        for namespace in reversed(made):
            _ip("netns", "delete", namespace)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


# 10 training videos: batches of 6 and 4, which 3 ranks and 2 can share. Slow enough to be disturbed.
TINY = """
batch_size: 6
log_every: 1
checkpoint_every: 2
tensorboard: false
precision: fp32
data: {clip_length: 16, size: 32, scales: [1.0, 0.875]}
model: {width: 0.25, bn_momentum: 0.1}
optimizer: {name: sgd, lr: 0.01}
"""


@pytest.fixture
def tiny_yaml(tmp_path) -> Path:
    """That configuration, as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def hosts():
    """Three hosts."""
    if os.geteuid() != 0:
        pytest.skip("needs root for network namespaces")
    if not shutil.which("ip"):
        pytest.skip("needs the command ip (package iproute2)")
    try:
        with network(1):
            pass
    except OSError as error:
        pytest.skip(f"needs the right to make network namespaces ({error})")
    with network(3) as made:
        yield made
