"""Refuses combinations of config values that are valid one by one but not together."""

from lmscale_jax.config.blocks import attention_blocks, block_numbers, mur_layers
from lmscale_jax.config.durations import steps_of, total_steps
from lmscale_jax.config.keys import PATH_OPTIONAL, is_used
from lmscale_jax.errors import InputError


def check_conflicts(config) -> None:
    """Raises InputError at the first conflict between values of a config with text durations."""
    _check_model(config)
    model, train, data = config.model, config.train, config.data
    if train.batch_size % train.accum:
        below = min(train.accum - 1, train.batch_size)
        good = next(a for a in range(below, 0, -1) if train.batch_size % a == 0)
        raise InputError(
            f"config.train.accum={train.accum} does not divide train.batch_size="
            f"{train.batch_size}; use {good}"
        )
    if not train.steps and not train.tokens:
        raise InputError("config.train.steps=0 needs train.tokens; use train.tokens=1e8")
    if is_used(config, "data.path") and data.source not in PATH_OPTIONAL and not data.path:
        raise InputError(
            f"config.data.path='' names no {data.source} data; use a path such as 'corpus/*'"
        )
    if data.tokenizer == "hf" and not data.tokenizer_path:
        raise InputError(
            "config.data.tokenizer_path='' names no tokenizer for data.tokenizer='hf'; use a "
            "directory such as 'tokenizers/gpt2' or a name on the hub such as 'gpt2'"
        )
    if model.attention not in ("auto", "plain") and model.dropout:
        raise InputError(
            f"config.model.attention={model.attention!r} does not support attention "
            f"dropout (model.dropout={model.dropout}); use 'plain' or 'auto'"
        )
    for name in ("activations_every", "spectral_every"):
        if config.log[name] % config.log.every:
            raise InputError(
                f"config.log.{name}={config.log[name]} is not a multiple of "
                f"log.every={config.log.every}; use {config.log.every}"
            )
    if config.eval.redundancy_every != "0":
        every = config.eval.redundancy_every
        check_chain(model, f"eval.redundancy_every={every!r}", READ_ONLY)
    _check_base(config)
    steps = steps_of(config)
    _check_schedule(config, steps)
    _check_freeze(config, steps)
    _check_mur(config, steps)
    if train.parent and not train.parent_step:
        raise InputError(
            f"config.train.parent_step=0 names no checkpoint of train.parent={train.parent!r}; use "
            "one of its steps, such as 1000"
        )
    if train.parent_step and not train.parent:
        raise InputError(
            f"config.train.parent_step={train.parent_step} needs train.parent, a run directory; "
            "use 0 without one"
        )


