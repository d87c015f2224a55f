"""Weights files of others: formats, what is told apart, what is refused, and where imported weights are taken."""

import json
import os

import pytest
import safetensors.torch
import torch

from genkd.cli_weights import class_names
from genkd.configs.load import load
from genkd.configs.schema import ModelConfig
from genkd.errors import UserError
from genkd.evaluation.recognition import evaluate_weights
from genkd.models import checkpoints
from genkd.models import reference as reference_weights
from genkd.models.importing import import_weights
from genkd.models.recognizer import Recognizer, build_cvae
from genkd.trainers import phases

CLIP = (1, 3, 16, 32, 32)
HEAD = {
    "reduce.0": "deconv1.0", "reduce.1": "deconv1.1", "conv": "Att_Head_5c.0.conv1d", "norm": "Att_Head_5c.1",
    "linear": "Att_Head_5c.3",
}  # fmt: skip
VAE = {
    "encoder.conv": "cencoder.con1", "decoder.deconv": "cdecoder.deconv",
    **{f"{part}.mlp.{2 * number}": f"c{part}.fc{number + 1}" for part in ("encoder", "decoder") for number in range(3)},
}  # fmt: skip


def renamed(state, names):
    """A state dict with its keys' beginnings changed."""
    found = {}
    for key, value in state.items():
        old = next(old for old in names if key.startswith(f"{old}."))
        found[names[old] + key[len(old) :]] = value
    return found


def plain(classes=5, channels=3, **config):
    """A plain I3D as genkd has it, and its weights as the public files name them."""
    torch.manual_seed(1)
    network = Recognizer(ModelConfig(**config), classes, (1024, 8, 7, 7), attention=False, in_channels=channels).eval()
    state = renamed(network.state_dict(), {"logits": "logits.conv3d", "backbone": "trunk"})
    return network, {key.removeprefix("trunk."): value for key, value in state.items()}


def network(classes=10, side=1, **config):
    """A recognition network for clips of 16 frames of 32 px, and its weights as the original names them."""
    torch.manual_seed(2)
    made = Recognizer(
        ModelConfig(stem="strided", **config), classes, (1024, 2, side, side), compat="reference"
    ).eval()  # fmt: skip
    names = {f"attention.{own}": other for own, other in HEAD.items()}
    names |= {"logits": "backbone._model.logits.conv3d", "backbone": "backbone._model"}
    return made, renamed(made.state_dict(), names)


def vae(side=1):
    torch.manual_seed(3)
    made = build_cvae((1024, 2, side, side)).eval()
    return made, renamed(made.state_dict(), VAE)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(network()[1], path)
    return path


@pytest.fixture(scope="module")
def cvae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cvae") / "cvae.pt"
    torch.save(vae()[1], path)
    return path


@pytest.mark.parametrize("kind", ["bare .pt", "old .pth", ".ckpt of a trainer", ".safetensors"])
def test_a_plain_i3d_of_every_kind_of_file_scores_as_before(tmp_path, kind):
    """old: before archives and the counting of batches, as the public files are."""
    source, state = plain()
    path = tmp_path / f"weights{kind[kind.index('.') :].split()[0]}"
    if kind.startswith("bare"):
        torch.save(state, path)
    elif kind.startswith("old"):
        state = {key: value for key, value in state.items() if "num_batches" not in key}
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind.startswith(".ckpt"):
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"epoch": 3, "state_dict": {"model": wrapped}, "optimizer": {"lr": 0.1}}, path)
    else:
        safetensors.torch.save_file(state, path)
    done = import_weights(path, tmp_path / "out", clip_length=16, size=32, compat="none")
    assert done.report.kind == "i3d rgb" and done.report.unused == ()
    # 57 convolutions with batch norm.
    assert len(done.report.missing) == (57 if kind.startswith("old") else 0)
    loaded, card = checkpoints.load_recognizer(tmp_path / "out")
    assert (card.attention, card.classes, card.feature_shape) == (False, tuple("01234"), (1024, 2, 1, 1))
    torch.manual_seed(0)
    clips = torch.randn(CLIP)
    with torch.inference_mode():
        want = source.backbone(clips)["Mixed_5c"].mean((2, 3, 4)) @ source.logits.weight.flatten(1).T
        torch.testing.assert_close(loaded(clips).logits[..., 0], want, atol=1e-5, rtol=1e-4)


