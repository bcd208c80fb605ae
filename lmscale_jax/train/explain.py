"""The page of `--explain`: what a run would do, said before it is done.

Nothing is trained, prepared or allocated: parameters appear as their annotations only.
"""

import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lmscale_jax.config.durations import in_steps, tokens_per_step
from lmscale_jax.config.keys import get, keys
from lmscale_jax.config.keys import get_config as base_config
from lmscale_jax.config.resolve import derived, validate
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError
from lmscale_jax.model import build, flops
from lmscale_jax.model import mesh as meshes
from lmscale_jax.mur import objective as mur
from lmscale_jax.optim import build as optim
from lmscale_jax.optim import schedules
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import rules_as_json
from lmscale_jax.train import aot, branch
from lmscale_jax.train import aot as topologies

# Share of the chip's peak that a training step of this size usually reaches.
EFFICIENCY = 0.4
# The same against the rate of a bare product on a CPU: what is not a product weighs more there, and
# most beside the matrix units that bfloat16 uses.
CPU_EFFICIENCY = {"float32": 0.5, "bfloat16": 0.2}
PROBE_SECONDS = 0.2


def explain(
    config: ConfigDict,
    overrides: dict,
    config_file: str,
    print: Callable = print,
    topology: str = "",
) -> None:
    """Prints the page for a config as it came from its file and the command line; then, once it is
    compiled, what the step takes.

    Args:
        config: not yet resolved.
        overrides: {dotted path: value} given on the command line.
        config_file: the value of --config.
        print: takes the text.
        topology: chips to explain it for, as `aot.parse_topology` takes them; empty: those here.

    Raises:
        InputError: the config is bad, or does not fit the devices.
    """
    validate(config)
    recorded = derived(config, prepare.vocab_size_of(config.data))
    resolved = in_steps(recorded)
    if not resolved.model.vocab_size:
        raise InputError(
            f"config.model.vocab_size=0: bare shards (data.path={config.data.path}) do not say how "
            f"many ids they use; set model.vocab_size, for example 50257 for GPT-2's tokenizer"
        )
    branch.find_parent(recorded)
    chips = topologies.parse_topology(topology) if topology else None
    if chips:
        # Nothing is asked of this machine's devices, which may be busy.
        jax.config.update("jax_platforms", "cpu")
        devices = chips.devices() if chips.shape else None
        mesh = topologies.mesh_sizes(resolved, chips, devices)
    else:
        meshes.start_jax(resolved)
        devices, mesh = None, meshes.make_mesh(resolved)
    platform = mesh.devices.flat[0].platform
    model = build.build_model(resolved, platform=platform, mesh=mesh)
    where = value_origins(config_file, overrides, config)
    for path, _ in keys():
        if get(recorded, path) != (given := get(config, path)):
            where[path] = "derived" if where[path] == "base" else f"{where[path]} gave {given:g}"
    print(explain_page(resolved, recorded, where, model, mesh, prepare.find_manifest(config.data)))
    if devices:
        mesh = meshes.make_mesh(resolved, devices)
        model = build.build_model(resolved, platform=platform, mesh=mesh)
    if devices or not chips:
        print(
            sections_text(
                [
                    (
                        "memory per device (compiled)",
                        aligned_rows(aot.memory_rows(resolved, model, mesh)),
                    )
                ]
            )
        )


def value_origins(config_file: str, overrides: dict, config) -> dict[str, str]:
    """{dotted path: "base", the config file, or the flag that set it}, for every key.

    A file that sets a key to its default cannot be told from one that leaves it alone.
    """
    defaults = base_config()
    found = {}
    for path, _ in keys():
        same = get(config, path) == get(defaults, path)
        found[path] = "base" if same else os.path.relpath(config_file)
        if path in overrides:
            found[path] = f"--config.{path}"
    return found


