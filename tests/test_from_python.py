"""The functions of `import lmscale_jax as lm`, on one small run, and the command `lmscale`."""

import ast
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import lmscale_jax as lm
from lmscale_jax import __main__ as console
from lmscale_jax import new
from lmscale_jax.config.key_help import key_help
from lmscale_jax.config.keys import SPEC, keys
from lmscale_jax.config.ladder_keys import FREE, LADDER
from lmscale_jax.ladders import executors, machine, plan
from lmscale_jax.ladders import run as ladder_run
from lmscale_jax.ladders.executors import EndedJob


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """A run that was trained from Python: (its directory, what `train` returned)."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    changes = settings | {"eval.sample": 0, "eval.baselines": False, "train.steps": 6,
               "log.per_layer": False, "log.tensorboard": False}  # fmt: skip
    config = lm.load_config("configs/base.py", changes)
    return workdir, lm.train(config, workdir, say=lambda line: None)


def test_the_import_loads_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import lmscale_jax as lm; dir(lm); lm.__version__"
    )
    code += "; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) <= {"lmscale_jax", "types", "importlib", "warnings"}, done


def test_functions_stay_functions_beside_modules_of_their_names():
    """The import system sets an attribute of the package for `lmscale_jax.train`."""
    import lmscale_jax.train.step as step

    assert step.__name__ == "lmscale_jax.train.step"
    assert all(callable(getattr(lm, name)) for name in lm.EXPORTS)
    assert set(lm.EXPORTS) <= set(dir(lm))


def test_train_returns_the_record(run):
    workdir, record = run
    assert record == json.loads((workdir / "run.json").read_text())
    assert record["status"] == "finished"


def test_a_loaded_run_computes_the_loss_of_its_record(run):
    """Cross-entropy in numpy, of logits by `apply`, over the held-out tokens in the shards."""
    workdir, record = run
    trained = lm.load(workdir)
    assert trained.step == 6 and trained.config.train.steps == 6
    length, count = trained.config.data.seq_len, record["final"]["val_tokens"]
    ids = trained._run.data.val.read(0, count + 1).astype(int)
    total = 0.0
    for first in range(0, count, length):
        tokens = ids[first : min(first + length, count) + 1]
        (logits_TxV,) = np.asarray(trained.apply(tokens[None, :-1]), np.float64)
        log_total = np.logaddexp.reduce(logits_TxV, axis=-1)
        total += (log_total - logits_TxV[np.arange(len(tokens) - 1), tokens[1:]]).sum()
    assert total / count == pytest.approx(record["final"]["val_loss"], rel=1e-5)
    text = "def f(x):"
    assert trained.tokenizer.decode(trained.tokenizer.encode_batch([text])[0]) == text
    written = trained.generate(text, tokens=4, temperature=0)
    assert written.startswith(text) and written == trained.generate(text, 4, temperature=0, seed=1)


def test_what_was_measured_is_plain_values(run, tmp_path):
    workdir, record = run
    scores = lm.evaluate(workdir, ["perplexity"], say=lambda line: None)
    assert scores == json.loads((workdir / "eval.json").read_text())
    assert scores["val_loss"] == pytest.approx(record["final"]["val_loss"])
    (row,) = lm.results(workdir)
    assert (row["run_id"], row["val_loss"]) == ("first", record["final"]["val_loss"])
    columns = lm.metrics(workdir)
    assert columns["step"] == [2, 4, 6] and len(set(map(len, columns.values()))) == 1


def test_bad_input_is_an_exception(run, tmp_path):
    workdir, _ = run
    for call, message in (
        (lambda: lm.load_config("nowhere.py"), "nowhere.py: no such file"),
        (lambda: lm.load_config("configs/base.py", {"optim.lrr": 1.0}), "did you mean optim.lr?"),
        (lambda: lm.train(lm.load_config("configs/base.py", {"seed": "x"}), tmp_path), "type int"),
        (lambda: lm.train(lm.load_config("configs/base.py"), workdir), "holds a run of another"),
        (lambda: lm.load(tmp_path), "holds no run.json"),
        (lambda: lm.results(tmp_path), "holds no run.json"),
        (lambda: lm.evaluate(workdir, ["taste"]), "taste"),
    ):
        with pytest.raises(lm.InputError, match=message):
            call()


@pytest.mark.parametrize(
    ("failure", "ended"),
    [
        (None, EndedJob(["a"], 0, "")),
        (lm.RunFailed("diverged at\nstep 3"), EndedJob(["a"], 1, "diverged at step 3")),
        (SystemExit(130), EndedJob(["a"], 130, "stopped")),
    ],
)
def test_jobs_train_in_this_process(monkeypatch, failure, ended):
    """One after the other; a signal that stopped a run reaches the scheduler."""

    def train_job(workdir, ids):
        if failure:
            raise failure

    signals = []
    monkeypatch.setattr(executors.worker, "train_job", train_job)
    monkeypatch.setattr(executors.os, "kill", lambda process, number: signals.append(number))
    executor = executors.make_executor({"name": "here"}, ROOT)
    assert executor.submit([["a"], ["b"]]) == [["b"]]
    assert (executor.poll(), executor.poll()) == ([ended], [])
    assert [int(number) for number in signals] == ([2] if ended.status == 130 else [])


@pytest.mark.parametrize(("holds", "name"), [(True, "here"), (False, "local")])
def test_a_ladder_is_trained_where_the_accelerator_is(monkeypatch, tmp_path, holds, name):
    names = []
    monkeypatch.setattr(machine, "holds_accelerator", lambda: holds)
    monkeypatch.setattr(
        ladder_run, "run_ladder", lambda config, *_, **__: names.append(config.executor.name)
    )
    lm.ladder(lm.load_config("configs/ladders/quickstart.py"), tmp_path, only=["gelu"], say=str)
    assert names == [name]


def lmscale(*arguments, module="lmscale_jax"):
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_verb_is_the_command_of_its_module():
    direct = lmscale("--workdir=nowhere", module="lmscale_jax.report")
    assert lmscale("report", "nowhere") == direct
    assert direct[0] == 2 and "holds no run.json" in direct[2]
    # All files of the package that are commands have a verb.
    commands = {p.stem for p in (ROOT / "lmscale_jax").glob("*.py") if "__main__" in p.read_text()}
    assert set(console.VERBS.values()) == commands - {"__main__", "cli", "from_python"}


@pytest.fixture
def says(monkeypatch, capsys):
    """Runs `lmscale` in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lmscale", *arguments])
        try:
            console.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_help_describes_every_key_and_names_the_nearest(says):
    for spec in (SPEC, LADDER):
        for path, key in keys(spec):
            text = "\n".join(key_help(path))
            assert key.doc in text and repr(key.default) in text and f"--config.{path}=" in text
            assert all(repr(choice) in text for choice in key.choices or ())
            assert all(other in text for other in key.when)
    assert says("help", "optim.lr")[1].startswith("optim.lr   peak learning rate")
    assert says("help", "run.optim.lr") == says("help", "--config.optim.lr=3") == says("help", "lr")
    group = says("help", "schedule")[1].splitlines()
    assert [line.split()[0] for line in group] == [f"schedule.{name}" for name in SPEC["schedule"]]
    for name in FREE:
        assert says("help", name)[0] == 0
    status, out, err = says("help", "optim.lrr")
    assert (status, out, err.count("\n")) == (2, "", 1) and "did you mean optim.lr" in err
    assert "did you mean model.mlp" in says("help", "modle.mlp")[2]
    assert "lmscale help lists" in says("help", "qqqq")[2]
    assert "use lmscale train" in says("trian")[2]
    listing = says()[1]
    assert all(word in listing for word in (*console.VERBS, *SPEC, *LADDER))


