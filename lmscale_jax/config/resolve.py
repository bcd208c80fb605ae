"""Validates, resolves, compares and hashes configs. keys.py specifies their keys."""

import difflib
import hashlib
import json
import math

from ml_collections import ConfigDict

from lmscale_jax.config import conflicts
from lmscale_jax.config.durations import DURATION, in_steps, total_steps
from lmscale_jax.config.key import Key
from lmscale_jax.config.keys import SPEC, get, has, is_used, keys
from lmscale_jax.config.mlp_forms import MLP_FORMS
from lmscale_jax.config.own_code import is_code
from lmscale_jax.config.own_keys import adopted, own_keys, own_values, with_own_values
from lmscale_jax.errors import InputError

# Of NumPy's and JAX's indices.
_LARGEST_INT = 2**63 - 1


def validate(config: ConfigDict) -> None:
    """Raises InputError at the first unknown, mistyped, out-of-range, unused or clashing key."""
    config = adopted(config)
    check_keys(config, SPEC | {"own": own_keys(config)})
    conflicts.check_conflicts(config)


def check_keys(config, spec: dict) -> None:
    """Raises InputError at the first key that a specification lacks, or whose value it refuses."""
    check_names(config, spec)
    for path, key in keys(spec):
        _check_value(path, get(config, path), key)
    for path, key in keys(spec):
        if get(config, path) != key.default:
            _check_used(config, path, key)


def check_names(config, spec: dict = SPEC) -> None:
    """Raises InputError at the first key that a specification lacks, or that a config lacks."""
    groups = [f"own.{group}" for group in spec.get("own", {})]
    _check_names(config, spec, "", [*groups, *(p for p, _ in keys(spec))])


def _check_names(config, spec: dict, prefix: str, all_paths: list[str]) -> None:
    for name in config:
        path = prefix + name
        if name not in spec:
            paths = all_paths if prefix else [*spec, *all_paths]
            if prefix.startswith("own."):
                paths = [p for p in paths if p.startswith("own.")]
            raise InputError(f"config.{path} is not a key; {hint(path, paths)}")
        if isinstance(spec[name], dict):
            if not isinstance(config[name], ConfigDict):
                raise InputError(f"config.{path}={config[name]!r} must be a group of keys")
            _check_names(config[name], spec[name], f"{path}.", all_paths)
    for name in spec:
        if name not in config and spec[name] != {}:
            raise InputError(
                f"config.{prefix}{name} is missing; start from "
                f"lmscale_jax.configs.base.get_config()"
            )


def reset_unused(config: ConfigDict, overrides) -> None:
    """Resets keys of a config file that an override of the command line leaves unused.

    `overrides` are the dotted paths that the user has set. So a file's size of a trained vocabulary
    does not stand in the way of data.tokenizer=bytes, while a key that the user sets is refused.
    """
    changed = set(overrides)
    for path, key in keys():
        if path in overrides or not has(config, path) or get(config, path) == key.default:
            continue
        if any(
            other in changed and has(config, other) and get(config, other) not in allowed
            for other, allowed in key.when.items()
        ):
            config.update_from_flattened_dict({path: key.default})
            changed.add(path)


def hint(path: str, paths: list[str]) -> str:
    """Suggests a key in place of an unknown one: the same name elsewhere, or a similar name."""
    group, _, name = path.rpartition(".")
    near = [p for p in paths if p.rpartition(".")[2] == name]
    siblings = {p.rpartition(".")[2]: p for p in paths if p.rpartition(".")[0] == group}
    near += [siblings[n] for n in difflib.get_close_matches(name, siblings, n=1)]
    near += difflib.get_close_matches(path, paths, n=1, cutoff=0.8)
    if path.startswith("own.") and not near:
        declared = [p for p in paths if p.startswith("own.") and p.count(".") == 2]
        return f"code of this config declares {', '.join(declared) or 'no key'}"
    return f"did you mean {near[0]}?" if near else "configs/base.py lists all keys"


def _check_value(path: str, value, key: Key) -> None:
    def refuse(why: str) -> None:
        raise InputError(f"config.{path}={value!r} {why}; use {key.default!r} ({key.doc})")

    # Python counts bool as int; a config key takes one or the other.
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
    if value == "None":
        refuse("is a text, not Python's None")
    if is_code(value) and key.choices and not key.code:
        takers = ", ".join(p for p, k in keys() if k.code)
        refuse(f"takes no code of your own, which {takers} take")
    if key.code and not key.choices and value and not is_code(value):
        refuse(f"must be FILE.py:NAME, a {key.code}")
    if is_code(value) and "," in value and path != "objective.terms":
        refuse("names several, and must name a single FILE.py:NAME")
    if key.choices and value not in key.choices and not (key.code and is_code(value)):
        code = f", or FILE.py:NAME, a {key.code}" if key.code else ""
        refuse("must be one of " + ", ".join(map(str, key.choices)) + code)
    if isinstance(value, float) and not math.isfinite(value):
        refuse("must be finite")
    if key.low is not None and value < key.low:
        refuse(f"must be at least {key.low}")
    high = _LARGEST_INT if key.high is None and numeric else key.high
    if high is not None and value > high:
        refuse(f"must be at most {high}")
    if key.above is not None and value <= key.above:
        refuse(f"must be above {key.above}")
    if key.duration and not DURATION.fullmatch(value.strip().lower()):
        refuse('is not a duration like "200" (steps), "5%" or "50M tokens"')


