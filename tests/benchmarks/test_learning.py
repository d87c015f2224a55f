import math

import pytest

from genkd.benchmarks import learning
from genkd.benchmarks.learning import Job


def test_every_run_comes_after_the_one_that_it_needs_and_only_once():
    seen = []
    for job in learning.jobs(with_fights=True):
        assert job.needs is None or job.needs in seen
        seen.append(job)
    assert len(set(seen)) == len(seen) == len({job.folder for job in seen})
    main = [job for job in seen if job.data == "fights-flow" and job.name in learning.MAIN]
    assert {(job.fold, job.seed) for job in main} == {(1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (4, 0), (5, 0)}
    assert {job.data for job in learning.jobs(with_fights=False)} == {"synth-large", "synth"}
    assert Job("synth", 1, 2, "representation").needs == Job("synth-large", 1, 0, "representation")
    assert Job("synth", 1, 0, "generative, compat=reference").needs == Job("synth", 1, 0, "representation")
    assert Job("synth", 1, 0, "none, strided stem").needs is None


def test_the_summary_by_hand():
    """Folds 1, 2 with seed 0: 0.5 and 0.7; fold 1 with seeds 0, 1: 0.5 and 0.6."""
    rows = [
        {"data": "d", "run": "r", "fold": fold, "seed": seed, "top1": top1, "parameters": 5}
        for fold, seed, top1 in ((1, 0, 0.5), (2, 0, 0.7), (1, 1, 0.6))
    ]
    (found,) = learning.summary(rows)
    assert found["folds"]["mean"] == pytest.approx(0.6) and found["folds"]["std"] == pytest.approx(math.sqrt(0.02))
    assert found["seeds"]["mean"] == pytest.approx(0.55) and found["seeds"]["error"] == pytest.approx(0.05)
    assert (found["data"], found["run"], found["parameters"]) == ("d", "r", 5)
