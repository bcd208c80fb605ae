"""What `evaluate` can say of a run, suite by suite; each gives the fields of eval.json it fills."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmscale_jax.config import conflicts
from lmscale_jax.errors import InputError
from lmscale_jax.evals import agreement, attention_stats, mur_stats, redundancy
from lmscale_jax.mur.settings import GRANULARITIES, THRESHOLDS
from lmscale_jax.mur.utility import METRICS
from lmscale_jax.run import record
from lmscale_jax.run.load import Loaded, load


def evaluate(
    workdir: Path, names: list[str], step: int, n_tokens: int, say: Callable[[str], None]
) -> Path:
    """Writes eval.json beside run.json: the suites named, of the checkpoint after `step` (0: the
    newest), over `n_tokens` (0: as eval.tokens) held-out tokens.

    Raises InputError as `run.load.load` and `check` do, and then writes nothing.
    """
    loaded = load(workdir, step)
    check(names, loaded.setup.config.model)
    status, last = loaded.record["status"], loaded.setup.config.train.steps
    if status != "finished" or loaded.step != last:
        say(f"{workdir} is {status}: this is its checkpoint after step {loaded.step} of {last}")
    about = {
        "name": loaded.record["name"],
        "config_hash": loaded.record["config_hash"],
        "run_status": status,
        "step": loaded.step,
        "last_step": last,
        "complete": status == "finished" and loaded.step == last,
        "val_fingerprint": loaded.setup.data.val_fingerprint,
        "versions": record.provenance()["versions"],
    }
    path = workdir / "eval.json"
    earlier = _beside(path, about)
    tokens = n_tokens or loaded.setup.config.eval.tokens
    record.write_json(path, earlier | about | run(names, loaded, tokens, say))
    return path


def check(names: list[str], model) -> None:
    """Raises InputError where a suite cannot measure a model of this kind."""
    for name in {"redundancy", "mur"}.intersection(names):
        conflicts.check_chain(model, f"--suites={name}", conflicts.READ_ONLY)
    if "attention" in names:
        attention_stats.gate_range(model)
    if "attention" in names and (model.window_layers != "none" or model.mask == "document"):
        raise InputError(
            f"--suites=attention takes every earlier token for visible, and config.model has "
            f"window_layers={model.window_layers!r} and mask={model.mask!r}; "
            f"--suites=perplexity would work"
        )


def _beside(path: Path, about: dict) -> dict:
    """What an earlier evaluation of the same checkpoint found; that of another is set aside."""
    try:
        before = json.loads(path.read_text())
        same = all(before[name] == about[name] for name in ("step", "config_hash"))
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no evaluation of this project; move it away") from None
    if same:
        return before
    path.rename(path.with_name(f"eval_step_{before['step']}.json"))
    return {}


def run(names: list[str], loaded: Loaded, n_tokens: int, say: Callable[[str], None]) -> dict:
    """The fields of the suites named, over the first `n_tokens` held-out tokens (0: all).

    With "redundancy" and "mur" both, also how alike they rank the blocks.
    """
    result, measures, n_windows = {}, {}, 0
    if "perplexity" in names:
        result |= loaded.setup.validate(loaded.params)
        say(f"perplexity           {result['perplexity']:.4f}, loss {result['val_loss']:.4f}")
    if "redundancy" in names:
        fields, found = missed(loaded, n_tokens)
        result |= fields
        n_windows = len(found.count_W)
        alone = slice(1, 1 + len(fields["block_influence"]))
        measures["block_influence"] = found.influence
        measures["layer_drop"] = lambda weight_W: found.damage(weight_W)[alone]
        say(f"block influence      {_line(fields['block_influence'])}")
        say(f"layer drop, nats     {_line(fields['layer_drop'])}")
    if "mur" in names:
        fields, found_mur = utilities(loaded, n_tokens)
        result |= fields
        n_windows = int(found_mur.window.max()) + 1
        measures["utility"] = lambda weight_W: found_mur.utility("block", weight_W)
        say(f"{fields['mur']['metric']} utility          {_line(fields['mur']['mean'])}")
    if "attention" in names:
        setup = loaded.setup
        bounds = attention_stats.gate_range(setup.config.model)
        result["attention"] = attention_stats.evaluate(
            attention_stats.make(setup.model, setup.mesh, bounds),
            loaded.params,
            setup.held_out(n_tokens),
            setup.mesh,
            bounds,
        )
        say(f"attention sink       {_line(result['attention']['sink'])}")
    if len(measures) > 1:
        result["rank_correlation"] = agreement.rank_correlations(measures, n_windows)
        for pair, found in result["rank_correlation"].items():
            say(f"rank correlation     {found['rho']:+.2f} [{found['low']:+.2f}, "
                f"{found['high']:+.2f}] of {pair}")  # fmt: skip
    return result


def missed(loaded: Loaded, n_tokens: int) -> tuple[dict, redundancy.Found]:
    """Block Influence and layer drop: each block alone, neighbours, and in order of influence."""
    setup, n = loaded.setup, loaded.setup.config.model.n_layers

    def drop(drops):
        batches = setup.held_out(n_tokens)
        return redundancy.measure(setup.drop_sums, loaded.params, batches, setup.mesh, n, drops)

    found = drop(redundancy.alone(n) + redundancy.contiguous(n))
    damage_M, sem_M = found.damage()[1:], found.damage_sem()[1:]
    several = [
        {"first": d[0], "length": len(d), "damage": damage, "sem": sem}
        for d, damage, sem in zip(found.drops[1:], damage_M.tolist(), sem_M.tolist(), strict=True)
    ][n:]
    pruned = drop(redundancy.cumulative(found.influence()))
    fields = {
        "block_influence": found.influence().tolist(),
        "layer_drop": damage_M[:n].tolist(),
        "layer_drop_sem": sem_M[:n].tolist(),
        "layer_drop_contiguous": several,
        "layer_drop_cumulative": {
            "order": [int(i) for i in np.argsort(found.influence(), kind="stable")],
            "damage": pruned.damage()[1:].tolist(),
            "sem": pruned.damage_sem()[1:].tolist(),
        },
        "redundancy_tokens": int(found.count_W.sum()),
    }
    return fields, found


def utilities(loaded: Loaded, n_tokens: int) -> tuple[dict, mur_stats.Found]:
    """Marginal utility of the blocks, and of their branches apart."""
    setup, config = loaded.setup, loaded.setup.config
    mur, found = config.mur, {}
    for granularity in GRANULARITIES:
        tokens = mur_stats.make(setup.model, config, granularity, setup.mesh)
        batches = setup.held_out(n_tokens)
        found[granularity] = mur_stats.measure(
            tokens, loaded.params, batches, setup.mesh, granularity
        )
    tau = mur.tau if THRESHOLDS[mur.tau_kind].is_utility else 0.0
    about = {"metric": mur.metric, "tau": tau, "tokens": len(found["block"].window)}
    # Cosines with a random direction have this standard deviation.
    about["noise_floor"] = METRICS[mur.metric].noise_floor(config.model.d_model)
    fields = about | mur_stats.summary(found["block"], "block", tau)
    branches = {
        p: mur_stats.summary(found["branch"], p, tau) for p in GRANULARITIES["branch"].names
    }
    return {"mur": fields | branches}, found["block"]


def _line(values: list[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
