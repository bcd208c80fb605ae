"""How fast text becomes shards, beside the plain way, and how fast shards become batches:

    python -m benchmarks.prepare

The text is the standard library's, as one Parquet file; the tokenizer a BPE of it. The plain way is
`datasets.map` over the same tokenizer with a process a core, its result joined to one array. Ours
also drops duplicates, splits, counts bytes and hashes. Reading is the pipeline's, in one thread.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli

COPIES = flags.DEFINE_integer("copies", 1, "of the text, each a little different", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "turns", lower_bound=1)
VOCABULARY = flags.DEFINE_integer("vocabulary", 4096, "entries of the BPE", lower_bound=300)


def write_parquet(path: Path) -> int:
    """Writes the documents; returns their characters."""
    import pyarrow
    from pyarrow import parquet

    from lmscale_jax.configs import base
    from lmscale_jax.data import sources

    library = list(sources.documents(base.get_config().data))
    texts = [f"{text}\n# copy {i}" for i in range(COPIES.value) for text in library]
    parquet.write_table(pyarrow.table({"text": texts}), path)
    return sum(map(len, texts))


def config_of(path: Path, cache: Path):
    from lmscale_jax.configs import base

    data = base.get_config().data
    data.source, data.path, data.cache = "parquet", str(path), str(cache)
    data.vocab_size = VOCABULARY.value
    return data


def ours(path: Path, folder: Path):
    """(seconds, the prepared data)."""
    from lmscale_jax.data import prepare

    start = time.perf_counter()
    data = prepare.prepare_data(config_of(path, folder), 0, log=lambda line: None)
    return time.perf_counter() - start, data


def plain(path: Path, tokenizer, folder: Path) -> tuple[float, int]:
    """(seconds, tokens) of datasets.map and one array of all tokens."""
    import datasets
    import numpy as np

    datasets.disable_progress_bars()
    start = time.perf_counter()
    rows = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(folder)
    )
    encoded = rows.map(
        lambda batch: {"ids": tokenizer.encode_batch(batch["text"])},
        batched=True, num_proc=os.cpu_count(), remove_columns=["text"],
    )  # fmt: skip
    ids = np.concatenate(encoded.with_format("numpy")["ids"][:]).astype(np.uint16)
    ids.tofile(folder / "plain.bin")
    return time.perf_counter() - start, len(ids)


def reading(data) -> float:
    """Tokens a second of the batches of a run, by one thread."""
    from lmscale_jax.data.batches import TrainBatches

    batches = TrainBatches(data, 256, 32, 0)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 1.0:
        batches.at(done)
        done += 1
    return done * 32 * 256 / (time.perf_counter() - start)


def consumed() -> float:
    """Tokens a second that the fastest training step of benchmarks.train_step takes here."""
    result = json.loads((Path(__file__).parent / "results/train_step.json").read_text())
    return max(
        1e3 * shape["shape"]["B"] * shape["shape"]["T"] / row["ms"]["median"]
        for shape in result["shapes"].values()
        for row in shape["rows"].values()
        if row.get("ms", {}).get("median")
    )


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "text.parquet"
        characters = write_parquet(path)
        for number in range(ROUNDS.value):
            folder = Path(temporary) / f"round{number}"
            folder.mkdir()
            seconds, data = ours(path, folder)
            tokens = data.train.n_tokens + data.val.n_tokens
            theirs, count = plain(path, data.tokenizer, folder)
            rows.append({"ours_s": seconds, "plain_s": theirs, "tokens": tokens,
                         "plain_tokens": count, "read": reading(data)})  # fmt: skip
            print(f"round {number}: ours {seconds:.1f} s, plain {theirs:.1f} s", flush=True)

    def middle(name):
        return statistics.median(row[name] for row in rows)

    result = machine.facts(None, machine.asked("copies", "rounds", "vocabulary"))
    result |= {"characters": characters, "rounds": rows}
    machine.save("prepare", result)
    print(f"\n{characters:,} characters\n\n{tables.prepare(result)}")
    ratio = middle("read") / consumed()
    print(
        f"\nreading: {middle('read'):,.0f} tokens a second in one thread, {ratio:,.0f} times what "
        f"the fastest step of results/train_step.json takes"
    )


if __name__ == "__main__":
    cli.run_command(main)
