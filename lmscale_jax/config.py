"""Validates, derives, compares and names configs. What keys there are stands in configs/base.py."""

import difflib
import hashlib
import json
import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.base import SPEC, Key
from lmscale_jax import clashes
from lmscale_jax.derived import DURATION, total_steps
from lmscale_jax.errors import InputError
from lmscale_jax.parametrization.schemes import scheme


def keys(spec: dict = SPEC, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every (dotted path, Key) of the specification, in its order."""
    for name, entry in spec.items():
        if isinstance(entry, Key):
            yield prefix + name, entry
        else:
            yield from keys(entry, f"{prefix}{name}.")


def get(config, path: str):
    """The value at a dotted path."""
    for name in path.split("."):
        config = config[name]
    return config


def validate(config: ConfigDict) -> None:
    """Raises InputError at the first unknown, mistyped, out-of-range, unused or clashing key."""
    check_keys(config, SPEC)
    clashes.check(config)


def check_keys(config, spec: dict) -> None:
    """Raises InputError at the first key that the specification does not have or not allow."""
    _check_names(config, spec, "", [p for p, _ in keys(spec)])
    for path, key in keys(spec):
        _check_value(path, get(config, path), key)
    for path, key in keys(spec):
        if get(config, path) != key.default:
            _check_used(config, path, key)


def _check_names(config, spec: dict, prefix: str, known: list[str]) -> None:
    for name in config:
        path = prefix + name
        if name not in spec:
            known = known if prefix else [*spec, *known]
            raise InputError(f"config.{path} is not a key; {hint(path, known)}")
        if isinstance(spec[name], dict):
            if not isinstance(config[name], ConfigDict):
                raise InputError(f"config.{path}={config[name]!r} must be a group of keys")
            _check_names(config[name], spec[name], f"{path}.", known)
    for name in spec:
        if name not in config:
            raise InputError(
                f"config.{prefix}{name} is missing; start from configs.base.get_config()"
            )


def hint(path: str, known: list[str]) -> str:
    """What to write in place of an unknown key: the same name elsewhere, or a similar one."""
    group, _, name = path.rpartition(".")
    near = [p for p in known if p.rpartition(".")[2] == name]
    beside = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == group}
    near += [beside[n] for n in difflib.get_close_matches(name, beside, n=1)]
    near += difflib.get_close_matches(path, known, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else "configs/base.py lists all keys"


def _check_value(path: str, value, key: Key) -> None:
    def refuse(why: str) -> None:
        raise InputError(f"config.{path}={value!r} {why}; {key.default!r} would work ({key.doc})")

    # bool is an int to Python; here a switch and a number are different things.
    numeric = isinstance(value, int) and not isinstance(value, bool)
    fits = (
        numeric or isinstance(value, float)
        if isinstance(key.default, float)
        else numeric
        if isinstance(key.default, int) and not isinstance(key.default, bool)
        else isinstance(value, type(key.default))
    )
    if not fits:
        refuse(f"must be of type {type(key.default).__name__}")
    if key.choices and value not in key.choices:
        refuse("must be one of " + ", ".join(map(str, key.choices)))
    if isinstance(value, float) and not math.isfinite(value):
        refuse("must be finite")
    if key.low is not None and value < key.low:
        refuse(f"must be at least {key.low}")
    if key.high is not None and value > key.high:
        refuse(f"must be at most {key.high}")
    if key.above is not None and value <= key.above:
        refuse(f"must be above {key.above}")
    if key.duration and not DURATION.fullmatch(value.strip().lower()):
        refuse('is no duration like "200" (steps), "5%" or "50M tokens"')


def _check_used(config, path: str, key: Key) -> None:
    for other, allowed in key.when.items():
        if get(config, other) not in allowed:
            raise InputError(
                f"config.{path}={get(config, path)!r} would be unused with {other}="
                f"{get(config, other)!r}; it needs {other}={' or '.join(map(repr, allowed))}, or "
                f"leave it at {key.default!r}"
            )


def resolve(config: ConfigDict, vocab_size: int = 0) -> ConfigDict:
    """A validated copy in which every 0 that means "derive it" holds the derived value.

    `vocab_size` is the tokenizer's; 0 leaves model.vocab_size as it is.
    """
    validate(config)
    config = ConfigDict(config.to_dict())
    model = config.model
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.head_dim = model.head_dim or model.d_model // model.n_heads
    if scheme(config).has_base:
        _resolve_base(config)
    model.d_ff = model.d_ff or _mlp_width(model, model.d_model)
    if model.positions == "learned":
        model.max_seq_len = model.max_seq_len or config.data.seq_len
    if model.vocab_size and vocab_size > model.vocab_size:
        raise InputError(
            f"config.model.vocab_size={model.vocab_size} is below the tokenizer's {vocab_size}; "
            f"0 or {-(-vocab_size // 64) * 64} would work"
        )
    model.vocab_size = model.vocab_size or vocab_size
    model.ids = model.ids or model.vocab_size
    model.vocab_size = -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple
    config.train.steps, config.train.tokens = total_steps(config), 0.0
    return config.lock()


def _mlp_width(model, width: int) -> int:
    if model.mlp in ("swiglu", "geglu"):
        return max(64, round(8 * width / 3 / 64) * 64)
    return 4 * width


def _resolve_base(config: ConfigDict) -> None:
    """The base shapes: heads of the same size, and d_ff by the same rule, unless said otherwise."""
    base, model = config.parametrization, config.model
    base.base_head_dim = base.base_head_dim or model.head_dim
    if not base.base_d_ff:
        in_proportion = round(model.d_ff * base.base_width / model.d_model)
        base.base_d_ff = in_proportion or _mlp_width(model, base.base_width)


def differences(a: dict, b: dict, identity_only: bool = False) -> list[str]:
    """Dotted paths at which two plain config dicts hold different values."""
    _missing = object()

    def value(config, path):
        try:
            return get(config, path)
        except (KeyError, TypeError):
            return _missing

    known = [p for p, key in keys() if key.identity or not identity_only]
    return [path for path in known if value(a, path) != value(b, path)]


def fingerprint(config: ConfigDict) -> str:
    """Twelve hex digits that name the run: a hash of all keys that can change its numbers."""
    chosen = {path: get(config, path) for path, key in keys() if key.identity}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]
