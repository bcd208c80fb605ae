"""Specifies the keys of a ladder: a question, its arms, their sizes, and how they are run.

LADDER has the keys that specify how the runs of a ladder differ; FREE has the groups without fixed
keys, because they hold keys of a run.
"""

import ml_collections

from lmscale_jax.config.key import Key

# {group: what it holds}
FREE = {
    "run": "the config that all runs of the ladder share",
    "arms": "{arm: {group: {key: value}}}, what each arm changes; only keys under `switch`",
    "tune": '{arm or "all": {group: {key: values}}}, tried at every anchor; the best values of '
    "each arm are compared, and the held-out rung uses the best ones of the largest anchor",
    "per_rung": "{group: {key: values}}, one value for each anchor and, last, one for the "
    "held-out rung",
}

_SOLVED = {"rungs.by": ("non_embedding", "total", "flops")}

# What a fault that a guard sees does; "skip" does not look.
_ACTIONS = ("refuse", "warn", "skip")


def _guard(default: str, doc: str) -> Key:
    return Key(default, doc, choices=_ACTIONS)


# Checks of every arm at a small size, before the first run (`guards/`).
GUARDS = {
    "mode": Key(
        "auto",
        "when the guards run, before the first run: auto: where a ladder has several arms or code "
        "of its own",
        choices=("auto", "always", "never"),
    ),
    "causality": _guard(
        "refuse", "no logit depends on a later token, on another row or, by its mask, document"
    ),
    "gradients": _guard(
        "refuse", "a gradient reaches every parameter, and is finite in float32 and bfloat16"
    ),
    "stack": _guard("warn", "unrolled blocks and a scan with rematerialization agree"),
    "accumulation": _guard("refuse", "one batch and two micro-batches agree"),
    "devices": _guard(
        "refuse", "one device agrees with two along data, fsdp, tensor and sequence (simulated)"
    ),
    "counts": _guard(
        "refuse", "declared FLOPs are those of the gradient's products within 5%, as the baseline's"
    ),
    "difference": _guard(
        "refuse", "an arm trains otherwise than the baseline, and equals it where its code is OFF"
    ),
    "repeat": _guard("refuse", "a second run and a continued one have the same bits"),
    "coordinates": _guard(
        "warn", "under mup and completep, activations keep their size over the width"
    ),
    "cost": _guard("warn", "time and memory of a step follow its FLOPs within 30%"),
    "held_out": _guard(
        "refuse",
        "no arm's held-out loss is a nat below those of all other arms of its rung; this one looks "
        "while the ladder trains",
    ),
}

LADDER = {
    "question": Key("", "the question of the ladder in one sentence; title of the report"),
    "baseline": Key("", "the arm that the others are compared with"),
    "switch": Key(("",), "keys or groups of keys of a run in which the arms may differ"),
    "rungs": {
        "by": Key(
            "non_embedding",
            "measure of size: parameters by a counting convention of run.json, width, number of "
            "blocks, or FLOPs of a whole run",
            choices=("non_embedding", "total", "width", "depth", "flops"),
        ),
        "sizes": Key((0.0,), "sizes of the anchors, ascending"),
        "held_out": Key(
            0.0, "size of the rung whose loss is forecast before it is trained; 0: none"
        ),
        "aspect": Key(
            64.0, "target d_model / n_layers of the solved shapes", above=0.0, when=_SOLVED
        ),
        "head_dim": Key(64, "channels per head", low=1, when=_SOLVED),
        "match": Key(
            "none",
            "how arms of one size are matched; none: the same shape, d_ff by its rule; "
            "parameters, flops: each arm's d_ff is solved to equal the baseline's within 0.5%",
            choices=("none", "parameters", "flops"),
        ),
    },
    "tokens": {
        "rule": Key(
            "ratio",
            "training tokens of a run: a ratio to its non-embedding parameters, token budgets, "
            "or FLOP budgets (an isoFLOP grid)",
            choices=("ratio", "budgets", "flops"),
        ),
        "amounts": Key(
            (20.0,), "ratios, tokens or FLOPs by the rule; every size is trained with each"
        ),
        "held_out": Key(0.0, "the same for the held-out rung; 0: the largest amount", low=0.0),
        "trunk": Key(
            "own",
            "own: each budget is a separate run; shared: one run at constant rate, from which "
            "each budget is a branch that cools down over its last fifth (needs "
            "schedule.name='wsd'; the held-out rung stays separate)",
            choices=("own", "shared"),
        ),
    },
    "dtype": Key(
        "auto",
        "type of products of all runs; run: run.model.dtype; auto: bfloat16 where the runs go to "
        "accelerators and no arm or tuned value sets model.dtype, else run.model.dtype",
        choices=("auto", "run"),
    ),
    "seeds": Key(2, "runs per cell; run s adds s to both seed and data.seed", low=1),
    "fit": {
        "n": Key(
            "non_embedding",
            "parameters that the laws' N counts",
            choices=("non_embedding", "total"),
        ),
        "effect": Key(0.1, "smallest relative change of the exponent that matters", above=0.0),
        "level": Key(0.95, "confidence level of the test between arms", above=0.5, high=0.999),
        "forecast_level": Key(
            0.9, "confidence level of the forecasts' intervals", above=0.5, high=0.999
        ),
    },
    "pack": {
        "mode": Key(
            "auto",
            "train runs that differ only in numbers as one program; auto: where that was "
            "measured to be faster (benchmarks/README.md)",
            choices=("auto", "always", "never"),
        ),
        "most": Key(16, "maximum number of runs in one program", low=1),
    },
    "executor": {
        "name": Key(
            "local",
            "local: processes on this machine, on CPU each pinned to a core; here: this process, "
            "for a debugger, or where it holds the accelerator; ray; slurm: job arrays",
            choices=("local", "here", "ray", "slurm"),
        ),
        "workers": Key(
            0,
            "simultaneous processes; 0: one per core on CPU, one on an accelerator",
            low=0,
            when={"executor.name": ("local", "slurm")},
        ),
        "cpus": Key(1, "cores per process", low=1),
        "gpus": Key(0, "accelerators per process", low=0, when={"executor.name": ("ray", "slurm")}),
        "partition": Key("", "Slurm partition", when={"executor.name": ("slurm",)}),
        "minutes": Key(
            240,
            "time limit of one job; the next one resumes from its checkpoint",
            low=1,
            when={"executor.name": ("slurm",)},
        ),
    },
    "guards": GUARDS,
    "max_hours": Key(0.0, "refuse a ladder that is estimated to take longer; 0: no limit", low=0.0),
}


def get_ladder_config(run: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the defaults of a ladder of such runs, which a ladder's config file edits."""

    def defaults(spec):
        return {k: v.default if isinstance(v, Key) else defaults(v) for k, v in spec.items()}

    return ml_collections.ConfigDict(
        defaults(LADDER) | {"run": run, "arms": {}, "tune": {}, "per_rung": {}}
    )
