"""Prints the page of `--explain`: what a run would do, before it does it.

Nothing is trained, prepared or allocated: parameters are their annotations only.
"""

import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.durations import in_steps, tokens_per_step
from lmscale_jax.config.keys import get, has
from lmscale_jax.config.keys import get_config as base_config
from lmscale_jax.config.own_keys import adopted, all_keys
from lmscale_jax.config.resolve import derived, validate
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError
from lmscale_jax.model import build, flops, visible_keys
from lmscale_jax.model.mesh import make_mesh, param_splits, start_jax
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import rules_as_json
from lmscale_jax.train import aot, branch, gpu_report, tpu_cycles
from lmscale_jax.train.setup import Setup, build_setup

# Share of the chip's peak that a training step usually reaches.
EFFICIENCY = 0.4
# The same against the rate of a matrix product on a CPU. There other operations take a larger
# share of the time, the largest beside bfloat16's fast products.
CPU_EFFICIENCY = {"float32": 0.5, "bfloat16": 0.2}
PROBE_SECONDS = 0.2


def explain(
    config: ConfigDict,
    overrides: dict,
    config_file: str,
    print: Callable = print,
    topology: str = "",
) -> None:
    """Prints the page of a config; then compiles the step and prints its memory.

    Args:
        config: not yet resolved.
        overrides: {dotted path: value} given on the command line.
        config_file: the value of --config; "": there is no file.
        print: takes the text.
        topology: chips to explain it for, as `aot.parse_topology` reads them; empty: those here.

    Raises:
        InputError: the config is bad, or does not fit the devices.
    """
    config = adopted(config)
    validate(config)
    ids = prepare.find_token_ids(config.data)
    recorded = derived(config, ids.vocab_size)
    resolved = in_steps(recorded)
    if not resolved.model.vocab_size:
        raise InputError(
            f"config.model.vocab_size=0: bare shards (data.path={config.data.path}) do not say how "
            f"many ids they use; set model.vocab_size, for example 50257 for GPT-2's tokenizer"
        )
    branch.find_parent(recorded)
    chips = aot.parse_topology(topology) if topology else None
    if chips:
        # This machine's devices may be busy, and are not used.
        jax.config.update("jax_platforms", "cpu")
        devices = chips.devices() if chips.is_compiled_for else None
        mesh = aot.mesh_sizes(resolved, chips, devices)
    else:
        start_jax(resolved)
        devices, mesh = None, make_mesh(resolved)
    setup = build_setup(resolved, ids.boundary, mesh)
    origins = value_origins(config_file, overrides, config)
    for path, _ in all_keys(config):
        if get(recorded, path) != (explicit := get(config, path)):
            origin = origins[path]
            origins[path] = "derived" if origin == "base" else f"{origin} gave {explicit:g}"
    manifest = prepare.find_manifest(config.data)
    print(explain_page(setup, recorded, origins, manifest))
    if devices:
        setup = build_setup(resolved, ids.boundary, make_mesh(resolved, devices))
    if devices or not chips:
        print(compiled_sections(setup, chips))


def compiled_sections(setup: Setup, chips: aot.Topology | None = None) -> str:
    """Compiles the training step and returns what the program takes.

    `chips` are those of --topology, None where the mesh is of this machine's devices.
    """
    if chips and chips.chip.platform == "gpu":
        sections = gpu_report.gpu_sections(setup, chips.chip)
    elif chips:
        sections = tpu_cycles.tpu_sections(setup, chips.chip)
    else:
        sections = [("memory per device (compiled)", aot.memory_rows(setup))]
    return sections_text([(title, aligned_rows(rows)) for title, rows in sections])


def value_origins(config_file: str, overrides: dict, config) -> dict[str, str]:
    """Returns {dotted path: "base", the config file, or the flag that set it}, for every key.

    A file that sets a key to its default counts as one that leaves it alone.
    """
    defaults = base_config()
    origins, file = {}, os.path.relpath(config_file) if config_file else "config"
    for path, key in all_keys(config):
        default = get(defaults, path) if has(defaults, path) else key.default
        same = get(config, path) == default
        origins[path] = "base" if same else file
        if path in overrides:
            origins[path] = f"--config.{path}"
    return origins


