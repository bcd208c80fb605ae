"""Every kind of bad config is one line that names the field, its value and one that works."""

import ast
import re

import pytest
from conftest import run
from ml_collections import ConfigDict

from lmscale_jax.config.durations import steps_of, total_steps
from lmscale_jax.config.keys import keys
from lmscale_jax.config.resolve import (
    apply_overrides,
    derived,
    differences,
    fingerprint,
    resolve,
    validate,
)
from lmscale_jax.configs.base import get_config
from lmscale_jax.errors import InputError


def changed(**changes) -> ConfigDict:
    """The base config with other values, of any type; keyword arguments have __ for dots."""
    config = get_config()
    for key, value in changes.items():
        *groups, name = key.split("__")
        node = config
        for group in groups:
            node[group] = node.get(group, ConfigDict())
            node = node[group]
        with node.ignore_type():
            node[name] = value
    return config


# What is wrong, then what the message must hold: field, value, remedy.
BAD = {
    "misspelt key": ({"optim__lrr": 1e-3}, ["optim.lrr", "did you mean optim.lr?"]),
    "misspelt group": ({"optin__lr": 1e-3}, ["optin", "did you mean optim"]),
    "unknown key": ({"model__zzzzzzzz": 1}, ["model.zzzzzzzz", "configs/base.py"]),
    "wrong group": ({"train__lr": 1e-3}, ["train.lr", "did you mean optim.lr?"]),
    "group as value": ({"optim": 3}, ["optim=3", "group"]),
    "wrong type": ({"model__d_model": "wide"}, ["model.d_model='wide'", "int", "256"]),
    "float for int": ({"train__batch_size": 8.5}, ["train.batch_size=8.5", "int", "32"]),
    "number for switch": ({"model__bias": 1}, ["model.bias=1", "bool", "False"]),
    "switch for number": ({"model__n_layers": True}, ["model.n_layers=True", "int", "4"]),
    "None": ({"optim__lr": None}, ["optim.lr=None", "float", "0.001"]),
    "negative": ({"model__n_layers": -1}, ["model.n_layers=-1", "at least 1", "4"]),
    "zero": ({"model__d_model": 0}, ["model.d_model=0", "at least 1", "256"]),
    "zero heads": ({"model__n_heads": 0}, ["model.n_heads=0", "at least 1", "4"]),
    "zero batch": ({"train__batch_size": 0}, ["train.batch_size=0", "at least 1", "32"]),
    "zero rate": ({"optim__lr": 0.0}, ["optim.lr=0.0", "above 0.0", "0.001"]),
    "too high": ({"model__dropout": 1.0}, ["model.dropout=1.0", "at most 0.9", "0.0"]),
    "not a number": ({"optim__lr": float("nan")}, ["optim.lr=nan", "finite", "0.001"]),
    "infinite": ({"optim__lr": float("inf")}, ["optim.lr=inf", "finite", "0.001"]),
    "no such choice": ({"model__mlp": "gelo"}, ["model.mlp='gelo'", "swiglu", "'gelu'"]),
    "bad duration": ({"schedule__warmup": "soon"}, ["schedule.warmup='soon'", "5%"]),
    "negative duration": ({"schedule__warmup": "-5"}, ["schedule.warmup='-5'", "5%"]),
    "heads": ({"model__n_heads": 6}, ["model.n_heads=6", "d_model=256", "use 4"]),
    "more heads than width": ({"model__n_heads": 512}, ["model.n_heads=512", "use 256"]),
    "grouped heads": ({"model__n_kv_heads": 3}, ["model.n_kv_heads=3", "n_heads=4", "use 2"]),
    "more groups than heads": ({"model__n_kv_heads": 8}, ["model.n_kv_heads=8", "use 4"]),
    "odd RoPE": (
        {"model__positions": "rope", "model__head_dim": 63},
        ["model.head_dim=63", "use 64"],
    ),
    "window beyond positions": (
        {"model__max_seq_len": 128},
        ["data.seq_len=256", "max_seq_len=128", "use 128"],
    ),
    "accumulation": ({"train__accum": 5}, ["train.accum=5", "batch_size=32", "use 4"]),
    "accumulation beyond batch": ({"train__accum": 64}, ["train.accum=64", "use 32"]),
    "unused key": ({"model__rope_theta": 5e5}, ["model.rope_theta", "unused", "positions='rope'"]),
    "unused cooldown": ({"schedule__cooldown": "5%"}, ["schedule.cooldown='5%'", "'wsd'"]),
    "unused path": ({"data__path": "x.txt"}, ["data.path='x.txt'", "unused", "'text'"]),
    "steps and tokens": ({"train__tokens": 1e6}, ["train.tokens=1000000.0", "train.steps=0"]),
    "neither": ({"train__steps": 0}, ["train.steps=0", "train.tokens=1e8"]),
    "no path": ({"data__source": "text"}, ["data.path=''", "text"]),
    "kernel without dropout": (
        {"model__attention": "xla", "model__dropout": 0.1},
        ["model.attention='xla'", "0.1", "'plain'"],
    ),
    "long warm-up": ({"schedule__warmup": "2000"}, ["schedule.warmup='2000'", "1000", "5%"]),
}


