"""The study of docs/gating.md: gates of attention against controls that spend the same.

    python -m benchmarks.gating_study

Every arm is a population of seeds (initial values and data order) that see the same tokens. A gated
arm is compared, seed by seed, with the plain model, with one whose MLP is wider by the parameters
of the gates, with one by their FLOPs, and with one that trains for the time that the gates take.
"""

import time

import numpy as np
from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli

SEEDS = flags.DEFINE_integer("seeds", 3, "members of each arm", lower_bound=2)
STEPS = flags.DEFINE_integer("steps", 400, "steps of every run", lower_bound=50)
ROUNDS = flags.DEFINE_integer("rounds", 7, "turns in which step times are compared", lower_bound=1)

GATES = {
    "headwise": {"attn_gate": "headwise"},
    "elementwise": {"attn_gate": "elementwise"},
    "elementwise, never shut": {"attn_gate": "elementwise", "gate_activation": "ns_sigmoid"},
    "const": {"attn_gate": "const"},
    "headwise on values": {"attn_gate": "headwise", "gate_place": "value"},
    "elementwise, another position": {"attn_gate": "elementwise", "gate_input": "earlier"},
}
# The gate whose cost the time-matched control pays.
TIMED = "elementwise"


def config_of(changes: dict):
    """The unresolved config of an arm; sizes that are solved for come in `changes` too."""
    from lmscale_jax.config.recipes import small_decoder

    config = small_decoder()
    config.model.n_layers, config.model.d_model, config.model.n_heads = 4, 64, 4
    config.train.steps, config.train.batch_size = STEPS.value, 8
    config.mesh.cpu_devices = 1
    for name, value in changes.items():
        (config.train if name == "steps" else config.model)[name] = value
    return config


def members(config, vocab_size: int) -> list:
    from ml_collections import ConfigDict

    from lmscale_jax.config.resolve import resolve

    resolved = []
    for seed in range(SEEDS.value):
        config_of_seed = ConfigDict(config.to_dict())
        config_of_seed.seed = config_of_seed.data.seed = seed
        resolved.append(resolve(config_of_seed, vocab_size))
    return resolved


def arms(vocab_size: int) -> dict[str, dict]:
    """{name: changes}: the plain model, the gated ones and the controls of equal cost."""
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model import sizes

    def spent(changes: dict, measure: str) -> float:
        counts, per_token = sizes.describe_shape(resolve(config_of(changes), vocab_size))
        return per_token if measure == "flops" else counts["non_embedding"]

    changes_of = {"none": {}} | GATES
    for gate in ("headwise", "elementwise"):
        for measure in ("parameters", "flops"):
            wider = sizes.match_parameters(
                config_of({}), spent(GATES[gate], measure), measure, vocab_size
            )
            changes_of[f"none, {measure} of {gate}"] = {"d_ff": wider.model.d_ff}
    return changes_of


def step_ratio(data) -> list[float]:
    """Step time of the timed gate over that of the plain model, one for each round."""
    import jax

    from lmscale_jax.sweeps import population

    def turn(changes):
        group = members(config_of(changes), data.vocab_size)
        runs = population.Population(group, data.boundary)
        state, batches = runs.begin(), population.batch_reader(group, data)(0, 10)

        def run() -> float:
            nonlocal state
            start = time.perf_counter()
            state, metrics = runs.advance(state, batches)
            jax.block_until_ready(metrics)
            return time.perf_counter() - start

        run()
        return run

    plain, gated = turn({}), turn(GATES[TIMED])
    return [gated() / plain() for _ in range(ROUNDS.value)]


def train(name: str, changes: dict, data) -> dict:
    from lmscale_jax.model import sizes
    from lmscale_jax.sweeps import population

    start = time.perf_counter()
    group = members(config_of(changes), data.vocab_size)
    losses = population.train_population(group, data).val_loss_K
    counts, per_token = sizes.describe_shape(group[0])
    seconds = time.perf_counter() - start
    print(f"{name}: {losses.mean():.4f} nats/token, {seconds:.0f} s", flush=True)
    return {
        "loss": losses.tolist(), "non_embedding": counts["non_embedding"],
        "flops_per_token": per_token, "d_ff": group[0].model.d_ff, "steps": group[0].train.steps,
    }  # fmt: skip


def difference(arm: dict, other: dict) -> tuple[float, float]:
    """(mean, half of the 95 % interval) of one minus other in nats a token, paired by seed."""
    from scipy import stats

    d = np.array(arm["loss"]) - np.array(other["loss"])
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return float(d.mean()), float(half)


def show(results: dict) -> str:
    """The table of docs/gating.md."""
    head = ["arm", "parameters outside embeddings", "d_ff", "steps", "loss ± deviation over seeds",
            "minus none, 95 %", "minus its control, 95 %"]  # fmt: skip
    rows = []
    for name, arm in results.items():
        cost = "headwise" if name.startswith("headwise") else "elementwise"
        control = results[f"none, parameters of {cost}"] if name in GATES else None
        if name == "const":
            control = results["none"]
        told = ["" if other is None else "{:+.4f} ± {:.4f}".format(*difference(arm, other))
                for other in (None if name == "none" else results["none"], control)]  # fmt: skip
        rows.append([
            name, f"{arm['non_embedding']:,}", str(arm["d_ff"]), str(arm["steps"]),
            f"{np.mean(arm['loss']):.4f} ± {np.std(arm['loss'], ddof=1):.4f}", *told,
        ])  # fmt: skip
    return tables.table(head, rows)


def main() -> None:
    from lmscale_jax.data import prepare
    from lmscale_jax.model import mesh

    config = config_of({})
    mesh.start_jax(config)
    data = prepare.prepare_data(config.data, config.model.vocab_size)
    ratios = step_ratio(data)
    result = {"machine": machine.facts(None, machine.asked("seeds", "steps")), "arms": {}}
    result["step_time_ratio"] = {
        "gate": TIMED,
        "rounds": ratios,
        "median": float(np.median(ratios)),
    }
    steps = round(STEPS.value * result["step_time_ratio"]["median"])
    plan = arms(data.vocab_size) | {f"none, time of {TIMED}": {"steps": steps}}
    for name, changes in plan.items():
        result["arms"][name] = train(name, changes, data)
        machine.save("gating_study", result)
    print(f"\n{show(result['arms'])}")


if __name__ == "__main__":
    cli.run_command(main)
