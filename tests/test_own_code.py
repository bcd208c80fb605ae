"""A user's own code as the value FILE.py:NAME of a key: loaded by content, checked, recorded."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import flags, record, run, train_losses

from lmscale_jax.config import own_code
from lmscale_jax.config.own_keys import adopted
from lmscale_jax.config.resolve import derived, fingerprint, resolve, validate
from lmscale_jax.data.batches import Batch
from lmscale_jax.errors import InputError
from lmscale_jax.files import write_json
from lmscale_jax.ladders import plan, results
from lmscale_jax.train import run_dir
from lmscale_jax.train.setup import TrainStep, build_setup

EXAMPLES = Path(__file__).parents[1] / "examples"

SAME_AS_RELU2 = '''
"""The choice relu2, as a user would write it."""
import jax
import jax.numpy as jnp
import activation
from lmscale_jax.api import Dense, nnx, pointwise

class Same(nnx.Module):
    def __init__(self, model, settings):
        self.up = Dense({"embed": model.d_model}, {"mlp": model.d_ff}, model.bias)
        self.down = Dense({"mlp": model.d_ff}, {"embed": model.d_model}, model.bias, residual=True)

    def __call__(self, x_NxD, context):
        return self.down(pointwise(activation.squared)(self.up(x_NxD, context)), context)
'''
ACTIVATION = """
import jax, jax.numpy as jnp
def squared(x):
    return jnp.square(jax.nn.relu(x))
"""


@pytest.fixture
def same(tmp_path) -> Path:
    """A folder with the choice relu2 as a user's file, and a module that it imports."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "same.py").write_text(SAME_AS_RELU2)
    (folder / "activation.py").write_text(ACTIVATION)
    return folder


def test_own_module_steps_to_the_bits_of_the_same_choice(small, same):
    ids = jnp.arange(256, dtype=jnp.int32).reshape(8, 32) % 64
    states = []
    for mlp in (f"{same}/same.py:Same", "relu2"):
        config = resolve(small(model__mlp=mlp, model__stack="scan"), 64)
        setup = build_setup(config, 0)
        state, take = setup.begin(), TrainStep(setup)
        for _ in range(2):
            state, metrics = take(state, Batch(ids, jnp.roll(ids, -1, 1)))
        states.append(jax.device_get((state, metrics)))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states)))


@pytest.mark.slow
def test_own_module_trains_to_the_bits_of_the_same_choice(small, settings, same, tmp_path):
    """Through the command and with its parameters' ids; only the name of the run differs."""
    common = ["--config=configs/base.py", *flags(settings | {"log.tensorboard": False})]
    ours_at, choice = tmp_path / "a", tmp_path / "b"
    for workdir, mlp in ((ours_at, f"{same}/same.py:Same"), (choice, "relu2")):
        status, _, err = run("main", *common, f"--config.model.mlp={mlp}", f"--workdir={workdir}")
        assert status == 0, err
    assert train_losses(ours_at) == train_losses(choice)
    ours, theirs = record(ours_at), record(choice)
    assert ours["final"] == theirs["final"] and ours["counts"] == theirs["counts"]
    assert ours["config_hash"] != theirs["config_hash"]
    (code,) = ours["own"]
    assert code["files"] == ["activation.py", "same.py"] and theirs["own"] == []
    assert code["source"] == f"source/{code['sha256'][:12]}/same.py"
    assert ours["config"]["model"]["mlp"] == f"{code['sha256'][:12]}/same.py:Same"
    # The run directory is complete: the files of the user are no longer needed.
    shutil.rmtree(same)
    arguments = ("evaluate", f"--workdir={ours_at}", "--suites=perplexity")
    status, _, err = run(*arguments)
    assert status == 2 and f"--trust_code={code['sha256'][:12]} runs it" in err, err
    assert "source/" in err and "same.py, 18 lines" in err
    status, _, err = run(*arguments, "--trust_code=0123456789ab")
    assert status == 2 and "--trust_code=" in err
    status, _, err = run(*arguments, f"--trust_code={code['sha256'][:12]}")
    assert status == 0, err
    assert json.loads((ours_at / "eval.json").read_text())["val_loss"] == ours["final"]["val_loss"]
    # Nor may the copy be changed afterwards.
    with (ours_at / code["source"]).open("a") as file:
        file.write("\n")
    status, _, err = run(*arguments, f"--trust_code={code['sha256'][:12]}")
    assert status == 2 and "was changed" in err


def test_code_is_named_by_its_content(small, same, tmp_path):
    def name(folder: Path) -> str:
        return fingerprint(derived(small(model__mlp=f"{folder}/same.py:Same"), 64))

    moved = shutil.copytree(same, tmp_path / "elsewhere")
    assert name(moved) == name(same)
    (moved / "unrelated.py").write_text("x = 1\n")
    assert name(moved) == name(same)
    for edited in ("same.py", "activation.py"):
        text = (moved / edited).read_text()
        (moved / edited).write_text(text + "# edited\n")
        assert name(moved) != name(same)
        (moved / edited).write_text(text)


