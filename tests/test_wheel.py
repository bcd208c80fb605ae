"""The package as a user has it: a wheel in an environment of its own, commands from elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, flags

pytestmark = pytest.mark.slow

OWN = """
from lmscale_jax.configs import base, laddering
from lmscale_jax.configs.ladders import quickstart

def get_config():
    config = base.get_config()
    config.model.n_layers = 3
    assert laddering.get_config(config).run.model.n_layers == 3
    assert quickstart.get_config().baseline == "gelu"
    return config
"""


def call(*command, **more) -> str:
    """What a command prints that must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **more)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built in a copy, so that nothing is left in this directory."""
    source = tmp_path_factory.mktemp("source")
    skipped = shutil.ignore_patterns("__pycache__")
    for folder in ("lmscale_jax", "configs", "examples"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=skipped)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    call(sys.executable, "-m", "pip", "wheel", *offline, f"--wheel-dir={source}/dist", source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """A Python that has the wheel, and for the rest what this one has."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True, with_pip=False)
    bases = {"base": str(home), "platbase": str(home)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=bases))
    offline = ("--no-deps", "--no-index")
    call(sys.executable, "-m", "pip", "install", *offline, f"--target={packages}", wheel)
    # A path in a .pth file, unlike a site directory, brings no .pth files of its own: an editable
    # installation of this checkout does not follow.
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (packages / "rest.pth").write_text("\n".join(sorted(here)))
    return home / "bin" / "python"


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's directory with nothing but a package of its own named configs."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").write_text('OWNER = "the user"\n')
    return tmp_path


@pytest.fixture
def lmscale(python, project):
    """Runs the installed `lmscale` in the user's directory: (status, stdout, stderr)."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # The installed script, whose first line names the Python that installed it.
    (script,) = python.parents[1].rglob("bin/lmscale")

    def run(verb: str, *arguments) -> tuple[int, str, str]:
        command = [str(python), str(script), verb, *map(str, arguments)]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_wheel_holds_the_configs_inside_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info.file_size for info in archive.infolist()}
    assert not [name for name in files if name.startswith("configs/")]
    for path in (ROOT / "configs").rglob("*.py"):
        name = f"lmscale_jax/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        assert files[name] == path.stat().st_size, name


def test_a_users_package_configs_is_the_users_own(python, project):
    text = "import configs, lmscale_jax; print(configs.OWNER, lmscale_jax.__file__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    out = call(python, "-c", text, cwd=project, env=environment)
    assert out.startswith("the user ")
    assert str(python.parents[1]) in out


def test_shipped_configs_are_found_from_any_directory(lmscale, project):
    chips = ("--explain", "--topology=H100:8")
    status, out, err = lmscale("train", "--config=configs/quickstart.py", *chips)
    assert (status, err) == (0, "")
    assert "* d_model 128 lmscale_jax/configs/quickstart.py" in " ".join(out.split())
    # A colon and an argument, in the other spelling.
    status, out, err = lmscale("train", "--config", "configs/mur.py:gpt2_50m,loss", *chips)
    assert (status, err) == (0, "")
    assert "* mode 'loss' lmscale_jax/configs/mur.py:gpt2_50m,loss" in " ".join(out.split())

    # A user's own file of that name comes first, and may import the shipped ones.
    (project / "configs/quickstart.py").write_text(OWN)
    status, out, err = lmscale("train", "--config=configs/quickstart.py", *chips)
    assert (status, err) == (0, "")
    assert "* n_layers 3 configs/quickstart.py" in " ".join(out.split())

    status, _, err = lmscale("train", "--config=configs/nosuch.py", *chips)
    assert status == 2
    assert err.startswith("error: --config=configs/nosuch.py: no such file")


def test_a_change_of_ones_own_begins_with_new(lmscale, project):
    """In a directory with nothing: an example, its ladder, and what the ladder would train."""
    status, out, err = lmscale("new", "mlp")
    assert (status, err) == (0, "") and "written my_ladder.py" in out
    (project / "my_mlp.py").write_text((project / "my_mlp.py").read_text().replace("2", "3"))
    status, out, err = lmscale("ladder", "my_ladder.py", "--dry_run")
    assert (status, err) == (0, "")
    assert "my_mlp  anchor" in out and "relu2   held_out" in out
    assert "model.mlp   activation" in lmscale("help", "model.mlp")[1]
    assert "configs/ladders/quickstart.py" in lmscale("configs")[1]


def test_commands_find_the_config_that_they_take_by_default(lmscale, project, corpus):
    # Messages that only a config that was read can give.
    status, _, err = lmscale("coord_check", "--workdir=coords", "--widths=64,100,256")
    assert (status, err.count("\n")) == (2, 1), err
    assert "--widths=100 is not a multiple of the head size 32" in err
    status, _, err = lmscale("lr_transfer", "--workdir=transfer", "--widths=16,40")
    assert (status, err.count("\n")) == (2, 1), err
    assert "--widths=40 is not a multiple of the head size 16" in err

    text = ("--source=text", f"--path={corpus}", "--tokenizer=bytes", "--out=shards")
    status, _, err = lmscale("prepare", *text)
    assert (status, err) == (0, "")
    assert (project / "shards/manifest.json").exists()


def test_a_ladder_is_planned_and_a_run_is_trained(lmscale, project, settings):
    # Both configs train a tokenizer.
    changes = {name: value for name, value in settings.items() if name != "data.tokenizer"}
    text = ("data.source", "data.path", "data.cache")
    of_runs = flags({f"run.{name}": changes[name] for name in text})
    ladder = ("--config=configs/ladders/quickstart.py", "--workdir=ladder", "--dry_run")
    status, out, err = lmscale("ladder", *ladder, *of_runs)
    assert (status, err) == (0, "")
    assert "swiglu" in out

    status, _, err = lmscale(
        "train", "--config=configs/quickstart.py", "--workdir=run", *flags(changes)
    )
    assert status == 0, err
    status, _, err = lmscale("report", "--workdir=run")
    assert status == 0, err
