"""The models that both sides build. Imports nothing by itself: any interpreter reads it."""

# gelu: nanoGPT's own form in its own case, this project's default in the others. 3 has a vocabulary
# at which the readout matters; 4 is a Llama with grouped keys.
SHAPES = {
    1: {"D": 128, "L": 4, "H": 4, "T": 64, "B": 12, "V": 65, "gelu": "erf"},
    2: {"D": 256, "L": 6, "H": 4, "T": 256, "B": 8, "V": 256, "gelu": "tanh"},
    3: {"D": 512, "L": 8, "H": 8, "T": 256, "B": 4, "V": 8192, "gelu": "tanh"},
    4: {
        "D": 384, "L": 6, "H": 6, "K": 2, "F": 1024, "T": 256, "B": 4, "V": 4096,
        "mlp": "swiglu", "norm": "rmsnorm", "positions": "rope", "head": "untied",
    },
}  # fmt: skip
# Those that pieces.py takes apart.
GPT2_WITHOUT_READOUT = (1, 2)

# Tokens of each document where attention stays within documents.
DOCUMENT = 1024

# What a shape is where it does not say.
_DEFAULTS = {
    "gelu": "tanh",
    "mlp": "gelu",
    "norm": "layernorm",
    "positions": "learned",
    "head": "tied",
    "bias": False,
}
_KEYS = {"D": "d_model", "L": "n_layers", "H": "n_heads", "K": "n_kv_heads", "F": "d_ff"}


def whole(shape: dict) -> dict:
    """A shape with everything said: K and F too, and P, the rows of the table of positions."""
    sizes = {"K": shape["H"], "F": 4 * shape["D"], "P": shape["T"]}
    return _DEFAULTS | sizes | shape


def shape_text(shape: dict) -> str:
    """In one line."""
    return " ".join(f"{key}={value}" for key, value in shape.items())


def config_of(shape: dict, dtype: str, devices: int, changes: dict | None = None):
    """configs/nanogpt_char.py with the model and the batch of a shape, on tokens without text.

    `changes` are further keys by their dotted path.
    """
    from lmscale_jax.configs import nanogpt_char

    config, full = nanogpt_char.get_config(), whole(shape)
    model = config.model
    for key, name in _KEYS.items():
        model[name] = full[key]
    for name in ("mlp", "norm", "positions", "head", "bias"):
        model[name] = full[name]
    model.gelu = full["gelu"] if full["mlp"] in ("gelu", "geglu") else "tanh"
    if full["positions"] == "learned" and full["P"] != full["T"]:
        model.max_seq_len = full["P"]
    model.dtype = dtype
    config.data.seq_len, config.train.batch_size = full["T"], full["B"]
    config.train.steps, config.mesh.cpu_devices = 100_000, devices
    with config.ignore_type():
        config.update_from_flattened_dict(changes or {})
    return config


def shape_of(config, batch: int) -> dict:
    """The shape of a resolved config, with a batch of so many sequences.

    Raises InputError where a shape cannot say what the model is: the peer has no such model.
    """
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.errors import InputError

    model = config.model
    shape = {key: model[name] for key, name in _KEYS.items()}
    shape |= {"T": config.data.seq_len, "B": batch, "V": model.vocab_size}
    shape |= {name: model[name] for name in ("mlp", "norm", "positions", "head", "bias")}
    if model.mlp in ("gelu", "geglu"):
        shape["gelu"] = model.gelu
    if model.positions == "learned":
        shape["P"] = model.max_seq_len
    again = resolve(config_of(shape, model.dtype, 0), model.vocab_size).model
    free = ("attention", "stack", "remat", "loss_chunk", "matmul", "ids", "head_dim")
    for name in model:
        if name not in free and again[name] != model[name]:
            raise InputError(
                f"config.model.{name}={model[name]!r}: the peer has no such model; "
                f"{again[name]!r} would work"
            )
    return shape
