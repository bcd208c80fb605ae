"""The keys of a ladder: a question, its arms, their sizes, and how they are run.

A ladder's config holds, under `run`, the whole config of its runs; all else here says in what the
runs differ from it. Three groups have no fixed keys, because they hold keys of `run`:

`arms`: {arm: {group: {key: value}}}, what each arm changes; only keys under `switch` may be there.
`tune`: {arm or "all": {group: {key: values}}}, tried at every anchor; the best of each is compared,
and the held-out rung takes what was best at the largest anchor.
`per_rung`: {group: {key: values}}, one value for each anchor and, last, one for the held-out rung.
"""

import ml_collections

from lmscale_jax.config.key import Key

FREE = ("run", "arms", "tune", "per_rung")

_SOLVED = {"rungs.by": ("non_embedding", "total", "flops")}

LADDER = {
    "question": Key("", "what is asked, in a sentence; it heads the report"),
    "baseline": Key("", "the arm that the others are compared with"),
    "switch": Key(("",), "keys or groups of keys of a run that the arms may differ in"),
    "rungs": {
        "by": Key(
            "non_embedding",
            "what a size is: parameters by a counting convention of run.json, the width, the "
            "number of blocks, or the FLOPs of a whole run",
            choices=("non_embedding", "total", "width", "depth", "flops"),
        ),
        "sizes": Key((0.0,), "the anchors, smallest first"),
        "held_out": Key(0.0, "the size whose loss is forecast before it is trained; 0: none"),
        "aspect": Key(64.0, "d_model / n_layers that a size aims at", above=0.0, when=_SOLVED),
        "head_dim": Key(64, "channels per head", low=1, when=_SOLVED),
        "match": Key(
            "none",
            "of arms at one size: none: the same shape, d_ff by its rule. parameters, flops: the "
            "d_ff of each other arm is solved to spend what the baseline spends, within 0.5%",
            choices=("none", "parameters", "flops"),
        ),
    },
    "tokens": {
        "rule": Key(
            "ratio",
            "tokens of a run: a ratio to its non-embedding parameters, budgets of tokens, or "
            "budgets of FLOPs (an isoFLOP grid)",
            choices=("ratio", "budgets", "flops"),
        ),
        "amounts": Key((20.0,), "ratios, tokens or FLOPs, by the rule; every size gets each"),
        "held_out": Key(
            0.0, "the same for the held-out rung; 0: the largest of the amounts", low=0.0
        ),
        "trunk": Key(
            "own",
            "own: each budget is a run of its own. shared: a run at constant rate from which one "
            "branch a budget cools down over its last fifth (schedule.name must be wsd); the held-"
            "out rung runs on its own",
            choices=("own", "shared"),
        ),
    },
    "seeds": Key(2, "runs of each cell; seed s adds s to both seed and data.seed", low=1),
    "fit": {
        "n": Key(
            "non_embedding", "parameters in the laws' N", choices=("non_embedding", "total")
        ),
        "effect": Key(0.1, "smallest relative change of the exponent that matters", above=0.0),
        "level": Key(0.95, "of the test between arms", above=0.5, high=0.999),
        "forecast_level": Key(0.9, "of the forecasts' intervals", above=0.5, high=0.999),
    },
    "pack": {
        "mode": Key(
            "auto",
            "runs that differ only in numbers, trained as one program: auto: where that was "
            "measured to be faster (benchmarks/README.md)",
            choices=("auto", "always", "never"),
        ),
        "most": Key(16, "runs in one program", low=1),
    },
    "executor": {
        "name": Key(
            "local",
            "local: processes here, one pinned to a core each on CPU; ray; slurm: job arrays",
            choices=("local", "ray", "slurm"),
        ),
        "workers": Key(
            0,
            "processes at a time; 0: on CPU one a core, on an accelerator one",
            low=0,
            when={"executor.name": ("local", "slurm")},
        ),
        "cpus": Key(1, "cores of each process", low=1),
        "gpus": Key(
            0, "accelerators of each process", low=0, when={"executor.name": ("ray", "slurm")}
        ),
        "partition": Key("", "Slurm partition", when={"executor.name": ("slurm",)}),
        "minutes": Key(
            240, "time limit of one job; it goes on from its checkpoint after", low=1,
            when={"executor.name": ("slurm",)},
        ),
    },
    "max_hours": Key(0.0, "refuse a plan estimated to take longer here; 0: no cap", low=0.0),
}  # fmt: skip


def get_ladder_config(run: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The defaults of a ladder of such runs, for a ladder's config file to edit."""

    def defaults(spec):
        return {k: v.default if isinstance(v, Key) else defaults(v) for k, v in spec.items()}

    return ml_collections.ConfigDict(
        defaults(LADDER) | {"run": run, "arms": {}, "tune": {}, "per_rung": {}}
    )
