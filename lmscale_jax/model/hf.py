"""Reads and writes GPT-2 and Llama checkpoints of Hugging Face transformers.

Weights are safetensors, in one file or several; nothing is unpickled and no code is downloaded. An
unsupported setting or tensor of a checkpoint raises InputError with its name.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmscale_jax.config.key import Modes
from lmscale_jax.errors import InputError
from lmscale_jax.model import parametrization
from lmscale_jax.model.param import named, nested
from lmscale_jax.model.transformer import HEADS

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# Buffers that older versions saved with the weights.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class TensorName(NamedTuple):
    """The tensor of one of our parameters.

    Attributes:
      name: its name, with {} for the layer.
      transposed: whether it is stored [out, in].
      part, parts: our parameter is this one of `parts` equal groups of columns.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


def _gpt2(model) -> dict[str, TensorName]:
    layer = "transformer.h.{}."
    names = {
        "embed/tokens": TensorName("transformer.wte.weight"),
        "embed/positions": TensorName("transformer.wpe.weight"),
    }
    for kind, theirs in (("weight", "weight"), ("bias", "bias")):
        for number, ours in enumerate(("query", "key", "value")):
            place = TensorName(f"{layer}attn.c_attn.{theirs}", part=number, parts=3)
            names[f"blocks/attention/{ours}/{kind}"] = place
        names[f"blocks/attention/out/{kind}"] = TensorName(f"{layer}attn.c_proj.{theirs}")
        names[f"blocks/mlp/up/{kind}"] = TensorName(f"{layer}mlp.c_fc.{theirs}")
        names[f"blocks/mlp/down/{kind}"] = TensorName(f"{layer}mlp.c_proj.{theirs}")
    for kind, theirs in (("scale", "weight"), ("bias", "bias")):
        names[f"blocks/attention_norm/{kind}"] = TensorName(f"{layer}ln_1.{theirs}")
        names[f"blocks/mlp_norm/{kind}"] = TensorName(f"{layer}ln_2.{theirs}")
        names[f"readout/norm/{kind}"] = TensorName(f"transformer.ln_f.{theirs}")
    return names


def _llama(model) -> dict[str, TensorName]:
    layer = "model.layers.{}."
    names = {
        "embed/tokens": TensorName("model.embed_tokens.weight"),
        "blocks/attention_norm/scale": TensorName(f"{layer}input_layernorm.weight"),
        "blocks/mlp_norm/scale": TensorName(f"{layer}post_attention_layernorm.weight"),
        "readout/norm/scale": TensorName("model.norm.weight"),
    }
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        place = TensorName(f"{layer}self_attn.{theirs}_proj.weight", transposed=True)
        names[f"blocks/attention/{ours}/weight"] = place
    for name in ("gate", "up", "down"):
        names[f"blocks/mlp/{name}/weight"] = TensorName(f"{layer}mlp.{name}_proj.weight", True)
    if HEADS[model.head].table:
        names["readout/weight"] = TensorName("lm_head.weight", True)
    return names


FAMILIES = {"gpt2": _gpt2, "llama": _llama}
# The closest family; `hf_family` refuses a model that is neither.
FAMILY_BY_POSITIONS = Modes("model.positions", {"learned": "gpt2", "rope": "llama", "none": "gpt2"})
# save_pretrained's name of each form of GELU.
GELU_NAMES = Modes("model.gelu", {"tanh": "gelu_new", "erf": "gelu"})


def read_config(directory: Path) -> dict:
    """Converts the config.json of a directory to our `model` keys. Raises InputError."""
    path = directory / CONFIG
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"--from_hf={directory} has no config.json; use a directory written by save_pretrained"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise InputError(f"{path}: model_type={kind!r} is not supported; use gpt2 or llama")
    return {"gpt2": _from_gpt2, "llama": _from_llama}[kind](theirs, path)


def _from_gpt2(theirs: dict, path: Path) -> dict:
    gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
    _check_settings(theirs, path, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False, tie_word_embeddings=True)  # fmt: skip
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in gelu:
        raise InputError(
            f"{path}: activation_function={activation!r} is not supported; use "
            f"one of {', '.join(gelu)}"
        )
    return {
        "n_layers": theirs["n_layer"], "d_model": theirs["n_embd"], "n_heads": theirs["n_head"],
        "d_ff": theirs.get("n_inner") or 4 * theirs["n_embd"], "mlp": "gelu",
        "gelu": gelu[activation], "norm": "layernorm", "bias": True, "positions": "learned",
        "max_seq_len": theirs["n_positions"], "head": "tied", "vocab_size": theirs["vocab_size"],
        "norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
    }  # fmt: skip