def test_a_public_kinetics_file_has_its_layout_and_may_lack_counts_and_the_bias(reference):
    """Names and shapes as listed from the original's module; values do not matter."""
    for channels, name, parameters in ((3, "rgb", 12_697_264), (2, "flow", 12_675_312)):
        entries = json.loads((reference / "keys" / f"i3d_{name}.json").read_text())
        state = {key: torch.zeros(()).expand(shape) for key, shape, dtype in entries if dtype == "float32"}
        del state["logits.conv3d.bias"]
        state["logits.conv3d.weight"] = torch.ones(()).expand(400, 1024, 1, 1, 1)
        module, report = checkpoints.from_reference(state)
        assert report.kind == f"i3d {name}" and module.in_channels == channels and not module.training
        assert len(report.missing) == 58 and "logits.conv3d.bias" in report.missing
        assert "Mixed_5c.b3b.bn.num_batches_tracked" in report.missing
        assert not module.logits.bias.any() and module.logits.weight.min() == 1
        assert sum(parameter.numel() for parameter in module.parameters()) == parameters


def test_the_cvaes_are_told_apart_by_the_half_that_is_not_used(reference):
    for name, kind in (("recognition_cvae", "teacher"), ("recognition_cvae_student", "student")):
        entries = json.loads((reference / "keys" / f"{name}.json").read_text())
        state = {key: torch.zeros(()).expand(shape) for key, shape, _ in entries}
        module, report = checkpoints.from_reference(state)
        assert report.kind == f"recognition {kind} cvae"
        assert len(report.used) == len(report.unused) == 20 and all("_832." in key for key in report.unused)
        assert sum(parameter.numel() for parameter in module.parameters()) == 112_210_944


@pytest.mark.parametrize("name", ["teacher", "student", "cvae_teacher", "cvae_student"])
def test_detection_weights_are_told_apart(reference, name):
    entries = json.loads((reference / "keys" / f"detection_{name}.json").read_text())
    state = {key: torch.zeros(()).expand(shape) for key, shape, _ in entries}
    layout = reference_weights.identify(state)
    assert layout.detection and layout.kind == ("detection cvae" if "cvae" in name else f"detection {name}")
    if "cvae" not in name:
        assert (layout.num_classes, layout.time, layout.height) == (20, 32, 3)


@pytest.mark.slow
def test_a_detector_and_its_cvae_are_imported(reference, tmp_path):
    """Weights of zeros: what counts is where they go and what their card says."""
    for name in ("detection_student", "detection_cvae_student"):
        entries = json.loads((reference / "keys" / f"{name}.json").read_text())
        state = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, shape, dtype in entries}
        torch.save(state, tmp_path / f"{name}.ckpt")
        done = import_weights(tmp_path / f"{name}.ckpt", tmp_path / "out")
        (tmp_path / f"{name}.ckpt").unlink()
    assert done.report.kind == "detection cvae" and done.card.task == "detection"
    detector, card = checkpoints.load_detector(tmp_path / "out")
    assert (card.clip_length, card.size, card.classes[:3]) == (256, 96, ("Background", "1", "2"))
    assert len(card.classes) == 21 and card.data["mean"] == [0.5] * 3 and not detector.training
    assert set(checkpoints.load_cvae(tmp_path / "out").keys()) == {"Mixed_4f", "Mixed_5c"}
    with pytest.raises(UserError, match="holds a detector; recognition needs the weights of a recognizer"):
        checkpoints.load_recognizer(tmp_path / "out")


