"""The groups `optim`, `schedule`, `freeze` and `mur` of the specification (keys.py)."""

from lmscale_jax.config.key import Key

_MUON = {"optim.name": ("muon", "normuon")}
_MOMENTS = {"optim.name": ("adamw", "lion", "muon", "normuon")}
_DRAWN = {"freeze.mode": ("random", "random_near_input")}
_ACTING = {"mur.mode": ("loss", "update")}
_WATCHING = {"mur.mode": ("diagnose", "loss", "update")}

OPTIM = {
    "name": Key(
        "adamw",
        "muon and normuon take the matrices inside blocks and leave the rest to adamw",
        choices=("adamw", "sgd", "lion", "muon", "normuon"),
    ),
    "lr": Key(1e-3, "peak learning rate; of what adamw takes where muon takes the rest", above=0.0),
    "embed_lr_factor": Key(1.0, "of lr, for embeddings", above=0.0),
    "head_lr_factor": Key(1.0, "of lr, for an untied readout", above=0.0),
    "vector_lr_factor": Key(1.0, "of lr, for gains, biases and scalars", above=0.0),
    "beta1": Key(0.9, "decay of the first moment", low=0.0, high=0.9999, when=_MOMENTS),
    "beta2": Key(
        0.95,
        "decay of the second moment (lion: of its momentum); 0.95 suits small batches of text",
        low=0.0,
        high=0.99999,
        when=_MOMENTS,
    ),
    "eps": Key(
        1e-8,
        "added to the root of the second moment",
        above=0.0,
        when={"optim.name": ("adamw", "muon", "normuon")},
    ),
    "momentum": Key(
        0.95,
        "decay of the momentum; Nesterov's form under muon and normuon",
        low=0.0,
        high=0.9999,
        when={"optim.name": ("sgd", "muon", "normuon")},
    ),
    "momentum_start": Key(
        0.85, "momentum before the first step of its warm-up", low=0.0, high=0.9999, when=_MUON
    ),
    "momentum_warmup": Key(
        "10%", "linear rise of the momentum; 0: none", duration=True, when=_MUON
    ),
    "muon_lr": Key(
        0.02, "peak learning rate of the matrices that muon takes", above=0.0, when=_MUON
    ),
    "muon_beta2": Key(
        0.95,
        "decay of the mean square of each neuron's orthogonal update",
        low=0.0,
        high=0.99999,
        when={"optim.name": ("normuon",)},
    ),
    "muon_coefficients": Key(
        "polar_express",
        "Newton-Schulz: 5 steps of Jordan's quintic, 5 of Polar Express (nearest to 1 for the "
        "cost), or 12 that converge",
        choices=("quintic", "polar_express", "stable"),
        when=_MUON,
    ),
    "muon_scale": Key(
        "spectral",
        "of an orthogonal update: sqrt(out/in), the one that transfers across any shape; kj "
        "sqrt(max(1, out/in)); moonlight 0.2 sqrt(max(in, out)), the size of an AdamW update",
        choices=("spectral", "kj", "moonlight"),
        when=_MUON,
    ),
    "muon_unit": Key(
        "matrix",
        "what is made orthogonal: whole matrices, or in attention the part of each head",
        choices=("matrix", "head"),
        when=_MUON,
    ),
    "muon_dtype": Key(
        "auto",
        "type of Newton-Schulz products; auto: float32 on CPU, bfloat16 elsewhere",
        choices=("auto", "float32", "bfloat16"),
        when=_MUON,
    ),
    "weight_decay": Key(
        1e-4,
        "independent: shrink per step at the schedule's peak; coupled: multiplied by the "
        "learning rate as in PyTorch (then 0.1 is usual)",
        low=0.0,
    ),
    "decay_mode": Key(
        "independent",
        "independent decay keeps its meaning when the learning rate is swept",
        choices=("independent", "coupled"),
    ),
    "decay_on": Key(
        "matrices",
        "parameters that decay: all matrices, only those inside blocks, or everything",
        choices=("matrices", "hidden", "all"),
    ),
    "decay_where": Key(
        "everywhere",
        "cautious: only entries that the update moves towards 0 as well",
        choices=("everywhere", "cautious"),
    ),
    "block_lr_decay": Key(
        1.0,
        "the update of each block is that of the one above it times this; 1: all alike",
        above=0.0,
        high=1.0,
    ),
    "ema_decay": Key(
        0.0,
        "of a running mean of the weights, evaluated beside them; 0: none",
        low=0.0,
        high=0.99999,
    ),
    "clip": Key(1.0, "global gradient norm above which gradients are scaled down; 0: off", low=0.0),
    "max_bad_steps": Key(
        20,
        "non-finite steps in a row before the run is called diverged",
        low=1,
    ),
}

SCHEDULE = {
    "name": Key(
        "cosine",
        "after warm-up; wsd: constant, then linear cooldown",
        choices=("cosine", "linear", "wsd", "constant"),
    ),
    "warmup": Key("2%", "linear rise from 0 to the peak", duration=True),
    "cooldown": Key(
        "20%", "length of the final descent", duration=True, when={"schedule.name": ("wsd",)}
    ),
    "final": Key(
        0.1,
        "last learning rate as a fraction of the peak",
        low=0.0,
        high=1.0,
        when={"schedule.name": ("cosine", "linear", "wsd")},
    ),
}

