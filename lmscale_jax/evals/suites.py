"""The suites of `evaluate`: each measures a model on held-out tokens, for fields of eval.json."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from lmscale_jax.config import conflicts
from lmscale_jax.data.batches import Batch
from lmscale_jax.errors import InputError
from lmscale_jax.evals import attention_stats, mur_stats, redundancy
from lmscale_jax.model.build import Model
from lmscale_jax.mur.settings import GRANULARITIES, THRESHOLDS
from lmscale_jax.mur.utility import METRICS

SUITES = ("perplexity", "redundancy", "mur", "attention")


class TrainedModel(NamedTuple):
    """A trained model with held-out tokens, for suites to measure.

    Attributes:
      config: resolved.
      model, mesh: what the config describes.
      params: weights, placed on the mesh.
      held_out: number of tokens -> batches of the first of the held-out tokens (0: all).
      validate: params -> the fields of the suite perplexity.
    """

    config: object
    model: Model
    mesh: jax.sharding.Mesh
    params: dict
    held_out: Callable[[int], Iterator[Batch]]
    validate: Callable[[dict], dict]


def check_suite_names(names: list[str]) -> None:
    """Raises InputError where a name is no suite's, or there is none."""
    wrong = [name for name in names if name not in SUITES]
    if wrong or not names:
        raise InputError(
            f"--suites={','.join(names)}: {wrong or 'nothing'} is not a suite; "
            f"use --suites={','.join(SUITES)}"
        )


def check_suite(names: list[str], model) -> None:
    """Raises InputError where a suite cannot measure a model with this config group."""
    for name in {"redundancy", "mur"}.intersection(names):
        conflicts.check_chain(model, f"--suites={name}", conflicts.READ_ONLY)
    if "attention" in names:
        conflicts.check_chain(model, "--suites=attention", conflicts.EXTRA_STREAMS)
        attention_stats.gate_range(model)
    if "attention" in names and (model.window_layers != "none" or model.mask == "document"):
        raise InputError(
            f"--suites=attention does not support config.model.window_layers="
            f"{model.window_layers!r} with mask={model.mask!r}, as it needs every earlier token "
            f"visible; use --suites=perplexity"
        )


def run_suites(
    names: list[str], trained: TrainedModel, n_tokens: int, say: Callable[[str], None]
) -> dict:
    """Returns the fields of the suites named, over the first `n_tokens` held-out tokens (0: all).

    Perplexity takes as many tokens as eval.tokens. With "redundancy" and "mur" both, the fields
    also have the rank correlations of their rankings of the blocks.
    """
    fields, rankings, n_windows = {}, {}, 0
    if "perplexity" in names:
        fields |= trained.validate(trained.params)
        say(f"perplexity           {fields['perplexity']:.4f}, loss {fields['val_loss']:.4f}")
    if "redundancy" in names:
        suite_fields, drops = redundancy_suite(trained, n_tokens)
        fields |= suite_fields
        n_windows = len(drops.count_W)
        single = slice(1, 1 + len(fields["block_influence"]))
        rankings["block_influence"] = drops.influence
        rankings["layer_drop"] = lambda weight_W: drops.damage(weight_W)[single]
        say(f"block influence      {_line(fields['block_influence'])}")
        say(f"layer drop, nats     {_line(fields['layer_drop'])}")
    if "mur" in names:
        suite_fields, block_utilities = mur_suite(trained, n_tokens)
        fields |= suite_fields
        n_windows = int(block_utilities.window.max()) + 1
        rankings["utility"] = lambda weight_W: block_utilities.utility("block", weight_W)
        say(f"{fields['mur']['metric']} utility          {_line(fields['mur']['mean'])}")
    if "attention" in names:
        bounds = attention_stats.gate_range(trained.config.model)
        fields["attention"] = attention_stats.evaluate_attention(
            attention_stats.make_attention_stats(trained.model, trained.mesh, bounds),
            trained.params,
            trained.held_out(n_tokens),
            trained.mesh,
            bounds,
        )
        say(f"attention sink       {_line(fields['attention']['sink'])}")
    if len(rankings) > 1:
        fields["rank_correlation"] = redundancy.rank_correlations(rankings, n_windows)
        for pair, rho in fields["rank_correlation"].items():
            interval = f"[{rho['low']:+.2f}, {rho['high']:+.2f}]"
            say(f"rank correlation     {rho['rho']:+.2f} {interval} of {pair}")
    return fields


def redundancy_suite(trained: TrainedModel, n_tokens: int) -> tuple[dict, redundancy.LayerDrop]:
    """Measures Block Influence and layer drop: single blocks, runs of neighbours, and cumulatively.

    The cumulative drops take the blocks in order of their influence, the least first.
    """
    n_layers = trained.config.model.n_layers
    drop_sums = redundancy.make_drop_sums(trained.model, trained.mesh)

    def measure(blocks):
        batches = trained.held_out(n_tokens)
        return redundancy.measure_drops(
            drop_sums, trained.params, batches, trained.mesh, n_layers, blocks
        )

    drops = measure(redundancy.single_blocks(n_layers) + redundancy.contiguous_blocks(n_layers))
    damage_M, sem_M = drops.damage()[1:], drops.damage_sem()[1:]
    contiguous = [
        {"first": d[0], "length": len(d), "damage": damage, "sem": sem}
        for d, damage, sem in zip(drops.drops[1:], damage_M.tolist(), sem_M.tolist(), strict=True)
    ][n_layers:]
    cumulative = measure(redundancy.cumulative_blocks(drops.influence()))
    fields = {
        "block_influence": drops.influence().tolist(),
        "layer_drop": damage_M[:n_layers].tolist(),
        "layer_drop_sem": sem_M[:n_layers].tolist(),
        "layer_drop_contiguous": contiguous,
        "layer_drop_cumulative": {
            "order": [int(i) for i in np.argsort(drops.influence(), kind="stable")],
            "damage": cumulative.damage()[1:].tolist(),
            "sem": cumulative.damage_sem()[1:].tolist(),
        },
        "redundancy_tokens": int(drops.count_W.sum()),
    }
    return fields, drops


def mur_suite(trained: TrainedModel, n_tokens: int) -> tuple[dict, mur_stats.TokenUtilities]:
    """Measures the marginal utility of the blocks, and of their branches separately."""
    config, mur, by_granularity = trained.config, trained.config.mur, {}
    for granularity in GRANULARITIES:
        token_utilities = mur_stats.make_token_utilities(
            trained.model, config, granularity, trained.mesh
        )
        by_granularity[granularity] = mur_stats.measure_utilities(
            token_utilities,
            trained.params,
            trained.held_out(n_tokens),
            trained.mesh,
            granularity,
        )
    blocks, branches = by_granularity["block"], by_granularity["branch"]
    tau = mur.tau if THRESHOLDS[mur.tau_kind].is_utility else 0.0
    fields = {"metric": mur.metric, "tau": tau, "tokens": len(blocks.window)}
    # Cosines with a random direction have this standard deviation.
    fields["noise_floor"] = METRICS[mur.metric].noise_floor(config.model.d_model)
    fields |= mur_stats.utility_summary(blocks, "block", tau)
    fields |= {
        part: mur_stats.utility_summary(branches, part, tau)
        for part in GRANULARITIES["branch"].names
    }
    return {"mur": fields}, blocks


def _line(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
