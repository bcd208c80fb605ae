"""Runs the guards over every shipped choice of the keys of a training step: none may be at fault.

    python benchmarks/guards_on_choices.py --out=choices.json [--only=model.,optim.]

Each choice is an arm beside the default of its key, with what else it needs. Also the arms of the
ladders in configs/ladders, at their smallest rung. About a quarter of an hour on two cores; the
table is in docs/guards.md.
"""

import importlib
import json
import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from lmscale_jax import cli
from lmscale_jax.config.keys import SPEC, get_config, keys
from lmscale_jax.config.resolve import apply_overrides, resolve
from lmscale_jax.errors import InputError
from lmscale_jax.guards import shrink
from lmscale_jax.guards.arm import SmallArm
from lmscale_jax.guards.table import GUARDS, run_guard
from lmscale_jax.ladders import grid
from lmscale_jax.model import mesh

ONLY = flags.DEFINE_list(
    "only", [], "beginnings of keys, as optim.; ladders: those of configs/ladders; empty: all"
)
WITHOUT = flags.DEFINE_list("without", [], "guards to leave out")
OUT = flags.DEFINE_string("out", "choices.json", "file of the findings")

GROUPS = ("model", "parametrization", "optim", "schedule", "freeze", "mur")
LADDERS = (
    "quickstart",
    "gate",
    "gelu_vs_swiglu",
    "families",
    "muon_vs_adamw",
    "mup_transfer",
    "mur",
)
# Guards that measure time, or train at several widths, are of the ladders alone.
CHEAP = [name for name in GUARDS if name not in ("cost", "coordinates")]
# What choices need beside the `when` of their key.
NEEDS = {
    "model.softcap_form": {"model.logit_softcap": 15.0},
    "model.residual_dtype": {"model.dtype": "bfloat16"},
    "model.gate_place": {"model.attn_gate": "elementwise"},
    "parametrization.name": {"parametrization.base_width": 64, "parametrization.base_depth": 2},
    "parametrization.control": {"parametrization.base_width": 64},
    "freeze.mode": {"freeze.blocks": "1"},
    "mur.tau_kind": {"mur.tau": 0.5},
    "optim.decay_where": {"optim.weight_decay": 0.01},
    "optim.decay_on": {"optim.weight_decay": 0.01},
    "optim.decay_mode": {"optim.weight_decay": 0.01},
    "model.window_layers": {"model.window": 48},
}
# Mistakes on purpose, which other checks must find.
LEFT_OUT = {"parametrization.control"}


def config_of(path: str, choice: str) -> ConfigDict | None:
    """Returns a config with that choice and what it needs; None where this CPU has none."""
    config, by_path = get_config(), dict(keys())
    config.data.seq_len, config.model.vocab_size = 128, 512
    changes = {path: choice}
    waiting = [path]
    while waiting:
        for other, allowed in by_path[waiting.pop()].when.items():
            if other not in changes and by_path[other].default not in allowed:
                changes[other] = allowed[0]
                waiting.append(other)
    extra = NEEDS.get(path, {}) | {
        name: value for c in list(changes) for name, value in NEEDS.get(c, {}).items()
    }
    for name, value in extra.items():
        try:
            config = apply_overrides(config, changes | {name: value})
            changes[name] = value
        except InputError:
            continue
    try:
        config = apply_overrides(config, changes)
        resolve(config, 512)
    except InputError as error:
        print(f"{path}={choice}: {error}")
        return None
    return config


def choices() -> list[tuple[str, str, ConfigDict, ConfigDict]]:
    """Returns (key, choice, its config, the config with the key's default) for every choice."""
    cases = []
    for path, key in keys(SPEC):
        named = key.choices and isinstance(key.default, str) and path.split(".")[0] in GROUPS
        if not named or not path.startswith(tuple(ONLY.value) or "") or path in LEFT_OUT:
            continue
        default = config_of(path, key.default)
        for choice in key.choices:
            config = config_of(path, choice)
            if choice != key.default and config is not None:
                # The default with all that the choice needs, where it may have that.
                try:
                    beside = apply_overrides(config, {path: key.default})
                except InputError:
                    beside = default
                cases.append((path, choice, config, beside))
    return cases


def ladder_arms(name: str) -> tuple[dict[str, ConfigDict], str]:
    """Returns ({arm: config at the smallest rung}, baseline) of a shipped ladder."""
    ladder = importlib.import_module(f"lmscale_jax.configs.ladders.{name}").get_config()
    ladder.seeds, vocab = 1, ladder.run.model.vocab_size or ladder.run.data.vocab_size
    configs = {}
    for cell in grid.make_cells(ladder, vocab):
        if cell.arm not in configs:
            configs[cell.arm] = apply_overrides(ConfigDict(ladder.run.to_dict()), cell.overrides)
    return configs, ladder.baseline


def check(arms: dict[str, SmallArm], baseline: SmallArm, names: list[str]) -> dict:
    """Runs guards over arms; returns {arm: {guard: finding}}."""
    findings = {arm: {} for arm in arms}
    for guard in (name for name in names if name not in WITHOUT.value):
        for name, arm in arms.items():
            begin = time.perf_counter()
            finding = run_guard(guard, arm, baseline)
            seconds = time.perf_counter() - begin
            findings[name][guard] = finding._asdict() | {"seconds": round(seconds, 2)}
            if finding.fault:
                print(f"FAULT {name} {guard}: {finding.fault}", flush=True)
    return findings


def main() -> None:
    mesh.start_jax(get_config(), 8)
    jax.config.update("jax_disable_most_optimizations", True)
    findings, bases = {}, {}
    for ladder in LADDERS if not ONLY.value or "ladders" in ONLY.value else ():
        configs, baseline = ladder_arms(ladder)
        n = shrink.blocks_needed(list(configs.values()))
        arms = {
            f"{ladder}/{arm}": SmallArm(arm, shrink.shrink(config, n, 512))
            for arm, config in configs.items()
        }
        names = [*CHEAP, "coordinates"]
        findings |= check(arms, arms[f"{ladder}/{baseline}"], names)
        print(f"{ladder}: done", flush=True)
        Path(OUT.value).write_text(json.dumps(findings, indent=1))
    for path, choice, config, beside in choices():
        # One block is enough for what does not depend on its number.
        n = shrink.blocks_needed([config, beside])
        n = 1 if n == shrink.BLOCKS else n
        key = repr((n, beside.to_dict()))
        if key not in bases:
            bases[key] = SmallArm("default", shrink.shrink(beside, n, 512))
        name = f"{path}={choice}"
        arm = SmallArm(name, shrink.shrink(config, n, 512))
        begin = time.perf_counter()
        findings |= check({name: arm}, bases[key], CHEAP)
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
        Path(OUT.value).write_text(json.dumps(findings, indent=1))
    faults = sum(bool(f["fault"]) for by_guard in findings.values() for f in by_guard.values())
    looked = sum(not f["skipped"] for by_guard in findings.values() for f in by_guard.values())
    print(f"{len(findings)} arms, {looked} checks, {faults} faults")


if __name__ == "__main__":
    cli.run_command(main)
