import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from genkd.cli import main
from genkd.errors import UserError
from genkd.evaluation import fusion, metrics, scores

CLASSES = ["a", "b", "c"]
KEYS = ["v0", "v1", "v2", "v3"]
LABELS = np.array([0, 1, 2, 0])
RGB = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.2, 0.3], [0.3, 0.4, 0.3]])
FLOW = np.array([[0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]])


def write(path, shares, logits=None, keys=KEYS, labels=LABELS, classes=CLASSES, modality="rgb", clips=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    result = metrics.score(np.arange(len(keys)), np.asarray(shares, float), np.asarray(labels))
    result = metrics.RecognitionResult(**{**vars(result), "logits": logits})
    about = {"classes": classes, "modality": modality, "split": "test", "clips": clips, "crops": 1, "compat": "none"}
    scores.write_scores(path, result, keys, about)
    return path


def test_names_are_shown_as_they_are_and_no_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q[" / "b]" / "scores.parquet", RGB)
    write(tmp_path / ":star:" / "scores.parquet", FLOW)
    done = CliRunner().invoke(main, ["fuse", "q[/b]", ":star:"])
    assert done.exit_code == 0 and "q[/b]" in done.stdout and ":star:" in done.stdout


def test_an_out_that_is_a_file_is_refused_and_an_interruption_told(tmp_path, monkeypatch):
    places = [str(write(tmp_path / name / "scores.parquet", RGB)) for name in "ab"]
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["fuse", *places, "--out", str(tmp_path / "file")])
    assert done.exit_code == 1 and f"{tmp_path / 'file'} is a file; name a folder" in done.stderr

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fusion, "fuse_files", interrupt)
    done = CliRunner().invoke(main, ["fuse", *places])
    assert done.exit_code == 130 and "other work starts over" in done.stderr


def test_the_weighted_mean_of_scores_by_hand():
    """0.6, 0.3, 0.1 and 3 times 0.2, 0.7, 0.1, over 4; scores that are sums over time count by their shares."""
    fused = fusion.fuse([7 * RGB, FLOW], [1, 3], "scores")
    np.testing.assert_allclose(fused[0], [0.3, 0.6, 0.1])
    np.testing.assert_allclose(fused.sum(1), 1)


def test_logits_are_averaged_over_time_then_weighted_by_hand():
    """Means over time (0, ln 2) and (ln 9, 0); weights 1 and 1: softmax of (ln 3, ln 2 / 2)."""
    one = np.array([[[0, 0], [0, 2 * np.log(2)]]])
    other = np.array([[[np.log(9), 0]]])
    wanted = np.array([3, 2**0.5]) / (3 + 2**0.5)
    np.testing.assert_allclose(fusion.fuse([one, other], [1, 1], "logits"), [wanted])
    np.testing.assert_allclose(fusion.fuse([one, other], [5, 5], "logits"), [wanted])


def test_the_references_rule_is_its_torch_code_transcribed():
    random = torch.Generator().manual_seed(0)
    rgb, flow = (3 * torch.randn(8, 11, 7, generator=random, dtype=torch.float64) for _ in range(2))
    for weight in (1.0, 1.5):
        wanted = torch.softmax(torch.softmax(rgb + weight * flow, dim=1).sum(2), dim=1)
        got = fusion.fuse([rgb.transpose(1, 2).numpy(), flow.transpose(1, 2).numpy()], [1.0, weight], "reference")
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-12)


def test_the_references_scores_follow_from_its_logits(reference):
    known = np.load(reference / "open" / "recognition_teacher_cells.npz")
    logits = known["logits_fg_b2"].transpose(0, 2, 1)
    got = fusion.fuse([logits, np.zeros_like(logits)], [1, 0], "reference")
    wanted = torch.softmax(torch.from_numpy(known["scores_b2"]).double(), 1).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("streams", "weights", "rule", "words"),
    [
        ([RGB, FLOW], [1], "scores", "1 weights for 2 streams"),
        ([RGB, FLOW], [1, -1], "scores", "0 or more"),
        ([RGB, FLOW], [0, 0], "logits", "not all 0"),
        ([RGB, FLOW], [1, np.nan], "scores", "0 or more"),
        ([RGB, FLOW], [1, 1], "mean", "unknown rule 'mean'"),
        ([RGB, FLOW[:2]], [1, 1], "scores", r"\(4, 3\) and \(2, 3\)"),
        ([RGB, FLOW], [1, 1], "reference", "cannot be fused"),
        ([np.zeros((1, 7, 3)), np.zeros((1, 4, 3))], [1, 1], "reference", r"\(1, 7, 3\) and \(1, 4, 3\)"),
    ],
)
def test_what_cannot_be_fused_is_refused(streams, weights, rule, words):
    with pytest.raises(UserError, match=words):
        fusion.fuse(streams, weights, rule)


