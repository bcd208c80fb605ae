"""The groups `optim`, `schedule` and `freeze` of the specification in configs/base.py."""

from configs.key import Key

_MUON = {"optim.name": ("muon", "normuon")}
_MOMENTS = {"optim.name": ("adamw", "lion", "muon", "normuon")}
_DRAWN = {"freeze.mode": ("random", "random_near_input")}

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
