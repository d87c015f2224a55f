"""The soak test itself, for a minute; it is run for hours by hand."""

from genkd.benchmarks.soak import soak


def test_a_disturbed_run_ends_as_one_left_alone(tmp_path):
    result = soak(tmp_path / "soak", minutes=0.3, every=2, ranks=2, seed=0)
    assert [entry["fault"] for entry in result["faults"]][:2] == ["kill_a_rank", "preempt"]
    assert not any(result["samples"].values()) and not any(result["samples_undisturbed"].values())
    assert result["largest_difference_of_weights"] == 0 and not result["leftovers"]
