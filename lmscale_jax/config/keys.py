"""Every configuration key: its default, unit, range and reason. Configs only differ from it.

`SPEC` is the single source of truth. `get_config()` turns it into the `ConfigDict` that config
files edit; `resolve.validate` holds a config to it. A key says in `when` which
other keys must hold which values for it to matter: setting a key that would go unused is an error.

Durations are strings: "200" (steps), "5%" (of the run) or "50M tokens".
"""

from collections.abc import Iterator

import ml_collections

from lmscale_jax.config.key import Key
from lmscale_jax.config.model_keys import MODEL
from lmscale_jax.config.optim_keys import FREEZE, MUR, OPTIM, SCHEDULE

_CORPORA = ("tinystories", "fineweb_edu", "openwebtext", "c4")
# Sources that are found without data.path, which names a copy of them.
PATH_OPTIONAL = (*_CORPORA, "fineweb10B_gpt2")
_TEXTS = ("stdlib", "text", "jsonl", "parquet", "hf", "tfds", *_CORPORA)
_SIZED = {"parametrization.name": ("mup", "completep")}

SPEC = {
    "seed": Key(0, "seed of initialisation and dropout; the data order has its own", low=0),
    "model": MODEL,
    "parametrization": {
        "name": Key(
            "sp",
            "how scale and learning rate follow size: sp not at all; mup with width (Yang et al. "
            "2022); completep with width and depth (Dey et al. 2025)",
            choices=("sp", "mup", "completep"),
        ),
        "base_width": Key(0, "d_model at which every rule is the identity", low=0, when=_SIZED),
        "base_depth": Key(
            0,
            "n_layers at which every rule is the identity",
            low=0,
            when={"parametrization.name": ("completep",)},
        ),
        "base_head_dim": Key(
            0,
            "channels per head at the base; 0: as here, so that heads are added",
            low=0,
            when=_SIZED,
        ),
        "base_d_ff": Key(
            0,
            "d_ff at the base; 0: by the rule of model.d_ff, or in proportion",
            low=0,
            when=_SIZED,
        ),
        "depth_exponent": Key(
            1.0,
            "branches are multiplied by (depth / base_depth)^-this; 1 transfers best (CompleteP)",
            low=0.0,
            high=1.0,
            when={"parametrization.name": ("completep",)},
        ),
        "embed_scale": Key(
            1.0, "multiplier of the embedding, tuned at the base", above=0.0, when=_SIZED
        ),
        "attention_scale": Key(1.0, "multiplier of q·k / sqrt(head_dim)", above=0.0),
        "output_scale": Key(
            1.0, "multiplier of the logits, tuned at the base", above=0.0, when=_SIZED
        ),
        "embed_lr_exponent": Key(
            0.0,
            "the embedding's learning rate goes as width^this; u-mup and nanochat take -0.5",
            low=-1.0,
            high=1.0,
            when=_SIZED,
        ),
        "control": Key(
            "none",
            "a deliberate mistake, for the coordinate check to find: logits_sqrt divides the "
            "logits by the root of the width ratio, no_lr_scaling leaves learning rates alone",
            choices=("none", "logits_sqrt", "no_lr_scaling"),
            when=_SIZED,
        ),
        "init_std": Key(0.02, "standard deviation of initial matrices (GPT-2)", above=0.0),
        "residual_init": Key(
            "depth_scaled",
            "projections into the residual stream: std / sqrt(2 n_layers) (GPT-2), as the rest, or "
            "zeros, so that every block begins as the identity",
            choices=("depth_scaled", "plain", "zeros"),
        ),
        "embed_std": Key(0.0, "of initial embeddings; 0: init_std", low=0.0),
        "head_init": Key(
            "normal",
            "zeros: all tokens are equally likely at first, a loss of ln(vocab_size)",
            choices=("normal", "zeros"),
            when={"model.head": ("untied",)},
        ),
    },
    "optim": OPTIM,
    "schedule": SCHEDULE,
    "freeze": FREEZE,
    "mur": MUR,
    "data": {
        "source": Key(
            "stdlib",
            "stdlib: the Python standard library's own source text, which every user has",
            choices=(*_TEXTS, "bin", "mixture", "fineweb10B_gpt2"),
        ),
        "path": Key(
            "",
            "file, directory or glob (** too), several joined by commas; hf: a directory or a name "
            "on the hub; tfds: its name; named corpora: a directory with a copy; mixture: prepared "
            "directories with weights, as web=3,code=1",
            when={"data.source": (*_TEXTS[1:], "bin", "mixture", "fineweb10B_gpt2")},
        ),
        "field": Key(
            "text",
            "field that holds the text",
            when={"data.source": ("jsonl", "parquet", "hf", "tfds")},
        ),
        "rows": Key(
            "train",
            "split that is read; ours in training and validation is made of it",
            when={"data.source": ("hf", "tfds", *_CORPORA)},
        ),
        "subset": Key("", "configuration of a dataset on the hub", when={"data.source": ("hf",)}),
        "revision": Key("", "commit or tag of the hub's", when={"data.source": ("hf", *_CORPORA)}),
        "directory": Key("", "where TFDS keeps its datasets", when={"data.source": ("tfds",)}),
        "limit": Key(
            0,
            "documents that are read; 0: all",
            low=0,
            when={"data.source": ("jsonl", "parquet", "hf", "tfds", *_CORPORA)},
        ),
        "shards": Key(
            1,
            "training shards of 100M tokens that are fetched",
            low=1,
            when={"data.source": ("fineweb10B_gpt2",)},
        ),
        "document": Key(
            "file",
            "what one document of a text file is: all of it, a paragraph or a line",
            choices=("file", "paragraph", "line"),
            when={"data.source": ("text",)},
        ),
        "tokenizer": Key(
            "bpe",
            "bytes, char (one id a character), bpe trained on the source, or hf: a published "
            "BPE, as GPT-2's or Llama's",
            choices=("bytes", "char", "bpe", "hf"),
            when={"data.source": _TEXTS},
        ),
        "tokenizer_path": Key(
            "",
            "directory with tokenizer.json, or with vocab.json and merges.txt; or gpt2, llama2, "
            "llama3 or another name on the hub",
            when={"data.tokenizer": ("hf",)},
        ),
        "vocab_size": Key(
            4096,
            "entries of the trained BPE, its document mark included",
            low=258,
            when={"data.tokenizer": ("bpe",)},
        ),
        "split": Key(
            "hash",
            "validation by a hash of each document's content, or the tail of the text",
            choices=("hash", "tail"),
            when={"data.source": _TEXTS},
        ),
        "val_fraction": Key(
            0.05,
            "share of documents (hash) or of characters (tail) held out",
            above=0.0,
            high=0.5,
            when={"data.source": _TEXTS},
        ),
        "val_path": Key(
            "",
            "shards held out; empty: those of data.path with 'val' in their name",
            when={"data.source": ("bin",)},
        ),
        "overlap": Key(
            0,
            "tokens of a run; preparing then reports which share of the validation side's runs the "
            "training side has too (13 is usual); 0: not looked for",
            low=0,
            when={"data.source": _TEXTS},
        ),
        "shard_tokens": Key(
            100_000_000,
            "tokens of a shard that is written",
            low=1,
            when={"data.source": _TEXTS},
        ),
        "seq_len": Key(256, "tokens per training window", low=1),
        "seed": Key(0, "seed of the data order", low=0),
        "cache": Key(
            "",
            "directory of prepared shards; empty: LMSCALE_CACHE or ~/.cache/lmscale_jax",
            identity=False,
        ),
        "workers": Key(
            0,
            "processes that read ahead (grain); 0: one thread, enough for memory-mapped shards",
            low=0,
            identity=False,
        ),
    },
    "train": {
        "steps": Key(1000, "optimizer steps; 0: from train.tokens", low=0),
        "tokens": Key(
            0.0,
            "token budget, rounded up to whole steps, in place of train.steps",
            low=0.0,
            when={"train.steps": (0,)},
        ),
        "batch_size": Key(32, "sequences per optimizer step, over all devices", low=1),
        "accum": Key(1, "micro-batches that one step is cut into, to save memory", low=1),
        "parent": Key(
            "",
            "work directory of a run to branch off: this one begins with its state at parent_step, "
            "and counts its steps and tokens as its own beginning",
        ),
        "parent_step": Key(0, "checkpoint of the parent to begin from", low=0),
    },
    "eval": {
        "every": Key(250, "steps between evaluations; 0: only at the end", low=0),
        "tokens": Key(200_000, "held-out tokens, always the same ones; 0: all", low=0),
        "batch_size": Key(
            0, "sequences at once; 0: as in a training micro-batch", low=0, identity=False
        ),
        "redundancy_every": Key(
            "0",
            "from one measurement of Block Influence and layer drop to the next; 0: none",
            duration=True,
        ),
        "redundancy_early": Key(
            "0", "the same in the early part of the run; 0: no early part", duration=True
        ),
        "redundancy_until": Key("10%", "where the early part ends", duration=True),
        "redundancy_tokens": Key(
            20_000, "held-out tokens for it, read once for each block and once more", low=1
        ),
        "baselines": Key(True, "print unigram and bigram losses beside the model's"),
        "sample": Key(200, "tokens of the text printed at the end; 0: none", low=0, identity=False),
    },
    "checkpoint": {
        "every": Key(500, "steps between checkpoints; 0: only at the end", low=0, identity=False),
        "keep": Key(2, "latest checkpoints kept", low=1, identity=False),
        "keep_every": Key(
            0,
            "steps; checkpoints at its multiples are kept for good; 0: none",
            low=0,
            identity=False,
        ),
    },
    "mesh": {
        "replica": Key(
            1,
            "copies that split the batch over a slow network, such as slices; -1 here or in one of "
            "the next four: all devices that remain",
            low=-1,
            identity=False,
        ),
        "data": Key(-1, "devices that split the batch", low=-1, identity=False),
        "fsdp": Key(1, "devices that split the batch and the parameters", low=-1, identity=False),
        "sequence": Key(1, "devices that split each row of the batch", low=-1, identity=False),
        "tensor": Key(1, "devices that split heads, MLP and vocabulary", low=-1, identity=False),
        "start_timeout": Key(
            60.0, "seconds until processes that have not come are missed", above=0, identity=False
        ),
        "peer_timeout": Key(
            60.0,
            "seconds of silence after which a process ends the others",
            above=0,
            identity=False,
        ),
        "cpu_devices": Key(
            0,
            "CPU devices of each process; 0: one if there are several processes, else what the "
            "sizes above need, -1 among them counting as one",
            low=0,
            identity=False,
        ),
    },
    "log": {
        "every": Key(10, "steps between lines of metrics.jsonl", low=1),
        "per_layer": Key(True, "norms of gradient, parameters and update for each layer"),
        "activations_every": Key(
            0, "steps between statistics of every layer's activations; 0: never", low=0
        ),
        "spectral_every": Key(
            0, "steps between spectral norms of every matrix and its update; 0: never", low=0
        ),
        "tensorboard": Key(True, "event files under tb/", identity=False),
        "watchdog": Key(
            600.0,
            "seconds without a finished step until what every thread does is printed; 0: never",
            low=0,
            identity=False,
        ),
        "wandb": Key(
            "off", "Weights & Biases", choices=("off", "offline", "online"), identity=False
        ),
        "wandb_project": Key(
            "lmscale", "its project", when={"log.wandb": ("offline", "online")}, identity=False
        ),
    },
}


def get_config() -> ml_collections.ConfigDict:
    """The defaults, as the `ConfigDict` that other config files edit."""

    def defaults(spec):
        return {k: v.default if isinstance(v, Key) else defaults(v) for k, v in spec.items()}

    return ml_collections.ConfigDict(defaults(SPEC))


def keys(spec: dict = SPEC, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yields every (dotted path, Key) of the specification, in its order."""
    for name, entry in spec.items():
        if isinstance(entry, Key):
            yield prefix + name, entry
        else:
            yield from keys(entry, f"{prefix}{name}.")


def get(config, path: str):
    """Returns the value at a dotted path."""
    for name in path.split("."):
        config = config[name]
    return config


def is_used(config, path: str) -> bool:
    """Says whether the other keys of a config let this one matter: all that its `when` asks for."""
    when = dict(keys())[path].when
    return all(get(config, other) in allowed for other, allowed in when.items())


def has(config, path: str) -> bool:
    """Says whether a config has a dotted path."""
    try:
        get(config, path)
    except (KeyError, TypeError):
        return False
    return True
