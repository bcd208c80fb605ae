"""The group `model` of the specification (keys.py)."""

from lmscale_jax.config.key import Key

_GATED = {"model.attn_gate": ("headwise", "elementwise", "const")}
_READING = {"model.attn_gate": ("headwise", "elementwise")}
_WINDOWED = {"model.window_layers": ("all", "ends", "fourth")}

MODEL = {
    "n_layers": Key(4, "decoder blocks", low=1),
    "d_model": Key(256, "width of the residual stream", low=1),
    "n_heads": Key(4, "query heads", low=1),
    "n_kv_heads": Key(0, "key and value heads; 0: as many as query heads (MHA)", low=0),
    "head_dim": Key(0, "channels per head; 0: d_model / n_heads", low=0),
    "d_ff": Key(
        0,
        "hidden width of the MLP; 0: 4 d_model, or for gated MLPs 8/3 d_model rounded to a "
        "multiple of 64, which spends the same parameters",
        low=0,
    ),
    "mlp": Key("gelu", "activation", choices=("gelu", "relu2", "swiglu", "geglu")),
    "gelu": Key(
        "tanh",
        "form of GELU; tanh is GPT-2's and the faster one on CPU",
        choices=("tanh", "erf"),
        when={"model.mlp": ("gelu", "geglu")},
    ),
    "norm": Key("layernorm", "pre-norm of each branch", choices=("layernorm", "rmsnorm")),
    "norm_gain": Key("learned", "a factor for each channel of a norm", choices=("learned", "none")),
    "norm_eps": Key(1e-5, "added to the variance", above=0.0),
    "bias": Key(False, "biases on dense products and on LayerNorm"),
    "positions": Key("learned", "position encoding", choices=("learned", "rope", "none")),
    "rope_theta": Key(
        1e4, "longest RoPE wavelength / 2 pi", above=1.0, when={"model.positions": ("rope",)}
    ),
    "rope_channels": Key(
        "all",
        "half: half of each head's channels carry no position; the others turn by 1 to "
        "1 / rope_theta radians a token, both ends included",
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
        "tied", "readout: the embedding transposed, or its own", choices=("tied", "untied")
    ),
    "logit_scale": Key(
        "one",
        "what the readout's product is multiplied by before the softcap; inverse_sqrt_width, "
        "of the speedrun models, belongs to sp: mup has a scale of its own",
        choices=("one", "inverse_sqrt_width"),
    ),
    "logit_softcap": Key(
        0.0, "c in c tanh(logits / c), the bound of the logits (Gemma 2); 0: none", low=0.0
    ),
    "softcap_form": Key(
        "tanh",
        "algebraic: c z / sqrt(c^2 + z^2)",
        choices=("tanh", "algebraic"),
    ),
    "vocab_size": Key(0, "rows of the embedding; 0: the tokenizer's", low=0),
    "vocab_multiple": Key(
        1,
        "rows are padded to a multiple of it, which some products want; no probability goes to "
        "those that are no token's",
        low=1,
    ),
    "ids": Key(0, "rows that are tokens; 0: vocab_size before it was padded", low=0),
    "qk_norm": Key(
        "none",
        "rmsnorm: queries and keys have a root mean square of 1 in each head (before rotation)",
        choices=("none", "rmsnorm"),
    ),
    "window_layers": Key(
        "none",
        "blocks whose queries see all of model.window, the others half of it: all of them; the "
        "first, the one at a third and the last; or every fourth and the last",
        choices=("none", "all", "ends", "fourth"),
    ),
    "window": Key(
        1024, "keys that a query sees, itself included, in tokens", low=1, when=_WINDOWED
    ),
    "window_block": Key(
        1,
        "windows are cut to whole blocks of so many tokens: a query sees its own and those before",
        low=1,
        when=_WINDOWED,
    ),
    "window_growth": Key(
        "0",
        "over which windows grow in proportion from one block; evaluation takes them whole",
        duration=True,
        when=_WINDOWED,
    ),
    "skips": Key(
        "none",
        "unet: the stream after block l of the first half, times a scalar, enters block L - 1 - l",
        choices=("none", "unet"),
    ),
    "x0_mix": Key(
        "none",
        "learned: each block begins with a h + b x0 of the stream and the embedding; at first "
        "a = 1 and b = 0",
        choices=("none", "learned"),
    ),
    "embed_norm": Key(
        "none", "rmsnorm: the embedding has a root mean square of 1", choices=("none", "rmsnorm")
    ),
    "value_embeddings": Key(
        0,
        "tables whose rows are added to the values, in as many blocks at either end, by learned "
        "shares that begin at a half each",
        low=0,
    ),
    "attn_gate": Key(
        "none",
        "gates attention by act(x W) of the block's normalised input, for each head or each "
        "channel (Qiu et al. 2025), or by a free parameter for each channel",
        choices=("none", "headwise", "elementwise", "const"),
    ),
    "gate_place": Key(
        "sdpa",
        "what is gated: the heads' results, queries, keys, values, or the projected output",
        choices=("sdpa", "query", "key", "value", "output"),
        when=_GATED,
    ),
    "gate_activation": Key(
        "sigmoid",
        "ns_sigmoid: 0.5 + 0.5 sigmoid, which shuts nothing off",
        choices=("sigmoid", "ns_sigmoid"),
        when=_GATED,
    ),
    "gate_bias": Key(False, "a bias under the activation, 0 at first", when=_READING),
    "gate_bias_init": Key(
        0.0, "added to what the activation gets: 2.2 opens gates to 0.9", when=_GATED
    ),
    "gate_input": Key(
        "own",
        "earlier: a control whose gates read another, earlier position's input",
        choices=("own", "earlier"),
        when=_READING,
    ),
    "dropout": Key(0.0, "embedding, attention and residual dropout rate", low=0.0, high=0.9),
    "mask": Key(
        "causal",
        "document: attention does not cross document boundaries",
        choices=("causal", "document"),
    ),
    "dtype": Key(
        "float32",
        "compute type of products; parameters, norms, softmax and loss stay float32",
        choices=("float32", "bfloat16"),
    ),
    "matmul": Key(
        "dtype",
        "products of activations and block weights; fp8: float8 e4m3, their gradients e5m2, each "
        "tensor scaled by its largest entry, on GPUs that have it, and model.dtype elsewhere",
        choices=("dtype", "fp8"),
    ),
    "attention": Key(
        "auto",
        "auto: the fastest that can serve. plain: the definition. saved: keeps the probabilities "
        "for a hand-written backward. xla: jax.nn.dot_product_attention. cudnn: NVIDIA's. splash: "
        "JAX's for TPU",
        choices=("auto", "plain", "saved", "xla", "cudnn", "splash"),
    ),
    "stack": Key(
        "auto",
        "how the blocks run; auto: unrolled on CPU, scan on accelerators (compile time)",
        choices=("auto", "scan", "unroll"),
        identity=False,
    ),
    "remat": Key(
        "none",
        "what the backward pass recomputes: nothing, whole blocks, all but dense products",
        choices=("none", "block", "dots"),
        identity=False,
    ),
    "loss_chunk": Key(
        0,
        "tokens per chunk of the loss; 0: chunks only where the logits would exceed 256 MiB",
        low=0,
        identity=False,
    ),
}
