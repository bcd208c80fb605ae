"""Bytes, messages and time of a config over a mesh, as sections of the page of --explain."""

from collections.abc import Mapping

from lmscale_jax.config.durations import tokens_per_step
from lmscale_jax.model import build, costs, flops, memory
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import update_rules


def moments(config, model: build.Model) -> dict[str, int]:
    """{path: arrays of its size that the optimizer keeps}."""
    mean = 1 if config.optim.ema_decay else 0
    rules = update_rules(model.rows, config)
    return {path: OPTIMIZERS[rule.optimizer].moments + mean for path, rule in rules.items()}


def sizes(config, model: build.Model, axes: Mapping[str, int], platform: str) -> dict[str, int]:
    """`memory.on_chip` of a model as it was built, by the sizes of the mesh axes."""
    return memory.on_chip(
        config,
        model.specs,
        axes,
        platform=platform,
        kernel=model.choices["attention"].split(":")[0],
        stack=model.choices["blocks"],
        moments=moments(config, model),
    )


def forecast(config, model: build.Model, mesh) -> list[tuple[str, list[tuple]]]:
    """Sections on a mesh of described chips: whether it fits, messages, roofline, checkpoint."""
    chip = mesh.chip
    total = sizes(config, model, mesh.shape, chip.platform)["total"]
    held = moments(config, model)
    sections = [
        (
            "fit",
            [(f"{total / chip.memory:.0%} of the {chip.memory / 1e9:.4g} GB of one {chip.name}",)],
        ),
    ]
    if flops.peak(chip.kind, config.model.dtype) is None:
        why = f"{chip.name} has no sure peak in {config.model.dtype}; bfloat16 has one"
        sections.append(("time per step (forecast)", [(why,)]))
    else:
        step = costs.step(config, model.specs, mesh.shape, chip, held)
        sections.append(("communication per step and chip", _messages(step)))
        sections.append(("time per step (forecast)", _roofline(config, step, mesh)))
    size, seconds = costs.checkpoint(model.specs, mesh.size, chip, held)
    hosts = -(-mesh.size // chip.host)
    each = f"{costs.WRITE_PER_HOST / 1e9:g} GB/s from each of {hosts} host(s)"
    sections.append(("checkpoint", [(f"{size / 1e9:.3g} GB in {seconds:.2g} seconds, at {each}",)]))
    return sections


def _messages(step: costs.Step) -> list[tuple]:
    if not step.messages:
        return [("none",)]
    rows = [("kind", "over", "fast links", "network", "messages", "seconds", "of compute", "")]
    for message in step.messages:
        rows.append(
            (
                message.kind,
                " ".join(message.axes),
                f"{message.fast / 1e9:.3g} GB",
                f"{message.network / 1e9:.3g} GB",
                f"{message.count:,.0f}",
                f"{message.seconds:.3g}",
                f"{message.seconds / step.compute:.0%}",
                "beside products" if message.hidden else "waited for",
            )
        )
    return rows


def _roofline(config, step: costs.Step, mesh) -> list[tuple]:
    tokens, chip = tokens_per_step(config), mesh.chip
    return [
        ("FLOPs per chip", f"{step.chip_flops:.4g}", f"{step.model_flops:.4g} without recomputing"),
        ("bytes moved per chip", f"{step.moved:.4g}", "to and from memory, products' own left out"),
        (
            "compute",
            f"{step.compute:.3g} s",
            f"products at {costs.PRODUCT_SHARE:.0%} of {chip.peak / 1e12:,.4g} TFLOP/s, then bytes "
            f"at {costs.BANDWIDTH_SHARE:.0%} of {chip.bandwidth / 1e12:.3g} TB/s (shares assumed)",
        ),
        ("messages beside it", f"{step.hidden:.3g} s", "the step takes the longer of the two"),
        ("messages waited for", f"{step.exposed:.3g} s", "and these"),
        ("step", f"{step.seconds:.3g} s", f"{tokens / step.seconds:,.0f} tokens/s"),
        ("MFU", f"{step.mfu:.1%}", "FLOPs without recomputing / (step x dense bfloat16 peak)"),
        ("whole run", f"{step.seconds * config.train.steps / 3600:.3g} h", "the steps alone"),
    ]
