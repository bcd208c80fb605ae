"""Environments: no home directory, other users, encodings, long names, read-only places.

Each gives one line with what to do, or works.
"""

import errno
import math
import os
import pwd
import shutil
import subprocess
import sys

import pytest
from conftest import PATHS, ROOT, flags, run

from lmscale_jax import cli
from lmscale_jax.config.resolve import reset_unused, validate
from lmscale_jax.configs import base, quickstart
from lmscale_jax.data import mixtures, prepare, sources
from lmscale_jax.errors import InputError
from lmscale_jax.evals.perplexity import loss_summary, loss_text
from lmscale_jax.files import atomic_write, check_writable, comma_separated, matching_paths

LONG = "a" * 300


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in /etc/passwd, as in a container."""

    def absent(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("LMSCALE_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", absent)
    monkeypatch.setattr(pwd, "getpwnam", absent)


def test_without_a_home_the_cache_must_be_named(homeless, monkeypatch, tmp_path):
    data = base.get_config().data
    with pytest.raises(InputError, match=r"HOME set.*LMSCALE_CACHE to a directory such as /"):
        prepare.cache_root(data)
    monkeypatch.setenv("LMSCALE_CACHE", str(tmp_path))
    assert prepare.cache_root(data) == tmp_path
    data.cache = "~somebody/x"
    with pytest.raises(InputError, match="no home directory"):
        prepare.cache_root(data)
    data.source, data.path = "text", "~/corpus/*.txt"
    with pytest.raises(InputError, match="without ~"):
        sources.source_files(data)


def test_places_that_cannot_be_written_are_named_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for folder, reason in (
        (tmp_path / LONG, "File name too long"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "file is a file"),
        (tmp_path / "\udce9", "PYTHONUTF8=1"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            check_writable(folder, "--workdir")
        assert str(caught.value).startswith("--workdir=")
    check_writable(tmp_path / "new" / "deeper", "--workdir")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"--workdir=.* cannot be written; use --out=/"):
        check_writable(tmp_path, "--workdir", remedy_flag="--out")


def test_errors_of_the_environment_are_one_line_and_bugs_are_not():
    def line(number):
        return cli.line_of(OSError(number, os.strerror(number), "/data/x"))

    assert line(errno.EROFS) == (
        "/data/x: Read-only file system; use a path that this user may read and write", 2,
    )  # fmt: skip
    assert line(errno.ENOSPC)[1] == 1
    assert line(errno.ENOENT) is None
    assert cli.line_of(ValueError("a bug")) is None


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    atomic_write(path, "text")
    assert path.read_text() == "text" and len(list(tmp_path.iterdir())) == 1


def test_commas_and_brackets_are_part_of_names_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("br [v2], x", "plain", "a,b"):
        (tmp_path / folder).mkdir()
        for name in ("1.txt", "2.txt", "[3].txt"):
            (tmp_path / folder / name).write_text("x")

    def names(paths):
        return [str(path) for path in sources.find_files(paths, "data.path", (".txt",))]

    all_three = [f"br [v2], x/{name}" for name in ("1.txt", "2.txt", "[3].txt")]
    assert names("br [v2], x") == names("br [v2], x/*.txt") == all_three
    assert names("br [v2], x/[3].txt") == ["br [v2], x/[3].txt"]
    assert names("plain/[12].txt") == ["plain/1.txt", "plain/2.txt"]
    assert names("br [v2], x/*, plain/1.txt,a,b") == [*all_three, "plain/1.txt",
        "a,b/1.txt", "a,b/2.txt", "a,b/[3].txt"]  # fmt: skip
    assert len(names("**/1.txt")) == 3
    for missing in ("", "plain,,a,b", "plain,nothing/*"):
        with pytest.raises(InputError, match="file there"):
            names(missing)
    assert [str(p) for p, _ in mixtures.parse_parts("a,b=3,plain")] == ["a,b", "plain"]
    assert matching_paths("nothing/*") == []
    assert comma_separated("a,b,c", lambda item: False) == ["a", "b", "c"]


def test_none_is_no_path_and_no_value(tmp_path, monkeypatch):
    config = base.get_config()
    config.data.cache = "None"
    with pytest.raises(InputError, match=r"config.data.cache='None' .* use ''"):
        validate(config)
    parser = cli._PathParser()
    for nothing in ("None", ""):
        with pytest.raises(ValueError, match="names no path"):
            parser.parse(nothing)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parser.parse("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("seed", [2**31, 2**32, 10**20])
def test_seeds_that_jax_refuses_are_refused_before(seed):
    config = base.get_config()
    config.seed = seed
    with pytest.raises(InputError, match=r"config\.seed=.* at most 2147483647; use 0"):
        validate(config)


def test_an_override_resets_what_the_file_sets_for_another_choice():
    config = quickstart.get_config()
    config.data.tokenizer = "bytes"
    reset_unused(config, {"data.tokenizer"})
    validate(config)
    # What the user sets remains an error.
    config.data.vocab_size = 1024
    reset_unused(config, {"data.tokenizer", "data.vocab_size"})
    with pytest.raises(InputError, match="vocab_size=1024 is unused"):
        validate(config)
    # A fault of the file remains one too.
    config = base.get_config()
    config.mur.tau = 0.3
    reset_unused(config, {"data.seq_len"})
    with pytest.raises(InputError, match=r"mur\.tau"):
        validate(config)


def test_texts_that_mean_a_value_are_understood_in_advice():
    assert cli._meant("1e2", 1000) == 100
    assert cli._meant("yes", False) is True and cli._meant("Off", True) is False
    assert cli._meant("many", 7) == 7 and cli._meant("inf", 7) == 7


def test_one_window_has_a_loss_and_no_error():
    import numpy as np

    scores = loss_summary(np.array([12.0]), np.array([4.0]), None)
    assert math.isnan(scores["val_loss_sem"])
    text = loss_text(scores)
    assert "nan" not in text and "±" not in text and "one window" in text
    two = loss_summary(np.array([12.0, 9.0]), np.array([4.0, 4.0]), None)
    assert "±" in loss_text(two)


# --- As real processes ----------------------------------------------------------------------------


def without_rights(*command) -> list[str]:
    """The command without the right of root to write everywhere; skips where that is impossible."""
    if os.getuid():
        return list(command)
    if not (setpriv := shutil.which("setpriv")):
        pytest.skip("root, and no setpriv")
    return [setpriv, "--inh-caps=-all", "--bounding-set=-all", *command]


@pytest.mark.slow
def test_a_run_in_poor_environments(tmp_path, settings):
    """Trains with an ASCII terminal; then reads the run from a place that cannot be written."""
    place, out = tmp_path / "place", tmp_path / "out"
    place.mkdir()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain = os.environ | ascii_only | {"PYTHONPATH": PATHS}
    plain |= {"LMSCALE_CACHE": str(tmp_path)}

    def call(module, *arguments, wrap=lambda *command: list(command)):
        command = wrap(sys.executable, "-m", f"lmscale_jax.{module}", *arguments)
        return subprocess.run(command, cwd=place, env=plain, capture_output=True, text=True)

    config = f"--config={ROOT / 'configs/base.py'}"
    flagfile = place / "flags.txt"
    small = flags(settings | {"train.steps": 2, "log.tensorboard": False})
    flagfile.write_text("\n".join(["--config=configs/base.py", *small]))
    done = call("main", "--flagfile=flags.txt", "--workdir=run")
    assert done.returncode == 0, done.stderr
    assert "? 0." in done.stdout  # the plus-minus sign
    done = call("main", config, f"--workdir={LONG}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    for folder in (place, place / "run"):
        folder.chmod(0o555)
    try:
        for module, arguments in (
            ("evaluate", ["--workdir=run", "--suites=perplexity"]),
            ("report", ["--workdir=run"]),
            ("main", ["--flagfile=flags.txt", "--workdir=new"]),
        ):
            done = call(module, *arguments, wrap=without_rights)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), (module, done.stderr)
            assert "--workdir=" in done.stderr and "cannot be written; use --" in done.stderr
        # The advice works.
        done = call("report", "--workdir=run", f"--out={out}", wrap=without_rights)
        assert done.returncode == 0 and (out / "index.html").exists(), done.stderr
    finally:
        for folder in (place, place / "run"):
            folder.chmod(0o755)
    status, _, err = run("main", config, "--workdir=None")
    assert (status, err.count("\n")) == (2, 1) and "names no path" in err