def test_modules_that_are_not_whole_are_refused_by_their_keys():
    state = network(temporal="top_heavy")[1]
    conv = "backbone._model.Mixed_3b.b0.conv3d.weight"
    for change, problem in (
        (
            {conv: torch.zeros(64, 192, 3, 3, 3)},
            rf"{conv} has shape \(64, 192, 3, 3, 3\), a recognition student \(64, ",
        ),
        ({conv: torch.full((64, 192, 1, 1, 1), torch.nan)}, f"{conv} holds values that are not finite"),
        ({conv: None}, f"look like a recognition student but lack 1 of its entries, e.g. {conv}"),
        ({conv: torch.zeros(64, 192, 1, 1, 1).to_sparse()}, f"{conv} is no plain tensor but a sparse"),
        ({"Att_Head_5c.3.weight": None}, "lack its attention head's Att_Head_5c.3.weight"),
        ({"deconv1.0.weight": torch.zeros(3)}, r"deconv1.0.weight has shape \(3,\)"),
        ({"backbone._model.Conv3d_1a_7x7.conv3d.weight": torch.zeros(64, 4, 7, 7, 7)}, "Conv3d_1a_7x7.* 4, 7, 7, 7"),
    ):
        changed = {key: value for key, value in {**state, **change}.items() if value is not None}
        with pytest.raises(UserError, match=problem):
            checkpoints.from_reference(changed)
    with pytest.raises(UserError, match="none that can be imported"):
        checkpoints.from_reference({"conv1.weight": torch.zeros(3)})
    state = plain()[1]
    del state["Mixed_5c.b0.conv3d.weight"]
    with pytest.raises(UserError, match="look like an i3d rgb but lack 1 of its entries"):
        checkpoints.from_reference(state)


