"""Named corpora and published tokenizers: their place on the hub, and how to fetch them."""

import logging
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.errors import InputError
from lmscale_jax.files import user_path


class Corpus(NamedTuple):
    """A dataset on the Hugging Face hub: its name, its subset, and the field with the text."""

    path: str
    subset: str
    field: str


CORPORA = {
    "tinystories": Corpus("roneneldan/TinyStories", "", "text"),
    "fineweb_edu": Corpus("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
    "openwebtext": Corpus("Skylion007/openwebtext", "", "text"),
    "c4": Corpus("allenai/c4", "en", "text"),
}
# Short names of published tokenizers.
TOKENIZERS = {
    "gpt2": "openai-community/gpt2",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "llama3": "meta-llama/Meta-Llama-3-8B",
}
# FineWeb in GPT-2's tokens, in shards of 100M, as the nanoGPT speedruns use it.
SHARDS, SHARDS_REPO = "fineweb10B_gpt2", "kjj0/fineweb10B-gpt2"
SHARDS_VOCAB, SHARDS_MARK, SHARDS_TRAIN = 50_257, 50_256, 103


def plain_source(data_cfg, cache: Path):
    """Replaces the names of a corpus and of a published tokenizer by sources and directories.

    `data.path` is the directory of a local copy of the corpus. Without it the corpus is read from
    the hub; shards and tokenizers are in `cache`, where `fetch` and `fetch_tokenizer` put them.

    Returns:
        The config group `data` without such names; `data_cfg` itself if it has none.

    Raises:
        InputError: there are fewer shards than data.shards.
    """
    if data_cfg.tokenizer == "hf" and not _is_local(data_cfg.tokenizer_path):
        folder = str(_tokenizer_folder(data_cfg, cache))
        data_cfg = _changed(data_cfg, tokenizer_path=folder)
    if data_cfg.source == SHARDS:
        if data_cfg.shards > SHARDS_TRAIN:
            raise InputError(
                f"config.data.shards={data_cfg.shards}: there are {SHARDS_TRAIN} training shards; "
                f"use {SHARDS_TRAIN} or fewer"
            )
        folder = _shard_folder(data_cfg, cache)
        names = ",".join(str(folder / name) for name in _shard_names(data_cfg))
        return _changed(data_cfg, source="bin", path=names, val_path="", document_mark=SHARDS_MARK)
    if data_cfg.source not in CORPORA:
        return data_cfg
    corpus = CORPORA[data_cfg.source]
    return _changed(
        data_cfg, source="hf", path=data_cfg.path or corpus.path,
        subset="" if data_cfg.path else corpus.subset, field=corpus.field,
    )  # fmt: skip


def corpus_vocab_size(data_cfg) -> int:
    """Returns the number of ids of a corpus that is published as tokens; 0 for any other."""
    return SHARDS_VOCAB if data_cfg.source == SHARDS else 0


def missing_shards(data_cfg, cache: Path) -> list[str]:
    """Lists the files of a corpus that is published as tokens that are not here; [] for others."""
    if data_cfg.source != SHARDS:
        return []
    folder = _shard_folder(data_cfg, cache)
    return [name for name in _shard_names(data_cfg) if not (folder / name).exists()]


def fetch_shards(data_cfg, cache: Path, log) -> None:
    """Fetches the missing shards of a corpus that is published as tokens, one after the other.

    huggingface_hub resumes partial downloads and checks hashes.

    Raises:
        InputError: the hub cannot be reached, or a shard is missing in data.path.
    """
    folder, missing = _shard_folder(data_cfg, cache), missing_shards(data_cfg, cache)
    if missing and data_cfg.path:
        raise InputError(
            f"config.data.path={data_cfg.path} has no {missing[0]}; leave data.path empty to "
            f"fetch the shards"
        )
    for name in missing:
        log(f"data: fetching {name} of {SHARDS_REPO}, 200 MB")
        remedy = (
            f"name a directory that holds {name} as data.path, or data.source='stdlib' needs no "
            f"network"
        )
        _download(SHARDS_REPO, name, folder, f"data.source={SHARDS!r}", remedy, repo_type="dataset")


def fetch_tokenizer(data_cfg, cache: Path, log) -> None:
    """Fetches the tokenizer that data.tokenizer_path names, if missing. Raises InputError."""
    name = data_cfg.tokenizer_path
    if data_cfg.tokenizer != "hf" or _is_local(name):
        return
    folder, repo = _tokenizer_folder(data_cfg, cache), TOKENIZERS.get(name, name)
    for file in ("tokenizer_config.json", "tokenizer.json"):
        if not (folder / file).exists():
            log(f"data: fetching {file} of {repo}")
            remedy = (
                "name a directory with tokenizer.json, or data.tokenizer='bpe' needs no network"
            )
            _download(repo, file, folder, f"data.tokenizer_path={name}", remedy)


def _download(
    repo: str, name: str, folder: Path, field: str, remedy: str, repo_type: str = "model"
) -> None:
    """Downloads one file of the hub into a folder; errors name `field` and end with `remedy`.

    Raises:
        InputError: huggingface_hub is not installed, the repository is gated, or the hub cannot be
            reached.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise InputError(
            f"{field} needs the package huggingface_hub; pip install 'lmscale_jax[hf]', or {remedy}"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        hf_hub_download(repo, name, local_dir=folder, repo_type=repo_type)
    except errors.GatedRepoError:
        raise InputError(
            f"{field}: {repo} is gated; log in with `hf auth login` and accept its licence, or "
            f"{remedy}"
        ) from None
    except Exception as error:  # of several libraries
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(
            f"{field}: {name} of {repo} cannot be fetched ({reason}); {remedy}"
        ) from None


def _is_local(path: str) -> bool:
    """Tells whether a path is an existing directory, or cannot be a name on the hub.

    The empty path counts as local; the validation of the config refuses it.
    """
    return not path or user_path(path).is_dir() or path.startswith(("/", ".", "~"))


def _tokenizer_folder(data_cfg, cache: Path) -> Path:
    return cache / "tokenizers" / data_cfg.tokenizer_path.replace("/", "--")


def _shard_folder(data_cfg, cache: Path) -> Path:
    return user_path(data_cfg.path) if data_cfg.path else cache / SHARDS


def _shard_names(data_cfg) -> list[str]:
    train = [f"fineweb_train_{i:06d}.bin" for i in range(1, data_cfg.shards + 1)]
    return ["fineweb_val_000000.bin", *train]


def _changed(data_cfg, **values):
    """Returns a copy of the config group with new values."""
    data = ConfigDict(data_cfg.to_dict())
    for name, value in values.items():
        data[name] = value
    return data
