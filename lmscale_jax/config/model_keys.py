"""Specifies the config group `model` (see keys.py)."""

from lmscale_jax.config.key import Key

_GATED = {"model.attn_gate": ("headwise", "elementwise", "const")}
_READING = {"model.attn_gate": ("headwise", "elementwise")}
_WINDOWED = {"model.window_layers": ("all", "ends", "fourth")}

MODEL = {
    "n_layers": Key(4, "decoder blocks", low=1, high=10_000),
    "d_model": Key(256, "width of the residual stream", low=1, high=2**20),
    "n_heads": Key(4, "query heads", low=1, high=2**16),
    "n_kv_heads": Key(0, "key and value heads; 0: as many as query heads (MHA)", low=0),
    "head_dim": Key(0, "channels per head; 0: d_model / n_heads", low=0),
    "d_ff": Key(
        0,
        "hidden width of the MLP; 0: 4 d_model, or for gated MLPs 8/3 d_model rounded to a "
        "multiple of 64, which has as many parameters",
        low=0,
    ),
    "mlp": Key(
        "gelu",
        "activation of the MLP; swiglu and geglu are gated",
        choices=("gelu", "relu2", "swiglu", "geglu"),
        code="class (model, settings) -> nnx.Module, called (x_NxD, context) -> [N, D]",
    ),
    "gelu": Key(
        "tanh",
        "form of GELU; tanh is GPT-2's and faster on CPU",
        choices=("tanh", "erf"),
        when={"model.mlp": ("gelu", "geglu")},
    ),
    "norm": Key(
        "layernorm",
        "pre-norm of each branch",
        choices=("layernorm", "rmsnorm"),
        code="class (model, settings) -> nnx.Module, called (h_NxD, context) -> [N, D]",
    ),
    "attention_module": Key(
        "softmax",
        "attention of a block; softmax: by heads, with the keys below",
        choices=("softmax",),
        late=True,
        code="class (model, settings) -> nnx.Module, called (x_NxD, context) -> [N, D]",
    ),
    "block": Key(
        "prenorm",
        "one block; prenorm: the stream plus attention of its norm, then plus the MLP of its norm",
        choices=("prenorm",),
        late=True,
        code="class (model, settings, parts) -> nnx.Module with attend and feed, called "
        "(h_NxD, context) -> [N, D]",
    ),
    "norm_gain": Key(
        "learned",
        "learned: each channel of a norm has a learned factor",
        choices=("learned", "none"),
    ),
    "norm_eps": Key(1e-5, "added to the variance in norms", above=0.0),
    "bias": Key(False, "biases in dense products and LayerNorm"),
    "positions": Key("learned", "position encoding", choices=("learned", "rope", "none")),
    "rope_theta": Key(
        1e4, "longest RoPE wavelength / 2 pi", above=1.0, when={"model.positions": ("rope",)}
    ),
    "rope_channels": Key(
        "all",
        "channels that RoPE rotates; half: half of each head's channels, by 1 to 1 / rope_theta "
        "radians a token, both ends included",
        choices=("all", "half"),
        when={"model.positions": ("rope",)},
    ),
    "max_seq_len": Key(
        0,
        "rows of the learned position table; 0: data.seq_len",
        low=0,
        when={"model.positions": ("learned",)},
    ),
    "head": Key(
        "tied",
        "readout; tied: the transposed embedding; untied: a matrix of its own",
        choices=("tied", "untied"),
    ),
    "logit_scale": Key(
        "one",
        "multiplier of the logits before the softcap; inverse_sqrt_width is for sp, as in the "
        "speedrun models: mup scales logits itself",
        choices=("one", "inverse_sqrt_width"),
    ),
    "logit_softcap": Key(
        0.0, "c in c tanh(logits / c), which bounds the logits (Gemma 2); 0: none", low=0.0
    ),
    "softcap_form": Key(
        "tanh",
        "form of the softcap; algebraic: c z / sqrt(c^2 + z^2)",
        choices=("tanh", "algebraic"),
    ),
    "vocab_size": Key(0, "rows of the embedding; 0: the tokenizer's vocabulary size", low=0),
    "vocab_multiple": Key(
        1,
        "vocab_size is padded to a multiple of this, which some products need; padding rows get "
        "no probability",
        low=1,
    ),
    "ids": Key(0, "vocabulary size before padding; 0: vocab_size", low=0),
    "qk_norm": Key(
        "none",
        "norm of queries and keys; rmsnorm: each head has a root mean square of 1, before rotation",
        choices=("none", "rmsnorm"),
    ),
    "window_layers": Key(
        "none",
        "blocks with the full attention window; the others have half of it; none: no windows; "
        "all: all blocks; ends: the first, the one at a third and the last; fourth: every fourth "
        "and the last",
        choices=("none", "all", "ends", "fourth"),
    ),
    "window": Key(
        1024,
        "attention window: keys that a query sees, itself included, in tokens",
        low=1,
        when=_WINDOWED,
    ),
    "window_block": Key(
        1,
        "tokens per unit of the window: a query sees its own unit and earlier ones",
        low=1,
        when=_WINDOWED,
    ),
    "window_growth": Key(
        "0",
        "duration over which windows grow linearly from one unit; evaluation uses the full ones",
        duration=True,
        when=_WINDOWED,
    ),
    "skips": Key(
        "none",
        "unet: the output of block l of the first half, times a learned scalar, is added to the "
        "input of block L - 1 - l",
        choices=("none", "unet"),
    ),
    "x0_mix": Key(
        "none",
        "learned: a block's input is a h + b x0 of the stream h and the embedding x0; a starts "
        "at 1 and b at 0",
        choices=("none", "learned"),
    ),
    "embed_norm": Key(
        "none",
        "norm of the embedding; rmsnorm: a root mean square of 1",
        choices=("none", "rmsnorm"),
    ),
    "value_embeddings": Key(
        0,
        "n tables of token embeddings, added to the values of the first and of the last n blocks "
        "with learned weights that start at 0.5",
        low=0,
    ),
    "attention_skip": Key(
        "",
        "blocks without attention, of an MLP alone, as '7' or '3,7'; '': none",
        late=True,
    ),
    "attn_gate": Key(
        "none",
        "gate of attention: act(x W) of the block's normalised input for each head or each "
        "channel (Qiu et al. 2025); const: a free parameter for each channel",
        choices=("none", "headwise", "elementwise", "const"),
    ),
    "gate_place": Key(
        "sdpa",
        "gated tensor; sdpa: the heads' outputs; query, key, value; output: the projected output",
        choices=("sdpa", "query", "key", "value", "output"),
        when=_GATED,
    ),
    "gate_activation": Key(
        "sigmoid",
        "activation of the gate; ns_sigmoid: 0.5 + 0.5 sigmoid, at least 0.5",
        choices=("sigmoid", "ns_sigmoid"),
        when=_GATED,
    ),
    "gate_bias": Key(False, "learned bias of the gate, initially 0", when=_READING),
    "gate_bias_init": Key(
        0.0, "constant added before the gate's activation; 2.2 makes initial gates 0.9", when=_GATED
    ),
    "gate_input": Key(
        "own",
        "input of the gate; own: its token's; earlier: another, earlier token's (a control)",
        choices=("own", "earlier"),
        when=_READING,
    ),
    "dropout": Key(
        0.0, "dropout rate of embedding, attention and residual branches", low=0.0, high=0.9
    ),
    "mask": Key(
        "causal",
        "attention mask; document: causal, and only within a document",
        choices=("causal", "document"),
    ),
    "dtype": Key(
        "float32",
        "type of products; parameters, norms, softmax and loss remain float32",
        choices=("float32", "bfloat16"),
    ),
    "residual_dtype": Key(
        "float32",
        "type of the residual stream between blocks; dtype: model.dtype, which in bfloat16 saves "
        "accelerators time and memory and rounds each sum (docs/performance.md)",
        choices=("float32", "dtype"),
        late=True,
    ),
    "matmul": Key(
        "dtype",
        "type of products with block weights; dtype: model.dtype; fp8: float8 e4m3 (gradients "
        "e5m2) with per-tensor scales on GPUs that have it, model.dtype elsewhere",
        choices=("dtype", "fp8"),
    ),
    "attention": Key(
        "auto",
        "attention kernel; auto: the fastest supported one; plain: the definition; saved: a "
        "hand-written backward pass from stored probabilities; xla: "
        "jax.nn.dot_product_attention; banded: plain XLA on the keys that the mask allows; cudnn: "
        "NVIDIA's; tokamax: OpenXLA's for GPUs, with any mask; splash: JAX's for TPU",
        choices=("auto", "plain", "saved", "xla", "banded", "cudnn", "tokamax", "splash"),
    ),
    "stack": Key(
        "auto",
        "execution of the blocks; auto: unrolled, but a scan on accelerators for more than 32 "
        "blocks, to save compile time, and on CPU with model.remat",
        choices=("auto", "scan", "unroll"),
        identity=False,
    ),
    "remat": Key(
        "none",
        "activations that the backward pass recomputes: none; block: all of each block; dots: "
        "all but dense products",
        choices=("none", "block", "dots"),
        identity=False,
    ),
    "loss_chunk": Key(
        0,
        "tokens per chunk of the loss; 0: chunks only if the float32 logits exceed 256 MiB on CPU, "
        "a quarter of the device's memory elsewhere",
        low=0,
        identity=False,
    ),
}
