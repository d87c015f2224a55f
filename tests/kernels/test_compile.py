"""Machine code for every architecture without a GPU; the cache on disk; which implementation runs, and why."""

import itertools
import logging
import sys
import time

import pytest
import torch

from genkd.errors import UserError
from genkd.kernels import attention_kd, backend
from genkd.kernels import compile as compiler
from genkd.tests.support import processes

pytest.importorskip("cuda.core")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
POOL = {"WIDTH": 1, "LANES": 1, "ELEMENT": "bf16", "SEGMENT": "float"}


def variants(types=(("bf16", "float", "bf16"),), widths=(8,), with_made=(1,)):
    """Macros of every kernel, as autocast's types need them."""
    yield "boundary_max_pool", POOL
    for (feature, made, attention), width in itertools.product(types, widths):
        for with_teacher in with_made:
            yield "generative_kd", {
                "WIDTH": width, "HAS_TEACHER": with_teacher, "FEATURE": feature, "RECONSTRUCTION": made,
                "TAUGHT": made, "LATENT": attention, "ATTENTION": attention,
            }  # fmt: skip
        for last, maps, reconstruction in itertools.product((0, 1), (0, 1), with_made):
            yield "attention_kd", {
                "WIDTH": width, "LAST": last, "MAPS": maps, "HAS_RECONSTRUCTION": reconstruction,
                "FEATURE": feature, "RECONSTRUCTION": made, "ATTENTION": attention,
            }  # fmt: skip


def assert_lean(arch, **which):
    seen = set()
    for name, defines in variants(**which):
        started = time.monotonic()
        code, resources = compiler.build(name, defines, arch)
        assert code[:4] == b"\x7fELF" and time.monotonic() - started < 60
        for kernel, used in resources.items():
            assert used.spill_stores == used.spill_loads == used.stack == 0, (arch, kernel, defines, used)
            # 3 blocks of 256 threads fit a multiprocessor's 65,536 registers.
            assert 0 < used.registers <= 80, (kernel, used)
            assert used.shared <= 48 * 1024
            seen.add(kernel)
    assert seen == {
        "attention_kd_sums", "attention_kd_finish", "attention_kd_losses", "attention_kd_maps", "attention_kd_dots",
        "attention_kd_slopes", "attention_kd_attention_grad", "attention_kd_grad", "generative_kd_sums",
        "generative_kd_finish",
        "generative_kd_grad", "boundary_max_pool", "boundary_max_pool_grad",
    }  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_without_spills(arch):
    assert_lean(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_variant_compiles_without_spills(arch):
    types = [("bf16", "float", "bf16"), ("bf16",) * 3, ("fp16",) * 3, ("float",) * 3]
    assert_lean(arch, types=types, widths=(1, 8), with_made=(0, 1))


def test_a_compile_error_carries_the_log():
    with pytest.raises(compiler.Failed, match=r"(?s)boundary_max_pool.cu does not compile for sm_90.*quux.*undefined"):
        compiler.build("boundary_max_pool", POOL | {"ELEMENT": "quux"}, "sm_90")
    with pytest.raises(compiler.Failed, match="does not compile for sm_12"):
        compiler.build("boundary_max_pool", POOL, "sm_12")


def test_the_cache_is_used_and_a_damaged_entry_is_built_again(tmp_path, monkeypatch, caplog):
    code = compiler.cached("boundary_max_pool", POOL, "sm_90", tmp_path)
    (entry,) = tmp_path.iterdir()
    built = []
    real = compiler.build
    monkeypatch.setattr(compiler, "build", lambda *arguments: built.append(arguments) or real(*arguments))
    assert compiler.cached("boundary_max_pool", POOL, "sm_90", tmp_path) == code and not built
    whole = entry.read_bytes()
    for damaged in (whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        entry.write_bytes(damaged)
        built.clear()
        assert compiler.cached("boundary_max_pool", POOL, "sm_90", tmp_path) == code
        assert len(built) == 1 and entry.read_bytes() == whole
    assert caplog.text.count("is damaged; it is compiled again") == 3


def test_the_key_is_of_all_that_decides_the_code(tmp_path, monkeypatch):
    def entries(**macros):
        compiler.cached("boundary_max_pool", POOL | macros, arch, tmp_path)
        return len(list(tmp_path.iterdir()))

    arch = "sm_90"
    assert entries() == 1 and entries(SEGMENT="bf16") == 2
    arch = "sm_80"
    assert entries() == 3
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 9))
    assert entries() == 4
    real = compiler.source
    monkeypatch.setattr(compiler, "source", lambda name: real(name) + "// changed\n")
    assert entries() == 5
    assert "block_sum" in real("boundary_max_pool"), "the header is part of the source"


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert compiler.cached("boundary_max_pool", POOL, "sm_90", tmp_path / "file" / "kernels")[:4] == b"\x7fELF"
    assert "GENKD_CACHE names another folder" in caplog.text


