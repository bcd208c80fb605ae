"""Specifies every config key: its default, unit, range and meaning.

`SPEC` is the single source of truth. `get_config()` turns it into the `ConfigDict` that config
files edit, and `resolve.validate` checks a config by it. `when` of a key lists the values of other
keys with which it is used: setting an unused key is an error.

Durations are strings: "200" (steps), "5%" (of the run) or "50M tokens".
"""

from collections.abc import Iterator

import ml_collections

from lmscale_jax.config.key import Key
from lmscale_jax.config.model_keys import MODEL
from lmscale_jax.config.optim_keys import FREEZE, MUR, OBJECTIVE, OPTIM, SCHEDULE
from lmscale_jax.config.parametrization_keys import PARAMETRIZATION

_CORPORA = ("tinystories", "fineweb_edu", "openwebtext", "c4")
# Sources that need no data.path; if set, it names a copy of them.
PATH_OPTIONAL = (*_CORPORA, "fineweb10B_gpt2")
_TEXTS = ("stdlib", "text", "jsonl", "parquet", "hf", "tfds", *_CORPORA)

SPEC = {
    "seed": Key(
        0,
        "seed of initialization and dropout; the data order has its own (data.seed)",
        low=0,
        high=2**31 - 1,
    ),
    "model": MODEL,
    "parametrization": PARAMETRIZATION,
    "objective": OBJECTIVE,
    "optim": OPTIM,
    "schedule": SCHEDULE,
    "freeze": FREEZE,
    "mur": MUR,
    "own": {},  # own.GROUP: the keys that a user's code declares (own_keys.py)
    "data": {
        "source": Key(
            "stdlib",
            "source of the text; stdlib: the source code of Python's standard library, which "
            "every user has; none: no tokens, for weights that were converted",
            choices=(*_TEXTS, "bin", "mixture", "fineweb10B_gpt2", "none"),
        ),
        "path": Key(
            "",
            "file, directory or glob (** too), or several with commas; hf: a directory or a name "
            "on the hub; tfds: a name; named corpora: a directory with a copy; mixture: prepared "
            "directories with weights, such as web=3,code=1",
            when={"data.source": (*_TEXTS[1:], "bin", "mixture", "fineweb10B_gpt2")},
        ),
        "field": Key(
            "text",
            "field that holds the text",
            when={"data.source": ("jsonl", "parquet", "hf", "tfds")},
        ),
        "rows": Key(
            "train",
            "dataset split to read, such as train; our training and validation split is made "
            "from it",
            when={"data.source": ("hf", "tfds", *_CORPORA)},
        ),
        "subset": Key("", "configuration of a dataset on the hub", when={"data.source": ("hf",)}),
        "revision": Key(
            "", "commit or tag of a dataset on the hub", when={"data.source": ("hf", *_CORPORA)}
        ),
        "directory": Key("", "directory of the TFDS datasets", when={"data.source": ("tfds",)}),
        "limit": Key(
            0,
            "documents to read; 0: all",
            low=0,
            when={"data.source": ("jsonl", "parquet", "hf", "tfds", *_CORPORA)},
        ),
        "shards": Key(
            1,
            "training shards of 100M tokens to download",
            low=1,
            when={"data.source": ("fineweb10B_gpt2",)},
        ),
        "document": Key(
            "file",
            "unit of text that is one document: a file, a paragraph or a line",
            choices=("file", "paragraph", "line"),
            when={"data.source": ("text",)},
        ),
        "tokenizer": Key(
            "bpe",
            "bytes: one id per byte; char: one id per character; bpe: trained on the source; hf: "
            "a published BPE, such as GPT-2's or Llama's",
            choices=("bytes", "char", "bpe", "hf"),
            when={"data.source": (*_TEXTS, "none")},
        ),
        "tokenizer_path": Key(
            "",
            "directory with tokenizer.json, or with vocab.json and merges.txt; or gpt2, llama2, "
            "llama3 or another name on the hub",
            when={"data.tokenizer": ("hf",)},
        ),
        "vocab_size": Key(
            4096,
            "entries of the trained BPE, including the document mark",
            low=258,
            when={"data.tokenizer": ("bpe",)},
        ),
        "split": Key(
            "hash",
            "how validation text is chosen: by a hash of each document, or the tail of the text",
            choices=("hash", "tail"),
            when={"data.source": _TEXTS},
        ),
        "val_fraction": Key(
            0.05,
            "fraction held out for validation, of documents (hash) or characters (tail)",
            above=0.0,
            high=0.5,
            when={"data.source": _TEXTS},
        ),
        "val_path": Key(
            "",
            "validation shards; empty: the shards of data.path with 'val' in their name",
            when={"data.source": ("bin",)},
        ),
        "document_mark": Key(
            -1,
            "bare shards: the id with which every document begins, 50256 in GPT-2's; -1: unknown. "
            "A prepared directory says its own",
            low=-1,
            when={"data.source": ("bin",)},
            late=True,
        ),
        "overlap": Key(
            0,
            "length in tokens of the n-grams whose overlap is reported: the fraction of those in "
            "the validation split that the training split contains too (13 is usual); 0: no "
            "report",
            low=0,
            when={"data.source": _TEXTS},
        ),
        "shard_tokens": Key(
            100_000_000,
            "tokens of one written shard",
            low=1,
            when={"data.source": _TEXTS},
        ),
        "seq_len": Key(256, "tokens of one training window", low=1),
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
            "training tokens, rounded up to whole steps; replaces train.steps",
            low=0.0,
            when={"train.steps": (0,)},
        ),
        "batch_size": Key(32, "sequences per optimizer step, over all devices", low=1),
        "accum": Key(1, "micro-batches per optimizer step; more take less memory", low=1),
        "parent": Key(
            "",
            "work directory of a run to branch from: this run starts from its state at "
            "train.parent_step and includes its steps and tokens in its own count",
        ),
        "parent_step": Key(0, "step of the parent's checkpoint to start from", low=0),
    },
    "eval": {
        "every": Key(250, "steps between evaluations; 0: only at the end", low=0),
        "tokens": Key(
            200_000, "validation tokens of an evaluation, always the same ones; 0: all", low=0
        ),
        "batch_size": Key(
            0,
            "sequences per forward pass; 0: as many as in a training micro-batch",
            low=0,
            identity=False,
        ),
        "redundancy_every": Key(
            "0",
            "interval between measurements of Block Influence and layer drop; 0: none",
            duration=True,
        ),
        "redundancy_early": Key(
            "0", "that interval in the early part of the run; 0: no early part", duration=True
        ),
        "redundancy_until": Key("10%", "end of the early part", duration=True),
        "redundancy_tokens": Key(
            20_000,
            "validation tokens per measurement; each is read once per block and once more",
            low=1,
        ),
        "baselines": Key(True, "print unigram and bigram losses with the model's"),
        "sample": Key(
            200, "tokens of the text sampled and printed at the end; 0: none", low=0, identity=False
        ),
    },
    "checkpoint": {
        "every": Key(500, "steps between checkpoints; 0: only at the end", low=0, identity=False),
        "keep": Key(2, "number of latest checkpoints to keep", low=1, identity=False),
        "keep_every": Key(
            0,
            "checkpoints at multiples of this many steps are never deleted; 0: none",
            low=0,
            identity=False,
        ),
    },
    "mesh": {
        "replica": Key(
            1,
            "copies that split the batch over a slow network, such as slices; -1, in one of the "
            "five mesh axes: all remaining devices",
            low=-1,
            identity=False,
        ),
        "data": Key(-1, "devices that split the batch", low=-1, identity=False),
        "fsdp": Key(1, "devices that split the batch and the parameters", low=-1, identity=False),
        "sequence": Key(
            1, "devices that split each sequence (sequence parallelism)", low=-1, identity=False
        ),
        "tensor": Key(
            1,
            "devices that split heads, MLP and vocabulary (tensor parallelism)",
            low=-1,
            identity=False,
        ),
        "start_timeout": Key(
            60.0, "seconds to wait at the start for all processes", above=0, identity=False
        ),
        "peer_timeout": Key(
            60.0,
            "seconds of silence of one process after which the others stop",
            above=0,
            identity=False,
        ),
        "cpu_devices": Key(
            0,
            "CPU devices of each process; 0: one if there are several processes, else the "
            "product of the mesh axes, with -1 counted as 1",
            low=0,
            identity=False,
        ),
    },
    "log": {
        "every": Key(10, "steps between lines of metrics.jsonl", low=1),
        "per_layer": Key(True, "log the norms of gradient, parameters and update of each layer"),
        "activations_every": Key(
            0, "steps between statistics of every layer's activations; 0: never", low=0
        ),
        "spectral_every": Key(
            0, "steps between spectral norms of every matrix and its update; 0: never", low=0
        ),
        "tensorboard": Key(True, "write TensorBoard event files under tb/", identity=False),
        "watchdog": Key(
            600.0,
            "seconds without a finished step after which every thread's stack is printed; 0: never",
            low=0,
            identity=False,
        ),
        "wandb": Key(
            "off", "Weights & Biases logging", choices=("off", "offline", "online"), identity=False
        ),
        "wandb_project": Key(
            "lmscale",
            "Weights & Biases project",
            when={"log.wandb": ("offline", "online")},
            identity=False,
        ),
    },
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults, as the `ConfigDict` that config files edit."""

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
    """Returns whether the other keys of a config have the values of this key's `when`."""
    when = dict(keys())[path].when
    return all(get(config, other) in allowed for other, allowed in when.items())


def has(config, path: str) -> bool:
    """Returns whether a config has a dotted path."""
    try:
        get(config, path)
    except (KeyError, TypeError):
        return False
    return True