def test_files_are_matched_by_key_and_the_fusion_is_compared_with_each_stream(tmp_path):
    """Right alone: RGB v0, v1; flow v1, v2, v3. Their mean (.4 .5 .1) (.15 .65 .2) (.3 .15 .55) (.45 .3 .25): the same
    three as flow. Weights 3 and 1: (.5 .4 .1) (.175 .575 .25) (.4 .175 .425) (.375 .35 .275): all four."""
    order = np.array([2, 0, 3, 1])
    write(tmp_path / "rgb" / "scores.parquet", RGB)
    write(tmp_path / "flow" / "scores.parquet", FLOW[order], None, [KEYS[n] for n in order], LABELS[order],
          modality="flow")  # fmt: skip
    places = [tmp_path / "rgb", tmp_path / "flow" / "scores.parquet"]
    values = fusion.fuse_files(places, out=tmp_path / "out")
    assert [stream["top1"] for stream in values["streams"]] == [0.5, 0.75]
    assert (values["top1"], values["difference"], values["standard_error"]) == (0.75, 0, 0)
    assert values["best_single"] == str(places[1]) and values["modality"] == "rgb+flow"
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == values
    written = scores.read_scores(tmp_path / "out" / "scores.parquet")
    np.testing.assert_allclose(written.scores, (RGB + FLOW) / 2)
    assert written.keys == KEYS and written.logits is None and written.about["split"] == "test"
    values = fusion.fuse_files(places, [3, 1])
    assert values["top1"] == 1.0
    # Differences from flow 1, 0, 0, 0: mean 1/4, sd 1/2, over sqrt(4).
    assert (values["difference"], values["standard_error"]) == (0.25, 0.25)
    again = fusion.fuse_files([tmp_path / "out", *places], [2, 1, 0])
    assert again["top1"] == 1.0, "2 (RGB + FLOW) / 2 + RGB: the same as weights 2 and 1"


def test_logits_come_through_files_and_are_fused_again(tmp_path, caplog):
    random = np.random.default_rng(0)
    logits = [random.normal(size=(4, 7, 3)).astype(np.float32) for _ in range(2)]
    for name, own in zip("ab", logits, strict=True):
        write(tmp_path / name / "scores.parquet", RGB, own, clips=1)
    np.testing.assert_array_equal(scores.read_scores(tmp_path / "a" / "scores.parquet").logits, logits[0])
    places = [tmp_path / "a", tmp_path / "b"]
    for rule in ("logits", "reference"):
        fusion.fuse_files(places, [1, 2], rule, tmp_path / rule)
        got = scores.read_scores(tmp_path / rule / "scores.parquet")
        np.testing.assert_allclose(got.scores, fusion.fuse(logits, [1, 2], rule))
        steps = {"logits": 1, "reference": 7}[rule]
        assert got.logits.shape == (4, steps, 3)
        fused = np.array(
            json.loads(json.dumps(fusion.fuse_files([tmp_path / rule, places[0]], rule=rule)))["confusion"]
        )
        direct = fusion.fuse([got.logits, logits[0]], [1, 1], rule).argmax(1)
        assert [fused[label, guess] > 0 for label, guess in zip(LABELS, direct, strict=True)] == [True] * 4
    assert not caplog.records
    write(tmp_path / "views" / "scores.parquet", FLOW, logits[1], clips=10)
    with caplog.at_level(logging.INFO, "genkd"):
        fusion.fuse_files([places[0], tmp_path / "views"], rule="reference")
    assert "exact for one view" in caplog.text


def test_streams_that_do_not_belong_together_are_refused(tmp_path):
    first = write(tmp_path / "first.parquet", RGB)

    def refused(words, rule="scores", **changes):
        other = write(tmp_path / "other.parquet", **{"shares": FLOW, **changes})
        with pytest.raises(UserError, match=words):
            fusion.fuse_files([first, other], rule=rule)

    refused("lacks 1 of the 4 videos of .*first.parquet, the first is v3", shares=FLOW[:3], keys=KEYS[:3],
            labels=LABELS[:3])  # fmt: skip
    more = {"shares": [*FLOW, FLOW[0]], "keys": [*KEYS, "v9"], "labels": [*LABELS, 0]}
    refused("first.parquet lacks 1 of the 5 videos of .*other.parquet, the first is v9", **more)
    refused("the same classes in another order", classes=["b", "a", "c"])
    refused("other classes", classes=["a", "b", "d"])
    refused("2 of 4 videos have another label .*first is v1 with 2 and 1", labels=[0, 2, 1, 0])
    refused("has the video v1 twice", keys=["v0", "v1", "v1", "v3"])
    refused("holds no logits", rule="logits")
    write(tmp_path / "first.parquet", RGB, np.zeros((4, 7, 3), np.float32))
    refused("has 4 of them and .* 7", rule="reference", logits=np.zeros((4, 4, 3), np.float32))
    nan = np.full((4, 7, 3), np.nan, np.float32)
    refused("4 of 4 videos .* logits that are nan .* v0", rule="logits", logits=nan)
    with pytest.raises(UserError, match="two streams or more"):
        fusion.fuse_files([first])
    with pytest.raises(UserError, match="would overwrite"):
        fusion.fuse_files([write(tmp_path / "own" / "scores.parquet", RGB), first], out=tmp_path / "own")


