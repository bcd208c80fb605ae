"""Corpora and tokenizers by name: where they lie, and which field holds the text."""

import logging
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.errors import InputError


class Corpus(NamedTuple):
    """A dataset on the Hugging Face hub: its name, its configuration, the field of the text."""

    path: str
    subset: str
    field: str


CORPORA = {
    "tinystories": Corpus("roneneldan/TinyStories", "", "text"),
    "fineweb_edu": Corpus("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "openwebtext": Corpus("Skylion007/openwebtext", "", "text"),
    "c4": Corpus("allenai/c4", "en", "text"),
}
# Published tokenizers by short names.
TOKENIZERS = {
    "gpt2": "openai-community/gpt2",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama3": "meta-llama/Meta-Llama-3-8B",
}
# FineWeb in GPT-2's tokens, in shards of 100M, as the nanoGPT speedruns use it.
SHARDS, SHARDS_AT = "fineweb10B_gpt2", "kjj0/fineweb10B-gpt2"
SHARDS_VOCAB, SHARDS_TRAIN = 50_257, 103


def plain(data_cfg, cache: Path):
    """The same data by a source that is no name of a corpus, and a tokenizer that is a directory;
    the config itself if it has both.

    `data.path` names a local copy, a directory; without it the hub's, or for the shards what is
    fetched into `cache`, as published tokenizers are. Raises InputError.
    """
    if data_cfg.tokenizer == "hf" and not _is_local(data_cfg.tokenizer_path):
        folder = str(_tokenizer_folder(data_cfg, cache))
        data_cfg = _changed(data_cfg, tokenizer_path=folder)
    if data_cfg.source == SHARDS:
        if data_cfg.shards > SHARDS_TRAIN:
            raise InputError(
                f"config.data.shards={data_cfg.shards}: there are {SHARDS_TRAIN}; "
                f"{SHARDS_TRAIN} would work"
            )
        folder = _shard_folder(data_cfg, cache)
        names = ",".join(str(folder / name) for name in _shard_names(data_cfg))
        return _changed(data_cfg, source="bin", path=names, val_path="")
    if data_cfg.source not in CORPORA:
        return data_cfg
    known = CORPORA[data_cfg.source]
    return _changed(
        data_cfg, source="hf", path=data_cfg.path or known.path,
        subset="" if data_cfg.path else known.subset, field=known.field,
    )  # fmt: skip


def vocab_size(data_cfg) -> int:
    """Ids of a corpus that comes in tokens; 0 for any other."""
    return SHARDS_VOCAB if data_cfg.source == SHARDS else 0


def fetch(data_cfg, cache: Path, log) -> None:
    """Fetches the shards that are not there, one after the other; what is there whole stays.

    huggingface_hub resumes a file that was begun and checks its hash. Raises InputError where the
    hub cannot be reached.
    """
    if data_cfg.source != SHARDS:
        return
    folder = _shard_folder(data_cfg, cache)
    absent = [name for name in _shard_names(data_cfg) if not (folder / name).exists()]
    if absent and data_cfg.path:
        raise InputError(
            f"config.data.path={data_cfg.path} has no {absent[0]}; without data.path the shards "
            f"are fetched"
        )
    for name in absent:
        log(f"data: fetching {name} of {SHARDS_AT}, 200 MB")
        remedy = (
            f"name a directory that holds {name} as data.path, or data.source='stdlib' needs no "
            f"network"
        )
        _download(SHARDS_AT, name, folder, f"data.source={SHARDS!r}", remedy, repo_type="dataset")


def fetch_tokenizer(data_cfg, cache: Path, log) -> None:
    """Fetches a published tokenizer that is named and not here. Raises InputError."""
    name = data_cfg.tokenizer_path
    if data_cfg.tokenizer != "hf" or _is_local(name):
        return
    folder, at = _tokenizer_folder(data_cfg, cache), TOKENIZERS.get(name, name)
    for file in ("tokenizer_config.json", "tokenizer.json"):
        if not (folder / file).exists():
            log(f"data: fetching {file} of {at}")
            remedy = (
                "name a directory with tokenizer.json, or data.tokenizer='bpe' needs no network"
            )
            _download(at, file, folder, f"data.tokenizer_path={name}", remedy)


def _download(at: str, name: str, folder: Path, what: str, remedy: str, **more) -> None:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise InputError(
            f"{what} needs the package huggingface_hub; pip install 'lmscale_jax[hf]', or {remedy}"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        hf_hub_download(at, name, local_dir=folder, **more)
    except errors.GatedRepoError:
        raise InputError(
            f"{what}: {at} is gated; log in with `hf auth login` and accept its licence, or "
            f"{remedy}"
        ) from None
    except Exception as error:  # of several libraries
        said = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{what}: {name} of {at} cannot be fetched ({type(error).__name__}: {said}); {remedy}"
        ) from None


def _is_local(path: str) -> bool:
    """A directory that is there, or a path that can be nothing else; "" is said elsewhere."""
    return not path or Path(path).expanduser().is_dir() or path.startswith(("/", ".", "~"))


def _tokenizer_folder(data_cfg, cache: Path) -> Path:
    return cache / "tokenizers" / data_cfg.tokenizer_path.replace("/", "--")


def _shard_folder(data_cfg, cache: Path) -> Path:
    return Path(data_cfg.path).expanduser() if data_cfg.path else cache / SHARDS


def _shard_names(data_cfg) -> list[str]:
    train = [f"fineweb_train_{i:06d}.bin" for i in range(1, data_cfg.shards + 1)]
    return ["fineweb_val_000000.bin", *train]


def _changed(data_cfg, **values):
    data = ConfigDict(data_cfg.to_dict())
    for name, value in values.items():
        data[name] = value
    return data
