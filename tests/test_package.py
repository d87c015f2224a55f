import ast
import subprocess
import sys
from pathlib import Path

import genkd

ROOT = Path(genkd.__file__).parent


def sources():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    names = files.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("[!.]*.py")]
    return [ROOT / name for name in names if not name.startswith(".venv")]


def test_the_root_is_the_package_and_is_imported_once():
    assert Path(__file__).resolve().parents[1] == ROOT.resolve()
    copies = [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == genkd.__file__]
    assert copies == ["genkd"]
    assert "pipelines" not in sys.modules and "configs" not in sys.modules


def test_importing_the_package_imports_nothing_else():
    code = "import sys, genkd; print([n for n in ('torch', 'av', 'nvidia', 'click') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_inside_the_package_are_relative():
    # Scripts that other interpreters run by their paths, so they have no package to be relative to.
    outside = ("setup.py", "shard_contenders.py", "loader_contenders.py")
    inside = [path for path in sources() if "tests" not in path.relative_to(ROOT).parts and path.name not in outside]
    assert len(inside) > 40
    for path in inside:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "genkd" for alias in node.names), path
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] != "genkd", path


def test_files_stay_readable():
    for path in sources():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_parts_depend_in_one_direction():
    """preprocessing and pipelines share the shard format only; models know neither."""
    everybodys = ("errors", "configs", "files", "storage", "remote_storage", "thumos_files", "kernels")
    allowed = {"pipelines": {"preprocessing.shards"}, "models": set(), "preprocessing": set(), "configs": set()}
    for folder, exceptions in allowed.items():
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
                    part = node.module.split(".")[0]
                    fine = part in everybodys or node.module in exceptions
                    assert fine, f"{path.name} imports {node.module}"
