import copy
import gzip
import json

import numpy as np
import pytest
from click.testing import CliRunner

from genkd.cli import main
from genkd.errors import UserError
from genkd.evaluation import detection
from genkd.evaluation.detection import average_recall, error_breakdown, mean_average_precision, parse_tious
from genkd.evaluation.ground_truth import read_ground_truth


def truth(**videos):
    """{video: [(label, start, end), ...]} as ground-truth JSON of subset test."""
    entry = {"video": [], **videos}
    return {
        "database": {
            name: {"subset": "test", "annotations": [{"label": label, "segment": list(times)} for label, *times in own]}
            for name, own in entry.items()
        }
    }


def predicted(**videos):
    """{video: [(label, start, end, score), ...]} as ActivityNet's results."""
    return {
        "results": {
            name: [{"label": label, "segment": [start, end], "score": score} for label, start, end, score in own]
            for name, own in videos.items()
        }
    }


TRUTH = truth(a=[("jump", "0", "10"), ("jump", "20", "30"), ("run", "40.0", "50.5")], b=[("run", 0, 4)])
FOUND = predicted(
    a=[
        ("jump", 0, 10, 0.9),  # finds the first
        ("jump", 1, 10, 0.8),  # a second time
        ("jump", 21, 28, 0.7),  # tIoU 0.7 with the second
        ("run", 100, 110, 0.95),
    ],
    b=[("run", 0, 4, 0.5)],
)


@pytest.mark.parametrize("tious", ["01_05", "03_07"])
def test_equals_activitynets_evaluator(reference, real_data, tious):
    arrays = np.load(reference / "open/detection_map.npz")
    levels = parse_tious({"01_05": "0.1:0.5:0.1", "03_07": "0.3:0.7:0.1"}[tious])
    assert levels.tolist() == arrays[f"tiou_{tious}"].tolist()
    result = mean_average_precision(
        real_data / "splits/thumos14/thumos_gt.json", reference / "open/detection_predictions.json.gz", levels, "test"
    )
    np.testing.assert_allclose(result.ap, arrays[f"ap_{tious}"], atol=1e-7)
    np.testing.assert_allclose(result.map, arrays[f"map_{tious}"], atol=1e-7)
    assert result.average_map == pytest.approx(arrays[f"average_map_{tious}"], abs=1e-7)
    assert list(result.classes) == arrays["classes"].tolist()
    assert result.instances.sum() == arrays["n_ground_truth"]
    assert result.predictions.sum() == result.counts.used == arrays["n_predictions_used"]


def test_average_precision_by_hand():
    """jump: found, false, found: at recall 1/2 precision 1, at 1 precision 2/3. run: false, found: 1/2 of the half."""
    result = mean_average_precision(TRUTH, FOUND, [0.5, 0.7, 0.75])
    assert result.classes == ("jump", "run") and result.instances.tolist() == [2, 2]
    np.testing.assert_allclose(result.ap, [[5 / 6, 1 / 4], [5 / 6, 1 / 4], [1 / 2, 1 / 4]])
    np.testing.assert_allclose(result.map, [13 / 24, 13 / 24, 3 / 8])
    assert result.average_map == pytest.approx((13 / 24 + 13 / 24 + 3 / 8) / 3)
    values = result.to_json()
    assert values["per_class"]["run"] == {"instances": 2, "predictions": 2, "ap": [0.25] * 3}
    json.dumps(values)


def test_each_takes_the_free_instance_that_it_overlaps_most():
    """(0, 10) has tIoU 8/10 with the first and 6/10 with the second; (0, 9) has 8/9, and 5/10 with what is left."""
    ground_truth = truth(a=[("x", 0, 8), ("x", 4, 10)])
    both = predicted(a=[("x", 0, 10, 0.9), ("x", 0, 9, 0.5)])
    overlaps = {tiou: mean_average_precision(ground_truth, both, [tiou]).ap[0, 0] for tiou in (0.5, 0.6, 0.7, 0.85)}
    assert overlaps == {0.5: 1.0, 0.6: 0.5, 0.7: 0.5, 0.85: pytest.approx(0.25)}


def test_of_equal_scores_and_equal_overlaps_the_last_comes_first():
    ground_truth = truth(a=[("x", 0, 10)])
    tied = predicted(a=[("x", 50, 60, 0.5), ("x", 0, 10, 0.5)])
    assert mean_average_precision(ground_truth, tied, [0.5]).ap[0, 0] == 1
    # Both instances have 1/2 with the first prediction; taking the second leaves the first to the other prediction.
    ground_truth = truth(a=[("x", 0, 5), ("x", 5, 10)])
    tied = predicted(a=[("x", 0, 10, 0.9), ("x", 0, 5, 0.5)])
    assert mean_average_precision(ground_truth, tied, [0.5]).ap[0, 0] == 1


