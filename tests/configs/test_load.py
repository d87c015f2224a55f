import pytest
from pydantic import ValidationError

from genkd.configs import PHASES
from genkd.configs.load import differences, dump, load, presets, read_run
from genkd.errors import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


FULL = [
    f"{data}{flow}{recipe}" for data in ("ucf101", "hmdb51") for flow in ("", "-flow") for recipe in ("", "-modern")
]
DETECTION = ["detect-demo", "thumos14", "thumos14-flow"]


@pytest.mark.parametrize("preset", ["demo", "small", *FULL, *DETECTION])
@pytest.mark.parametrize("phase", PHASES)
def test_every_preset_is_valid_in_every_phase(preset, phase):
    assert preset in presets()
    config = load(preset, phase)
    assert config.phase == phase
    students = "detect-distill" if preset in DETECTION else "distill"
    assert config.model.temporal == ("top_heavy" if phase == students else "full")


def test_there_is_a_test_for_every_preset():
    assert set(presets()) == {"demo", "small", *FULL, *DETECTION}


def test_the_detection_presets_have_the_originals_hyper_parameters():
    """From its detection configurations and training script: windows of 256 frames of 96 of 112 px, every 30 frames,
    in tests every 128, batches of 1, Adam at 1e-6 (flow 1e-5) and 1e-3, 50 epochs (flow 20), pixels from -1 to 1,
    lw 10, ssl 0.1, IoU 0.5, beta 10, background 35."""
    rgb, flow = load("thumos14", "detect-distill"), load("thumos14-flow", "detect-distill")
    assert (rgb.batch_size, rgb.epochs, rgb.optimizer.lr, rgb.optimizer.weight_decay) == (1, 50, 1e-6, 1e-3)
    assert (flow.epochs, flow.optimizer.lr) == (20, 1e-5)
    assert (rgb.cvae_optimizer.lr, rgb.cvae_optimizer.betas) == (1e-4, (0.8, 0.999))
    data, loss = rgb.data, rgb.loss
    assert (data.clip_length, data.size, data.window_stride, data.eval_window_stride) == (256, 96, 30, 128)
    assert (data.mean, data.std, data.flow_mean, data.flow_std) == ((0.5,) * 3, (0.5,) * 3, (0.5,) * 2, (0.5,) * 2)
    assert data.scales == pytest.approx([96 / 112], abs=1e-3) and data.eval_scale == pytest.approx(96 / 112, abs=1e-3)
    assert (loss.segments, loss.triplet, loss.overlap, loss.attention, loss.background) == (10, 0.1, 0.5, 10, 35)


@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_the_full_size_presets_have_the_originals_hyper_parameters(name):
    """From its recognition configuration and training script: SGD at 1e-3 and 5e-4, batches of 6, 200 epochs, Adam at
    1e-4 with betas 0.8 and 0.999 for the VAE, beta 0.1, 64 frames of 224 pixels, the middle 224 of 256 in tests."""
    config = load(name, "distill")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ("sgd", 1e-3, 0.9)
    assert (config.optimizer.weight_decay, config.optimizer.schedule) == (5e-4, "constant")
    assert (config.batch_size, config.epochs, config.loss.attention) == (6, 200, 0.1)
    assert (config.cvae_optimizer.lr, config.cvae_optimizer.betas) == (1e-4, (0.8, 0.999))
    assert config.cvae_optimizer.weight_decay == 0
    data = config.data
    assert (data.clip_length, data.size, data.eval_scale) == (64, 224, 224 / 256)
    assert data.scales == (1.0, 0.875, 0.75, 0.66)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    flow = load(f"{name}-flow", "distill").data
    assert (flow.scales, flow.flow_mean, flow.flow_std) == ((1.0, 0.875, 0.75), (0.5, 0.5), (0.226, 0.226))
    modern = load(f"{name}-flow-modern", "teacher")
    assert (modern.optimizer.schedule, modern.ema > 0, modern.loss.label_smoothing) == ("cosine", True, 0.1)
    assert not modern.data.jitters_colour and load(f"{name}-modern", "teacher").data.jitters_colour


def test_a_file_stands_on_its_base_and_wins_over_it(tmp_path):
    write(tmp_path / "base.yaml", "epochs: 3\noptimizer: {lr: 0.5, momentum: 0.1}\nphases: {distill: {epochs: 4}}\n")
    path = write(tmp_path / "mine.yaml", "base: base.yaml\noptimizer: {lr: 0.25}\n")
    config = load(path, "teacher")
    assert (config.epochs, config.optimizer.lr, config.optimizer.momentum) == (3, 0.25, 0.1)
    assert load(path, "distill").epochs == 4
    other = write(tmp_path / "other.yaml", "base: mine.yaml\nepochs: 9\n")
    assert load(other, "distill").epochs == 9, "a file's own keys win over its base's phases"
    assert load(write(tmp_path / "of.yaml", "base: demo\n"), "teacher") == load("demo", "teacher")
    for text, words in (
        ("base: of.yaml", "leads back to itself"),
        (f"base: ../{tmp_path.name}/of.yaml", "leads back to itself"),
        ("base: [demo]", "preset's name"),
        ("base: dmeo", "did you mean 'demo'"),
    ):
        with pytest.raises(UserError, match=words):
            load(write(tmp_path / "of.yaml", text), "teacher")