def test_files_of_another_kind_are_refused(tmp_path):
    first = write(tmp_path / "first.parquet", RGB)

    def refused(words):
        with pytest.raises(UserError, match=words):
            fusion.fuse_files([first, tmp_path / "bad.parquet"])

    refused("holds no scores.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    refused("no readable Parquet file")
    table = pq.read_table(first)
    pq.write_table(table.drop_columns(["scores"]), tmp_path / "bad.parquet")
    refused("no column 'scores'")
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "bad.parquet")
    refused("does not say which classes")
    pq.write_table(table.replace_schema_metadata({"genkd": json.dumps({"classes": ["a", "b"]})}),
                   tmp_path / "bad.parquet")  # fmt: skip
    refused("contradicts itself")


@pytest.fixture
def two_streams(tmp_path):
    """Two splits of two streams, as `genkd evaluate recognition --out` lays them out."""
    for name, first in (("rgb", RGB), ("flow", FLOW)):
        for number, shares in enumerate((first, np.roll(first, 1, 0)), 1):
            folder = tmp_path / name / str(number)
            write(folder / "scores.parquet", shares, keys=[f"{number}/{key}" for key in KEYS])
        (tmp_path / name / "results.json").write_text(json.dumps({"splits": [{}, {}]}))
    return tmp_path


def test_several_splits_are_fused_one_by_one(two_streams):
    """Split 1 as above. In split 2 each video has the scores of the one before it, the first those of the last: the
    fusion says 0, 1, 1, 2 where 0, 1, 2, 0 is right, RGB 1, 0, 1, 0 and flow 0, 1, 1, 2."""
    places = [two_streams / "rgb", two_streams / "flow"]
    values = fusion.fuse_files(places, out=two_streams / "out", search=True)
    assert [split["top1"] for split in values["splits"]] == [0.75, 0.5]
    assert values["mean"]["top1"] == 0.625 and values["std"]["top1"] == pytest.approx(0.25 / 2**0.5)
    assert [stream["mean"]["top1"] for stream in values["streams"]] == [0.375, 0.625]
    assert values["best_single"] == str(places[1]) and values["difference"] == {"mean": 0.0, "std": 0.0}
    assert json.loads((two_streams / "out" / "results.json").read_text()) == values
    found = values["search"]
    top1 = dict(zip(found["weights"], found["top1"], strict=True))
    assert (min(top1), max(top1)) == (0.25, 4.0)
    # Half of flow's weight: all four right in split 1 (.7 .65 .15, ..., .6 .5 .4), only the first in split 2.
    assert top1[1.0] == 0.625 and top1[0.5] == (1.0 + 0.25) / 2
    assert found["best_top1"] == max(found["top1"]) and "tuned on these very videos" in found["note"]
    again = fusion.fuse_files([two_streams / "out", places[0]], [2, 0])
    assert [split["top1"] for split in again["splits"]] == [0.75, 0.5]


def test_unfinished_or_mixed_results_are_refused(two_streams):
    places = [two_streams / "rgb", two_streams / "flow"]
    with pytest.raises(UserError, match=r"rgb has 2, .*1 has 1"):
        fusion.fuse_files([places[0], places[1] / "1"])
    with pytest.raises(UserError, match="holds the results of several splits"):
        fusion.fuse_files([place / "1" for place in places], out=places[0])
    with pytest.raises(UserError, match="would overwrite"):
        fusion.fuse_files(places, out=places[0])
    (places[1] / "results.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        fusion.fuse_files(places)


def test_the_command_prints_tables_or_json_and_says_that_a_search_is_tuned(two_streams):
    streams = [str(two_streams / "rgb"), str(two_streams / "flow")]
    run = CliRunner().invoke(main, ["fuse", *streams, "--search"])
    assert run.exit_code == 0 and "62.50 ± 17.68 %" in run.stdout and "tuned on these very videos" in run.stdout
    one = [f"{stream}/1" for stream in streams]
    values = json.loads(CliRunner().invoke(main, ["fuse", *one, "--weights", "3,1", "--json"]).stdout)
    assert values["top1"] == 1.0
    run = CliRunner().invoke(main, ["fuse", *one])
    assert "paired standard error" in run.stdout and "75.00 %" in run.stdout
    for arguments, words in (
        (["--weights", "1,x"], "not numbers with commas"),
        (["--weights", "1"], "1 weights for 2 streams"),
        (["--rule", "logits"], "holds no logits"),
        ([streams[0] + "/2", "--search"], "the second of two streams, not of 3"),
    ):
        run = CliRunner().invoke(main, ["fuse", *one, *arguments])
        assert run.exit_code == 1 and words in run.output and "Traceback" not in run.output