def explain_page(
    config, recorded, origins: dict[str, str], model: build.Model, mesh, manifest: dict | None
) -> str:
    """The whole text.

    Args:
        config: resolved.
        recorded: the same with the user's durations, which are shown.
        origins: where the value of each key came from.
        model: as `build.build_model` describes it.
        mesh: the device mesh.
        manifest: of the prepared data, None where it is not prepared yet.
    """
    chosen = model.choices | optim.optimizer_choices(config, mesh.devices.flat[0].platform)
    chosen |= mur.mur_choices(config)
    sections = [
        ("config (* set by the config file or a flag)", _config(recorded, origins)),
        ("schedule", _schedule(config)),
        ("parameters", _parameters(model, mesh, config)),
        ("counts", _count_rows(model)),
        ("flops", _flops_rows(config, model)),
        ("memory per device (estimate)", _memory(config, model, mesh)),
        ("data", _data_rows(config, model, manifest)),
        ("mesh", _mesh(mesh)),
        ("choices", [f"{name:<12}{why}" for name, why in chosen.items()]),
    ]
    if isinstance(mesh, topologies.MeshSizes):
        sections += [
            (title, aligned_rows(rows)) for title, rows in aot.forecast_step(config, model, mesh)
        ]
    else:
        sections.append(("time", _time(config, model, mesh)))
    return sections_text(sections).removeprefix("\n")


def sections_text(sections: list[tuple[str, list[str]]]) -> str:
    """Titles over their lines, an empty line before each."""
    return "\n".join("\n".join(["", title, *("  " + x for x in body)]) for title, body in sections)


def rate_jumps(config) -> list[tuple[int, int, float, float]]:
    """Where the learning rate changes faster than in warm-up, as (first, last, before, after).

    Steps first..last each change it by more than one step of warm-up does (without warm-up: by more
    than 2 % of the peak). `before` and `after` are learning rates. The rate before step 0 is 0.
    """
    warmup = config.schedule.warmup
    # The schedule is float32; the last term is its rounding.
    limit = (1.01 / warmup if warmup > 1 else 0.02) + 5e-7
    factor, total = schedules.make_schedule(config, np), config.train.steps
    found: list[tuple[int, int, float, float]] = []
    before, block = 0.0, 2**20
    for start in range(0, total, block):
        values = np.atleast_1d(factor(np.arange(start, min(total, start + block))))
        earlier = np.concatenate([[before], values[:-1]])
        for i in np.flatnonzero(np.abs(values - earlier) > limit):
            step, low, high = (
                start + int(i),
                *(float(x[i]) * config.optim.lr for x in (earlier, values)),
            )
            if found and found[-1][1] == step - 1:
                found[-1] = (found[-1][0], step, found[-1][2], high)
            else:
                found.append((step, step, low, high))
        before = float(values[-1])
    return found


def estimate_seconds(config, model: build.Model, mesh) -> tuple[float, str]:
    """An estimate of the time of all steps, without evaluation, and what it rests on."""
    device = mesh.devices.flat[0]
    dtype = config.model.dtype
    total = flops.flops_per_token(config, model.specs)["model"] * training_tokens(config)
    peak = flops.peak(device.device_kind, dtype)
    if peak is not None:
        rate, share = peak, EFFICIENCY
        basis = f"{device.device_kind}'s {dtype} peak, {peak / 1e12:,.0f} TFLOP/s"
    else:
        rate = probe_flops(dtype, 1024 if device.platform == "cpu" else 4096)
        share = CPU_EFFICIENCY[dtype] if device.platform == "cpu" else EFFICIENCY
        basis = f"a {dtype} product measured now, {rate / 1e9:,.0f} GFLOP/s"
    # Simulated CPU devices share the machine that the probe measured as a whole.
    devices = 1 if device.platform == "cpu" else mesh.size
    each = f" on each of {devices} devices" if devices > 1 else ""
    return total / (rate * share * devices), f"{share:.0%} of {basis}{each}"


def training_tokens(config) -> int:
    """Training tokens of a resolved config."""
    return config.train.steps * tokens_per_step(config)


def probe_flops(dtype: str, width: int) -> float:
    """FLOP/s of a square product, measured for a moment."""
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
    for path, key in keys():
        head, _, name = path.rpartition(".")
        if head != group:
            rows.append((head or "(top)", "", ""))
            group = head
        value, origin = get(config, path), origins[path]
        shown = repr(value) if isinstance(value, str) else _short_number(value)
        mark = " " if origin in ("base", "derived") else "*"
        unused = any(get(config, other) not in allowed for other, allowed in key.when.items())
        if unused and origin == "base":  # one that was set has been used, to derive others
            origin = "not used here"
        rows.append((f" {mark} {name}", shown, origin))
    return aligned_rows(rows)