def test_method_is_short_for_the_distillations_method(tmp_path):
    """In each file and override of its own, so that what comes later wins."""
    path = write(tmp_path / "m.yaml", "method: none\n")
    assert load(path, "distill", ["distill.method=logits"]).distill.method == "logits"
    over = write(tmp_path / "n.yaml", "base: m.yaml\ndistill: {method: features}\n")
    assert load(over, "distill").distill.method == "features"
    assert load(over, "distill", ["method=logits"]).distill.method == "logits"
    assert load("demo", "distill", ["method=logits"]).distill.method == "logits"
    assert load(write(tmp_path / "c.yaml", "method: none\n"), "distill").distill.method == "none"
    with pytest.raises(UserError, match=r"override 'method=hinton'.*distill\.method.*generative"):
        load("demo", "distill", ["method=hinton"])


def test_the_phase_section_wins_over_the_file_and_overrides_win_over_both(tmp_path):
    path = write(tmp_path / "c.yaml", "epochs: 7\noptimizer: {lr: 0.5}\nphases: {distill: {epochs: 9}}\n")
    assert load(path, "teacher").epochs == 7
    assert load(path, "distill").epochs == 9
    assert load(path, "distill", ["epochs=11", "optimizer.lr=1e-3"]).epochs == 11
    assert load(path, "distill", ["optimizer.lr=1e-3"]).optimizer.lr == 0.001


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E2", 100.0), ("3", 3.0), ("0.5", 0.5), (".5", 0.5), ("-0.0", 0.0)]
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    path = write(tmp_path / "c.yaml", f"grad_clip: {text}\n")
    assert load(path, "teacher").grad_clip == value


def test_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load("demo", "teacher").epochs = 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimiser.lr=1"], ["optimiser", "optimizer", "override"]),
        (["data.clip_lenght=8"], ["data.clip_lenght", "data.clip_length"]),
        (["lr=1"], ["'lr'", "optimizer.lr"]),
        (["epochs=many"], ["epochs", "integer", "many"]),
        (["epochs=1.5"], ["epochs", "1.5"]),
        (["epochs=0"], ["epochs", "greater"]),
        (["data.flip=2"], ["data.flip", "1"]),
        (["model.width=0.3"], ["width", "1/16"]),
        (["data.scales=[1.5]"], ["scales"]),
        (["data.std=[1,0,1]"], ["std"]),
        (["epochs"], ["key=value"]),
        (["tensorboard=7"], ["tensorboard", "boolean"]),
        (["data.frame_jitter=2"], ["frame_jitter 2", "stride 2"]),
        (["data.flow_mean=[0.5]"], ["flow_mean", "2 values"]),
        (["data.dtype=uint8"], ["uint8", "float16"]),
        (["data.dtype=uint8", "data.padding=zero"], ["padding=zero", "black"]),
        (["data=3"], ["data", "3"]),
        (["phase=distill"], ["distill", "teacher"]),
        (["epochs=[1"], ["YAML"]),
    ],
)
def test_a_wrong_override_is_named_with_its_remedy(overrides, words):
    with pytest.raises(UserError) as caught:
        load("demo", "teacher", overrides)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_file_is_named(tmp_path):
    path = write(tmp_path / "mine.yaml", "epochz: 3\n")
    with pytest.raises(UserError, match=r"mine\.yaml.*epochz.*epochs"):
        load(path, "teacher")
    path = write(tmp_path / "mine.yaml", "a: [1\nb: 2\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line \d+.*YAML"):
        load(path, "teacher")
    path = write(tmp_path / "mine.yaml", "phases: {destill: {epochs: 3}}\n")
    with pytest.raises(UserError, match="did you mean 'distill'"):
        load(path, "teacher")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load(str(tmp_path / "binary.yaml"), "teacher")
    with pytest.raises(UserError, match=r"no configuration file 'dmo'.*did you mean 'demo'"):
        load("dmo", "teacher")


def test_several_errors_are_told_at_once():
    with pytest.raises(UserError) as caught:
        load("demo", "teacher", ["epochs=x", "sed=1"])
    assert "epochs" in str(caught.value) and "seed" in str(caught.value)


def test_a_dumped_configuration_reads_back_the_same(tmp_path):
    config = load("demo", "distill", ["data.scales=[1.0, 0.5]", "teacher=somewhere"])
    (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8")
    assert read_run(tmp_path) == config
    assert differences(config, load("demo", "distill", ["teacher=elsewhere"])) == [
        "data.scales: [1.0, 0.5] -> [1.0, 0.875]",
        "teacher: somewhere -> elsewhere",
    ]
