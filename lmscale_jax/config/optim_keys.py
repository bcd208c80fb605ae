"""Specifies the config groups `objective`, `optim`, `schedule`, `freeze` and `mur`."""

from lmscale_jax.config.key import CODE, Key

_MUON = {"optim.name": ("muon", "normuon")}
# Of code, for the parameters that it leaves to adamw.
_MOMENTS = {"optim.name": ("adamw", "lion", "muon", "normuon", CODE)}
_DRAWN = {"freeze.mode": ("random", "random_near_input")}
_ACTING = {"mur.mode": ("loss", "update")}
_WATCHING = {"mur.mode": ("diagnose", "loss", "update")}

OBJECTIVE = {
    "terms": Key(
        "",
        "terms that are added to the loss, several with commas; train_loss is without them",
        late=True,
        code="function (params, out, settings, step) -> scalar",
    ),
}

OPTIM = {
    "name": Key(
        "adamw",
        "optimizer; muon and normuon update the matrices inside blocks, and adamw the other "
        "parameters",
        choices=("adamw", "sgd", "lion", "muon", "normuon"),
        code="function (settings, rules) -> optax.GradientTransformation, the direction",
    ),
    "lr": Key(
        1e-3,
        "peak learning rate; with muon or normuon, that of the parameters that adamw updates",
        above=0.0,
    ),
    "embed_lr_factor": Key(1.0, "learning-rate factor of embeddings", above=0.0),
    "head_lr_factor": Key(1.0, "learning-rate factor of an untied readout", above=0.0),
    "vector_lr_factor": Key(1.0, "learning-rate factor of gains, biases and scalars", above=0.0),
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
        when={"optim.name": ("adamw", "muon", "normuon", CODE)},
    ),
    "momentum": Key(
        0.95,
        "decay of the momentum; muon and normuon use Nesterov's form",
        low=0.0,
        high=0.9999,
        when={"optim.name": ("sgd", "muon", "normuon")},
    ),
    "momentum_start": Key(
        0.85, "momentum at the start of its warm-up", low=0.0, high=0.9999, when=_MUON
    ),
    "momentum_warmup": Key(
        "10%", "duration of the linear warm-up of the momentum; 0: none", duration=True, when=_MUON
    ),
    "muon_lr": Key(
        0.02, "peak learning rate of the matrices that muon updates", above=0.0, when=_MUON
    ),
    "muon_beta2": Key(
        0.95,
        "decay of the mean square of each neuron's orthogonal update",
        low=0.0,
        high=0.99999,
        when={"optim.name": ("normuon",)},
    ),
    "muon_neurons": Key(
        "output",
        "neurons whose updates normuon evens out; output: what each computes, as in its paper; "
        "longer: the entries of a matrix's longer side, as in modded-nanogpt",
        choices=("output", "longer"),
        when={"optim.name": ("normuon",)},
        late=True,
    ),
    "muon_coefficients": Key(
        "polar_express",
        "Newton-Schulz coefficients; quintic: 5 steps of Jordan's; polar_express: 5 steps, "
        "closest to orthogonal at this cost; stable: 12 steps that converge",
        choices=("quintic", "polar_express", "stable"),
        when=_MUON,
    ),
    "muon_scale": Key(
        "spectral",
        "scale of an orthogonal update; spectral: sqrt(out/in), which transfers across all "
        "shapes; kj: sqrt(max(1, out/in)); moonlight: 0.2 sqrt(max(in, out)), the size of an "
        "AdamW update",
        choices=("spectral", "kj", "moonlight"),
        when=_MUON,
    ),
    "muon_unit": Key(
        "matrix",
        "unit that is orthogonalized: the matrix, or in attention the part of each head",
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
        "independent: relative shrinkage per step at the schedule's peak; coupled: multiplied by "
        "the learning rate as in PyTorch (0.1 is usual)",
        low=0.0,
    ),
    "decay_mode": Key(
        "independent",
        "independent: not multiplied by the peak rate, so it keeps its meaning in a sweep of "
        "it; coupled: multiplied, as in PyTorch, and the same at every size",
        choices=("independent", "coupled"),
    ),
    "decay_on": Key(
        "matrices",
        "parameters with weight decay: all matrices, the matrices inside blocks (hidden), or all",
        choices=("matrices", "hidden", "all"),
    ),
    "decay_where": Key(
        "everywhere",
        "cautious: only entries that the update also moves towards 0",
        choices=("everywhere", "cautious"),
    ),
    "block_lr_decay": Key(
        1.0,
        "ratio of a block's learning rate to that of the block above it; 1: all equal",
        above=0.0,
        high=1.0,
    ),
    "ema_decay": Key(
        0.0,
        "decay of a running mean of the weights, which is evaluated too; 0: none",
        low=0.0,
        high=0.99999,
    ),
    "clip": Key(1.0, "maximum global gradient norm; 0: no clipping", low=0.0),
    "max_bad_steps": Key(
        20,
        "non-finite steps in a row after which the run has diverged",
        low=1,
    ),
}