def _check_used(config, path: str, key: Key) -> None:
    for other, allowed in key.when.items():
        if get(config, other) not in allowed:
            raise InputError(
                f"config.{path}={get(config, path)!r} is unused with {other}="
                f"{get(config, other)!r}; use {key.default!r}, or "
                f"{other}={' or '.join(map(repr, allowed))}"
            )


def resolve(config: ConfigDict, vocab_size: int = 0) -> ConfigDict:
    """Resolves a config: `derived`, with durations as ints in optimizer steps.

    All computations read this form; durations.py describes both. `vocab_size` as for `derived`.
    """
    return in_steps(derived(config, vocab_size))


def derived(config: ConfigDict, vocab_size: int = 0) -> ConfigDict:
    """Validates a config and returns a copy in which derived values replace the zeros.

    Durations remain the user's texts: run.json records this form, `fingerprint` hashes it, and
    runs are compared by it. `vocab_size` is the tokenizer's; 0 leaves model.vocab_size as it is.
    Raises InputError.
    """
    config = ConfigDict(adopted(config).to_dict())
    validate(config)
    model = config.model
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.head_dim = model.head_dim or model.d_model // model.n_heads
    if is_used(config, "parametrization.base_width"):
        _resolve_base(config)
    model.d_ff = model.d_ff or MLP_FORMS[model.mlp].default_width(model.d_model)
    if model.positions == "learned":
        model.max_seq_len = model.max_seq_len or config.data.seq_len
    if model.vocab_size and vocab_size > model.vocab_size:
        raise InputError(
            f"config.model.vocab_size={model.vocab_size} is below the tokenizer's {vocab_size}; "
            f"use 0 or {-(-vocab_size // 64) * 64}"
        )
    model.vocab_size = model.vocab_size or vocab_size
    model.ids = model.ids or model.vocab_size
    model.vocab_size = -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple
    config.train.steps, config.train.tokens = total_steps(config), 0.0
    return config.lock()


def _resolve_base(config: ConfigDict) -> None:
    """Sets unset base shapes: heads of the same size, d_ff in proportion or by its rule."""
    base, model = config.parametrization, config.model
    base.base_head_dim = base.base_head_dim or model.head_dim
    if not base.base_d_ff:
        in_proportion = round(model.d_ff * base.base_width / model.d_model)
        base.base_d_ff = in_proportion or MLP_FORMS[model.mlp].default_width(base.base_width)


def differences(a: dict, b: dict, identity_only: bool = False) -> list[str]:
    """Lists the dotted paths at which two plain config dicts hold different values."""
    _missing = object()

    def value(config, path, key):
        try:
            return get(config, path)
        except (KeyError, TypeError):
            return key.default if key.late else _missing

    compared = [(p, key) for p, key in keys() if key.identity or not identity_only]
    paths = [path for path, key in compared if value(a, path, key) != value(b, path, key)]
    a, b = own_values(a), own_values(b)
    return paths + [p for p in sorted(a.keys() | b.keys()) if a.get(p) != b.get(p)]


def fingerprint(config: ConfigDict) -> str:
    """Hashes all keys that can change a run's numbers; returns twelve hex digits.

    Raises ValueError for a config with durations in steps: only the texts are hashed.
    """
    omitted = late_defaults(config)
    identity = {
        path: get(config, path) for path, key in keys() if key.identity and path not in omitted
    } | own_values(config)
    if not all(isinstance(identity[path], str) for path, key in keys() if key.duration):
        raise ValueError("fingerprint() takes a config whose durations are texts")
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def late_defaults(config) -> set[str]:
    """Returns the late keys that a config has at their default, which no hash counts."""
    return {
        path
        for path, key in keys()
        if key.late and has(config, path) and get(config, path) == key.default
    }


def apply_overrides(config: ConfigDict, overrides: dict) -> ConfigDict:
    """Copies an unresolved config and sets {dotted key: value} in the copy.

    Raises InputError where a key does not exist or a value is not allowed.
    """
    of_code = {key: v for key, v in overrides.items() if key.split(".")[0] == "own"}
    config = with_own_values(config, of_code)
    allowed = dict(keys()) | of_code
    for key, value in overrides.items():
        if key not in allowed:
            raise InputError(f"config.{key} is not a key; {hint(key, list(allowed))}")
        if key == "objective.terms" and not isinstance(value, str):
            value = ",".join(value)
        with config.ignore_type():
            config.update_from_flattened_dict({key: value})
    validate(config)
    return config