def explain_page(setup: Setup, recorded, origins: dict[str, str], manifest: dict | None) -> str:
    """Formats the page.

    Args:
        setup: of the run; its mesh may be of sizes alone.
        recorded: its config with the user's durations.
        origins: as `value_origins` returns them.
        manifest: of the prepared data; None: not prepared yet.
    """
    config, model, mesh = setup.config, setup.model, setup.mesh
    choices = model.choices | optim.optimizer_choices(config, setup.platform)
    choices |= mur.mur_choices(config)
    sections = [
        ("config (* set by the config file or a flag)", _config(recorded, origins)),
        ("schedule", _schedule(config)),
        ("parameters", _parameters(model, mesh, config)),
        ("counts", _count_rows(model)),
        ("flops", _flops_rows(config, model)),
        ("memory per device (estimate)", _memory(config, model, mesh)),
        ("data", _data_rows(config, model, manifest)),
        ("mesh", _mesh(mesh)),
        ("choices", [f"{name:<12}{why}" for name, why in choices.items()]),
    ]
    if isinstance(mesh, aot.MeshSizes):
        sections += [
            (title, aligned_rows(rows)) for title, rows in aot.forecast_step(config, model, mesh)
        ]
    else:
        sections.append(("time", _time(config, model, mesh)))
    return sections_text(sections).removeprefix("\n")


def sections_text(sections: list[tuple[str, list[str]]]) -> str:
    """Formats titles over their lines, an empty line before each title."""
    return "\n".join("\n".join(["", title, *("  " + x for x in body)]) for title, body in sections)


def rate_jumps(config) -> list[tuple[int, int, float, float]]:
    """Finds where the learning rate changes faster than in warm-up: (first, last, before, after).

    Each of the steps first..last changes it by more than a step of warm-up (without warm-up: by
    more than 2 % of the peak). `before` and `after` are learning rates; before step 0 it is 0.
    """
    warmup = config.schedule.warmup
    # The last term covers the rounding of the float32 schedule.
    limit = (1.01 / warmup if warmup > 1 else 0.02) + 5e-7
    factor, total = schedules.make_schedule(config, np), config.train.steps
    jumps: list[tuple[int, int, float, float]] = []
    before, block = 0.0, 2**20
    for start in range(0, total, block):
        values = np.atleast_1d(factor(np.arange(start, min(total, start + block))))
        earlier = np.concatenate([[before], values[:-1]])
        for i in np.flatnonzero(np.abs(values - earlier) > limit):
            step, low, high = (
                start + int(i),
                *(float(x[i]) * config.optim.lr for x in (earlier, values)),
            )
            if jumps and jumps[-1][1] == step - 1:
                jumps[-1] = (jumps[-1][0], step, jumps[-1][2], high)
            else:
                jumps.append((step, step, low, high))
        before = float(values[-1])
    return jumps


def estimate_seconds(config, model: build.Model, mesh) -> tuple[float, str]:
    """Estimates the seconds of all steps, without evaluation; also returns the basis as text."""
    device = mesh.devices.flat[0]
    dtype = config.model.dtype
    total = flops.flops_per_token(config, model.specs)["model"] * training_tokens(config)
    peak = flops.peak_flops(device.device_kind, dtype)
    if peak is not None:
        rate, share = peak, EFFICIENCY
        basis = f"{device.device_kind}'s {dtype} peak, {peak / 1e12:,.0f} TFLOP/s"
    else:
        rate = probe_flops(dtype, 1024 if device.platform == "cpu" else 4096)
        share = CPU_EFFICIENCY[dtype] if device.platform == "cpu" else EFFICIENCY
        basis = f"a {dtype} product measured now, {rate / 1e9:,.0f} GFLOP/s"
    # The probe measured the machine, which simulated CPU devices share.
    devices = 1 if device.platform == "cpu" else mesh.size
    each = f" on each of {devices} devices" if devices > 1 else ""
    return total / (rate * share * devices), f"{share:.0%} of {basis}{each}"


def training_tokens(config) -> int:
    """Counts the training tokens of a resolved config."""
    return config.train.steps * tokens_per_step(config)