def test_what_is_ignored_and_what_is_false():
    ground_truth = truth(a=[("x", 0, 10), ("y", 0, 10), ("y", 9, 3)], empty=[])
    ground_truth["database"]["other"] = {"subset": "train", "annotations": [{"label": "z", "segment": [0, 1]}]}
    found = predicted(
        a=[("x", 10, 0, 0.9), ("x", 0, 10, 0.5), ("z", 0, 10, 0.9)],
        other=[("x", 0, 10, 0.99)] * 3,
        nowhere=[("z", 0, 10, 0.99)],
    )
    result = mean_average_precision(ground_truth, found, [0.5])
    assert result.classes == ("x", "y") and result.ap.tolist() == [[0.5, 0.0]]  # a reversed one is false, y has none
    assert result.counts._asdict() == {
        "total": 7, "used": 2, "unknown_video": 4, "unknown_label": 1, "reversed": 1, "reversed_instances": 1,
    }  # fmt: skip
    found = predicted(a=[("x", 0, 10, 0.5)], empty=[("x", 0, 10, 0.9)])
    assert mean_average_precision(ground_truth, found, [0.5]).ap[0, 0] == 0.5  # false where there is nothing to find


def test_no_predictions_negative_times_and_no_length():
    assert mean_average_precision(TRUTH, {"results": {}}).ap.tolist() == [[0.0] * 2] * 5
    assert average_recall(TRUTH, {"results": {"a": []}}).average.tolist() == [0.0] * 4
    assert np.isnan(error_breakdown(TRUTH, {"results": {}}).overall).all()
    ground_truth = truth(a=[("x", -5, 5)], b=[("y", 3, 3)])
    found = predicted(a=[("x", -5, 5, 0.5)], b=[("y", 3, 3, 0.5)])
    assert mean_average_precision(ground_truth, found, [0.5]).ap.tolist() == [[1.0, 0.0]]


def test_average_recall_by_hand():
    """Of 4 proposals in a and 2 in b, one a video on average is int(4/3) = 1 of a and int(2/3) = 0 of b."""
    ground_truth = truth(a=[("x", 0, 10), ("y", 0, 9), ("x", 20, 30)], b=[("x", 0, 4)])
    found = predicted(
        a=[("x", 20, 30, 0.2), ("x", 50, 60, 0.1), ("other", 0, 10, 0.9), ("x", 22, 30, 0.8)],
        b=[("y", 7, 9, 0.9), ("y", 0, 4, 0.5)],
        video=[("x", 0, 1, 0.5)] * 50,  # nothing to find, so it does not count
    )
    result = average_recall(ground_truth, found, [0.7, 0.95], [3, 1, 2])
    np.testing.assert_allclose(result.recall, [[4 / 4, 2 / 4, 3 / 4], [3 / 4, 1 / 4, 1 / 4]])
    np.testing.assert_allclose(result.average, [7 / 8, 3 / 8, 1 / 2])
    assert result.numbers.tolist() == [3, 1, 2]
    assert average_recall(ground_truth, found, [0.7], [10**6]).recall.tolist() == [[1.0]]


def test_every_type_of_error_by_hand():
    ground_truth = truth(a=[("x", 0, 10), ("y", 20, 30)], b=[("y", 0, 10)])
    found = predicted(
        a=[
            ("x", 0, 10, 0.9),  # true positive
            ("x", 0, 9, 0.8),  # double detection
            ("x", 20, 29, 0.7),  # wrong label
            ("x", 0, 4, 0.6),  # localization: tIoU 0.4
            ("x", 20, 23, 0.5),  # confusion: 0.3
            ("x", 20, 20.5, 0.4),  # background: 0.05
        ],
        video=[("x", 0, 10, 0.3), ("x", 0, 10, 0.2)],  # background: nothing there at all
    )
    result = error_breakdown(ground_truth, found, [0.5])
    assert result.numbers.shape == (1, 10, 6)
    assert result.numbers[0, :8].tolist() == [*np.eye(6, dtype=int).tolist(), [0] * 5 + [1], [0] * 5 + [1]]
    assert result.overall.tolist() == [1 / 8] * 5 + [3 / 8]
    assert np.isnan(result.shares[8:]).all() and (result.shares[:8].sum(1) == 1).all()
    assert result.average_map_n == 0.5 and result.gain.tolist() == [0.0] * 6  # nothing stands before the hit
    assert error_breakdown(ground_truth, found, [0.5], factor=3).numbers.sum((0, 1)).tolist() == [1, 1, 1, 0, 0, 0]
    # At 0.3 what was confused has a wrong label, and what was badly placed is a second detection.
    assert error_breakdown(ground_truth, found, [0.3, 0.5]).numbers[0].sum(0).tolist() == [1, 2, 2, 0, 0, 3]
    values = result.to_json()
    assert values["overall"]["background"] == 3 / 8 and values["shares"][9]["background"] is None
    json.dumps(values, allow_nan=False)