def test_ranks_may_compile_at_the_same_time(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "from hashlib import sha256\nfrom genkd.kernels import compile as c\n"
        f"print(sha256(c.cached('boundary_max_pool', {POOL!r}, 'sm_90')).hexdigest())\n"
    )
    environment = {"GENKD_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    ranks = [processes.start(script, env=environment) for _ in range(3)]
    assert len({rank.communicate()[0] for rank in ranks}) == 1 and not any(rank.returncode for rank in ranks)
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv("GENKD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(compiler.cache_folder()) == "/x/genkd/kernels"
    monkeypatch.setenv("GENKD_CACHE", "/y")
    assert str(compiler.cache_folder()) == "/y/kernels"


def on_a_gpu(monkeypatch, capability=(9, 0), nvrtc=(13, 0), driver=(13, 1)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: nvrtc)
    monkeypatch.setattr(compiler, "driver_version", lambda: driver)
    compiler.check.cache_clear()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"nvrtc": (12, 9)}, None),
        ({"capability": (7, 5)}, "need compute capability 8.0; Some GPU has 7.5"),
        ({"nvrtc": (13, 0), "driver": (12, 8)}, "NVRTC is of CUDA 13, the driver of CUDA 12"),
    ],
)
def test_gpus_that_cannot_run_the_kernels(monkeypatch, given, said):
    on_a_gpu(monkeypatch, **given)
    if said is None:
        compiler.check(0)
    else:
        with pytest.raises(compiler.Failed, match=said):
            compiler.check(0)
    compiler.check.cache_clear()


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch):
    import cuda.bindings.nvrtc as nvrtc

    def missing():
        raise RuntimeError("libnvrtc.so is not here\nmore lines")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(compiler.Failed, match=r"NVRTC cannot be loaded \(libnvrtc.so is not here\); pip install"):
        compiler.nvrtc_version()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(compiler.Failed, match=r"cuda-core cannot be imported.*pip install cuda-core"):
        compiler.build("boundary_max_pool", POOL, "sm_90")


def test_auto_falls_back_with_one_warning_and_cuda_does_not(monkeypatch, caplog):
    def failing(*_):
        raise compiler.Failed("no compiler here")

    monkeypatch.setattr(compiler, "library", failing)
    monkeypatch.setattr(backend, "require", lambda name, device_type: None)
    features, attention = torch.rand(1, 4, 2, 2, 2), torch.rand(1, 4, 2)
    with backend.selected("cuda"), pytest.raises(UserError, match=r"kernels\.backend=cuda: no compiler here"):
        attention_kd.attention_kd(features, attention)

    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

    with caplog.at_level(logging.WARNING):
        assert [backend.run(OnGpu(), failing, lambda: "torch") for _ in range(3)] == ["torch"] * 3
        assert caplog.text.count("torch runs in place of a CUDA kernel: no compiler here") == 1
    with backend.selected("torch"):
        assert backend.run(OnGpu(), failing, lambda: "torch") == "torch"


def test_cuda_on_a_cpu_and_unknown_backends_are_refused():
    features, attention = torch.rand(1, 4, 2, 2, 2), torch.rand(1, 4, 2)
    with (
        backend.selected("cuda"),
        pytest.raises(UserError, match=r"kernels\.backend=cuda needs a CUDA device, not cpu"),
    ):
        attention_kd.attention_kd(features, attention)
    with pytest.raises(UserError, match=r"kernels\.backend=triton is not known; choose auto, cuda or torch"):
        backend.select("triton")
