"""The rules of the house that a machine can check."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale_jax.config.resolve import validate
from lmscale_jax.ladders import grid

ROOT = Path(__file__).parents[1]
SKIPPED = {".git", ".ruff_cache", ".pytest_cache", "__pycache__", "build", "runs", "logs"}
PYTHON_FOLDERS = ("lmscale_jax", "configs", "examples", "tests", "benchmarks", "launch", "colab")
MAX_FILE, MAX_FUNCTION = 400, 60


def project_files() -> list[Path]:
    """Every file of the project, without what is built, cached or installed."""
    files = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = SKIPPED.intersection(parts) or parts[0].startswith(".venv")
        if path.is_file() and not hidden and not any(p.endswith(".egg-info") for p in parts):
            files.append(path)
    return files


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON = [p for p in project_files() if p.suffix == ".py" and p.parent != ROOT]
CONFIGS = [
    p
    for p in PYTHON
    if name(p).startswith("configs/") and p.name not in ("__init__.py", "laddering.py")
]


def imports(path: Path) -> set[str]:
    """Dotted names of all modules of the package that a file imports, wherever it does so."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}: relative import"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {module for module in modules if module.startswith("lmscale_jax.")}


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") < MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 < MAX_FUNCTION, node.name


def test_no_file_is_named_for_nothing():
    assert not [p for p in PYTHON if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_nothing_imports_a_command():
    commands = {p.stem for p in (ROOT / "lmscale_jax").glob("*.py") if "__main__" in p.read_text()}
    assert "main" in commands
    for path in (ROOT / "lmscale_jax").rglob("*.py"):
        wrong = {m for m in imports(path) if m.split(".")[1] in commands}
        assert not wrong, f"{name(path)} imports {wrong}"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_every_config_is_valid(path):
    module = "lmscale_jax." + name(path)[: -len(".py")].replace("/", ".")
    config = importlib.import_module(module).get_config()
    ladder = path.parent.name == "ladders"
    grid.check_ladder(config) if ladder else validate(config)


def test_heavy_packages_are_imported_only_where_used():
    heavy = ["orbax", "grain", "transformers", "matplotlib", "tensorboardX", "scipy.optimize"]
    check = "import sys; print([m for m in {} if m in sys.modules])"
    for modules, unwanted in (
        ("lmscale_jax.main, lmscale_jax.config.resolve", [*heavy, "jax", "flax"]),
        ("lmscale_jax.model.build, lmscale_jax.train.explain", heavy),
    ):
        code = f"import {modules}; {check.format(unwanted)}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]", modules


DOCUMENTS = [p for p in project_files() if p.suffix == ".md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_documents_name_no_missing_files(path):
    text = path.read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in linked if not (path.parent / link).exists()]
    folders = "|".join((*PYTHON_FOLDERS, "docs"))
    for named in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/.-]*\.(?:py|md|ipynb|sh)\b", text):
        if not (ROOT / named).exists():
            missing.append(named)
    assert not missing


def test_the_readme_marks_the_two_commands_that_ci_runs():
    text = (ROOT / "README.md").read_text()
    for mark in ("train", "test"):
        block = re.search(rf"<!-- ci: {mark} -->\n```\w*\n(.+?)\n```", text, re.DOTALL)
        assert block, mark
        assert "\n" not in block[1], f"{mark} is one line"


def test_no_file_names_a_machine_or_a_registry():
    # In pieces, so that this file passes its own test.
    unwanted = [
        "/wo" + "rk/",
        "/tmp/" + "venv",
        "/ro" + "ot/",
        "py" + "pi.org",
        "pythonho" + "sted",
    ]
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        matches = [word for word in unwanted if word in text]
        assert not matches, f"{name(path)}: {matches}"
