"""The type in which a ladder's runs multiply follows the hardware, or the ladder's own word."""

import pytest

from lmscale_jax.config.resolve import resolve
from lmscale_jax.errors import InputError
from lmscale_jax.ladders import machine, plan

# Shapes that need not be solved for.
WIDTHS = {"rungs__by": "width", "rungs__sizes": (64.0, 128.0), "rungs__held_out": 0.0,
          "rungs__match": "none", "rungs__aspect": 64.0, "rungs__head_dim": 64,
          "seeds": 1}  # fmt: skip


def test_runs_on_accelerators_compute_in_bfloat16(ladder, monkeypatch, tmp_path):
    """Unless the ladder says otherwise, or the type is what it compares."""

    def dtypes(on_cpu: bool, arms: dict | None = None, **changes) -> dict[str, set]:
        monkeypatch.setattr(machine, "runs_on_cpu", lambda: on_cpu)
        config = ladder(**WIDTHS | changes)
        if arms:
            config.arms, config.baseline, config.switch = arms, "float32", ("model.dtype",)
        ladder_plan = plan.make_plan(config, print)
        chosen = f"products in {ladder_plan.ladder['run']['model']['dtype']}"
        assert plan.describe_dtype(ladder_plan) == f"{chosen} (config.dtype={config.dtype!r})"
        configs = {c.arm: resolve(ladder_plan.config(c, tmp_path)) for c in ladder_plan.cells}
        return {arm: config.model.dtype for arm, config in configs.items()}

    assert set(dtypes(on_cpu=True).values()) == {"float32"}
    assert set(dtypes(on_cpu=False).values()) == {"bfloat16"}
    assert set(dtypes(on_cpu=False, dtype="run").values()) == {"float32"}
    # Submitted from a machine without one.
    slurm = {"executor__name": "slurm", "executor__gpus": 1}
    assert set(dtypes(on_cpu=True, **slurm).values()) == {"bfloat16"}
    arms = {"float32": {}, "bfloat16": {"model": {"dtype": "bfloat16"}}}
    assert dtypes(on_cpu=False, arms=arms) == {"float32": "float32", "bfloat16": "bfloat16"}


def test_a_ladder_goes_on_with_the_type_of_its_plan(ladder, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "runs_on_cpu", lambda: True)
    first = plan.make_plan(ladder(**WIDTHS), print)
    plan.write_plan(first, None, tmp_path)
    monkeypatch.setattr(machine, "runs_on_cpu", lambda: False)
    remedy = r"use --config\.dtype=run --config\.run\.model\.dtype=float32, or"
    with pytest.raises(InputError, match=remedy):
        plan.check_plan(plan.make_plan(ladder(**WIDTHS), print), tmp_path)
    same = plan.make_plan(ladder(dtype="run", **WIDTHS), print)
    assert plan.check_plan(same, tmp_path).id == first.id == same.id