def _check_model(config) -> None:
    model, data = config.model, config.data
    if not model.head_dim and model.d_model % model.n_heads:
        below = min(model.n_heads - 1, model.d_model)
        good = next(h for h in range(below, 0, -1) if model.d_model % h == 0)
        raise InputError(
            f"config.model.n_heads={model.n_heads} does not divide model.d_model={model.d_model}; "
            f"use {good}, or set model.head_dim"
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        below = min(model.n_kv_heads - 1, model.n_heads)
        good = next(h for h in range(below, 0, -1) if model.n_heads % h == 0)
        raise InputError(
            f"config.model.n_kv_heads={model.n_kv_heads} does not divide "
            f"model.n_heads={model.n_heads}; use {good}"
        )
    head_dim = model.head_dim or model.d_model // model.n_heads
    if model.positions == "rope" and head_dim % 2:
        raise InputError(
            f"config.model.head_dim={head_dim} is odd, but RoPE rotates pairs of channels; "
            f"use {head_dim + 1}"
        )
    if model.gate_place == "output" and model.attn_gate == "headwise":
        raise InputError(
            "config.model.attn_gate='headwise' does not support model.gate_place='output', which "
            "has no heads; use 'elementwise', or gate_place='sdpa'"
        )
    _check_block_inputs(model, head_dim)
    if model.positions == "learned" and 0 < model.max_seq_len < data.seq_len:
        raise InputError(
            f"config.data.seq_len={data.seq_len} is longer than model.max_seq_len="
            f"{model.max_seq_len}; use {model.max_seq_len}"
        )


def _check_block_inputs(model, head_dim: int) -> None:
    if model.vocab_size and model.ids > model.vocab_size:
        raise InputError(
            f"config.model.ids={model.ids} is above model.vocab_size={model.vocab_size}; use 0"
        )
    if model.attention_skip:
        _check_block_list("model.attention_skip", model.attention_skip, model.n_layers, "")
        if model.block != "prenorm":
            raise InputError(
                f"config.model.attention_skip={model.attention_skip!r} does not support "
                f"model.block={model.block!r}; use ''"
            )
        if not attention_blocks(model):
            raise InputError(
                f"config.model.attention_skip={model.attention_skip!r} leaves no block with "
                f"attention; use ''"
            )
    if 2 * model.value_embeddings > model.n_layers:
        raise InputError(
            f"config.model.value_embeddings={model.value_embeddings} needs twice as many blocks "
            f"(model.n_layers={model.n_layers}); use {model.n_layers // 2}"
        )
    if model.softcap_form != "tanh" and not model.logit_softcap:
        raise InputError(
            f"config.model.softcap_form={model.softcap_form!r} is unused with "
            f"model.logit_softcap=0; use model.logit_softcap=15.0"
        )
    if model.rope_channels == "half" and (head_dim % 4 or head_dim < 8):
        raise InputError(
            f"config.model.head_dim={head_dim} does not support model.rope_channels='half', "
            f"which needs a multiple of 4, at least 8; use {max(8, -(-head_dim // 4) * 4)}"
        )


def _check_base(config) -> None:
    base, model = config.parametrization, config.model
    if not is_used(config, "parametrization.base_width"):
        return
    if model.logit_scale != "one":
        raise InputError(
            f"config.model.logit_scale={model.logit_scale!r} scales the logits by width, as "
            f"parametrization.name={base.name!r} does already; use 'one'"
        )
    if not base.base_width:
        raise InputError(
            f"config.parametrization.base_width=0 is no width for {base.name}; use the width at "
            f"which the learning rate was tuned, such as 256"
        )
    if is_used(config, "parametrization.base_depth") and not base.base_depth:
        raise InputError(
            f"config.parametrization.base_depth=0 is no depth for {base.name}; use the depth at "
            "which the learning rate was tuned, such as 4"
        )
    size = model.head_dim or model.d_model // model.n_heads
    base_size = base.base_head_dim or size
    for path, width, unit in (
        ("model.d_model", model.d_model, size),
        ("parametrization.base_width", base.base_width, base_size),
    ):
        if width % unit:
            raise InputError(
                f"config.{path}={width} is not a multiple of the head size {unit}; use "
                f"{max(1, round(width / unit)) * unit}"
            )
    heads, ratio = (
        base.base_width // base_size,
        model.n_heads // (model.n_kv_heads or model.n_heads),
    )
    if heads % ratio:
        raise InputError(
            f"config.parametrization.base_width={base.base_width} makes {heads} heads, "
            f"not a multiple of the {ratio} query heads per key head; use {ratio * base_size}"
        )


def _check_schedule(config, steps: dict[str, int]) -> None:
    total, ramp_steps = total_steps(config), steps["schedule.warmup"]
    if is_used(config, "schedule.cooldown"):
        ramp_steps += steps["schedule.cooldown"]
    if ramp_steps > total:
        raise InputError(
            f"config.schedule.warmup={config.schedule.warmup!r} and cooldown take {ramp_steps} "
            f"steps of {total}; use '5%'"
        )


def _check_freeze(config, steps: dict[str, int]) -> None:
    freeze, n = config.freeze, config.model.n_layers
    if freeze.mode != "none" and config.model.attention_skip:
        raise InputError(
            f"config.model.attention_skip={config.model.attention_skip!r} does not support "
            f"freeze.mode={freeze.mode!r}, which needs blocks that are alike; use ''"
        )
    if is_used(config, "freeze.blocks"):
        _check_block_list("freeze.blocks", freeze.blocks, n, "0")
    n_drawable = n
    if is_used(config, "freeze.near_input"):
        n_drawable = max(1, round(n * freeze.near_input))
    if is_used(config, "freeze.count") and freeze.count > n_drawable:
        raise InputError(
            f"config.freeze.count={freeze.count} is more than the {n_drawable} block(s) to draw "
            f"from; use {n_drawable}"
        )
    if is_used(config, "freeze.every"):
        last = (n - 1) * steps["freeze.every"]
        if last >= total_steps(config):
            raise InputError(
                f"config.freeze.every={freeze.every!r} unfreezes the last of {n} blocks at step "
                f"{last} of {total_steps(config)}; use '{(total_steps(config) - 1) // n}'"
            )


def _check_block_list(path: str, text: str, n_layers: int, good: str) -> None:
    try:
        numbers = block_numbers(text)
    except ValueError:
        numbers = []
    inside = all(0 <= number < n_layers for number in numbers)
    if not numbers or len(set(numbers)) < len(numbers) or not inside:
        raise InputError(
            f"config.{path}={text!r} does not list different blocks from 0 to {n_layers - 1}; "
            f"use {good!r}"
        )


def _check_mur(config, steps: dict[str, int]) -> None:
    mur, n, total = config.mur, config.model.n_layers, total_steps(config)
    if is_used(config, "mur.metric"):
        read_only = () if is_used(config, "mur.lambda_max") else READ_ONLY
        check_chain(config.model, f"mur.mode={mur.mode!r}", read_only)
    if not is_used(config, "mur.warmup"):
        return
    for name in ("first_block", "last_block"):
        if mur[name] >= n:
            raise InputError(
                f"config.mur.{name}={mur[name]} is not below model.n_layers={n}; use {n - 1}"
            )
    if 0 <= mur.last_block < mur_layers(config).start:
        first = mur_layers(config).start
        raise InputError(
            f"config.mur.last_block={mur.last_block} is before the first regularized block, "
            f"{first}; use {first}"
        )
    if mur.first_block < 0 and mur.last_block < 0 and mur.start >= mur.end:
        raise InputError(
            f"config.mur.start={mur.start} is not below mur.end={mur.end}; use 0.0 and 1.0 for "
            f"all blocks"
        )
    if mur.tau_kind == "quantile" and not 0 < mur.tau < 1:
        raise InputError(
            f"config.mur.tau={mur.tau} is not strictly between 0 and 1 "
            f"(mur.tau_kind='quantile'); use 0.5"
        )
    if is_used(config, "mur.alpha") and mur.granularity == "branch":
        raise InputError(
            "config.mur.granularity='branch' does not support mur.mode='update'; use 'block'"
        )
    if steps["mur.warmup"] >= total:
        raise InputError(
            f"config.mur.warmup={mur.warmup!r} lasts {steps['mur.warmup']} steps, but the run "
            f"has only {total}; use '5%'"
        )


# Keys that add an input to a block, but take no other output from it than the stream.
READ_ONLY = ("x0_mix", "value_embeddings")
EXTRA_STREAMS = ("skips", *READ_ONLY)
# Keys by which a block reads or writes more than the residual stream, or differs from the others,
# with the value for none.
_EXTRA_INPUTS = {"skips": "none", "x0_mix": "none", "value_embeddings": 0, "attention_skip": ""}


def check_chain(model, what: str, allowed: tuple[str, ...] = ()) -> None:
    """Checks that every block is the same function of the residual stream alone.

    Args:
      model: the `model` group of a config.
      what: the setting that needs it, as "mur.mode='loss'", for the message.
      allowed: keys of the group that `what` supports all the same.

    Raises:
      InputError: another key adds an input or an output, or leaves out a part.
    """
    for name, plain in _EXTRA_INPUTS.items():
        if model[name] != plain and name not in allowed:
            raise InputError(
                f"config.model.{name}={model[name]!r} does not support {what}, which needs blocks "
                f"that are alike and read the residual stream alone; use {plain!r}"
            )
