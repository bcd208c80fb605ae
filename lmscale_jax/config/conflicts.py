"""Values of a config that are each right and do not go together."""

from lmscale_jax.config.blocks import block_numbers, mur_layers
from lmscale_jax.config.durations import steps_of, total_steps
from lmscale_jax.config.keys import PATH_OPTIONAL, is_used
from lmscale_jax.errors import InputError


def check_conflicts(config) -> None:
    """Raises InputError at the first pair of values that clash, in a config with texts."""
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
    if is_used(config, "data.path") and data.source not in PATH_OPTIONAL and not data.path:
        raise InputError(f"config.data.path='' must name the {data.source} data, such as corpus/*")
    if data.tokenizer == "hf" and not data.tokenizer_path:
        raise InputError(
            "config.data.tokenizer_path='' must name the directory of data.tokenizer='hf', such as "
            "tokenizers/gpt2, or a name on the hub, such as gpt2"
        )
    if model.attention not in ("auto", "plain") and model.dropout:
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
    if config.eval.redundancy_every != "0":
        every = config.eval.redundancy_every
        check_chain(model, f"eval.redundancy_every={every!r}", READ_ONLY)
    _check_base(config)
    steps = steps_of(config)
    _check_schedule(config, steps)
    _check_freeze(config, steps)
    _check_mur(config, steps)
    if bool(train.parent) != bool(train.parent_step):
        raise InputError(
            f"config.train.parent={train.parent!r} and train.parent_step={train.parent_step} go "
            f"together; parent='runs/stable' with parent_step=1000 would work, or '' with 0"
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
    _check_wiring(model, head_dim)
    if model.positions == "learned" and 0 < model.max_seq_len < data.seq_len:
        raise InputError(
            f"config.data.seq_len={data.seq_len} is longer than model.max_seq_len="
            f"{model.max_seq_len}; {model.max_seq_len} would work"
        )


def _check_wiring(model, head_dim: int) -> None:
    if model.vocab_size and model.ids > model.vocab_size:
        raise InputError(
            f"config.model.ids={model.ids} is more than the rows, model.vocab_size="
            f"{model.vocab_size}; 0 would work"
        )
    if 2 * model.value_embeddings > model.n_layers:
        raise InputError(
            f"config.model.value_embeddings={model.value_embeddings} takes as many blocks at "
            f"either end, and there are {model.n_layers}; {model.n_layers // 2} would work"
        )
    if model.softcap_form != "tanh" and not model.logit_softcap:
        raise InputError(
            f"config.model.softcap_form={model.softcap_form!r} would be unused with "
            f"model.logit_softcap=0; 15.0 would work"
        )
    if model.rope_channels == "half" and (head_dim % 4 or head_dim < 8):
        raise InputError(
            f"config.model.head_dim={head_dim} has no quarter of at least two frequencies for "
            f"model.rope_channels='half'; {max(8, -(-head_dim // 4) * 4)} would work"
        )


def _check_base(config) -> None:
    base, model = config.parametrization, config.model
    if not is_used(config, "parametrization.base_width"):
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
    if is_used(config, "parametrization.base_depth") and not base.base_depth:
        raise InputError(
            f"config.parametrization.base_depth=0 must be given for {base.name}; the depth at "
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


def _check_schedule(config, steps: dict[str, int]) -> None:
    total, spent = total_steps(config), steps["schedule.warmup"]
    if is_used(config, "schedule.cooldown"):
        spent += steps["schedule.cooldown"]
    if spent > total:
        raise InputError(
            f"config.schedule.warmup={config.schedule.warmup!r} and cooldown take {spent} steps of "
            f"{total}; '5%' would work"
        )


def _check_freeze(config, steps: dict[str, int]) -> None:
    freeze, n = config.freeze, config.model.n_layers
    if is_used(config, "freeze.blocks"):
        try:
            numbers = block_numbers(freeze.blocks)
        except ValueError:
            numbers = []
        if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= b < n for b in numbers):
            raise InputError(
                f"config.freeze.blocks={freeze.blocks!r} must name different blocks from 0 to "
                f"{n - 1}; '0' would work"
            )
    near = max(1, round(n * freeze.near_input)) if is_used(config, "freeze.near_input") else n
    if is_used(config, "freeze.count") and freeze.count > near:
        raise InputError(
            f"config.freeze.count={freeze.count} is more than the {near} block(s) to draw from; "
            f"{near} would work"
        )
    if is_used(config, "freeze.every"):
        last = (n - 1) * steps["freeze.every"]
        if last >= total_steps(config):
            raise InputError(
                f"config.freeze.every={freeze.every!r} lets the last of {n} blocks begin at step "
                f"{last} of {total_steps(config)}; '{(total_steps(config) - 1) // n}' would work"
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
    if is_used(config, "mur.alpha") and mur.granularity == "branch":
        raise InputError(
            "config.mur.granularity='branch' has no factor for half a block's update "
            "(mur.mode='update'); 'block' would work"
        )
    if steps["mur.warmup"] >= total:
        raise InputError(
            f"config.mur.warmup={mur.warmup!r} is {steps['mur.warmup']} steps of {total}, "
            f"so nothing would ever happen; '5%' would work"
        )


# Wirings that bring something into a block, but take nothing out of one.
READ_ONLY = ("x0_mix", "value_embeddings")
# Wirings by which a block reads or writes more than the stream that comes in and goes out.
_BESIDE = {"skips": "none", "x0_mix": "none", "value_embeddings": 0}


def check_chain(model, what: str, allowed: tuple[str, ...] = ()) -> None:
    """Raises InputError where `what` needs blocks to be functions of the stream alone, and they are
    not; the wirings in `allowed` do not matter to it."""
    for name, plain in _BESIDE.items():
        if model[name] != plain and name not in allowed:
            raise InputError(
                f"config.model.{name}={model[name]!r} does not go with {what}, which takes blocks "
                f"for functions of the residual stream alone; {plain!r} would work"
            )