def test_two_files_of_one_name_do_not_meet(small, same, tmp_path):
    """Neither in `sys.modules` nor through the modules that they import."""
    other = shutil.copytree(same, tmp_path / "other")
    (other / "activation.py").write_text(ACTIVATION.replace("jnp.square", "jnp.abs"))
    entries = [
        own_code.load(own_code.adopt(f"{folder}/same.py:Same")).entry for folder in (same, other)
    ]
    squares = [vars(__import__("sys").modules[e.__module__])["activation"] for e in entries]
    assert float(squares[0].squared(3.0)) == 9.0 and float(squares[1].squared(3.0)) == 3.0


FAULTS = {
    "no file": ("none.py:X", {}, "no file"),
    "no name": ("poly.py:Poly", {}, "poly.py defines no Poly; it has PolyMLP"),
    "no class": ("wrong.py:FUNCTION", {}, "wrong.py:FUNCTION is a int, and not a class of modules"),
    "no module": ("wrong.py:Plain", {}, "wrong.py:Plain is a type, and not a class of modules"),
    "syntax": ("syntax.py:X", {}, "syntax.py:2: "),
    "import fails": ("fails.py:X", {}, "fails.py:1: in <module>: ModuleNotFoundError"),
    "misspelt key": (
        "poly.py:PolyMLP",
        {"own.poly.powr": 2},
        "config.own.poly.powr is not a key; did you mean own.poly.power?",
    ),
    "another group": (
        "poly.py:PolyMLP",
        {"own.pol.power": 2},
        "config.own.pol is not a key; did you mean own.poly?",
    ),
    "no keys": (
        "bare.py:Bare",
        {"own.bare.size": 2},
        "config.own.bare.size is not a key; code of this config declares no key",
    ),
    "range": ("poly.py:PolyMLP", {"own.poly.power": 0}, "config.own.poly.power=0 must be at least"),
    "choice": ("poly.py:PolyMLP", {"own.poly.share": "all"}, "must be one of learned, none"),
    "duration": ("wrong.py:Lasting", {}, "its key a is a duration, which keys of code cannot be"),
    "keys": ("wrong.py:Keys", {}, "wrong.py:Keys: KEYS must map names to lmscale_jax.api.Key"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line(fault, small, tmp_path):
    from lmscale_jax.config.resolve import apply_overrides, resolve
    from lmscale_jax.model.build import declare_specs

    value, changes, message = FAULTS[fault]
    shutil.copy(EXAMPLES / "poly.py", tmp_path)
    (tmp_path / "syntax.py").write_text("x = 1\ndef X(:\n")
    (tmp_path / "fails.py").write_text("import no_such_module\n")
    (tmp_path / "bare.py").write_text(
        "from lmscale_jax.api import nnx\nclass Bare(nnx.Module): 1\n"
    )
    (tmp_path / "wrong.py").write_text(
        "from lmscale_jax.api import nnx\nFUNCTION = 1\nclass Plain: pass\n"
        "class Keys(nnx.Module): KEYS = {'a': 1}\n"
        "from lmscale_jax.api import Key\n"
        "class Lasting(nnx.Module): KEYS = {'a': Key('5%', 'length', duration=True)}\n"
    )
    with pytest.raises(InputError) as caught:
        config = apply_overrides(small(), {"model.mlp": f"{tmp_path}/{value}"} | changes)
        declare_specs(resolve(config, 64), "cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_only_some_keys_take_code(small):
    with pytest.raises(InputError, match=r"config.model.head='x.py:X' takes no code of your own"):
        validate(small(model__head="x.py:X"))
    with pytest.raises(InputError, match=r"or FILE.py:NAME, a class"):
        validate(small(model__mlp="gelo"))


def test_an_error_in_the_code_names_its_line(small, settings, tmp_path):
    (tmp_path / "broken.py").write_text(
        "from lmscale_jax.api import nnx\nclass B(nnx.Module):\n"
        "    def __init__(self, model, settings): self.size = model.no_such\n"
    )
    status, _, err = run(
        "main", "--config=configs/base.py", *flags(settings), f"--workdir={tmp_path / 'w'}",
        f"--config.model.mlp={tmp_path}/broken.py:B",
    )  # fmt: skip
    assert status == 2 and err.count("\n") == 1
    assert f"{tmp_path}/broken.py:3: in __init__: AttributeError" in err


@pytest.mark.slow
def test_a_ladder_of_own_code(ladder, tmp_path):
    """Its cells are trained in workers, from the copy; an edited file is another arm."""
    shutil.copy(EXAMPLES / "poly.py", tmp_path)
    config = ladder(rungs__sizes=(1e5,), rungs__held_out=0.0, seeds=1, tokens__amounts=(0.2,))
    mlp = own_code.here(tmp_path / "my_ladder.py") + "poly.py:PolyMLP"
    config.switch = ("model.mlp", "own.poly", "objective.terms")
    config.arms = {"gelu": {}, "poly": {"model": {"mlp": mlp}, "own": {"poly": {"power": 3}}}}
    config.arms.poly.objective = {"terms": (f"{EXAMPLES}/zloss.py:z_loss",)}
    config.run.model.stack = "unroll"
    planned = plan.make_plan(config, print)
    (cell,) = [c for c in planned.cells if c.arm == "poly"]
    assert cell.overrides["own.poly.power"] == 3 and str(tmp_path) not in str(cell.overrides)
    base = next(c for c in planned.cells if c.arm == "gelu")
    assert abs(cell.counts["non_embedding"] / base.counts["non_embedding"] - 1) < 0.005
    workdir = tmp_path / "ladder"
    workdir.mkdir()
    plan.write_plan(planned, None, workdir)
    (tmp_path / "poly.py").write_text((tmp_path / "poly.py").read_text() + "# edited\n")
    again = plan.make_plan(config, print)
    with pytest.raises(InputError, match="arm poly was trained by other code"):
        plan.check_plan(again, workdir)
    status, _, err = run("ladders.worker", f"--workdir={workdir}", f"--ids={cell.id}")
    assert status == 2 and "--trust_code=" in err
    digest, of_term = (cell.overrides[key][:12] for key in ("model.mlp", "objective.terms"))
    arguments = (f"--workdir={workdir}", f"--ids={cell.id}", f"--trust_code={digest},{of_term}")
    status, _, err = run("ladders.worker", *arguments)
    assert status == 0, err
    assert record(plan.cell_dir(workdir, cell.id))["config"]["own"] == {
        "poly": {"power": 3, "share": "learned"}, "zloss": {"weight": 1e-4},
    }  # fmt: skip
    assert (workdir / "source" / digest / "poly.py").is_file()


def test_adopted_leaves_other_configs_alone(small):
    config = small()
    assert adopted(config) is config


@pytest.fixture
def begun(ladder, tmp_path):
    """(plan, workdir) of a small ladder of which two runs are recorded as finished."""
    config = ladder(rungs__sizes=(1e5,), rungs__held_out=0.0, seeds=1, tokens__amounts=(0.2,))
    planned, workdir = plan.make_plan(config, print), tmp_path / "ladder"
    for cell in planned.cells:
        fields = {
            "status": "finished", "code": {"sha256": "0123456789ab"}, "tokens": cell.tokens,
            "counts": cell.counts, "flops_per_token": cell.flops_per_token,
            "flops_total": cell.flops, "config": {"model": cell.shape},
            "final": {"val_loss": 3.0, "val_tokens": 10}, "data": {"val_fingerprint": "x"},
        }  # fmt: skip
        plan.cell_dir(workdir, cell.id).mkdir(parents=True)
        write_json(plan.cell_dir(workdir, cell.id) / "run.json", fields)
    return planned, workdir


def change_record(workdir, cell, **fields) -> None:
    path = plan.cell_dir(workdir, cell.id) / "run.json"
    write_json(path, json.loads(path.read_text()) | fields)


def test_counts_come_from_the_records(begun):
    planned, workdir = begun
    cell = planned.cells[0]
    assert results.result_rows(planned, workdir)[0]["n_non_embedding"] > 0
    change_record(workdir, cell, counts={"total": 7, "non_embedding": 5, "embedding": 2})
    with pytest.raises(InputError, match=f"run {cell.id} .* has n_total=7, and the plan"):
        results.result_rows(planned, workdir)


def test_runs_of_other_code_of_the_package_are_not_mixed(begun):
    planned, workdir = begun
    ours, (first, second) = run_dir.package_hash(), planned.cells
    assert results.code_warnings(planned, workdir) == []
    # Nothing to train: nothing is mixed.
    results.check_code(planned, planned.cells, workdir, "")
    change_record(workdir, second, status="running")
    with pytest.raises(InputError, match=r"2 run.s., such as .* were trained by other code"):
        results.check_code(planned, planned.cells, workdir, "")
    results.check_code(planned, planned.cells, workdir, "a comment was corrected")
    change_record(workdir, second, status="finished", code={"sha256": ours})
    (warning,) = results.code_warnings(planned, workdir)
    assert f"1 by 0123456789ab, 1 by {ours}" in warning["message"] and first.id != second.id
    assert "a comment was corrected" in warning["message"]
