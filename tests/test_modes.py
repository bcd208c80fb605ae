"""Every choice of every string-valued key is implemented, by one table, and does something."""

import dataclasses
import functools
import importlib.util
import pkgutil
from pathlib import Path

import jax
import pytest

import lmscale_jax
from lmscale_jax.config import key as modes
from lmscale_jax.config.keys import get, keys
from lmscale_jax.config.ladder_keys import LADDER
from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.train import diagnostics
from lmscale_jax.train.setup import build_setup

ROOT = Path(__file__).parents[1]
KEYS = dict(keys())


def _modes_of(spec: dict) -> dict:
    """{path: Key} of the string-valued keys with choices."""
    return {p: key for p, key in keys(spec) if key.choices and isinstance(key.default, str)}


ALL = _modes_of(base.SPEC) | _modes_of(LADDER)
CODE_KEYS = {path for path, key in KEYS.items() if key.code}
PROGRAM = [p for p in _modes_of(base.SPEC) if p.split(".")[0] not in ("data", "log")]

SMALL = {
    "model.n_layers": 4,
    "model.d_model": 32,
    "model.n_heads": 4,
    "model.vocab_size": 64,
    "model.stack": "scan",  # one block is traced, not four
    "data.seq_len": 16,
    "train.batch_size": 4,
    "train.steps": 40,
}
# What a key's choices need beside its `when`, at every choice.
WITH_KEY = {
    "model.gate_place": {"model.attn_gate": "elementwise"},
    "model.softcap_form": {"model.logit_softcap": 15.0},
    "model.residual_dtype": {"model.dtype": "bfloat16"},
}
# What a choice needs beside its key's `when`.
WITH_CHOICE = {
    ("parametrization.name", "mup"): {"parametrization.base_width": 16},
    ("parametrization.name", "completep"): {
        "parametrization.base_width": 16,
        "parametrization.base_depth": 2,
    },
    ("freeze.mode", "fixed"): {"freeze.blocks": "1"},
    ("mur.tau_kind", "quantile"): {"mur.tau": 0.5},
    ("model.window_layers", "all"): {"model.window": 8},
    ("model.window_layers", "ends"): {"model.window": 8},
    ("model.window_layers", "fourth"): {"model.window": 8},
}
# Pairs of choices whose programs are the same on one CPU device, and why.
SAME = {
    ("model.matmul", "dtype", "fp8"): "a CPU has no float8 products; documented fallback",
    ("model.attention", "auto", "saved"): "auto chooses saved on CPU",
    ("model.stack", "auto", "unroll"): "auto chooses unroll on CPU",
    ("optim.muon_dtype", "auto", "float32"): "auto chooses float32 on CPU",
}
# Choices that are refused on CPU, and what the message says.
REFUSED = {
    ("model.attention", "cudnn"): "it runs on NVIDIA GPUs",
    ("model.attention", "splash"): "it runs on TPU",
    ("model.attention", "tokamax"): "it runs on NVIDIA GPUs",
}
# Keys with several tables, and why.
SEVERAL_TABLES = {
    "data.source": "reading documents (sources.py) and opening shards (prepare.py) are two layers",
    "model.mask": "visible_keys.py counts what the mask of skip_connections.py leaves",
    **dict.fromkeys(
        ("model.gelu", "model.mlp", "model.positions"),
        "hf.py has the names that Hugging Face uses",
    ),
}


@functools.cache
def tables() -> dict[str, list[modes.Modes]]:
    """Every table of the package by key. Commands, which define flags of one name, hold none."""
    for module in pkgutil.walk_packages(lmscale_jax.__path__, "lmscale_jax."):
        spec = importlib.util.find_spec(module.name)
        if "__main__" not in Path(spec.origin).read_text():
            importlib.import_module(module.name)
    return modes.TABLES


def settings(path: str, choice: str) -> dict:
    """The small config with that choice, and all that makes it valid."""
    changes = SMALL | WITH_KEY.get(path, {})

    def enable(path: str) -> None:
        for other, allowed in KEYS[path].when.items():
            if changes.get(other, KEYS[other].default) not in allowed:
                changes[other] = allowed[0]
            enable(other)

    enable(path)
    changes[path] = choice
    for item in list(changes.items()):
        changes |= WITH_CHOICE.get(item, {})
    return changes


@functools.cache
def program(changes: tuple) -> str:
    """The training step and the initial state of a config, as text; with all that it measures."""
    config = base.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(dict(changes))
    setup = build_setup(resolve(config), 0)
    due = tuple(
        name
        for name in diagnostics.due_measurements(setup.config, setup.config.log.every)
        if name != "norms"
    )
    text = setup.lower_step(due).as_text()
    return f"{text}\n{jax.make_jaxpr(setup.model.init)(jax.random.key(0))}"


def program_of(path: str, choice: str) -> str:
    return program(tuple(sorted(settings(path, choice).items())))


def message(path: str, choice: str) -> str:
    """What is said of a choice that only the specification has."""
    (table,) = tables()[path][:1]
    holder = importlib.import_module(table.module)
    name = next(n for n, value in vars(holder).items() if value is table)
    file = Path(holder.__file__).relative_to(ROOT).as_posix()
    return f"config.{path}={choice!r} is declared but not implemented: {name} in {file} has "


@pytest.mark.parametrize("path", ALL)
def test_one_table_holds_every_choice_of_a_key(path):
    matches = tables().get(path, [])
    where = [table.module for table in matches]
    assert matches, f"config.{path} is looked up in no table"
    assert len(matches) == 1 or path in SEVERAL_TABLES, f"config.{path} has tables in {where}"
    for table in matches:
        for choice in ALL[path].choices:
            table[choice]  # raises InputError, which names the table, where it is missing
        assert set(table) == set(ALL[path].choices), f"{where}: a choice that no config can name"


def test_no_table_is_of_a_key_that_does_not_exist():
    assert set(tables()) <= set(ALL) | CODE_KEYS
    assert set(SEVERAL_TABLES) <= {path for path, group in tables().items() if len(group) > 1}


def test_tables_of_keys_that_take_code_adapt_it():
    """And no others, so that a key says in its declaration whether it takes FILE.py:NAME."""
    adapting = {path for path, group in tables().items() if any(t.adapt for t in group)}
    assert adapting == CODE_KEYS
    assert all(table.adapt for path in CODE_KEYS for table in tables()[path])


@pytest.mark.parametrize("path", PROGRAM)
def test_every_choice_is_another_program(path):
    programs = {}
    for choice in KEYS[path].choices:
        if (path, choice) in REFUSED:
            with pytest.raises(InputError, match=REFUSED[path, choice]):
                program_of(path, choice)
        else:
            programs[choice] = program_of(path, choice)
    names = list(programs)
    equal = {
        (a, b) for i, a in enumerate(names) for b in names[i + 1 :] if programs[a] == programs[b]
    }
    assert equal == {(a, b) for key, a, b in SAME if key == path}


@pytest.mark.parametrize("path", PROGRAM)
def test_a_choice_that_is_only_declared_is_refused(path, monkeypatch):
    """Whatever reads the key looks it up in the key's table: no other choice takes its place."""
    *groups, name = path.split(".")
    spec = get(base.SPEC, ".".join(groups))
    declared = dataclasses.replace(spec[name], choices=(*spec[name].choices, "zzz"))
    monkeypatch.setitem(spec, name, declared)
    with pytest.raises(InputError) as refused:
        program_of(path, "zzz")
    assert str(refused.value).startswith(message(path, "zzz"))
