import contextlib
import hashlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from genkd.cli import main
from genkd.configs.load import load
from genkd.configs.schema import ModelConfig
from genkd.errors import UserError
from genkd.evaluation import export as exporting
from genkd.evaluation import formats, model_card, recognition
from genkd.models.checkpoints import ModelCard, load_recognizer, save_weights
from genkd.tests.support import processes
from genkd.trainers.loop import train

ALL = ("safetensors", "torch-export", "onnx")
needs_onnx = pytest.mark.skipif(
    any(__import__("importlib").util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason='needs onnx, onnxscript and onnxruntime: pip install "genkd[export]"',
)


def weights_in(folder, *, width=0.25, classes=("a", "b|c", "d`e"), clip_length=16, size=32, seed=0, **values):
    """A network with weights that tell clips apart: batch norm has seen some, the classifier is not near zero."""
    values = {"attention": True, "compat": "none", "data": {}, **values}
    model = {"temporal": values.pop("temporal", "top_heavy"), "stem": values.pop("stem", "strided")}
    card = ModelCard(ModelConfig(width=width, bn_momentum=0.5, **model), classes, clip_length, size, **values)
    torch.manual_seed(seed)
    network = card.build().train()
    torch.nn.init.normal_(network.logits.weight, std=0.3)
    with torch.no_grad():
        for _ in range(4):
            network(torch.randn(4, card.in_channels, clip_length, size, size))
    save_weights(folder, card, {"recognizer": network})
    return folder


@pytest.fixture(scope="module")
def run(shard_sets, tmp_path_factory):
    """A student trained for a moment and evaluated. Its clips are odd: the last frame's mean is of itself alone."""
    data = shard_sets("vp9")
    out = tmp_path_factory.mktemp("runs")
    small = ["data.clip_length=15", "data.size=33", f"data.dataset={data.path}", "epochs=1", "batch_size=5"]
    train(load("demo", "representation", small), out / "rep", lambda text: None)
    train(load("demo", "distill", [*small, f"teacher={out / 'rep'}"]), out / "student", lambda text: None)
    recognition.evaluate_weights(out / "student", data.path, out / "student" / "evaluation", clips=2, crops=3)
    return out / "student"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """All formats of that run, and what export() returned."""
    out = tmp_path_factory.mktemp("exports") / "student"
    return out, exporting.export(run, out, ALL)


@needs_onnx
@pytest.mark.parametrize("batch", [1, 3])
def test_every_format_gives_the_networks_outputs(run, exported, batch):
    import onnxruntime

    out, _ = exported
    clips = torch.randn(batch, 3, 15, 33, 33, generator=torch.Generator().manual_seed(batch))
    model, _ = load_recognizer(run)
    with torch.inference_mode():
        want = model(clips)
        again = load_recognizer(out)[0](clips)
        program = torch.export.load(out / "recognizer.pt2").module()(clips)
    session = onnxruntime.InferenceSession(out / "recognizer.onnx", providers=["CPUExecutionProvider"])
    arrays = session.run(["logits", "scores", "attention"], {"clips": clips.numpy()})
    assert [output.shape for output in session.get_outputs()] == [["batch", 10, 1], ["batch", 10], ["batch", 256, 2]]
    for number, name in enumerate(("logits", "scores", "attention")):
        exact = getattr(want, name)
        assert exact.std() > 0 and torch.equal(getattr(again, name), exact)
        torch.testing.assert_close(program[name], exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
        np.testing.assert_allclose(arrays[number], exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@needs_onnx
def test_the_formats_describe_themselves(run, exported):
    import onnx

    out, _ = exported
    card = load_recognizer(run)[1]
    stored = {entry.key: entry.value for entry in onnx.load(out / "recognizer.onnx").metadata_props}
    extra = {"genkd.json": ""}
    assert torch.export.load(out / "recognizer.pt2", extra_files=extra).example_inputs is None
    assert ModelCard.from_json(stored["genkd"]) == card == ModelCard.from_json(extra["genkd.json"])
    onnx.checker.check_model(str(out / "recognizer.onnx"), full_check=True)
    package = str(exporting.__file__.rpartition("/evaluation/")[0]).encode()
    for name in ("recognizer.onnx", "recognizer.pt2"):
        assert package not in (out / name).read_bytes(), "paths of the machine that exported"


@needs_onnx
def test_the_card_tells_what_is_known(run, exported, data):
    out, values = exported
    assert json.loads((out / "model.json").read_text()) == json.loads(json.dumps(values))
    assert values["classes"] == list(data.classes) and values["name"] == "student"
    assert values["input"]["frames"] == 15 and values["input"]["size"] == 33 and values["input"]["stride"] == 2
    assert values["input"]["mean"] == [0.5] * 3 and values["architecture"]["stem"] == "strided"
    model, _ = load_recognizer(run)
    assert values["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert values["metrics"]["evaluation"] == {
        key: results[key]
        for key in ("split", "videos", "clips", "crops", "top1", "top5", "mean_class_accuracy", "ece", "loss",
                    "decoder", "precision", "device")
    }  # fmt: skip
    assert (results["videos"], results["clips"], results["crops"]) == (40, 2, 3)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert values["metrics"]["training"]["top1"] == [line for line in logged if line["kind"] == "eval"][-1]["top1"]
    assert values["metrics"]["training"]["epoch"] == 1 and values["metrics"]["training"]["split"] == "test"
    assert values["training"]["phase"] == "distill" and values["teacher"]["temporal"] == "full"
    assert {split: entry["videos"] for split, entry in values["data_set"]["splits"].items()} == {
        "test": 40,
        "train": 10,
    }
    assert values["data_set"]["index_digest"] == data.info["index_digest"]
    assert values["versions"]["torch"] == torch.__version__ and "onnxruntime" in values["versions"]
    check = values["check"]
    assert check["real"] and check["batches"] == [1, 3] and set(check["differences"]) == set(ALL)
    assert all(value["relative"] <= 1e-4 for found in check["differences"].values() for value in found.values())
    assert check["differences"]["safetensors"]["logits"]["absolute"] == 0
    assert {entry["file"] for entry in values["files"]} == {p.name for p in out.iterdir()} - {"model.json", "README.md"}
    for entry in values["files"]:
        content = (out / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


@needs_onnx
def test_the_readmes_snippets_run(exported, tmp_path):
    out, values = exported
    page = (out / "README.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(snippets) == 3
    # In one process, but each with names of its own.
    script = tmp_path / "snippets.py"
    script.write_text(f"for snippet in {snippets!r}:\n    exec(snippet, {{}})\n    print('---')\n")
    done = processes.run(script, cwd=out, check=True)
    parts = [part.split("\n") for part in done.stdout.split("\n---\n")[:-1]]
    assert [len(lines) for lines in parts] == [2, 2, 2] and {line for p in parts for line in p} <= set(
        values["classes"]
    )
    for words in (
        "40 videos in `test`",
        "2 clips x 3 crops",
        "generative",
        "Apache-2.0",
        "15 frames, one of every 2 of the video",
    ):
        assert words in page
    assert not re.search(r"\n\n\n", page) and "{{" not in page and "None" not in page


@pytest.mark.parametrize(
    "changes",
    [
        {"compat": "reference", "stem": "paired"},
        pytest.param(
            {"temporal": "full", "attention": False, "modality": "flow", "clip_length": 24}, marks=pytest.mark.slow
        ),
    ],
)
def test_other_networks_export_too(tmp_path, changes):
    """Not as ONNX, which takes seconds each and is made of the same program as torch-export."""
    values = exporting.export(weights_in(tmp_path / "w", **changes), tmp_path / "out", ALL[:2])
    steps = 2 if changes.get("clip_length") == 24 else 1  # of features, less one: pairs of them are pooled
    assert values["outputs"]["logits"]["shape"] == ["N", 3, steps]
    assert ("attention" in values["outputs"]) == changes.get("attention", True)
    assert all(set(found) == set(values["outputs"]) for found in values["check"]["differences"].values())
    page = (tmp_path / "out" / "README.md").read_text()
    assert "random clips only" in page and "name no data set" in page and not values["check"]["real"]
    assert ("depend on the others of its batch" in page) == ("compat" in changes)
    assert "`b\\|c`" in page and "`` d`e ``" in page


def test_a_data_set_that_is_gone_or_of_others_is_told(run, data, tmp_path):
    gone = weights_in(tmp_path / "gone", data={"dataset": str(tmp_path / "nowhere")})
    values = exporting.export(gone, tmp_path / "a")
    assert "no genkd data set" in values["check"]["reason"] and not values["data_set"]["read"]
    with pytest.raises(UserError, match="10 classes, not the 3 classes"):
        exporting.export(gone, tmp_path / "b", data=data.path)
    with pytest.raises(UserError, match="'val'"):
        exporting.export(run, tmp_path / "b", split="val")
    values = exporting.export(run, tmp_path / "c", split="train", clips=12, name="a *name*")
    assert values["check"]["batches"] == [1, 11] and values["check"]["clips"].endswith("split train")
    assert (tmp_path / "c" / "README.md").read_text().startswith("# a \\*name\\*\n")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("spoilt", ["safetensors", "torch-export", "onnx"])
@needs_onnx
def test_a_file_that_differs_from_the_network_is_refused(run, exported, tmp_path, monkeypatch, spoilt):
    """One weight of a thousand is changed in a file that was right."""
    import onnx

    form, right = formats.FORMATS[spoilt], exported[0] / formats.FORMATS[spoilt].file

    def write(from_, path):
        if spoilt == "onnx":
            model = onnx.load(right)
            (bias,) = (entry for entry in model.graph.initializer if entry.name.endswith("logits.bias"))
            values = onnx.numpy_helper.to_array(bias) + np.float32([0.01] + [0] * 9)
            bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
            onnx.save(model, path)
        elif spoilt == "torch-export":
            program = torch.export.load(right)
            program.state_dict["recognizer.logits.bias"].data[0] += 0.01
            torch.export.save(program, path)
        else:
            model, card = load_recognizer(right)
            model.logits.bias.data[0] += 0.01
            save_weights(path.parent, card, {path.stem: model})

    monkeypatch.setitem(formats.FORMATS, spoilt, formats.Format(form.file, write, form.load, form.packages))
    with pytest.raises(UserError, match=f"the {spoilt} export of .* in its logits"):
        exporting.export(run, tmp_path / "out", [spoilt])
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_differences_by_hand():
    want = [{"logits": torch.tensor([1.0, -4.0]).double()}, {"logits": torch.tensor([2.0])}]
    got = [{"logits": torch.tensor([1.0, -4.0002], dtype=torch.float64)}, {"logits": torch.tensor([2.0])}]
    found = exporting.compare(got, want, "it")["logits"]
    assert found["absolute"] == pytest.approx(2e-4, rel=1e-3) and found["relative"] == pytest.approx(5e-5, rel=1e-3)
    for wrong in (torch.tensor([1.0, -4.001]), torch.tensor([1.0, float("nan")]), torch.tensor([1.0])):
        with pytest.raises(UserError, match="it "):
            exporting.compare([{"logits": wrong}, got[1]], want, "it")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    folder = weights_in(tmp_path / "w")
    model, card = load_recognizer(folder)
    model.logits.weight.data[0, 0] = float("nan")
    save_weights(folder, card, {"recognizer": model})
    with pytest.raises(UserError, match="not finite"):
        exporting.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced(tmp_path):
    first, second = weights_in(tmp_path / "1"), weights_in(tmp_path / "2", seed=1)
    out = tmp_path / "out"
    out.mkdir()
    before = exporting.export(first, out)  # an empty folder is taken
    with pytest.raises(UserError, match=r"not empty.*--force"):
        exporting.export(second, out)
    after = exporting.export(second, out, force=True)
    assert before["files"][0]["sha256"] != after["files"][0]["sha256"]
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match=r"'notes\.txt', which no export put there"):
        exporting.export(first, out, force=True)
    with pytest.raises(UserError, match="which no export put there"):
        exporting.export(first, first, force=True)
    with pytest.raises(UserError, match="is a file"):
        exporting.export(first, out / "notes.txt")
    assert load_recognizer(first) and sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "out"]


def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch):
    source, out = weights_in(tmp_path / "w"), tmp_path / "out"
    exporting.export(source, out)
    before = (out / "README.md").read_bytes()
    (tmp_path / ".out.elsewhere-1.tmp").mkdir()  # of one that was killed

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(model_card, "write", stop)
        exporting.export(source, out, force=True, name="other")
    assert (out / "README.md").read_bytes() == before
    exporting.export(source, out, force=True, name="other")
    assert (out / "README.md").read_text().startswith("# other\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "w"]


def test_a_full_disk_is_one_sentence(tmp_path, small_disk):
    disk, source = small_disk("2m"), weights_in(tmp_path / "w")
    for name in ("safetensors", "torch-export"):
        with pytest.raises(UserError, match="no space left on the disk"):
            exporting.export(source, disk / "out", [name])
        assert not list(disk.iterdir())


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'onnxruntime.*pip install "genkd\[export\]"'):
        exporting.export(weights_in(tmp_path / "w"), tmp_path / "out", ["onnx"])
    assert not (tmp_path / "out").exists()


def test_the_command(run, tmp_path, monkeypatch):
    def export(place, out, *options):
        return CliRunner().invoke(main, ["export", str(place), str(tmp_path / out), *options])

    done = export(run, "out")
    assert done.exit_code == 0 and "GFLOPs" in done.stdout and "recognizer.safetensors" in done.stdout
    done = export(weights_in(tmp_path / "w"), "out2", "--format", "safetensors", "--json")
    assert json.loads(done.stdout)["check"]["real"] is False and "random clips only" in done.stderr
    for place, out, words in ((run, "out", "--force"), (tmp_path / "nothing", "out3", "neither a training run")):
        result = export(place, out)
        assert result.exit_code == 1 and words in result.output and "Traceback" not in result.output
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = export(run, "out3")
    assert result.exit_code == 1 and "torchrun started 2" in result.output
    assert not (tmp_path / "out3").exists()
