"""K runs in one program against one at a time: tokens a second, on one core or accelerator.

    python -m benchmarks.population

For each width, a turn of each K after the other, many rounds; the ratio is the median over rounds
of what K members train in a second over what one run by itself does in the same round.
"""

import os
import statistics
import time

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import machine, tables
from lmscale_jax import cli
from lmscale_jax.configs import base
from lmscale_jax.model import mesh
from lmscale_jax.sweeps import population
from lmscale_jax.train.run import build_run
from lmscale_jax.train.setup import TrainStep

WIDTHS = flags.DEFINE_list("widths", ["16", "32", "64", "128", "256"], "model.d_model")
COUNTS = flags.DEFINE_list("counts", ["1", "2", "4", "8", "16"], "members")
ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each", lower_bound=1)
TURN = flags.DEFINE_float("turn_ms", 400.0, "milliseconds of one turn at the least")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "model.dtype")
BATCH = flags.DEFINE_integer("batch", 8, "sequences a step of each member, 128 tokens each")


def config_of(width: int) -> ConfigDict:
    c = base.get_config()
    c.model.n_layers, c.model.d_model, c.model.n_heads = 2, width, max(1, width // 16)
    c.model.norm, c.model.mlp, c.model.positions = "rmsnorm", "swiglu", "rope"
    # Bytes need no tokenizer to be trained; the model has the ids of a small one.
    c.model.vocab_size, c.data.tokenizer, c.data.seq_len = 1024, "bytes", 128
    c.train.steps, c.train.batch_size = 10_000, BATCH.value
    c.model.dtype, c.log.every = DTYPE.value, 10
    c.mesh.cpu_devices = 0 if machine.accelerated() else 1
    return c


class Alone:
    """The step of an ordinary run, again and again."""

    def __init__(self, run):
        self._state = run.begin()
        self._take = TrainStep(run)
        self._batch = mesh.put_batch(run.batches.at(0), run.mesh)

    def turn(self) -> None:
        for _ in range(10):
            self._state, metrics = self._take(self._state, self._batch)
            float(metrics["train_loss"])


class Together:
    """A population of K, ten steps at a time."""

    def __init__(self, run, count: int):
        members = [ConfigDict(run.config.to_dict() | {"seed": seed}) for seed in range(count)]
        self._population = population.Population(members, run.data.boundary)
        self._state = self._population.begin()
        self._batches = population.batch_reader(members, run.data)(0, 10)

    def turn(self) -> None:
        self._state, metrics = self._population.advance(self._state, self._batches)
        jax.block_until_ready(metrics)


def rate(turn, runs: int, tokens: int) -> float:
    """Tokens a second of all runs together over at least `turn_ms`."""
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < TURN.value / 1000:
        turn()
        done += 10
    return done * runs * tokens / spent


def measure(width: int) -> dict:
    run = build_run(config_of(width), None, print)
    tokens = BATCH.value * 128
    kinds = {"alone": (Alone(run), 1)}
    for count in map(int, COUNTS.value):
        kinds[f"{count}"] = (Together(run, count), count)
    for kind, _ in kinds.values():
        kind.turn()
    rounds = [
        {name: rate(kind.turn, runs, tokens) for name, (kind, runs) in kinds.items()}
        for _ in range(ROUNDS.value)
    ]
    counts = {"parameters": sum(x.size for x in jax.tree.leaves(kinds["alone"][0]._state.params))}
    ratios = {name: statistics.median(r[name] / r["alone"] for r in rounds) for name in kinds}
    alone = statistics.median(r["alone"] for r in rounds)
    print(f"width {width}: alone {alone:,.0f} tokens/s; " + ", ".join(
        f"K = {name}: {ratio:.2f}" for name, ratio in ratios.items() if name != "alone"
    ), flush=True)  # fmt: skip
    return counts | {"width": width, "alone": alone, "ratios": ratios}


def main() -> None:
    if hasattr(os, "sched_setaffinity") and not machine.accelerated():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    mesh.start_jax(config_of(16))
    np.random.seed(0)
    asked = machine.asked("widths", "counts", "rounds", "turn_ms", "batch", "dtype")
    result = machine.facts(None, asked) | {"sizes": []}
    for width in WIDTHS.value:
        result["sizes"].append(measure(int(width)))
        machine.save("population", result)
    print(f"\n{tables.headline(result)}\n\n{tables.population(result)}")


if __name__ == "__main__":
    cli.run_command(main)
