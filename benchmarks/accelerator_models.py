"""The models that accelerator.py times, as commands of ours and of the peer's."""

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags

from benchmarks import machine
from benchmarks.shapes import DOCUMENT, shape_of
from lmscale_jax import cli
from lmscale_jax.errors import InputError

TINY = flags.DEFINE_bool("tiny", False, "models of a few thousand parameters")

HERE = Path(__file__).parent
TINY_KEYS = {
    "model.n_layers": 2, "model.d_model": 32, "model.n_heads": 2, "model.d_ff": 64,
    "model.vocab_size": 320, "data.vocab_size": 300, "data.seq_len": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    """Attributes:
    config: as --config takes it.
    rows: sequences of a step, without accumulation.
    keys: changes of the config, by dotted path.
    tiny: further changes with --tiny.
    apart: ours and the peer's do not fit on the device together.
    remark: what the peer leaves out.
    """

    config: str
    rows: int
    keys: dict = dataclasses.field(default_factory=dict)
    tiny: dict = dataclasses.field(default_factory=dict)
    apart: bool = False
    remark: str = ""


MODELS = {
    "llama_100m": Model("configs/llama_100m.py:embedded", 32),
    "gpt2_100m": Model("configs/gpt2_100m.py:embedded", 32),
    "llama_300m": Model("configs/llama_300m.py:embedded", 16),
    "record26": Model(
        "configs/speedrun_record26.py",
        8,
        # The windows of the end, the widest.
        {"model.window_growth": "0"},
        {"model.value_embeddings": 1, "model.attention_skip": ""},
        apart=True,
        remark="The peer of record26 has its width, depth, tokens, documents and windows, in "
        "FlexAttention, and attention in block 7; not its embeddings of values, skips, norm of "
        "queries and keys, softcap and Muon (it takes AdamW). MFU counts the visible keys of ours "
        "for both.",
    ),
}
CHANGES = {
    "plain": {},
    "mur loss, middle third": {
        "mur.mode": "loss", "mur.tau": 0.1, "mur.lambda_max": 0.1, "mur.start": 0.33,
        "mur.end": 0.67, "mur.warmup": "2%", "mur.ramp": "3%",
    },
    "muon": {"optim.name": "muon"},
    "fp8": {"model.matmul": "fp8"},
}  # fmt: skip
CHANGED = "llama_100m"
# Larger batches, in the order in which they are tried: of which model, and how many times larger.
LARGER = (("llama_100m", 4), ("gpt2_100m", 4), ("llama_300m", 4))
# A model whose losses a CPU can follow: 50 steps of 2,048 tokens.
FOLLOWED_KEYS = {
    "model.n_layers": 4, "model.d_model": 256, "model.n_heads": 4, "model.d_ff": 704,
    "model.vocab_size": 4096, "data.vocab_size": 4096, "data.seq_len": 256,
}  # fmt: skip
# Nats by which losses may differ over the 50 steps. float32 products are not rounded to TF32.
ALLOWED = {"float32": 1e-3, "bfloat16": 3e-2}


def keys_of(model: Model) -> dict:
    """The changes of a model's config, with --tiny of its size too."""
    return model.keys | (TINY_KEYS | model.tiny if TINY.value else {})


def worker_command(model: Model, rows: int, keys: dict, report: Path, *more: str) -> list[str]:
    """The command of our step, which leaves its facts in `report`."""
    assigned = [f"--config.{key}={value}" for key, value in (keys_of(model) | keys).items()]
    program = [sys.executable, "-m", "benchmarks.worker_jax", f"--config={model.config}"]
    return [*program, *assigned, f"--batch={rows}", f"--report={report}", *more]


def resolved(model: Model, rows: int):
    """The resolved config of a model, without a device."""
    from lmscale_jax.config.resolve import apply_overrides, resolve

    path, _, argument = model.config.partition(":")
    config, fault = cli.load_config(str(HERE.parent / path) + (f":{argument}" if argument else ""))
    if fault:
        raise InputError(fault)
    config = apply_overrides(config, keys_of(model) | {"train.batch_size": rows, "train.accum": 1})
    return resolve(config, config.model.vocab_size or config.data.vocab_size)


def peer_shape(model: Model, rows: int) -> dict:
    """The peer's shape of a model; of one with windows what the peer has of it."""
    from lmscale_jax.model.skip_connections import attention_windows, full_window_blocks

    config = resolved(model, rows)
    m = config.model
    if m.mask == "causal":
        return shape_of(config, rows)
    full, half = attention_windows(config)
    is_full = full_window_blocks(m)
    windows = [int(full if layer in is_full else half) for layer in range(m.n_layers)]
    return {
        "D": m.d_model, "L": m.n_layers, "H": m.n_heads, "F": m.d_ff, "V": m.vocab_size,
        "T": config.data.seq_len, "B": rows, "mlp": m.mlp, "norm": m.norm,
        "positions": m.positions, "head": m.head, "windows": windows, "unit": m.window_block,
        "document": DOCUMENT,
    }  # fmt: skip


def peer_command(shape: dict) -> list[str]:
    step = ["step", "--shape", json.dumps(shape), "--precision", "bf16-autocast"]
    return [machine.TORCH_PYTHON.value, str(HERE / "peer_torch.py"), *step, "--compile", "default"]
