"""Random configs and environments: each gives a page of --explain, or one line and status 2.

Values come as texts on the command line, as a user types them. Where the line says "use VALUE" for
a key, the value is tried: the same complaint must not come back.
"""

import functools
import re

import numpy as np
import pytest
from absl import flags
from conftest import ROOT
from ml_collections import config_flags

from lmscale_jax import cli
from lmscale_jax.config.keys import keys
from lmscale_jax.data import corpora
from lmscale_jax.errors import InputError
from lmscale_jax.train import explain

FILES = [
    "base.py", "quickstart.py", "nanogpt_char.py", "muon_small.py", "mur_small.py",
    "mur.py:gpt2_50m,loss", "speedrun_gate.py", "speedrun_record26.py", "speedrun_simple.py",
    "llama_50m.py:embedded",
]  # fmt: skip
# Texts that no key expects, or that a library would refuse later.
ODD = [
    "None", "", "nan", "inf", "-1", "0", "1", "2", "3", "7", "1e2", "1e400", "2147483648",
    "99999999999999999999", "0.5", "-0.0", "yes", "true", "[1, 2]", "a,b", "µ", "50%", "7 steps",
    "1M tokens", "~nobody/x", "/proc/1/mem", "x" * 300,
]  # fmt: skip


def texts_for(key, rng) -> str:
    """A text for a key: mostly one that could be meant, sometimes an odd one."""
    if rng.random() < 0.25:
        return str(rng.choice(ODD))
    if key.choices:
        return str(rng.choice([str(choice) for choice in key.choices]))
    if key.duration:
        return str(rng.choice(["0", "1", "3", "10%", "100%", "2k tokens", "500"]))
    if isinstance(key.default, bool):
        return str(rng.choice(["True", "False"]))
    if isinstance(key.default, int | float):
        low = key.low if key.low is not None else key.above if key.above is not None else 0
        numbers = [low, low + 1, low + 2, key.default, 2 * key.default, 64, 3]
        number = rng.choice(np.array(numbers, float))
        return str(int(number)) if isinstance(key.default, int) else f"{number:g}"
    return str(rng.choice(["", "nowhere/*.txt", "text", "0", "0,1", "train"]))


def arguments(rng) -> list[str]:
    """A config file and one to four overrides."""
    chosen = rng.choice(len(SPECIFIED), size=rng.integers(1, 5), replace=False)
    named = [SPECIFIED[i] for i in chosen]
    config = f"--config=configs/{rng.choice(FILES)}"
    return [config, *(f"--config.{path}={texts_for(key, rng)}" for path, key in named)]


# The number of devices of a process that has begun is fixed.
SPECIFIED = [(path, key) for path, key in keys() if path != "mesh.cpu_devices"]


class Refused(Exception):
    """A command would end here: (status, message)."""


@pytest.fixture
def explained(monkeypatch, tmp_path):
    """Calls the command's own functions in this process; (status, what is printed or the line)."""

    def leave(message, status):
        raise Refused(status, message)

    def offline(repo, name, folder, field, remedy, **more):
        raise InputError(f"{field}: the hub cannot be reached; {remedy}")

    monkeypatch.setattr(cli, "exit_with_error", leave)
    monkeypatch.setattr(corpora, "_download", offline)
    # To compile and to measure this machine takes longer than all the rest.
    monkeypatch.setattr(explain, "compiled_sections", lambda *arguments: "")
    monkeypatch.setattr(explain, "probe_flops", lambda *arguments: 1e9)
    monkeypatch.setenv("LMSCALE_CACHE", str(tmp_path))
    monkeypatch.chdir(ROOT)
    define = config_flags.DEFINE_config_file

    def call(overrides: list[str]) -> tuple[int, str]:
        argv, lines, values = ["main", *overrides], [], flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(
            config_flags, "DEFINE_config_file", functools.partial(define, flag_values=values)
        )
        monkeypatch.setattr(flags, "mark_flag_as_required", lambda name: None)
        monkeypatch.setattr("sys.argv", argv)
        try:
            config = cli.config_flag()
            cli._parse(argv)
            explain.explain(config.value, cli.overrides(), cli.config_file(), lines.append)
        except Refused as error:
            return error.args
        except Exception as error:
            if (line := cli.line_of(error)) is None:
                raise
            return line[1], line[0]
        return 0, "\n".join(lines)

    return call


def advice(message: str) -> tuple[str, str] | None:
    """The (key, value) that a message says to use; None where it names another remedy."""
    value = r"('[^']*'|-?[\d.]+(?:e[+-]?\d+)?|True|False)(?![\w*])"
    remedy = re.search(rf"; use (?:[^;(=]*such as )?(?:([\w.]+)=)?{value}", message)
    field = re.match(r"config\.([\w.]+)", message)
    if not remedy or not field:
        return None
    key, value = remedy[1] or field[1], remedy[2].rstrip(".").strip("'")
    near = f"{field[1].rpartition('.')[0]}.{key}"
    key = key if key in PATHS else near
    return (key, value) if key in PATHS else None


PATHS = dict(keys())


def test_advice_is_read_out_of_messages():
    assert advice("config.train.steps=0 needs train.tokens; use train.tokens=1e8") == (
        "train.tokens", "1e8",
    )  # fmt: skip
    assert advice("config.model.norm='x' must be one of a, b; use 'rmsnorm' (the norm)") == (
        "model.norm", "rmsnorm",
    )  # fmt: skip
    assert advice("config.optim.lr=0 is no rate; use the tuned one, such as 256") == (
        "optim.lr", "256",
    )  # fmt: skip
    assert advice("config.train.parent='x' holds no run.json; use the --workdir of a run") is None


@pytest.mark.parametrize(
    ("seed", "n_configs"), [(0, 60), pytest.param(1, 500, marks=pytest.mark.slow)]
)
def test_every_config_gives_a_page_or_a_line_and_advice_works(explained, seed, n_configs):
    rng, counts = np.random.default_rng(seed), {0: 0, 2: 0, "advice": 0}
    for number in range(n_configs):
        overrides, seen = arguments(rng), []
        for _ in range(12):
            try:
                status, text = explained(overrides)
            except Exception as error:
                raise AssertionError(f"config {number}: {overrides}") from error
            counts[status] += 1
            if status == 0:
                assert "counts" in text and "flops" in text
                break
            assert status == 2 and text.strip(), (number, overrides, status)
            assert "Traceback" not in text and len(text) < 1500, (number, overrides, text)
            assert text not in seen, (number, overrides, text)
            seen.append(text)
            if not (remedy := advice(text)):
                break
            counts["advice"] += 1
            flag = f"--config.{remedy[0]}="
            overrides = [o for o in overrides if not o.startswith(flag)] + [flag + remedy[1]]
        else:
            raise AssertionError(f"config {number}: advice without an end: {overrides}, {seen}")
    # The fuzz reaches both ends, and advice often enough to judge it.
    assert min(counts.values()) >= n_configs // 10, counts