@pytest.mark.parametrize(
    "kind", ["mlp", *(pytest.param(k, marks=pytest.mark.slow) for k in new.KINDS if k != "mlp")]
)
def test_new_writes_a_change_and_its_ladder(says, kind, tmp_path, monkeypatch):
    """Both files are read, the arms are planned, and nothing is ever overwritten."""
    monkeypatch.chdir(tmp_path)
    assert says("new", kind)[0] == 0
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(texts) == {f"my_{kind}.py", "my_ladder.py"}
    config = lm.load_config("my_ladder.py", {"rungs.sizes": (25e3,), "rungs.held_out": 0.0})
    ladder_plan = plan.make_plan(config, say=lambda line: None)
    arms = {str(ladder_plan.config(c, tmp_path).to_dict()): c.arm for c in ladder_plan.cells}
    assert set(arms.values()) == {config.baseline, f"my_{kind}"} and len(arms) >= 2
    counts = [cell.counts["non_embedding"] for cell in ladder_plan.cells]
    assert max(counts) < 1.01 * min(counts)
    status, _, err = says("new", kind)
    assert (status, err.count("\n")) == (2, 1) and "exists" in err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == texts
    assert says("new", kind, "another")[0] == 0 and (tmp_path / "another_ladder.py").exists()
    assert "own.another" in (tmp_path / "another_ladder.py").read_text()


def test_new_names_the_kinds(says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ((), ("mpl",), ("mlp", "a b"), ("mlp", "a", "b")):
        status, _, err = says("new", *arguments)
        assert (status, err.count("\n")) == (2, 1) and "mlp" in err
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_enough_ends_a_command_quietly():
    code = "from lmscale_jax import cli; cli.run_command(lambda: print('a\\n' * 99999))"
    command = f'{sys.executable} -c "{code}" | head -c 1'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("a", "")


def test_configs_lists_every_config_with_its_first_line(says):
    status, out, _ = says("configs")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    for path in (ROOT / "configs").rglob("*.py"):
        if path.stem not in ("__init__", "laddering"):
            name = path.relative_to(ROOT).as_posix()
            assert lines.pop(name) == ast.get_docstring(ast.parse(path.read_text())).split("\n")[0]
    assert (status, lines) == (0, {})