def _from_llama(theirs: dict, path: Path) -> dict:
    _check_settings(theirs, path, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise InputError(f"{path}: rope scaling {kind!r} is not supported; use 'default'")
    heads = theirs["num_attention_heads"]
    return {
        "n_layers": theirs["num_hidden_layers"], "d_model": theirs["hidden_size"],
        "n_heads": heads, "n_kv_heads": theirs.get("num_key_value_heads") or heads,
        "head_dim": theirs.get("head_dim") or theirs["hidden_size"] // heads,
        "d_ff": theirs["intermediate_size"], "mlp": "swiglu", "norm": "rmsnorm", "bias": False,
        "positions": "rope", "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 1e4)),
        "head": "tied" if theirs.get("tie_word_embeddings") else "untied",
        "vocab_size": theirs["vocab_size"], "norm_eps": theirs.get("rms_norm_eps", 1e-6),
    }  # fmt: skip


def _check_settings(theirs: dict, path: Path, **supported) -> None:
    for name, value in supported.items():
        if theirs.get(name, value) != value:
            raise InputError(f"{path}: {name}={theirs[name]!r} is not supported; use {value!r}")


def read_params(directory: Path, model, specs: dict) -> dict:
    """Reads our parameters, float32, from the safetensors of a directory.

    Args:
      directory: contains model.safetensors, or its index and parts.
      model: the resolved `model` group, from `read_config`.
      specs: annotations of that model.

    Raises:
      InputError: there is no safetensors file, a tensor is missing, unknown or of another shape, or
        the package safetensors is not installed.
    """
    tensors = _load(directory)
    kind = FAMILY_BY_POSITIONS[model.positions]
    used, params = set(), {}
    for path, place in FAMILIES[kind](model).items():
        shape = named(specs)[path].shape
        inside = path.startswith("blocks/")
        names = [place.name.format(i) for i in range(model.n_layers)] if inside else [place.name]
        parts = [_take(tensors, name, place, directory) for name in names]
        used.update(names)
        value = np.stack(parts) if inside else parts[0]
        if value.size != np.prod(shape):
            raise InputError(
                f"{directory}: {names[0]} has the shape {parts[0].shape}, but {path} needs "
                f"{tuple(shape)}; use the config.json of this checkpoint"
            )
        params[path] = np.ascontiguousarray(value.reshape(shape), np.float32)
    tied = set() if HEADS[model.head].table else {"lm_head.weight"}
    unknown = sorted(set(tensors) - used - tied)
    if unknown:
        raise InputError(
            f"{directory}: {unknown[0]} and {len(unknown) - 1} more tensors are not supported"
        )
    return nested(params)


def _load(directory: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a directory, by its full name."""
    safetensors = _safetensors()
    files = [directory / WEIGHTS]
    if (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        files = sorted({directory / name for name in index["weight_map"].values()})
    elif not files[0].exists():
        pickled = (directory / "pytorch_model.bin").exists()
        raise InputError(
            f"{directory} has no {WEIGHTS}"
            + ("; pytorch_model.bin is a pickle and is not opened" if pickled else "")
            + "; use a directory written by save_pretrained"
        )
    tensors = {}
    for file in files:
        try:
            with safetensors.safe_open(file, "np") as opened:
                for name in opened.keys():
                    tensors[_full_name(name)] = opened.get_tensor(name)
        except (OSError, safetensors.SafetensorError, TypeError) as error:
            raise InputError(f"{file} cannot be read ({error})") from None
    return {k: v for k, v in tensors.items() if not k.endswith(BUFFERS)}


def _safetensors():
    """Imports the optional package safetensors. Raises InputError."""
    try:
        import safetensors.numpy
    except ImportError:
        raise InputError(
            "--from_hf and --to_hf need the package safetensors; use pip install 'lmscale_jax[hf]'"
        ) from None
    return safetensors


def _full_name(name: str) -> str:
    """Adds the prefix of models with a head, which bare models omit."""
    if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):
        return f"transformer.{name}"
    return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name


def _take(tensors: dict, name: str, place: TensorName, directory: Path) -> np.ndarray:
    if name not in tensors:
        raise InputError(f"{directory}: tensor {name} is missing")
    x = np.asarray(tensors[name], np.float32)
    x = x.T if place.transposed else x
    return np.split(x, place.parts, axis=-1)[place.part]


def write_hf(directory: Path, config, params: dict) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Args:
      directory: new or empty.
      config: resolved.
      params: nested dict of arrays.

    Raises:
      InputError: the model is neither a GPT-2 nor a Llama, the directory is not empty, or the
        package safetensors is not installed.
    """
    safetensors = _safetensors()
    kind = hf_family(config)
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"--to_hf={directory} is not empty; use a new directory")
    flat, tensors, parts = named(params), {}, {}
    for path, place in FAMILIES[kind](config.model).items():
        value = np.asarray(flat[path], np.float32)
        layers = list(value) if path.startswith("blocks/") else [value]
        for i, layer in enumerate(layers):
            matrix = _hf_matrix(path, layer)
            matrix = matrix.T if place.transposed else matrix
            parts.setdefault(place.name.format(i), {})[place.part] = matrix
    for name, parts_of_tensor in parts.items():
        joined = np.concatenate([x for _, x in sorted(parts_of_tensor.items())], axis=-1)
        tensors[name] = np.ascontiguousarray(joined)
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    settings = {"gpt2": _to_gpt2, "llama": _to_llama}[kind](config)
    (directory / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _hf_matrix(path: str, value: np.ndarray) -> np.ndarray:
    """Joins named axes to [in, out]; those of vectors, and of biases of heads, to one axis."""
    if path.endswith(("bias", "scale")):
        return value.reshape(-1)
    return value.reshape(-1, value.shape[-1]) if "/out/" in path else value.reshape(len(value), -1)


def hf_family(config) -> str:
    """Returns "gpt2" or "llama". Raises InputError with a setting that neither supports."""
    model = config.model
    gpt2 = {
        "norm": "layernorm",
        "mlp": "gelu",
        "positions": "learned",
        "bias": True,
        "head": "tied",
    }
    llama = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "bias": False}
    common = {
        "attn_gate": "none", "logit_softcap": 0.0, "mask": "causal", "window_layers": "none",
        "qk_norm": "none", "norm_gain": "learned", "embed_norm": "none", "skips": "none",
        "x0_mix": "none", "value_embeddings": 0, "rope_channels": "all", "attention_skip": "",
        "attention_module": "softmax", "block": "prenorm",
    }  # fmt: skip
    kind = FAMILY_BY_POSITIONS[model.positions]
    for key, value in ({"gpt2": gpt2, "llama": llama}[kind] | common).items():
        if model[key] != value:
            raise InputError(
                f"config.model.{key}={model[key]!r} is not supported by Hugging Face's {kind}; "
                f"use {value!r}"
            )
    if kind == "gpt2" and (model.n_kv_heads, model.n_heads * model.head_dim) != (
        model.n_heads, model.d_model,
    ):  # fmt: skip
        raise InputError(
            f"config.model.n_kv_heads={model.n_kv_heads} and head_dim={model.head_dim} are not "
            f"supported by GPT-2; use n_heads and d_model / n_heads"
        )
    plain = parametrization.Scales(
        embed=1.0, logits=1.0, branch=1.0, attention=model.head_dim**-0.5, gate=1.0
    )
    scales = parametrization.forward_scales(config)
    if scales._replace(gate=1.0) != plain:
        raise InputError(
            f"config.parametrization.name={config.parametrization.name!r} multiplies activations "
            f"by {scales}, which Hugging Face's models do not support; use 'sp'"
        )
    return kind


def _to_gpt2(config) -> dict:
    model = config.model
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": model.n_layers,
        "n_embd": model.d_model, "n_head": model.n_heads, "n_inner": model.d_ff,
        "n_positions": model.max_seq_len, "n_ctx": model.max_seq_len,
        "vocab_size": model.vocab_size, "layer_norm_epsilon": model.norm_eps,
        "activation_function": GELU_NAMES[model.gelu],
        "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _to_llama(config) -> dict:
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "num_hidden_layers": model.n_layers, "hidden_size": model.d_model,
        "num_attention_heads": model.n_heads, "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim, "intermediate_size": model.d_ff, "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta,
        "max_position_embeddings": config.data.seq_len, "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.head == "tied", "attention_bias": False, "mlp_bias": False,
        "torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
