"""The notebook under colab/: in step with its twin in plain text, and run from top to bottom."""

import json
import os
import re
import subprocess
import types
from pathlib import Path

import jupytext
import nbclient
import pytest
from conftest import ROOT

NOTEBOOK, TWIN = ROOT / "colab/lmscale.ipynb", ROOT / "colab/lmscale.py"


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_the_notebook_and_its_twin_are_in_step():
    """Where this fails: jupytext --sync colab/lmscale.py, or of the file that was edited."""
    assert cells(NOTEBOOK) == cells(TWIN)
    for path in (NOTEBOOK, TWIN):
        assert jupytext.read(path).metadata["jupytext"]["formats"] == "ipynb,py:percent", path


def test_no_outputs_are_committed():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_links_lead_to_files_of_the_repository():
    text = TWIN.read_text()
    repository = re.search(r'^REPOSITORY = "(.+)"$', text, re.MULTILINE)[1]
    assert text.count(f'"{repository}"') == 1
    linked = re.findall(rf"\({repository}/blob/main/(.+?)\)", text)
    assert len(linked) == text.count("](")
    badge = re.search(
        r"\(https://colab\.research\.google\.com/github/(.+?)/blob/main/(.+?)\)",
        (ROOT / "README.md").read_text(),
    )
    assert repository == f"https://github.com/{badge[1]}"
    for name in (*linked, badge[2]):
        assert (ROOT / name).is_file(), name


REQUIREMENTS = ["jax>=0.10,<0.13", "flax>=0.12", "tqdm>=4", 'pytest>=8; extra == "test"']


@pytest.fixture
def install(monkeypatch):
    """Runs the cell that installs, on a machine that has certain packages; a list of its pips."""
    source = next(s for kind, s in cells(TWIN) if kind == "code")

    def run(installed: dict, origin: str | None, fails: str = "") -> list[list[str]]:
        from importlib import metadata, util

        calls = []

        def version(name):
            if name not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        def pip(command, **_):
            assert command[1:5] == ["-m", "pip", "install", "--quiet"]
            calls.append(command[5:])
            if "--constraint" in command:
                path = Path(command[command.index("--constraint") + 1])
                calls[-1] = ["held", *path.read_text().split(), *command[7:]]
            else:
                installed["lmscale_jax"] = "0.1.0"
            return types.SimpleNamespace(returncode=bool(fails), stdout="", stderr=fails)

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "requires", lambda name: REQUIREMENTS)
        spec = types.SimpleNamespace(origin=origin)
        monkeypatch.setattr(util, "find_spec", lambda name: spec)
        monkeypatch.setattr(subprocess, "run", pip)
        exec(source, {"__name__": "cell"})
        return calls

    return run


FROM = "git+https://github.com/lmscale/lmscale_jax"
HAS = {"jax": "0.11.0", "jaxlib": "0.11.0", "flax": "0.12.1"}


def test_what_is_there_is_not_installed_again(install, capsys):
    assert install(HAS | {"lmscale_jax": "0.1.0", "tqdm": "4.1"}, "lmscale_jax/__init__.py") == []
    assert capsys.readouterr().out == ""


def test_an_installed_jax_is_held_where_it_is(install, capsys):
    """A directory of that name, found without an origin, is not the package."""
    calls = install(dict(HAS), None)
    assert calls[0] == ["--no-deps", FROM]
    assert calls[1:] == [["held", "jax==0.11.0", "jaxlib==0.11.0", "tqdm>=4"]]


def test_without_jax_pip_chooses_one(install):
    assert install({}, None) == [[FROM]]


def test_another_jax_is_named_in_one_line(install, capsys):
    """So is what is missing where the package is there already; nothing is changed."""
    old = HAS | {"jax": "0.7.2", "lmscale_jax": "0.1.0"}
    assert install(old, "lmscale_jax/__init__.py") == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "jax<0.13,>=0.10" in lines[0] and "0.7.2" in lines[0]
    assert "tqdm>=4" in lines[1] and "none" in lines[1]


def test_what_pip_says_is_shown(install):
    with pytest.raises(RuntimeError, match="no such commit"):
        install(dict(HAS), None, fails="no such commit")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after its cells ran, with small settings, and where they ran."""
    folder = tmp_path_factory.mktemp("notebook")
    environment = {
        "LMSCALE_NOTEBOOK": "small",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    notebook = jupytext.read(NOTEBOOK)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=os.environ | environment)
    return notebook, folder / "runs_small"


def outputs(notebook) -> list[dict]:
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


@pytest.mark.slow
def test_every_cell_runs(executed):
    notebook, _ = executed
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for out in outputs(notebook) if out.output_type == "error"]


@pytest.mark.slow
def test_the_runs_left_their_records(executed):
    _, runs = executed

    def read(name):
        return json.loads((runs / name).read_text())

    assert read("quickstart/run.json")["status"] == "finished"
    assert read("coordinates/coord_check.json")["passed"]
    assert not read("coordinates_control/coord_check.json")["passed"]
    assert read("ladder/verdict.json")["runs"] == {"finished": 6}
    scores = read("quickstart/eval.json")
    assert scores["complete"] and len(scores["mur"]["mean"]) == len(scores["layer_drop"]) == 2


@pytest.mark.slow
def test_figures_page_and_lines_are_inline(executed):
    notebook, _ = executed
    shown = [out.data for out in outputs(notebook) if out.output_type == "display_data"]
    images = [data["image/png"] for data in shown if "image/png" in data]
    assert len(images) == 6 and min(map(len, images)) > 10_000
    pages = [data["text/html"] for data in shown if "text/html" in data]
    assert len(pages) == 1 and "Does SwiGLU beat GeLU" in pages[0] and "data:image/png" in pages[0]
    # Self-contained, as where the notebook is shown elsewhere there are no files beside it.
    assert not re.findall(r"(?:src|href)=&quot;(?!data:)", pages[0])
    text = "".join(out.text for out in outputs(notebook) if out.output_type == "stream")
    for line in ("unigram model ", "bigram model ", "this run ", "perplexity ", "verdict: "):
        assert f"\n{line}" in text, line
