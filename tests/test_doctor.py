import json
import sys

import pytest
import torch
from click.testing import CliRunner

from genkd import doctor
from genkd.cli import main

CHECKS = ["python", "torch", "gpu", "cudnn", "nccl", "dali", "nvdec", "encoders", "decoders", "apex", "kernels", "disk",
          "shared memory", "one clip"]  # fmt: skip


def ask(*options):
    done = CliRunner().invoke(main, ["doctor", *options])
    return done.exit_code, done.stdout


def findings(text):
    return {entry["what"]: entry for entry in json.loads(text)}


def test_a_machine_that_is_fine_is_exit_code_0_and_json(genkd):
    done = genkd("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and [entry["what"] for entry in found] == CHECKS
    assert all(set(entry) == {"what", "ok", "found"} and entry["ok"] is True for entry in found)
    said = findings(done.stdout)
    assert said["torch"]["found"].startswith(torch.__version__)
    assert "libx264" in said["encoders"]["found"] and "hevc" in said["decoders"]["found"]
    assert "pyav" in said["one clip"]["found"] and "dali" in said["one clip"]["found"]


def broken():
    raise RuntimeError("no clip came out\nat decoder 3")


@pytest.mark.parametrize(
    ("place", "name", "value", "what", "words"),
    [
        (torch, "__version__", "2.9.1+cu128", "torch", "genkd needs 2.10 or newer"),
        (sys, "version_info", (3, 14, 0, "final", 0), "python", "genkd runs on 3.10 to 3.13"),
        (doctor, "_ENCODERS", ("libx264", "nocodec"), "encoders", "without nocodec"),
        (doctor, "_DECODERS", ("h264", "nocodec"), "decoders", "without nocodec"),
        (doctor, "_one_clip", broken, "one clip", "RuntimeError: no clip came out"),
    ],
)
def test_what_is_not_fine_is_exit_code_1_and_named(monkeypatch, place, name, value, what, words):
    monkeypatch.setattr(doctor, "_one_clip", lambda: (True, "stood in for"))
    code, text = ask("--json")
    assert code == 0
    with monkeypatch.context() as patch:
        patch.setattr(place, name, value)
        code, text = ask("--json")
        table = ask()
    assert code == table[0] == 1
    assert [entry["what"] for entry in json.loads(text) if not entry["ok"]] == [what]
    assert words in findings(text)[what]["found"] and "decoder 3" not in text
    assert any(line.split()[1:2] == ["no"] for line in table[1].splitlines() if what in line)


@pytest.mark.parametrize(
    ("version", "fine", "words"),
    [
        (None, True, "not used"),
        (90701, True, "9.7.1; before 9.15"),
        (90800, False, "163539"),
        (91002, False, "9.10.2: bf16 conv3d is wrong on very large inputs"),
        (91300, True, "166643"),
        (91500, True, "9.15.0"),
        (92100, True, "9.21.0"),
        (8907, True, "8907; before 9.15"),
    ],
)
def test_known_bad_versions_of_cudnn_are_named(version, fine, words):
    ok, found = doctor.of_cudnn(version)
    assert ok is fine and words in found and ("slow" in found) == (fine and version is not None and version < 91500)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "not installed (optional)"),
        ({"__init__.py": "raise ImportError('pyramid')"}, "another project of that name"),
        ({"__init__.py": ""}, "another project of that name"),
        ({"__init__.py": "", "optimizers.py": ""}, "NVIDIA's, built without fused optimizers"),
        ({"__init__.py": "", "optimizers.py": "FusedSGD = 1"}, "NVIDIA's, with fused optimizers"),
    ],
)
def test_apex_is_nvidias_or_said_to_be_another(tmp_path, monkeypatch, files, words):
    for name, text in files.items():
        (tmp_path / "apex").mkdir(exist_ok=True)
        (tmp_path / "apex" / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)] + [place for place in sys.path if place])
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        ok, found = doctor._apex()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            del sys.modules[name]
    assert ok and found.startswith(words)