@pytest.mark.parametrize(("changes", "parts"), BAD.values(), ids=BAD)
def test_bad_config_is_one_line_with_field_value_and_remedy(changes, parts):
    with pytest.raises(InputError) as caught:
        validate(changed(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for part in parts:
        assert part in message


def test_a_missing_key_is_named():
    config = get_config()
    del config.optim["lr"]
    with pytest.raises(InputError, match=r"optim\.lr is missing"):
        validate(config)


def test_remedies_work():
    # Every remedy of the form "use N" for the field that is named.
    tried = 0
    for changes, _ in BAD.values():
        with pytest.raises(InputError) as caught:
            validate(changed(**changes))
        remedy = re.match(r"config\.([\w.]+)=.*?; use (\d[\d.]*)", str(caught.value))
        if remedy:
            value = ast.literal_eval(remedy[2])
            validate(changed(**(changes | {remedy[1].replace(".", "__"): value})))
            tried += 1
    assert tried >= 8


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("200", 200),
        ("200 steps", 200),
        ("5%", 50),
        ("0.1%", 1),
        ("8192 tokens", 1),
        ("1M tokens", 123),
    ],
)
def test_durations(text, steps):
    # 1,000 steps of 32 x 256 = 8,192 tokens.
    config = resolve(changed(schedule__warmup=text))
    assert config.schedule.warmup == steps
    assert type(config.schedule.warmup) is int