def _schedule(config) -> list[str]:
    schedule, total = config.schedule, config.train.steps
    warmup = schedule.warmup
    factor = schedules.make_schedule(config, np)
    named = {0: "first", total // 2: "middle", total - 1: "last"}
    if warmup > 1:
        named[warmup - 1] = "warm-up done"
    cooldown = schedules.cooldown_steps(config)
    if cooldown is not None:
        named[total - cooldown] = "cooldown begins"
    lines = [f"{schedule.name}, {total:,} steps of {tokens_per_step(config):,} tokens"]
    for step in sorted(s for s in named if s < total):
        lines.append(
            f"step {step:>10,}  lr {config.optim.lr * float(factor(step)):<10.4g} {named[step]}"
        )
    peak = OPTIMIZERS[config.optim.name].peak
    if peak != "lr":
        lines.append(f"orthogonal updates: the same with a peak of {config.optim[peak]:.4g}")
    if config.train.parent:
        begin = config.train.parent_step
        lines.append(f"steps 0 to {begin - 1:,} are those of {config.train.parent}")
    found = rate_jumps(config)
    for first, last, before, after in found:
        span = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        lines.append(f"jump at {span}: lr {before:.4g} to {after:.4g}")
    if not found:
        lines.append("no step changes the learning rate by more than a step of warm-up does")
    return lines


def _parameters(model: build.Model, mesh, config) -> list[str]:
    given = ("path", "axes", "role", "optimizer", "std")
    rows = [(*given, "fwd x", "lr x", "wd x", "eps x", "update x", "split over")]
    for entry in rules_as_json(model.rows, config, meshes.param_splits(model.rows, mesh)):
        axes = " ".join(f"{a}={n}" for a, n in zip(entry["axes"], entry["shape"], strict=True))
        std = f"{entry['init_std']:.4g}" if entry["init"] == "normal" else entry["init"]
        given = (entry["path"], axes, entry["role"], entry["optimizer"], std)
        names = ("multiplier", "lr_factor", "wd_factor", "eps_factor", "update_scale")
        factors = tuple(f"{entry[name]:.4g}" for name in names)
        split = entry["sharding"]
        over = " ".join(part or "-" for part in split) if any(split) else "-"
        rows.append((*given, *factors, over))
    return aligned_rows(rows)


def _count_rows(model: build.Model) -> list[str]:
    return aligned_rows([(name, f"{n:,}") for name, n in flops.counts(model.specs).items()])


def _flops_rows(config, model: build.Model) -> list[str]:
    rows = [("convention", "per token", "whole run")]
    for name, each in flops.flops_per_token(config, model.specs).items():
        rows.append((name, f"{each:.4g}", f"{each * training_tokens(config):.4g}"))
    return [
        *aligned_rows(rows),
        "model is what run.json and MFU use; lmscale_jax/model/flops.py defines all",
    ]


def _memory(config, model: build.Model, mesh) -> list[str]:
    sizes = aot.memory_sizes(config, model, mesh.shape, mesh.devices.flat[0].platform)
    return aligned_rows([(name, f"{size / 2**20:,.0f} MiB") for name, size in sizes.items()])


def _data_rows(config, model: build.Model, manifest: dict | None) -> list[str]:
    n, total = flops.counts(model.specs), training_tokens(config)
    rows = [
        ("training tokens", f"{total:,}"),
        ("tokens per parameter", f"{total / n['total']:.3g}"),
        ("  not counting tables", f"{total / max(1, n['non_embedding']):.3g}"),
    ]
    if manifest is None:
        rows.append(("epochs", "not known: the data is not prepared yet"))
        return aligned_rows(rows)
    sides = manifest["splits"]
    windows = (sides["train"]["tokens"] - 1) // config.data.seq_len
    epochs = config.train.steps * config.train.batch_size / max(1, windows)
    rows.append(("prepared, training", f"{sides['train']['tokens']:,} tokens"))
    rows.append(("prepared, validation", f"{sides['val']['tokens']:,} tokens"))
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
    """Seconds in the unit that reads best."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if amount >= 1.5 * size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount:.2g} seconds"


def _short_number(value) -> str:
    # Separators where digits are hard to count, but not in a seed or a year-sized number.
    return f"{value:,}" if type(value) is int and abs(value) >= 10_000 else f"{value}"


def aligned_rows(rows: list[tuple]) -> list[str]:
    """Rows of text with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