SCHEDULE = {
    "name": Key(
        "cosine",
        "learning-rate schedule after warm-up; wsd: constant, then linear cooldown",
        choices=("cosine", "linear", "wsd", "constant"),
        code="function (step, n_steps) -> factor of the peak after warm-up",
    ),
    "warmup": Key("2%", "duration of the linear rise from 0 to the peak", duration=True),
    "cooldown": Key(
        "20%",
        "duration of the final linear descent",
        duration=True,
        when={"schedule.name": ("wsd",)},
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
        "blocks that are not trained; fixed: those of freeze.blocks; random: drawn from all; "
        "random_near_input: drawn from those near the input; unfreeze: all but one at first, "
        "then one more at each freeze.every",
        choices=("none", "fixed", "random", "random_near_input", "unfreeze"),
    ),
    "blocks": Key(
        "", "numbers of the frozen blocks, from 0, such as 0,3", when={"freeze.mode": ("fixed",)}
    ),
    "count": Key(1, "number of blocks to draw", low=1, when=_DRAWN),
    "near_input": Key(
        0.25,
        "fraction of the blocks, from the input, to draw from; at least one block",
        above=0.0,
        high=1.0,
        when={"freeze.mode": ("random_near_input",)},
    ),
    "order": Key(
        "input",
        "order of unfreezing: from the input, from the output, or random",
        choices=("input", "output", "random"),
        when={"freeze.mode": ("unfreeze",)},
    ),
    "every": Key(
        "10%",
        "interval between unfreezing consecutive blocks",
        duration=True,
        when={"freeze.mode": ("unfreeze",)},
    ),
    "seed": Key(
        0,
        "seed of these draws, independent of the run's",
        low=0,
        when={"freeze.mode": ("random", "random_near_input", "unfreeze")},
    ),
}

# Marginal Utility Regularization, described in docs/mur.md.
MUR = {
    "mode": Key(
        "off",
        "diagnose: measure the utility of every block; loss: add a hinge on it to the objective; "
        "update: enlarge the update of blocks with low utility",
        choices=("off", "diagnose", "loss", "update"),
    ),
    "metric": Key(
        "cos",
        "utility of a token; raw: -<g, δ>; cos: that over |g| |δ|; proj: that over |g|^2",
        choices=("cos", "proj", "raw"),
        when=_WATCHING,
    ),
    "granularity": Key(
        "block",
        "δ is the output of a whole block (block), or of attention and MLP separately (branch)",
        choices=("block", "branch"),
        when=_WATCHING,
    ),
    "eps": Key(
        1e-6,
        "minimum denominator of cos and proj, as a fraction of its mean over the batch",
        above=0.0,
        high=0.1,
        when=_WATCHING,
    ),
    "start": Key(
        0.33,
        "first regularized block, as a fraction of the depth",
        low=0.0,
        high=1.0,
        when=_ACTING | {"mur.first_block": (-1,)},
    ),
    "end": Key(
        0.67,
        "end of the regularized blocks, as a fraction of the depth; 1: includes the last",
        low=0.0,
        high=1.0,
        when=_ACTING | {"mur.last_block": (-1,)},
    ),
    "first_block": Key(
        -1,
        "number of the first regularized block, from 0; -1: from mur.start",
        low=-1,
        when=_ACTING,
    ),
    "last_block": Key(
        -1,
        "number of the last regularized block, inclusive; -1: from mur.end",
        low=-1,
        when=_ACTING,
    ),
    "tau": Key(
        0.0,
        "utility below which a block is regularized, in units of mur.tau_kind; the mean cosine "
        "of a trained network is near 0 for every block",
        when=_WATCHING,
    ),
    "tau_kind": Key(
        "absolute",
        "absolute: tau is a utility; quantile: a quantile (0 to 1) of the running distribution "
        "of token utilities in the regularized blocks; stderr: a multiple of the running "
        "standard error of a layer's utility",
        choices=("absolute", "quantile", "stderr"),
        when=_ACTING,
    ),
    "lambda_max": Key(
        0.1, "weight of the hinge in the objective", above=0.0, when={"mur.mode": ("loss",)}
    ),
    "alpha": Key(
        0.2,
        "s in the update factor 1 + s max(0, tau - utility)",
        above=0.0,
        when={"mur.mode": ("update",)},
    ),
    "apply_to": Key(
        "updates",
        "what the factor multiplies: the optimizer's updates, or the gradients as in the "
        "original, where Adam, Lion and Muon cancel it",
        choices=("updates", "grads"),
        when={"mur.mode": ("update",)},
    ),
    "decay": Key(
        0.99,
        "decay per step of the running means (utility in update mode, quantile, standard error)",
        low=0.0,
        high=0.99999,
        when=_ACTING,
    ),
    "warmup": Key(
        "5%",
        "duration before the hinge or the update factor has any effect",
        duration=True,
        when=_ACTING,
    ),
    "ramp": Key("10%", "duration of its linear rise to full strength", duration=True, when=_ACTING),
    "reduce": Key(
        "mean",
        "tokens that a layer's utility averages; mean: all labelled ones; sample_k: some drawn "
        "from each sequence; top_loss: those with the highest loss",
        choices=("mean", "sample_k", "top_loss"),
        when=_ACTING,
    ),
    "sample_k": Key(
        32,
        "tokens drawn from each sequence, without replacement",
        low=1,
        when={"mur.reduce": ("sample_k",)},
    ),
    "top_share": Key(
        0.25,
        "fraction of tokens, those with the highest loss",
        above=0.0,
        high=1.0,
        when={"mur.reduce": ("top_loss",)},
    ),
}
