"""Specifies the config group `parametrization` (see keys.py)."""

from lmscale_jax.config.key import Key

_SIZED = {"parametrization.name": ("mup", "completep")}

PARAMETRIZATION = {
    "name": Key(
        "sp",
        "how initial scale and learning rate follow the model's size: sp: not at all; mup: "
        "with width (Yang et al. 2022); completep: with width and depth (Dey et al. 2025)",
        choices=("sp", "mup", "completep"),
    ),
    "base_width": Key(
        0,
        "base d_model, at which every factor is 1: the width that was tuned",
        low=0,
        when=_SIZED,
    ),
    "base_depth": Key(
        0,
        "base n_layers, at which every factor is 1: the depth that was tuned",
        low=0,
        when={"parametrization.name": ("completep",)},
    ),
    "base_head_dim": Key(
        0,
        "channels per head at the base; 0: model.head_dim, so that width adds heads",
        low=0,
        when=_SIZED,
    ),
    "base_d_ff": Key(
        0,
        "d_ff at the base; 0: by the rule of model.d_ff, or in proportion to the width",
        low=0,
        when=_SIZED,
    ),
    "depth_exponent": Key(
        1.0,
        "a in the branch multiplier (depth / base_depth)^-a; 1 transfers best (CompleteP)",
        low=0.0,
        high=1.0,
        when={"parametrization.name": ("completep",)},
    ),
    "embed_scale": Key(
        1.0, "multiplier of the embedding, tuned at the base", above=0.0, when=_SIZED
    ),
    "attention_scale": Key(
        1.0, "multiplier of the attention scores q·k / sqrt(head_dim)", above=0.0
    ),
    "output_scale": Key(1.0, "multiplier of the logits, tuned at the base", above=0.0, when=_SIZED),
    "embed_lr_exponent": Key(
        0.0,
        "p in the embedding's learning-rate factor width^p; u-mup and nanochat use -0.5",
        low=-1.0,
        high=1.0,
        when=_SIZED,
    ),
    "rule": Key(
        "",
        "factors of single parameters, on top of those of parametrization.name",
        late=True,
        code="function (spec, base, settings) -> {'init_std', 'lr', 'multiplier': factor}",
    ),
    "control": Key(
        "none",
        "a deliberate mistake that the coordinate check must detect: logits_sqrt divides the "
        "logits by the square root of the width ratio; no_lr_scaling and no_eps_scaling do not "
        "scale learning rates and Adam's epsilon",
        choices=("none", "logits_sqrt", "no_lr_scaling", "no_eps_scaling"),
        when=_SIZED,
    ),
    "init_std": Key(0.02, "standard deviation of initial matrices (GPT-2)", above=0.0),
    "residual_init": Key(
        "depth_scaled",
        "initial projections into the residual stream: depth_scaled: init_std / sqrt(2 "
        "n_layers) (GPT-2); plain: like other matrices; zeros: every block starts as the "
        "identity",
        choices=("depth_scaled", "plain", "zeros"),
    ),
    "embed_std": Key(0.0, "standard deviation of initial embeddings; 0: init_std", low=0.0),
    "head_init": Key(
        "normal",
        "initial readout; zeros: all tokens start equally likely, at a loss of ln(vocab_size)",
        choices=("normal", "zeros"),
        when={"model.head": ("untied",)},
    ),
}
