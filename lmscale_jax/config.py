"""Validates, derives, compares and names configs. What keys there are stands in configs/base.py."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from configs.base import SPEC, Key
from lmscale_jax.errors import InputError

SCALES = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


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
    _check_together(config)


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
    if key.duration and not _DURATION.fullmatch(value.strip().lower()):
        refuse('is no duration like "200" (steps), "5%" or "50M tokens"')


def _check_used(config, path: str, key: Key) -> None:
    for other, allowed in key.when.items():
        if get(config, other) not in allowed:
            raise InputError(
                f"config.{path}={get(config, path)!r} would be unused with {other}="
                f"{get(config, other)!r}; it needs {other}={' or '.join(map(repr, allowed))}, or "
                f"leave it at {key.default!r}"
            )


def _check_model(config) -> None:
    model, data = config.model, config.data
    if not model.head_dim and model.d_model % model.n_heads:
        good = max(h for h in range(1, model.n_heads) if model.d_model % h == 0)
        raise InputError(
            f"config.model.n_heads={model.n_heads} does not divide model.d_model={model.d_model}; "
            f"{good} would, or set model.head_dim"
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        good = max(h for h in range(1, model.n_kv_heads) if model.n_heads % h == 0)
        raise InputError(
            f"config.model.n_kv_heads={model.n_kv_heads} does not divide "
            f"model.n_heads={model.n_heads}; {good} would"
        )
    head_dim = model.head_dim or model.d_model // model.n_heads
    if model.positions == "rope" and head_dim % 2:
        raise InputError(
            f"config.model.head_dim={head_dim} is odd, and RoPE rotates pairs; "
            f"{head_dim + 1} would work"
        )
    if model.gate_place == "output" and model.attn_gate == "headwise":
        raise InputError(
            "config.model.attn_gate='headwise' with model.gate_place='output': the projected "
            "output has no heads; 'elementwise' would work, or gate_place='sdpa'"
        )
    if model.positions == "learned" and 0 < model.max_seq_len < data.seq_len:
        raise InputError(
            f"config.data.seq_len={data.seq_len} is longer than model.max_seq_len="
            f"{model.max_seq_len}; {model.max_seq_len} would work"
        )


def _check_together(config) -> None:
    _check_model(config)
    model, train, data = config.model, config.train, config.data
    if train.batch_size % train.accum:
        good = max(a for a in range(1, train.accum) if train.batch_size % a == 0)
        raise InputError(
            f"config.train.accum={train.accum} does not divide train.batch_size="
            f"{train.batch_size}; {good} would"
        )
    if not train.steps and not train.tokens:
        raise InputError("config.train.steps=0 needs train.tokens; train.tokens=1e8 would work")
    if data.source != "stdlib" and not data.path:
        raise InputError(f"config.data.path='' must name the {data.source} data, such as corpus/*")
    if data.tokenizer == "hf" and not data.tokenizer_path:
        raise InputError(
            "config.data.tokenizer_path='' must name the directory of data.tokenizer='hf', such as "
            "tokenizers/gpt2"
        )
    if model.attention in ("saved", "xla") and model.dropout:
        raise InputError(
            f"config.model.attention={model.attention!r} has no attention dropout "
            f"(model.dropout={model.dropout}); 'plain' or 'auto' would work"
        )
    for name in ("activations_every", "spectral_every"):
        if config.log[name] % config.log.every:
            raise InputError(
                f"config.log.{name}={config.log[name]} is no multiple of log.every="
                f"{config.log.every}, whose lines carry it; {config.log.every} would work"
            )
    _check_base(config)
    _check_schedule(config)
    _check_freeze(config)
    _check_mur(config)
    if bool(train.parent) != bool(train.parent_step):
        raise InputError(
            f"config.train.parent={train.parent!r} and train.parent_step={train.parent_step} go "
            f"together; parent='runs/stable' with parent_step=1000 would work, or '' with 0"
        )


def _check_base(config) -> None:
    base, model = config.parametrization, config.model
    if base.name == "sp":
        return
    if model.logit_scale != "one":
        raise InputError(
            f"config.model.logit_scale={model.logit_scale!r} would scale the logits by width twice "
            f"with parametrization.name={base.name!r}; 'one' would work"
        )
    if not base.base_width:
        raise InputError(
            f"config.parametrization.base_width=0 must be given for {base.name}; the width at "
            f"which the learning rate was tuned, such as 256"
        )
    if base.name == "completep" and not base.base_depth:
        raise InputError(
            "config.parametrization.base_depth=0 must be given for completep; the depth at which "
            "the learning rate was tuned, such as 4"
        )
    size = model.head_dim or model.d_model // model.n_heads
    base_size = base.base_head_dim or size
    for path, width, unit in (
        ("model.d_model", model.d_model, size),
        ("parametrization.base_width", base.base_width, base_size),
    ):
        if width % unit:
            raise InputError(
                f"config.{path}={width} is no multiple of the head size {unit}, so the number of "
                f"heads cannot follow it; {max(1, round(width / unit)) * unit} would work"
            )
    heads, ratio = (
        base.base_width // base_size,
        model.n_heads // (model.n_kv_heads or model.n_heads),
    )
    if heads % ratio:
        raise InputError(
            f"config.parametrization.base_width={base.base_width} makes {heads} heads, which "
            f"{ratio} query heads to a key head do not divide; {ratio * base_size} would work"
        )


def _check_schedule(config) -> None:
    steps = total_steps(config)
    spent = duration(config.schedule.warmup, config)
    if config.schedule.name == "wsd":
        spent += duration(config.schedule.cooldown, config)
    if spent > steps:
        raise InputError(
            f"config.schedule.warmup={config.schedule.warmup!r} and cooldown take {spent} steps of "
            f"{steps}; '5%' would work"
        )


def _check_freeze(config) -> None:
    freeze, n = config.freeze, config.model.n_layers
    if freeze.mode == "fixed":
        try:
            numbers = block_numbers(freeze.blocks)
        except ValueError:
            numbers = []
        if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= b < n for b in numbers):
            raise InputError(
                f"config.freeze.blocks={freeze.blocks!r} must name different blocks from 0 to "
                f"{n - 1}; '0' would work"
            )
    near = max(1, round(n * freeze.near_input)) if freeze.mode == "random_near_input" else n
    if freeze.mode in ("random", "random_near_input") and freeze.count > near:
        raise InputError(
            f"config.freeze.count={freeze.count} is more than the {near} block(s) to draw from; "
            f"{near} would work"
        )
    if freeze.mode == "unfreeze":
        last = (n - 1) * duration(freeze.every, config)
        if last >= total_steps(config):
            raise InputError(
                f"config.freeze.every={freeze.every!r} lets the last of {n} blocks begin at step "
                f"{last} of {total_steps(config)}; '{(total_steps(config) - 1) // n}' would work"
            )


def _check_mur(config) -> None:
    mur, n, steps = config.mur, config.model.n_layers, total_steps(config)
    if mur.mode not in ("loss", "update"):
        return
    for name in ("first_block", "last_block"):
        if mur[name] >= n:
            raise InputError(f"config.mur.{name}={mur[name]} is no block of {n}; {n - 1} would be")
    if 0 <= mur.last_block < mur_layers(config).start:
        first = mur_layers(config).start
        raise InputError(
            f"config.mur.last_block={mur.last_block} comes before the first block acted on, "
            f"{first}; {first} would work"
        )
    if mur.first_block < 0 and mur.last_block < 0 and mur.start >= mur.end:
        raise InputError(
            f"config.mur.start={mur.start} is not below mur.end={mur.end}; 0.0 with 1.0 takes all "
            f"blocks"
        )
    if mur.tau_kind == "quantile" and not 0 < mur.tau < 1:
        raise InputError(
            f"config.mur.tau={mur.tau} is no quantile strictly between 0 and 1 "
            f"(mur.tau_kind='quantile'); 0.5 would work"
        )
    if mur.mode == "update" and mur.granularity == "branch":
        raise InputError(
            "config.mur.granularity='branch' has no factor for half a block's update "
            "(mur.mode='update'); 'block' would work"
        )
    if duration(mur.warmup, config) >= steps:
        raise InputError(
            f"config.mur.warmup={mur.warmup!r} is {duration(mur.warmup, config)} steps of {steps}, "
            f"so nothing would ever happen; '5%' would work"
        )


def mur_layers(config) -> range:
    """The blocks that mur.* acts on. A fraction v of L blocks is round(v L), half to even."""
    mur, n = config.mur, config.model.n_layers
    first = mur.first_block if mur.first_block >= 0 else min(n - 1, round(n * mur.start))
    stop = mur.last_block + 1 if mur.last_block >= 0 else round(n * mur.end)
    return range(first, min(n, max(first + 1, stop)))


def block_numbers(text: str) -> list[int]:
    """ "0,3" as [0, 3]. Raises ValueError."""
    return [int(part) for part in text.split(",")]


_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(%)|(?:([kmbt]?)\s*(steps?|tokens?))?)")


def duration(text: str, config) -> int:
    """A duration ("200", "5%", "50M tokens") in whole optimizer steps, rounded up."""
    number, percent, scale, unit = _DURATION.fullmatch(text.strip().lower()).groups()
    if percent:
        amount = float(number) / 100 * total_steps(config)
    else:
        amount = float(number) * SCALES[scale or ""]
        if unit and unit.startswith("token"):
            amount /= tokens_per_step(config)
    return int(-(-amount // 1))


def tokens_per_step(config) -> int:
    return config.train.batch_size * config.data.seq_len


def total_steps(config) -> int:
    return config.train.steps or int(-(-config.train.tokens // tokens_per_step(config)))


def resolve(config: ConfigDict, vocab_size: int = 0) -> ConfigDict:
    """A validated copy in which every 0 that means "derive it" holds the derived value.

    `vocab_size` is the tokenizer's; 0 leaves model.vocab_size as it is.
    """
    validate(config)
    config = ConfigDict(config.to_dict())
    model = config.model
    model.n_kv_heads = model.n_kv_heads or model.n_heads
    model.head_dim = model.head_dim or model.d_model // model.n_heads
    if config.parametrization.name != "sp":
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