def probe_flops(dtype: str, width: int) -> float:
    """Measures the FLOP/s of a square matrix product for PROBE_SECONDS."""
    x = jnp.ones((width, width), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < PROBE_SECONDS:
        product(x, x).block_until_ready()
        done += 1
    return done * 2 * width**3 / spent


def _config(config, origins: dict[str, str]) -> list[str]:
    rows, group = [], None
    for path, key in all_keys(config):
        head, _, name = path.rpartition(".")
        if head != group:
            rows.append((head or "(top)", "", ""))
            group = head
        value, origin = get(config, path), origins[path]
        shown = repr(value) if isinstance(value, str) else _short_number(value)
        mark = " " if origin in ("base", "derived") else "*"
        unused = any(get(config, other) not in allowed for other, allowed in key.when.items())
        if unused and origin == "base":  # an explicit value was used to derive others
            origin = "not used here"
        rows.append((f" {mark} {name}", shown, origin))
    return aligned_rows(rows)


def _schedule(config) -> list[str]:
    schedule, total = config.schedule, config.train.steps
    warmup = schedule.warmup
    factor = schedules.make_schedule(config, np)
    labels = {0: "first", total // 2: "middle", total - 1: "last"}
    if warmup > 1:
        labels[warmup - 1] = "warm-up done"
    cooldown = schedules.cooldown_steps(config)
    if cooldown is not None:
        labels[total - cooldown] = "cooldown begins"
    lines = [f"{schedule.name}, {total:,} steps of {tokens_per_step(config):,} tokens"]
    for step in sorted(s for s in labels if s < total):
        lines.append(
            f"step {step:>10,}  lr {config.optim.lr * float(factor(step)):<10.4g} {labels[step]}"
        )
    peak = OPTIMIZERS[config.optim.name].peak
    if peak != "lr":
        lines.append(f"orthogonal updates: the same with a peak of {config.optim[peak]:.4g}")
    if config.train.parent:
        lines.append(
            f"steps 0 to {config.train.parent_step - 1:,} are those of {config.train.parent}"
        )
    jumps = rate_jumps(config)
    for first, last, before, after in jumps:
        span = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        lines.append(f"jump at {span}: lr {before:.4g} to {after:.4g}")
    if not jumps:
        lines.append("no step changes the learning rate by more than a step of warm-up does")
    return lines


def _parameters(model: build.Model, mesh, config) -> list[str]:
    titles = ("path", "axes", "role", "optimizer", "std")
    rows = [(*titles, "fwd x", "lr x", "wd x", "eps x", "update x", "split over")]
    for entry in rules_as_json(model.param_rules, config, param_splits(model.param_rules, mesh)):
        axes = " ".join(f"{a}={n}" for a, n in zip(entry["axes"], entry["shape"], strict=True))
        std = f"{entry['init_std']:.4g}" if entry["init"] == "normal" else str(entry["init"])
        facts = (entry["path"], axes, entry["role"], entry["optimizer"], std)
        names = ("multiplier", "lr_factor", "wd_factor", "eps_factor", "update_scale")
        factors = tuple(f"{entry[name]:.4g}" for name in names)
        split = entry["sharding"]
        mesh_axes = " ".join(part or "-" for part in split) if any(split) else "-"
        rows.append((*facts, *factors, mesh_axes))
    return aligned_rows(rows)


def _count_rows(model: build.Model) -> list[str]:
    return aligned_rows(
        [(name, f"{n:,}") for name, n in flops.parameter_counts(model.specs).items()]
    )


def _flops_rows(config, model: build.Model) -> list[str]:
    rows = [("convention", "per token", "whole run")]
    for name, per_token in flops.flops_per_token(config, model.specs).items():
        total = per_token * training_tokens(config)
        rows.append((name, f"{per_token:.4g}", f"{total:.4g}"))
    return [
        *aligned_rows(rows),
        f"attention: {visible_keys.describe_visible(config)}",
        "model is what run.json and MFU use; lmscale_jax/model/flops.py defines all",
    ]


def _memory(config, model: build.Model, mesh) -> list[str]:
    device = mesh.devices.flat[0]
    sizes = aot.memory_sizes(config, model, mesh.shape, device.platform, device.device_kind)
    return aligned_rows([(name, f"{size / 2**20:,.0f} MiB") for name, size in sizes.items()])


def _data_rows(config, model: build.Model, manifest: dict | None) -> list[str]:
    n, total = flops.parameter_counts(model.specs), training_tokens(config)
    rows = [
        ("training tokens", f"{total:,}"),
        ("tokens per parameter", f"{total / n['total']:.3g}"),
        ("  not counting tables", f"{total / max(1, n['non_embedding']):.3g}"),
    ]
    if manifest is None:
        rows.append(("epochs", "not known: the data is not prepared yet"))
        return aligned_rows(rows)
    splits = manifest["splits"]
    windows = (splits["train"]["tokens"] - 1) // config.data.seq_len
    epochs = config.train.steps * config.train.batch_size / max(1, windows)
    rows.append(("prepared, training", f"{splits['train']['tokens']:,} tokens"))
    rows.append(("prepared, validation", f"{splits['val']['tokens']:,} tokens"))
    rows.append(("epochs", f"{epochs:.3g}"))
    return aligned_rows(rows)


def _mesh(mesh) -> list[str]:
    device = mesh.devices.flat[0]
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return [f"{shape}: {mesh.size} {device.platform} device(s), {device.device_kind}"]


def _time(config, model: build.Model, mesh) -> list[str]:
    estimate, basis = estimate_seconds(config, model, mesh)
    return [f"about {readable_seconds(estimate)} for the steps alone, at {basis}"]


def readable_seconds(amount: float) -> str:
    """Formats seconds as days, hours, minutes or seconds."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if amount >= 1.5 * size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount:.2g} seconds"


def _short_number(value) -> str:
    # No separators in numbers of the size of a seed or a year.
    return f"{value:,}" if type(value) is int and abs(value) >= 10_000 else f"{value}"


def aligned_rows(rows: list[tuple]) -> list[str]:
    """Formats rows of text with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
