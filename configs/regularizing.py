"""Keys of Marginal Utility Regularization; what they mean together is told in docs/mur.md."""

from configs.key import Key

_ACTING = {"mur.mode": ("loss", "update")}
_WATCHING = {"mur.mode": ("diagnose", "loss", "update")}

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