def test_parts_of_a_run_are_exact():
    """Against whole numbers: every per cent of nine lengths, and tenths of a million tokens."""
    for total in (50, 100, 200, 300, 500, 1000, 2000, 4000, 12345):
        config = changed(train__steps=total)
        for percent in range(1, 100):
            config.schedule.warmup = f"{percent}%"
            assert steps_of(config)["schedule.warmup"] == -(-total * percent // 100)
    config = changed(train__steps=10**6, data__seq_len=100, train__batch_size=1)
    for tenths in range(1, 1000):
        config.schedule.warmup = f"{tenths // 10}.{tenths % 10}M tokens"
        assert steps_of(config)["schedule.warmup"] == tenths * 1000


def test_tokens_are_rounded_up_to_whole_steps():
    config = changed(train__steps=0, train__tokens=8193.0)
    assert total_steps(config) == 2
    assert resolve(config).train.tokens == 0.0


def test_resolving_fills_every_derived_value_and_leaves_the_original():
    config = changed(model__mlp="swiglu", model__n_heads=8)
    model = resolve(config, vocab_size=1000).model
    assert (model.n_kv_heads, model.head_dim, model.d_ff) == (8, 32, 704)
    assert (model.max_seq_len, model.vocab_size) == (256, 1000)
    assert config.model.d_ff == 0
    # What is derived is a valid config, and derives itself.
    again = derived(derived(config, 1000), 1000)
    assert again.to_dict() == derived(config, 1000).to_dict()


def test_what_is_recorded_has_the_users_durations_and_what_is_computed_by_has_steps():
    config = changed(schedule__warmup="1M tokens", mur__mode="loss", mur__ramp="1%")
    recorded, resolved = derived(config, 1000), resolve(config, 1000)
    assert recorded.schedule.warmup == "1M tokens"
    assert (resolved.schedule.warmup, resolved.mur.ramp, resolved.mur.warmup) == (123, 10, 50)
    changed_paths = differences(recorded.to_dict(), resolved.to_dict())
    assert changed_paths == [path for path, key in keys() if key.duration]
    # The name of a run is that of its texts; the other form has none.
    with pytest.raises(ValueError, match="texts"):
        fingerprint(resolved)


def test_a_vocabulary_below_the_tokenizers_is_refused():
    with pytest.raises(InputError, match=r"model\.vocab_size=100 .* 300; use 0 or 320"):
        resolve(changed(model__vocab_size=100), vocab_size=300)


def test_the_name_of_a_run_follows_only_what_can_change_its_numbers():
    base = fingerprint(get_config())
    assert fingerprint(changed(checkpoint__every=7, log__wandb="offline")) == base
    assert fingerprint(changed(optim__lr=2e-3)) != base


def test_a_late_key_renames_nothing_at_its_default():
    """Runs from before it have no such key: they have its default, and the same name."""
    late = [path for path, key in keys() if key.late]
    before, now = get_config().to_dict(), get_config()
    for path in late:
        group, _, name = path.partition(".")
        del before[group][name]
    assert late and differences(before, now.to_dict()) == []
    config = changed(optim__name="normuon", optim__muon_neurons="longer")
    assert fingerprint(config) != fingerprint(changed(optim__name="normuon"))
    assert differences(before, config.to_dict()) == ["optim.name", "optim.muon_neurons"]


def refused(tmp_path, *arguments) -> str:
    """The one line on stderr of a training command that must be refused before it starts."""
    workdir = tmp_path / "run"
    status, _, err = run("main", f"--workdir={workdir}", *arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert "Traceback" not in err
    assert not workdir.exists()
    return err


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--config.optim.lrr=1e-3", ["optim.lrr", "did you mean optim.lr?"]),
        ("--config.train.lr=1e-3", ["train.lr", "did you mean optim.lr?"]),
        ("--config.model.d_model=wide", ["model.d_model=wide", "int", "use 256"]),
        ("--config.model.n_heads=6", ["model.n_heads=6", "use 4"]),
        ("--config.model.n_layers=-1", ["model.n_layers=-1", "at least 1"]),
        ("--config.model.rope_theta=5e5", ["model.rope_theta", "unused"]),
        ("--config.train.tokens=1e6", ["train.tokens", "train.steps"]),
        ("--config.optim=3", ["config.optim=3", "group"]),
        ("--config.model.bias=2", ["config.model.bias=2", "bool", "use False"]),
        ("--worddir=x", ["worddir", "workdir"]),
        ("stray", ["stray", "--name=value"]),
    ],
)
def test_the_command_refuses_a_bad_flag(tmp_path, flag, parts):
    err = refused(tmp_path, "--config=configs/base.py", flag)
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("config.optim.lrr = 1e-3", ["config.optim.lrr", "did you mean optim.lr?"]),
        ("config.model.d_model = 'wide'", ["bad.py:4", "d_model", "int"]),
        ("config.model.n_heads = 6", ["model.n_heads=6", "use 4"]),
        ("config.model.n_heads = 1 / 0", ["bad.py:4", "division by zero"]),
        ("return None", ["bad.py", "NoneType", "ConfigDict"]),
        ("config.model.n_heads = = 2", ["bad.py:4", "invalid syntax"]),
    ],
)
def test_the_command_refuses_a_bad_config_file(tmp_path, line, parts):
    file = tmp_path / "bad.py"
    file.write_text(
        f"from lmscale_jax.configs import base\ndef get_config():\n    config = base.get_config()\n"
        f"    {line}\n    return config\n"
    )
    err = refused(tmp_path, f"--config={file}")
    for part in parts:
        assert part in err


def test_a_config_without_its_groups_is_refused_before_it_is_explained(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 0})\n"
    )
    err = refused(tmp_path, f"--config={file}", "--explain")
    assert "config.model is missing; start from lmscale_jax.configs.base.get_config()" in err


@pytest.mark.parametrize("config", ["configs/nosuch.py", ""])
def test_the_command_refuses_a_config_that_is_not_there(tmp_path, config):
    err = refused(tmp_path, f"--config={config}")
    assert f"--config={config}: no such file; use --config=configs/quickstart.py" in err


def test_the_command_says_what_is_wrong_in_other_spellings(tmp_path):
    err = refused(tmp_path, "--config", "configs/base.py", "--config.optim.lrr=3")
    assert "did you mean optim.lr?" in err
    err = refused(tmp_path, "--config.optim.lr=3", "--config=configs/base.py")
    assert "put it after" in err
    status, _, err = run("main", "--workdir", "--config=configs/base.py")
    assert status == 2
    assert "use --workdir=value" in err


def test_the_command_refuses_to_start_without_its_flags(tmp_path):
    assert "--config" in refused(tmp_path)
    status, _, err = run("main", "--config=configs/base.py")
    assert status == 2
    assert "--workdir=runs/" in err


def test_overrides_leave_the_base_alone():
    base_config = get_config()
    cell = apply_overrides(base_config, {"model.mlp": "swiglu", "optim.lr": 1})
    assert (cell.model.mlp, cell.optim.lr) == ("swiglu", 1) and base_config.model.mlp == "gelu"
    with pytest.raises(InputError, match=r"optim\.rl is not a key; did you mean"):
        apply_overrides(base_config, {"optim.rl": 1})
