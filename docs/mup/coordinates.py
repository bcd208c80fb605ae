"""Coordinate checks of both families and their controls: docs/mup/coordinates.py OUT [NAME ...]

Writes OUT/NAME/coord_check.* and OUT/coordinates.json with the slopes at steps 1, 2, 5 and last.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lmscale_jax.configs import coord_check as family
from lmscale_jax.files import write_json
from lmscale_jax.model import mesh
from lmscale_jax.reports.sweep_plots import draw_coord_check
from lmscale_jax.sweeps import coord_check

# The narrowest GPT-2 is too narrow for its attention averages (docs/mup.md).
WIDTHS = {"llama": [64, 128, 256, 512, 1024], "gpt2": [128, 256, 512, 1024]}
NARROW = [64, 128, 256, 512]
CONTROLS = ("sp", "logits_sqrt", "no_lr_scaling")


def completep(exponent: float):
    config = family.get_config("llama")
    config.model.d_model, config.model.n_heads = 128, 4
    config.parametrization.name = "completep"
    config.parametrization.base_width, config.parametrization.base_depth = 128, 2
    config.parametrization.depth_exponent = exponent
    return config


def heads():
    config = family.get_config("llama")
    config.model.d_model, config.model.n_heads = 256, 4
    config.parametrization.base_head_dim = 64
    return config


def large_epsilon():
    """Updates whose size depends on epsilon. Clipping would change gradients by the norm of all."""
    config = family.get_config("llama")
    config.model.attn_gate, config.model.value_embeddings = "headwise", 1
    config.parametrization.base_width = NARROW[0]
    config.optim.eps, config.optim.clip = 1e-5, 0.0
    return config


CHECKS = {
    "llama none": (family.get_config, "width", WIDTHS["llama"], "none"),
    "gpt2 none": (lambda: family.get_config("gpt2"), "width", WIDTHS["gpt2"], "none"),
    **{f"llama {c}": (family.get_config, "width", NARROW, c) for c in CONTROLS},
    **{f"gpt2 {c}": (lambda: family.get_config("gpt2"), "width", NARROW, c) for c in CONTROLS},
    "epsilon none": (large_epsilon, "width", NARROW, "none"),
    "epsilon no_eps_scaling": (large_epsilon, "width", NARROW, "no_eps_scaling"),
    "llama head_dim": (heads, "head_dim", [32, 64, 128, 256], "none"),
    "llama depth 1": (lambda: completep(1.0), "depth", [2, 4, 8, 16], "none"),
    "llama depth 0.5": (lambda: completep(0.5), "depth", [2, 4, 8, 16], "none"),
    "llama depth 0": (lambda: completep(0.0), "depth", [2, 4, 8, 16], "none"),
}


def text(entry: dict) -> str | None:
    """Returns a slope and its standard error, "-0.500 ± 0.002"; None where a size was 0."""
    return None if entry["slope"] is None else f"{entry['slope']:+.3f} ± {entry['se']:.3f}"


def main(out: Path, names: list[str]) -> None:
    path = out / "coordinates.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in names or CHECKS:
        make, sweep, sizes, control = CHECKS[name]
        plan = coord_check.plan_sizes(make(), sweep, sizes, control)
        mesh.start_jax(plan.configs[0])
        print(f"== {name}", flush=True)
        workdir = out / name.replace(" ", "_")
        result = coord_check.check_coordinates(plan, 3, workdir, print)
        draw_coord_check(result, workdir / "coord_check.png")
        last = str(result["config"]["train"]["steps"])
        results[name] = {
            "verdict": result["verdict"],
            "failures": len(result["failures"]),
            "certain": sum(failure["certain"] for failure in result["failures"]),
            "predicted": result.get("predicted"),
            "slopes": {
                tensor: {step: text(steps[step]) for step in ("1", "2", "5", last)}
                for tensor, steps in result["slopes"].items()
            },
        }
        write_json(path, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
