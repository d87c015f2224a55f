import json

import pytest

from genkd.benchmarks import run_benchmark
from genkd.benchmarks.common import compare


def test_contenders_take_turns_and_are_compared_with_the_first():
    calls = []

    def contender(name, rates):
        def measure():
            calls.append(name)
            return rates.pop(0), {"note": name}

        return measure

    result = compare("x", "things/s", {"a": contender("a", [1.0, 2, 3]), "b": contender("b", [4.0, 6, 5])}, 3, {})
    assert calls == ["a", "b"] * 3
    assert [(row["median"], row["ratio"]) for row in result["rows"]] == [(2, 1), (5, 2.5)]
    assert result["machine"]["cores"] >= 1 and result["versions"]["torch"]
    json.dumps(result)


@pytest.mark.slow
def test_train_benchmark():
    result = run_benchmark("train", None, 1)
    assert len(result["rows"]) == 4