def test_of_instances_at_one_place_the_first_decides_the_type_of_error():
    """As each cliff dive of THUMOS14 is also a dive."""
    for labels, wanted in ((("y", "x"), [1, 0, 1, 0, 0, 0]), (("x", "y"), [1, 1, 0, 0, 0, 0])):
        ground_truth = truth(a=[(label, 0, 10) for label in labels])
        result = error_breakdown(ground_truth, predicted(a=[("x", 0, 10, 0.9), ("x", 0, 9, 0.8)]), [0.5])
        assert result.numbers.sum((0, 1)).tolist() == wanted


def test_what_removing_an_error_gains_by_hand():
    """x: background, then found, of 1; y: nothing, of 3. N = 2: precision 1*2/(1*2 + 1) = 2/3, and 1 without."""
    ground_truth = truth(a=[("x", 0, 10), ("y", 20, 30), ("y", 40, 50), ("y", 60, 70)])
    result = error_breakdown(ground_truth, predicted(a=[("x", 80, 90, 0.9), ("x", 0, 10, 0.8)]), [0.5])
    assert result.average_map_n == pytest.approx((2 / 3) / 2)
    np.testing.assert_allclose(result.gain, [0, 0, 0, 0, 0, 1 / 2 - 1 / 3])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0.5", [0.5]), ("0.3,0.75", [0.3, 0.75]), ("0.1:0.5:0.1", [0.1, 0.2, 0.3, 0.4, 0.5]),
     ("0.5:0.95:0.05", [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]), ("0.1:0.4:0.2", [0.1, 0.3])],
)  # fmt: skip
def test_tious(text, wanted):
    assert parse_tious(text).tolist() == wanted


@pytest.mark.parametrize("text", ["", "half", "0", "0.5:", "0.5:0.1:0.1", "0.1:0.5:0", "0.1:0.5:-0.1", "1.5", "nan",
                                  "0.1:0.5", "0.1:nan:0.1"])  # fmt: skip
def test_bad_tious(text):
    with pytest.raises(UserError, match=r"give thresholds above 0 and up to 1, such as"):
        parse_tious(text)


def changed(value, *path, to):
    """A copy with one thing replaced, or removed where `to` is ..."""
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return value


PREDICTION = ("results", "a", 1)
ANNOTATION = ("database", "a", "annotations", 1)


@pytest.mark.parametrize(
    ("path", "to", "words"),
    [
        (("results",), ..., 'no "results" by video'),
        (("results", "a"), 5, "a has 5 where a list of segments is due"),
        (PREDICTION, "x", "prediction 2 of a is 'x', not"),
        ((*PREDICTION, "score"), ..., "prediction 2 of a has no 'score'"),
        ((*PREDICTION, "score"), float("nan"), "prediction 2 of a has the score nan; scores are finite numbers"),
        ((*PREDICTION, "score"), float("inf"), "has the score inf"),
        ((*PREDICTION, "score"), "high", "has the score 'high'"),
        ((*PREDICTION, "score"), None, "has the score None"),
        ((*PREDICTION, "score"), 10**400, "has the score 1000"),
        ((*PREDICTION, "label"), 3, "has the label 3; labels are text"),
        ((*PREDICTION, "label"), ["x"], r"has the label \['x'\]; labels are text"),
        ((*PREDICTION, "segment"), [1], r"has the segment \[1\]; segments are two finite numbers, start and end in"),
        ((*PREDICTION, "segment"), [1, 2, 3], r"has the segment \[1, 2, 3\]"),
        ((*PREDICTION, "segment"), [float("-inf"), 2], r"has the segment \[-inf, 2\]"),
        ((*PREDICTION, "segment"), "12", "has the segment '12'"),
        ((*PREDICTION, "segment"), ["0", "x"], r"has the segment \['0', 'x'\]"),
    ],
)
def test_bad_predictions_are_named(path, to, words):
    with pytest.raises(UserError, match=f"the predictions: .*{words}"):
        mean_average_precision(TRUTH, changed(FOUND, *path, to=to))


@pytest.mark.parametrize(
    ("path", "to", "words"),
    [
        (("database",), ..., 'no "database" of videos'),
        (("database", "a", "subset"), ..., 'a has no "subset"'),
        (("database", "a", "annotations"), None, 'a has no list of "annotations"'),
        ((*ANNOTATION, "label"), ..., "annotation 2 of a has no label that is text"),
        ((*ANNOTATION, "segment"), ..., "annotation 2 of a has the segment None"),
        ((*ANNOTATION, "segment"), ["0", "nan"], r"annotation 2 of a has the segment \['0', 'nan'\]"),
        (("database",), {}, "there is no subset 'test'; there are no videos at all"),
        (("database",), truth()["database"], "the 1 videos of subset 'test' have no annotations to compare with"),
    ],
)
def test_bad_ground_truth_is_named(path, to, words):
    with pytest.raises(UserError, match=f"the ground truth: {words}"):
        mean_average_precision(changed(TRUTH, *path, to=to), FOUND)


