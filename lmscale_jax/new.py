"""Writes an example of a user's change, and a ladder that asks about it, for `lmscale new`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from lmscale_jax.cli import PACKAGE
from lmscale_jax.errors import InputError


class Kind(NamedTuple):
    """A kind of change.

    Attributes:
      example: file of examples/.
      entry: what the key names in it, a class or a function.
      key: dotted key that takes FILE.py:NAME.
      baseline: the value of this key with which it is compared.
      tune: {dotted key: (values tried in the baseline's arm, values tried in the user's)}.
    """

    example: str
    entry: str
    key: str
    baseline: str
    tune: Mapping = MappingProxyType({})


KINDS = {
    "mlp": Kind("poly", "PolyMLP", "model.mlp", "relu2"),
    "attention": Kind("differential", "Differential", "model.attention_module", "softmax"),
    "block": Kind("linear_block", "LinearBlock", "model.block", "prenorm"),
    "optimizer": Kind(
        "signum", "signum", "optim.name", "adamw",
        {"optim.lr": ((2e-3, 4e-3, 8e-3), (2e-4, 5e-4, 1e-3))},
    ),
    "loss": Kind("zloss", "z_loss", "objective.terms", ""),
    "schedule": Kind("inverse_sqrt", "inverse_sqrt", "schedule.name", "cosine"),
    "rule": Kind("fan_in_init", "fan_in", "parametrization.rule", ""),
}  # fmt: skip

LADDER = '''"""Is {file}.py better than {baseline}, and will it be at scale?

    lmscale ladder {ladder}.py --dry_run      what is trained, and how long it takes
    lmscale ladder {ladder}.py                trains, and writes runs/{ladder}/report/index.html
"""

from lmscale_jax.configs import laddering
from lmscale_jax.configs.ladders import quickstart


def get_config():
    # Decoders of a few blocks on the source text of Python's standard library, two seeds.
    # `lmscale help` lists the keys, `lmscale help optim.lr` says what one is.
    c = quickstart.get_config()
    c.question = "Does {file} beat {baseline}?"

    # Two arms that differ in nothing but the keys under `switch`.
    c.switch = ({switch})
    c.arms = {{
        "{baseline}": {baseline_arm},
        "{file}": {arm},
    }}
    c.baseline = "{baseline}"
{tune}
    # Parameters of the runs without embeddings: the last size is forecast by the others before it
    # is trained. The d_ff of both arms is solved so that they have equally many.
    c.rungs.sizes, c.rungs.held_out = (12.5e3, 25e3, 50e3), 100e3
    c.rungs.match = "parameters"
    c.tokens.amounts = (6.0,)  # training tokens for each parameter
    return c
'''


def write_example(arguments: list[str]) -> None:
    """Writes my_KIND.py and my_ladder.py, or NAME.py and NAME_ladder.py, in this directory.

    Raises InputError for another kind, and where one of the files exists.
    """
    kind, name = (*arguments, "", "")[:2]
    if kind not in KINDS or len(arguments) > 2:
        raise InputError(
            f"new {' '.join(arguments)}: use lmscale new KIND [NAME], with one of the kinds "
            f"{', '.join(KINDS)}"
        )
    if name and not name.isidentifier():
        raise InputError(f"new {kind} {name}: the name must be one of Python's; use my_{kind}")
    file, ladder = (name, f"{name}_ladder") if name else (f"my_{kind}", "my_ladder")
    texts = {
        f"{file}.py": example_text(kind, file),
        f"{ladder}.py": ladder_text(kind, file, ladder),
    }
    for path in texts:
        if Path(path).exists():
            raise InputError(f"{path} exists; use lmscale new {kind} NAME for other file names")
    for path, text in texts.items():
        Path(path).write_text(text, encoding="utf-8")
        print(f"written {path}")
    print(f"edit them; then: lmscale ladder {ladder}.py")


def example_text(kind: str, file: str) -> str:
    """Returns the example of a kind as a file of that name, which is the group of its keys too."""
    stem = KINDS[kind].example
    text = (PACKAGE / "examples" / f"{stem}.py").read_text(encoding="utf-8")
    return re.sub(rf"\b{stem}\b", file, text)


def ladder_text(kind: str, file: str, ladder: str) -> str:
    """Returns the config of a ladder of the example and its baseline."""
    k = KINDS[kind]
    entry, baseline = file if k.entry == k.example else k.entry, k.baseline or "none"
    here = f'laddering.here(__file__) + "{file}.py:{entry}"'
    arms = [_nested({key: repr(v[i]) for key, v in k.tune.items()}) for i in (0, 1)]
    tune = f"""
    # Tried at every size; the best values of each arm are compared.
    c.tune = {{
        "{baseline}": {arms[0]},
        "{file}": {arms[1]},
    }}
"""
    return LADDER.format(
        file=file,
        ladder=ladder,
        baseline=baseline,
        switch=", ".join(map(json.dumps, (k.key, f"own.{file}"))),
        baseline_arm=_nested({k.key: json.dumps(k.baseline)}),
        arm=_nested({k.key: here}),
        tune=tune if k.tune else "",
    )


def _nested(settings: dict[str, str]) -> str:
    """Writes {"group.key": code} as code of nested dicts."""
    groups: dict[str, list[str]] = {}
    for path, code in settings.items():
        group, _, key = path.partition(".")
        groups.setdefault(group, []).append(f'"{key}": {code}')
    return "{" + ", ".join(f'"{g}": {{{", ".join(keys)}}}' for g, keys in groups.items()) + "}"
