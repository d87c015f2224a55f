"""The Slurm templates under Slurm itself: a controller and two nodes, each a host of its own with a name."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from genkd.configs import templates
from genkd.preprocessing.shards import Dataset

# Nodes with one "GPU" of no use, so that the template's requests are met. cred_expire: seconds for which a job that is
# queued again waits at least. SlurmdTimeout: seconds without an answer after which a node is down.
SLURM = """
ClusterName=test
SlurmctldHost=control(10.83.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdTimeout=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/control.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/control.log
SlurmdLogFile={root}/%n.log
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=node1 NodeAddr=10.83.0.2 CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=node2 NodeAddr=10.83.0.3 CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Slurm's daemons on three hosts, and its commands on the first."""

    names = ("control", "node1", "node2")

    def __init__(self, root, hosts):
        self.root, self.hosts = root, dict(zip(self.names, hosts, strict=True))
        self.environment = {
            **os.environ, "SLURM_CONF": str(root / "slurm.conf"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        (root / "state").mkdir()
        (root / "slurm.conf").write_text(SLURM.format(root=root))
        (root / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (root / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{host.address} {name}\n" for name, host in self.hosts.items())
        )
        (root / "munge.key").write_bytes(os.urandom(1024))
        (root / "munge.key").chmod(0o600)
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.munged = subprocess.Popen(
            ["munged", "--foreground", "--force", *(f"--{name}={root}/munge.{end}" for name, end in files.items())],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.until(lambda: (root / "munge.sock").exists(), 20)
        for name in self.names:
            self.boot(name)
        self.until(lambda: self("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"], 60)

    def on(self, name, *command):
        """A command line that runs on that host, which has its name, its network and the cluster's names."""
        inside = f'mount --bind {self.root}/hosts /etc/hosts && hostname {name} && exec "$@"'
        return [
            "nsenter", f"--net=/run/netns/{self.hosts[name].namespace}", "unshare", "--uts", "--mount",
            "--propagation", "private", "sh", "-c", inside, "sh", *command,
        ]  # fmt: skip

    def boot(self, name):
        with open(self.root / f"{name}.out", "ab") as out:
            daemon = "slurmctld" if name == "control" else "slurmd"
            subprocess.Popen(self.on(name, daemon, "-D"), env=self.environment, stdout=out, stderr=out)

    def __call__(self, *command, check=False):
        done = subprocess.run(
            self.on("control", *map(str, command)), env=self.environment, cwd=self.root, capture_output=True, text=True,
            timeout=60, check=check,
        )  # fmt: skip
        return done.stdout

    def submit(self, *arguments):
        return self("sbatch", "--parsable", "--cpus-per-task=1", *arguments, check=True).strip()

    def states(self, job):
        """Of a job, or of all in an array."""
        return self("squeue", "-h", "-r", "-t", "all", "-o", "%T", "-j", job).split()

    def until(self, condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            logs = sorted([*self.root.glob("*.log"), *self.root.glob("*.out")])
            assert time.monotonic() < deadline, "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)
            time.sleep(0.5)

    def stop(self):
        for host in self.hosts.values():
            host.kill()
        self.munged.send_signal(signal.SIGTERM)
        self.munged.wait(20)


@pytest.fixture
def slurm(hosts):
    for command in ("slurmctld", "slurmd", "munged"):
        if not shutil.which(command):
            pytest.skip(f"needs the command {command} (packages slurm-wlm and munge)")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # tmp_path is too long for a socket, and nobody's
        Path(folder).chmod(0o755)
        cluster = None
        try:
            cluster = Slurm(Path(folder), hosts)
            yield cluster
        finally:
            if cluster is not None:
                cluster.stop()


def script(slurm, name, **values):
    values["VENV"] = Path(sys.prefix)
    path = slurm.root / f"{name}.sbatch"
    path.write_text(templates.fill(name, [f"{key}={value}" for key, value in values.items()]))
    return path


def test_an_array_of_jobs_shards_a_data_set(slurm, videos, data, tmp_path):
    wanted = tmp_path / "sharded"
    path = script(slurm, "slurm-shard", LAYOUT="ucf101", SOURCE=videos, DATASET=wanted)
    array = slurm.submit("--array=0-2", path)
    genkd = Path(sys.executable).with_name("genkd")
    merge = slurm.submit(f"--dependency=afterok:{array}", "--wrap", f'"{genkd}" shard --merge "{wanted}"')
    slurm.until(lambda: slurm.states(merge) == ["COMPLETED"], 240)
    assert slurm.states(array) == ["COMPLETED"] * 3
    found, one_by_one = (set(made.table.column("key").to_pylist()) for made in (Dataset.open(wanted), data))
    assert found == one_by_one and len(found) == 50


@pytest.mark.timeout(900)
def test_training_goes_on_after_a_signal_and_after_the_death_of_a_node(slurm, data, tiny_yaml, tmp_path):
    tiny_yaml.write_text(tiny_yaml.read_text() + "epochs: 25\n")
    run = tmp_path / "run"
    path = script(slurm, "slurm-train", PHASE="representation", CONFIG=tiny_yaml, RUN=run, DATASET=data.path)
    job = slurm.submit("--gpus-per-node=1", "--time=60", path)
    log = slurm.root / f"genkd-train-{job}.log"

    def steps():
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [line["step"] for line in found if line["kind"] == "train"]

    def resumed(after):
        slurm.until(lambda: slurm.states(job) == ["PENDING"], 120)
        time.sleep(8)  # longer than cred_expire, before which the nodes take the job for the one that has ended
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        slurm.until(lambda: steps()[-1] > after, 180)

    slurm.until(lambda: steps() and steps()[-1] >= 8, 180)
    slurm("scancel", "--signal=TERM", job)  # to the tasks, as --signal=TERM@120 of the script asks for
    slurm.until(lambda: "state saved" in log.read_text(), 60)
    told = re.search(r"stopped at step (\d+) of 50, state saved", log.read_text())[1]
    resumed(int(told))
    assert f"continuing {run} from step {told} of 50" in log.read_text()

    slurm.hosts["node2"].plug(False)
    slurm.hosts["node2"].kill()
    slurm.until(lambda: "node2" in slurm("sinfo", "-h", "-N", "-t", "down", "-o", "%n"), 120)
    slurm.hosts["node2"].plug(True)
    slurm.boot("node2")
    resumed(steps()[-1])

    slurm.until(lambda: (run / "result.json").exists(), 240)
    slurm.until(lambda: slurm.states(job) == ["COMPLETED"], 60)
    assert steps()[-1] == 50 and set(steps()) == set(range(1, 51))
    assert slurm("scontrol", "show", "job", job).find("Restarts=2") > 0