class Command:
    """Unpickling it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_file_that_needs_code_is_refused_and_none_of_it_runs(tmp_path, genkd, archive):
    trap = tmp_path / "trap"
    torch.save({"state_dict": {}, "args": Command(trap)}, tmp_path / "x.pth", _use_new_zipfile_serialization=archive)
    told = genkd("import-checkpoint", tmp_path / "x.pth", tmp_path / "out", check=False)
    assert told.returncode == 1 and not trap.exists() and not (tmp_path / "out").exists()
    assert "would run code of posix.mkdir" in told.stderr and "Traceback" not in told.stderr


@pytest.mark.filterwarnings("ignore:.*orch.jit.*", "ignore:.*TorchScript.*")
def test_other_files_are_refused(tmp_path, teacher_file):
    whole = teacher_file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("no weights at all")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "wrong.safetensors").write_bytes(b"rubbish")
    (tmp_path / "weights.bin").write_bytes(whole)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "none.pt")
    (tmp_path / "letters.pt").write_text("eeee, no weights at all")
    torch.save({"epoch": 1, "best": 2.0}, tmp_path / "numbers.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name, problem in (
        ("cut.pt", "damaged"),
        ("text.ckpt", "damaged"),
        ("empty.pth", "damaged"),
        ("wrong.safetensors", "damaged or no safetensors file"),
        ("weights.bin", "is none of"),
        ("list.pt", "holds no state dict.* but a value of type list$"),
        ("none.pt", "holds no state dict.* but an empty dict$"),
        ("letters.pt", "is damaged or no file of torch.save$"),
        ("numbers.pt", "holds no state dict.* but a dict of 'epoch', 'best'"),
        ("script.pt", "TorchScript"),
        ("absent.pt", "there is no file"),
    ):
        with pytest.raises(UserError, match=problem) as told:
            import_weights(tmp_path / name, tmp_path / "out")
        assert str(tmp_path / name) in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["network first", "vae first"])
def test_a_pair_ends_up_side_by_side_and_teaches(tmp_path, teacher_file, cvae_file, order):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {number}" for number in range(10)))
    out = tmp_path / "out"
    files = [(teacher_file, {"classes": class_names(names)}), (cvae_file, {})]
    for file, options in files if order == "network first" else files[::-1]:
        import_weights(file, out, **options)
    assert sorted(path.name for path in out.iterdir()) == ["cvae.safetensors", "recognizer.safetensors"]
    cards = []
    for path in out.iterdir():
        with safetensors.safe_open(path, "pt") as file:
            cards.append(file.metadata()["genkd"])
    assert cards[0] == cards[1]
    assert checkpoints.load_recognizer(out)[1].classes[9] == "class 9"
    config = load("ucf101", "distill", [f"teacher={out}", "data.clip_length=16", "data.size=32"])
    phase = phases.build(config, class_names(names))
    assert torch.equal(phase.frozen["teacher"].attention.linear.weight, network()[0].attention.linear.weight)
    assert torch.equal(phase.frozen["teacher_cvae"].decoder.deconv[0].weight, vae()[0].decoder.deconv[0].weight)


def test_a_pair_that_does_not_fit_is_refused_in_both_orders(tmp_path, teacher_file):
    torch.save(vae(side=2)[1], tmp_path / "cvae.pt")
    import_weights(teacher_file, tmp_path / "a")
    with pytest.raises(UserError, match="makes 1 x 1 features, the CVAE wants 2 x 2"):
        import_weights(tmp_path / "cvae.pt", tmp_path / "a")
    import_weights(tmp_path / "cvae.pt", tmp_path / "b")
    with pytest.raises(UserError, match="does not fit the recognizer beside it"):
        import_weights(teacher_file, tmp_path / "b")
    assert not (tmp_path / "b" / "recognizer.safetensors").exists()


def test_settings_that_do_not_fit_and_taken_places_are_refused(tmp_path, teacher_file, cvae_file):
    for options, problem in (
        ({"classes": ("a", "b")}, "2 class names, the recognition teacher has 10 classes"),
        ({"size": 64}, "give 2 x 2 x 2 features, this recognition teacher takes 2 x 1 x 1"),
        ({"clip_length": 64}, "give 8 x 1 x 1 features"),
        ({"mean": (0.5, 0.5)}, "--mean 0.5,0.5 is not 3 finite values"),
        ({"mean": (0.5, float("nan"), 0.5)}, "--mean 0.5,nan,0.5 is not 3 finite values"),
        ({"std": (0.5, 0.5, 0.0)}, "--std .* is not 3 finite positive values"),
        ({"std": (0.5, float("nan"), 0.5)}, "--std 0.5,nan,0.5 is not 3 finite positive values"),
        ({"std": (0.5, float("inf"), 0.5)}, "--std 0.5,inf,0.5 is not 3 finite positive values"),
    ):
        with pytest.raises(UserError, match=problem):
            import_weights(teacher_file, tmp_path / "out", **options)
    with pytest.raises(UserError, match="a CVAE has neither classes"):
        import_weights(cvae_file, tmp_path / "out", classes=("a",))
    assert not (tmp_path / "out").exists()
    import_weights(teacher_file, tmp_path / "out")
    with pytest.raises(UserError, match="--force"):
        import_weights(teacher_file, tmp_path / "out")
    done = import_weights(teacher_file, tmp_path / "out", force=True, clip_length=12)
    assert done.card.clip_length == 12
    with pytest.raises(UserError, match="genkd's own file already"):
        import_weights(done.path, tmp_path / "again")
    with pytest.raises(UserError, match="is a file; name a folder"):
        import_weights(teacher_file, done.path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="folder of a training run"):
        import_weights(teacher_file, tmp_path / "run")


def test_imported_weights_are_evaluated_with_the_data_sets_classes(tmp_path, data, teacher_file, genkd):
    told = genkd("import-checkpoint", teacher_file, tmp_path / "out", "--classes", data.path)
    assert "recognition teacher: 354 used, 0 unused, 0 missing" in told.stdout
    # The trunk's 12,287,264 with 10 classes, and an attention head of 1x1 maps and 2 time steps.
    parameters = 12_287_264 + 10 * 1025 + 512 * 1025 + 1024 + 1024 * (512 * 3 + 1) + 2048 + 2 * 1025
    assert f"{parameters:,} parameters, 10 classes, rgb clips of 16 frames of 32 px" in told.stdout
    values = evaluate_weights(tmp_path / "out", data.path, clips=1)
    assert values["videos"] == 40 and values["parameters"] == parameters
    import_weights(teacher_file, tmp_path / "numbers")
    with pytest.raises(UserError, match="others"):
        evaluate_weights(tmp_path / "numbers", data.path, clips=1)


def test_the_report_as_json(tmp_path, genkd):
    state = plain(channels=2)[1] | {"extra.weight": torch.zeros(2)}
    del state["Mixed_5c.b0.bn.num_batches_tracked"]
    torch.save({"model": state}, tmp_path / "flow.ckpt")
    options = ("--mean", "0.4,0.6", "--std", "0.2,0.3")
    told = json.loads(genkd("import-checkpoint", tmp_path / "flow.ckpt", tmp_path / "out", *options, "--json").stdout)
    assert told["counts"] == {"used": 343, "unused": 1, "missing": 1} and told["unused"] == ["extra.weight"]
    assert told["missing"] == ["Mixed_5c.b0.bn.num_batches_tracked"]
    assert (told["kind"], told["modality"], told["classes"], told["clip_length"]) == ("i3d flow", "flow", 5, 64)
    card = checkpoints.read_card(tmp_path / "out")
    assert (card.data["flow_mean"], card.data["flow_std"]) == ([0.4, 0.6], [0.2, 0.3])
    told = genkd("import-checkpoint", tmp_path / "flow.ckpt", tmp_path / "out", "--force", "--verbose")
    assert "  unused  extra.weight\n" in told.stdout and "--classes" in told.stdout


def test_training_starts_from_a_file_itself(tmp_path, teacher_file, cvae_file):
    """Kinetics' 400 classes are not the data set's: all but classifier and attention come along."""
    source, state = plain(classes=400)
    torch.save(state, tmp_path / "rgb_imagenet.pt")
    overrides = ["data.clip_length=16", "data.size=32"]

    def start(place, classes=("a", "b"), *more):
        return phases.build(load("ucf101", "representation", [f"init={place}", *overrides, *more]), classes).network

    begun = start(tmp_path / "rgb_imagenet.pt")
    assert torch.equal(begun.backbone.Mixed_5c.b0.conv3d.weight, source.backbone.Mixed_5c.b0.conv3d.weight)
    assert begun.logits.weight.shape[0] == 2
    flat = start(tmp_path / "rgb_imagenet.pt", ("a", "b"), "model.temporal=top_heavy", "model.stem=paired")
    whole = source.backbone.Conv3d_1a_7x7.conv3d.weight.sum(2)
    torch.testing.assert_close(flat.backbone.Conv3d_1a_7x7.conv3d.weight[:, :, 1], whole / 2)
    with pytest.raises(UserError, match="import-checkpoint FILE OUT --classes"):
        start(teacher_file, tuple("abcdefghij"))
    with pytest.raises(UserError, match=r"cvae\.pt: this is a recognition cvae, not a network to start from"):
        start(cvae_file)


@pytest.mark.real
def test_class_names_of_ucf101(real_data):
    names = class_names(real_data / "splits" / "ucf101" / "classInd.txt")
    assert len(names) == 101 and names[:2] == ("ApplyEyeMakeup", "ApplyLipstick") and names[100] == "YoYo"


def test_class_names_come_from_lists_and_data_sets(tmp_path, data):
    assert class_names(data.path) == tuple(data.classes)
    path = tmp_path / "names.txt"
    for text, want in (
        ("walk\n\njump rope\n", ("walk", "jump rope")),
        ("2 jump rope\n1 walk\n", ("walk", "jump rope")),
        ("3 walk\n4 run\n", ("3 walk", "4 run")),
    ):
        path.write_text(text)
        assert class_names(path) == want
    for text, problem in (("a\nb\na\n", "'a' comes twice"), ("\n", "no class names")):
        path.write_text(text)
        with pytest.raises(UserError, match=problem):
            class_names(path)