FREEZE = {
    "mode": Key(
        "none",
        "blocks that do not learn: those named, some drawn from all or from those near the input; "
        "unfreeze: all but one, which then begin one after the other",
        choices=("none", "fixed", "random", "random_near_input", "unfreeze"),
    ),
    "blocks": Key(
        "", "numbers of the frozen blocks from 0, such as 0,3", when={"freeze.mode": ("fixed",)}
    ),
    "count": Key(1, "how many blocks are drawn", low=1, when=_DRAWN),
    "near_input": Key(
        0.25,
        "share of the blocks, from the input, that are drawn from; at least one block",
        above=0.0,
        high=1.0,
        when={"freeze.mode": ("random_near_input",)},
    ),
    "order": Key(
        "input",
        "which block begins first: the one at the input, at the output, or one drawn",
        choices=("input", "output", "random"),
        when={"freeze.mode": ("unfreeze",)},
    ),
    "every": Key(
        "10%",
        "from one block's beginning to the next one's; tokens do not follow the run's length",
        duration=True,
        when={"freeze.mode": ("unfreeze",)},
    ),
    "seed": Key(
        0,
        "of what is drawn here, apart from the run's own",
        low=0,
        when={"freeze.mode": ("random", "random_near_input", "unfreeze")},
    ),
}

# Marginal Utility Regularization; what these keys mean together is told in docs/mur.md.
MUR = {
    "mode": Key(
        "off",
        "diagnose: measure the utility of every block; loss: add a hinge on it to the objective; "
        "update: enlarge the update of blocks whose utility is low",
        choices=("off", "diagnose", "loss", "update"),
    ),
    "metric": Key(
        "cos",
        "utility of a token: -<g, δ> (raw), over |g| |δ| (cos) or over |g|^2 (proj)",
        choices=("cos", "proj", "raw"),
        when=_WATCHING,
    ),
    "granularity": Key(
        "block",
        "what δ is of: a whole block, or attention and MLP apart (branch)",
        choices=("block", "branch"),
        when=_WATCHING,
    ),
    "eps": Key(
        1e-6,
        "least denominator of cos and proj, as a share of its mean over the batch",
        above=0.0,
        high=0.1,
        when=_WATCHING,
    ),
    "start": Key(
        0.33,
        "first block acted on, as a fraction of the depth",
        low=0.0,
        high=1.0,
        when=_ACTING | {"mur.first_block": (-1,)},
    ),
    "end": Key(
        0.67,
        "where the blocks acted on end, as a fraction of the depth; 1: after the last one",
        low=0.0,
        high=1.0,
        when=_ACTING | {"mur.last_block": (-1,)},
    ),
    "first_block": Key(
        -1, "number of the first block acted on, from 0; -1: by mur.start", low=-1, when=_ACTING
    ),
    "last_block": Key(
        -1,
        "number of the last block acted on, itself included; -1: by mur.end",
        low=-1,
        when=_ACTING,
    ),
    "tau": Key(
        0.0,
        "utility below which a block is acted on; in the unit of mur.tau_kind. For a trained "
        "network the mean cosine is near 0 whatever the block is worth",
        when=_WATCHING,
    ),
    "tau_kind": Key(
        "absolute",
        "quantile: tau, from 0 to 1, picks a quantile of the running distribution of token "
        "utilities in the blocks acted on; stderr: a multiple of the running standard error of a "
        "layer's utility",
        choices=("absolute", "quantile", "stderr"),
        when=_ACTING,
    ),
    "lambda_max": Key(
        0.1, "weight of the hinge in the objective", above=0.0, when={"mur.mode": ("loss",)}
    ),
    "alpha": Key(
        0.2,
        "s in the factor 1 + s max(0, tau - utility)",
        above=0.0,
        when={"mur.mode": ("update",)},
    ),
    "apply_to": Key(
        "updates",
        "what the factor multiplies: what leaves the optimizer, or the gradients, as the original "
        "did; Adam, Lion and Muon cancel the latter",
        choices=("updates", "grads"),
        when={"mur.mode": ("update",)},
    ),
    "decay": Key(
        0.99,
        "of the running means (utility in update mode, quantile, standard error), per step",
        low=0.0,
        high=0.99999,
        when=_ACTING,
    ),
    "warmup": Key("5%", "steps before weight or factor leave 0 and 1", duration=True, when=_ACTING),
    "ramp": Key("10%", "steps until they are whole, in a line", duration=True, when=_ACTING),
    "reduce": Key(
        "mean",
        "a layer's utility: mean over all labelled tokens, over some drawn from each sequence, or "
        "over those with the highest loss",
        choices=("mean", "sample_k", "top_loss"),
        when=_ACTING,
    ),
    "sample_k": Key(
        32, "tokens drawn from a sequence, each once", low=1, when={"mur.reduce": ("sample_k",)}
    ),
    "top_share": Key(
        0.25,
        "share of the tokens that have the highest loss",
        above=0.0,
        high=1.0,
        when={"mur.reduce": ("top_loss",)},
    ),
}
