"""The soak test itself, for a moment; it is run for hours by hand."""

import functools
from types import SimpleNamespace

import pytest

from genkd.benchmarks import soak
from genkd.tests.support import processes


def assert_as_one_left_alone(result):
    assert [entry["fault"] for entry in result["faults"]][:2] == ["kill_a_rank", "preempt"]
    assert all(entry["told"] for entry in result["faults"])
    assert not any(result["samples"].values()) and not any(result["samples_undisturbed"].values())
    assert result["largest_difference_of_weights"] == 0 and not result["leftovers"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disturbed_run_ends_as_one_left_alone(tmp_path):
    assert_as_one_left_alone(soak.soak(tmp_path / "soak", minutes=0.3, every=2, ranks=2, seed=0))


def test_two_faults_leave_no_trace(tmp_path, monkeypatch):
    """With torchrun and ranks that are forked from a process that has imported everything."""

    def start(command, stdout, stderr, env, start_new_session):
        return processes.start(*command[1:], env=env, output=tmp_path / "soak" / stdout.name, start_new_session=True)

    monkeypatch.setattr(soak, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(soak.Run, "rank_processes", lambda run: processes.children(run.process.pid))
    monkeypatch.setattr(soak, "LOOK", 0.1)
    quick = soak.CONFIG.replace("width: 0.25", "width: 0.0625").replace("checkpoint_every: 10", "checkpoint_every: 3")
    monkeypatch.setattr(soak, "CONFIG", quick)
    began = []  # of each fault

    def counted(fault):
        return functools.wraps(fault)(lambda *arguments: began.append(fault) or fault(*arguments))

    monkeypatch.setattr(soak, "FAULTS", tuple(map(counted, soak.FAULTS)))
    monkeypatch.setattr(soak.Run, "ending", property(lambda run: len(began) == 2 or run.steps + 1 >= run.last - 4))
    assert_as_one_left_alone(soak.soak(tmp_path / "soak", minutes=0.08, every=0.1, ranks=2, seed=0))
