"""Parquet, Hugging Face datasets and TFDS: real ones, written here, read and trained from."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, finish

from lmscale_jax.configs import base
from lmscale_jax.data import corpora, prepare, sources
from lmscale_jax.errors import InputError
from lmscale_jax.train import loop

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")


def texts(count=300) -> list[str]:
    chance = np.random.default_rng(0)
    words = ["oak", "river", "stone", "lantern", "über", "seven", "the", "of", "walked", "\n"]
    return [" ".join(chance.choice(words, 40)) + f" {i}" for i in range(count)]


def write_parquet(path, values, field="text"):
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({field: values, "id": list(range(len(values)))}), path)


def tfds_folder(path):
    """A TFDS dataset prepared as ArrayRecord, by a process of its own."""
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    path.mkdir()
    (path / "stories.jsonl").write_text("\n".join(map(json.dumps, texts())))
    program = (
        "from tests.little_stories import LittleStories\n"
        f"LittleStories(data_dir={str(path / 'tfds')!r}).download_and_prepare("
        "file_format='array_record')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"LITTLE_STORIES": str(path / "stories.jsonl")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path / "tfds"


@functools.cache
def written_dataset(folder, kind: str) -> dict:
    """The overrides that name a dataset of that kind, written under the folder."""
    path, values = folder / kind.replace(" ", "_"), texts()
    match kind:
        case "parquet":
            write_parquet(path / "a.parquet", values[:100])
            write_parquet(path / "b.parquet", values[100:])
            return {"data.source": "parquet", "data.path": str(path)}
        case "jsonl":
            path.mkdir()
            with gzip.open(path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in values)
            return {"data.source": "jsonl", "data.path": str(path)}
        case "bin":
            path.mkdir()
            for side, count in (("train", 5000), ("val", 2000)):
                header = np.zeros(256, "<i4")
                header[:3] = 20240520, 1, count
                body = np.random.default_rng(count).integers(0, 90, count).astype("<u2")
                (path / f"part_{side}_0.bin").write_bytes(header.tobytes() + body.tobytes())
            return {"data.source": "bin", "data.path": str(path), "model.vocab_size": 90,
                    "data.tokenizer": "bpe", "data.val_fraction": 0.05}  # fmt: skip
        case "saved":
            datasets.Dataset.from_dict({"body": values}).save_to_disk(str(path))
            return {"data.source": "hf", "data.path": str(path), "data.field": "body"}
        case "saved splits":
            rows = datasets.Dataset.from_dict({"text": values})
            another = datasets.Dataset.from_dict({"text": ["another"]})
            datasets.DatasetDict({"part": rows, "rest": another}).save_to_disk(str(path))
            return {"data.source": "hf", "data.path": str(path), "data.rows": "part"}
        case "directory":
            write_parquet(path / "train-0.parquet", values)
            return {"data.source": "hf", "data.path": str(path)}
        case "a copy of a corpus":
            write_parquet(path / "train-0.parquet", values)
            return {"data.source": "tinystories", "data.path": str(path)}
        case "tfds":
            directory = tfds_folder(path)
            return {"data.source": "tfds", "data.path": "little_stories", "data.field": "story",
                    "data.directory": str(directory)}  # fmt: skip


KINDS = ["jsonl", "parquet", "saved", "saved splits", "directory", "a copy of a corpus", "tfds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def data_of(overrides: dict, cache="unused"):
    config = base.get_config()
    config.update_from_flattened_dict(
        {"data.cache": str(cache), "data.tokenizer": "bytes"} | overrides
    )
    return config.data


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_those_that_were_written(kind, folder, tmp_path):
    data = data_of(written_dataset(folder, kind), tmp_path)
    plain = corpora.plain_source(data, tmp_path)
    documents = list(sources.documents(plain))
    # TFDS shuffles what it writes.
    assert (sorted(documents) if kind == "tfds" else documents) == (
        sorted(texts()) if kind == "tfds" else texts()
    )
    if kind != "a copy of a corpus":
        data.limit = 7
        assert list(sources.documents(data)) == documents[:7]
    tokens = prepare.prepare_data(
        data_of(written_dataset(folder, kind), tmp_path), 0, log=lambda line: None
    )
    reopened = prepare.prepare_data(
        data_of(written_dataset(folder, kind), tmp_path), 0, log=pytest.fail
    )
    assert reopened.fingerprint == tokens.fingerprint
    assert tokens.train.n_tokens + tokens.val.n_tokens == 300 + sum(
        len(t.encode()) for t in texts()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "bin"])
def test_a_run_trains_from_it(kind, folder, small, tmp_path):
    named = {k.replace(".", "__"): v for k, v in written_dataset(folder, kind).items()}
    config = small(**named, train__steps=4, eval__every=0)
    loop.train(config, tmp_path / "run", say=lambda line: None)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished" and 0 <= record["throughput"]["data_wait"] <= 1


def refused(data, message):
    with pytest.raises(InputError, match=message) as caught:
        prepare.prepare_data(data, 0, log=lambda line: None)
    assert "\n" not in str(caught.value)


def test_bad_tables_are_refused_in_one_line(folder, tmp_path):
    overrides = written_dataset(folder, "parquet")
    refused(data_of(overrides | {"data.field": "body"}, tmp_path), "no field 'body'.*text, id")
    refused(
        data_of(written_dataset(folder, "saved") | {"data.field": "x"}, tmp_path),
        "no field 'x'.*body",
    )
    refused(
        data_of(written_dataset(folder, "saved splits") | {"data.rows": "train"}, tmp_path),
        "rows='train'.*part, rest",
    )
    refused(data_of(written_dataset(folder, "directory") | {"data.rows": "no"}, tmp_path), "no")
    broken = tmp_path / "broken" / "a.parquet"
    broken.parent.mkdir()
    source = (folder / "parquet" / "a.parquet").read_bytes()
    for damaged in (source[: len(source) // 2], b"PAR1" + bytes(100) + b"PAR1", b""):
        broken.write_bytes(damaged)
        refused(
            data_of(overrides | {"data.path": str(broken)}, tmp_path), "not a readable Parquet file"
        )
    empty = tmp_path / "empty" / "a.parquet"
    write_parquet(empty, ["", None, ""])
    refused(data_of(overrides | {"data.path": str(empty)}, tmp_path), "no text there")
    numbers = tmp_path / "numbers" / "a.parquet"
    write_parquet(numbers, [1, 2])
    refused(data_of(overrides | {"data.path": str(numbers)}, tmp_path), "holds int, not text")


def test_no_hub_and_no_tfds(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = r"(the hub cannot be reached|log in).*directory that holds a copy"
    refused(data_of({"data.source": "fineweb_edu"}, tmp_path), message)
    refused(data_of({"data.source": "hf", "data.path": "nobody/nothing"}, tmp_path), message)
    pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    bad = {"data.source": "tfds", "data.path": "no_such_set", "data.directory": str(tmp_path)}
    refused(data_of(bad, tmp_path), "no TFDS dataset to read.*download_and_prepare")


def test_shards_in_tokens(tmp_path, monkeypatch):
    """fineweb10B_gpt2: what is there is used, what is not is fetched, a failure is one line."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    downloads = []

    def write(path, n=3000):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, n
        body = np.random.default_rng(n).integers(0, 50_257, n).astype("<u2")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header.tobytes() + body.tobytes())

    def download(repo, name, repo_type, local_dir):
        assert (repo, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        downloads.append(name)
        write(local_dir / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    data = data_of({"data.source": "fineweb10B_gpt2", "data.shards": 2}, tmp_path)
    shards_data = prepare.prepare_data(data, 0, log=lambda line: None)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert downloads == names and shards_data.vocab_size == 50_257
    assert (shards_data.train.n_tokens, shards_data.val.n_tokens) == (6000, 3000)
    prepare.prepare_data(data, 0, log=lambda line: None)
    assert downloads == names
    refused(data_of({"data.source": "fineweb10B_gpt2", "data.path": str(tmp_path)}, tmp_path),
            "has no fineweb_val_000000.bin")  # fmt: skip

    def unreachable(*arguments, **named):
        raise OSError("no route")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    data.shards = 3
    refused(data, "fineweb_train_000003.bin of .* cannot be fetched.*no route.*stdlib")


def test_a_published_tokenizer_by_name(folder, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(texts(), trainer)
    library.add_special_tokens(["<|endoftext|>"])
    downloads = []

    def download(repo, name, repo_type, local_dir):
        assert repo_type == "model"
        downloads.append((repo, name))
        local_dir.mkdir(parents=True, exist_ok=True)
        content = library.to_str() if name == "tokenizer.json" else '{"eos_token": "<|endoftext|>"}'
        (local_dir / name).write_text(content)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    named = {"data.tokenizer": "hf", "data.tokenizer_path": "gpt2"}
    data = data_of(written_dataset(folder, "parquet") | named, tmp_path)
    assert prepare.find_token_ids(data).vocab_size == 281
    prepared_data = prepare.prepare_data(data, 0, log=lambda line: None)
    assert prepared_data.vocab_size == 281 and prepared_data.tokenizer.boundary == 280
    repo_name = "openai-community/gpt2"
    assert downloads == [(repo_name, "tokenizer_config.json"), (repo_name, "tokenizer.json")]
    assert prepare.find_manifest(data) is not None

    def gated(*arguments, **named):
        raise hub.errors.GatedRepoError(
            "403", response=type("R", (), {"headers": {}, "request": None})
        )

    monkeypatch.setattr(hub, "hf_hub_download", gated)
    data.tokenizer_path = "llama2"
    refused(data, "Llama-2-7b-hf is gated; log in with .* accept its licence, or name a directory")
    data.tokenizer_path = "./nowhere"
    refused(data, "nowhere is no directory")


PREPARE = """
import sys, time
from lmscale_jax.configs import base
from lmscale_jax.data import encode, prepare
encode._BLOCK_CHARACTERS = 3000
data = base.get_config().data
data.source, data.path, data.tokenizer, data.vocab_size = "parquet", sys.argv[1], "bpe", 300
data.shard_tokens = 700
slow = encode._write_block
def write(*arguments):
    time.sleep(float(sys.argv[3]))
    slow(*arguments)
encode._write_block = write
from pathlib import Path
prepare.prepare_directory(data, Path(sys.argv[2]), log=lambda line: print(line, flush=True))
"""


def test_killed_and_started_again_it_ends_with_the_same_bytes(folder, tmp_path):
    source = written_dataset(folder, "parquet")["data.path"]

    def begin(out, pause, **environment):
        return subprocess.Popen(
            [sys.executable, "-c", PREPARE, source, str(out), str(pause)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
        )  # fmt: skip

    def content(directory):
        return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}

    status, _, err = finish(begin(tmp_path / "whole", 0, RAYON_NUM_THREADS="1"))
    assert status == 0, err
    journal = tmp_path / ".killed.tmp" / "journal.json"
    for blocks in (1, 4, 9):
        process = begin(tmp_path / "killed", 0.1, RAYON_NUM_THREADS="2")
        limit = time.monotonic() + 60
        while time.monotonic() < limit and process.poll() is None:
            if journal.exists():
                noted = json.loads(journal.read_text()).get("blocks", {"number": 0})
                if noted["number"] >= blocks:
                    break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert journal.exists() and not (tmp_path / "killed").exists()
    status, out, err = finish(begin(tmp_path / "killed", 0, RAYON_NUM_THREADS="2"))
    assert status == 0, err
    assert "resuming after" in out
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert len(content(tmp_path / "whole")) > 10 and not journal.exists()


def test_a_journal_removes_what_a_killed_process_was_writing(tmp_path):
    from lmscale_jax.data import encode

    (tmp_path / "journal.json").write_text('{"tokenizer": "bytes"}')
    (tmp_path / ".journal.json.123").write_text('{"tokeni')
    journal = encode.PrepareJournal(tmp_path)
    assert journal.get("tokenizer") == "bytes" and journal.get("blocks") is None
    journal.remove()
    assert list(tmp_path.iterdir()) == []