def test_other_arguments_that_are_refused():
    with pytest.raises(UserError, match=r"no subset 'val'; there are test \(3 videos\)"):
        mean_average_precision(TRUTH, FOUND, subset="val")
    with pytest.raises(UserError, match="is of subset 'test', not 'val'"):
        mean_average_precision(read_ground_truth(TRUTH, "test"), FOUND, subset="val")
    for nothing in ([], None, {"results": []}):
        with pytest.raises(UserError, match='the predictions: no "results" by video'):
            mean_average_precision(TRUTH, nothing)
    with pytest.raises(UserError, match="a tIoU threshold of 0:"):
        mean_average_precision(TRUTH, FOUND, [0.5, 0])
    with pytest.raises(UserError, match=r"1 or more proposals a video, not \[0\]"):
        average_recall(TRUTH, FOUND, numbers=[0])
    with pytest.raises(UserError, match="top 1G predictions or more, not 0G"):
        error_breakdown(TRUTH, FOUND, factor=0)
    assert detection.soft_nms(np.array([[0.0, 1, 1]])).shape == (1, 3)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    with gzip.open(tmp_path / "found.json.gz", "wt") as file:
        json.dump(predicted(a=[*((e["label"], *e["segment"], e["score"]) for e in FOUND["results"]["a"]),
                               ("fly", 0, 1, 0.1)]), file)  # fmt: skip
    return tmp_path


def invoke(folder, *arguments):
    command = ["evaluate", "detection", str(folder / "found.json.gz"), "--ground-truth", str(folder / "truth.json")]
    return CliRunner().invoke(main, [*command, *map(str, arguments)])


def test_command_line_shows_tables(files):
    done = invoke(files, "--tiou", "0.5:0.7:0.2", "--per-class", "--recall", "1,10", "--errors")
    assert done.exit_code == 0, done.output
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
            for line in done.stdout.splitlines() if line.startswith("│")}  # fmt: skip
    assert rows["mAP"] == ["41.67", "41.67", "41.67"]  # (5/6 + 0) / 2
    assert rows["jump"] == ["2", "3", "83.33", "83.33", "83.33"]
    assert rows["AR@10"] == ["50.00"] * 3
    # Of jump the first 2 of 3 and of run the only one; the others are jump's third.
    assert rows["double detection"][:3] == ["33.33", "0.00", "25.00"]
    assert rows["background"][:3] == ["33.33", "0.00", "25.00"] and rows["true positive"][1] == "100.00"
    assert rows["ignored: of labels that no instance has"] == ["1"]


def test_command_line_writes_json(files):
    done = invoke(files, "--out", files / "new/result.json", "--json", "--tiou", "0.5", "--recall", "10")
    values = json.loads(done.stdout)
    assert values == json.loads((files / "new/result.json").read_text())
    assert values["map"] == [pytest.approx(5 / 12)] and values["counts"]["unknown_label"] == 1
    assert values["average_recall"] == {"numbers": [10], "recall": [[0.5]], "average": [0.5]} and "errors" not in values


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--subset", "validation"], "no subset 'validation'; there are test (3 videos)"),
        (["--tiou", "half"], "tIoU thresholds 'half': give thresholds"),
        (["--recall", "1,none"], "--recall '1,none' is not numbers of proposals with commas"),
        (["--recall", "0"], "--recall '0' is not numbers"),
        (["--ground-truth", "nowhere.json"], "there is no file nowhere.json"),
        (["--ground-truth", "."], "Is a directory while reading ."),
    ],
)
def test_command_line_errors_are_one_sentence(files, arguments, words):
    done = invoke(files, *arguments)
    assert done.exit_code == 1 and words in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "is not JSON"), (b'{"results": ', "is not JSON"), (b"\x1f\x8b\x08\x00broken", "cannot be unpacked"),
     (b"\xff\xfe{", "is not JSON"), (b"[" * 100_000, "is not JSON"), (b"[]", 'no "results" by video'),
     (b'{"results": {"a": [{"label": "x", "score": NaN, "segment": [0, 1]}]}}', "prediction 1 of a has the score nan")],
)  # fmt: skip
def test_damaged_files_are_named(files, data, words):
    (files / "found.json.gz").write_bytes(data)
    done = invoke(files)
    assert done.exit_code == 1 and "found.json.gz" in done.output and "Traceback" not in done.output
    assert words in " ".join(done.output.split())
