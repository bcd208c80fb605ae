"""nanoGPT's documented run on a CPU: a small character-level model of Shakespeare's plays.

    python -m lmscale_jax.main --config=configs/nanogpt_char.py \
        --config.data.path=FOLDER/input.txt --workdir=runs/nanogpt_char

The options of its README's CPU example on top of its train_shakespeare_char configuration;
nanoGPT reports a validation loss of 1.88 nats per character.
"""

from lmscale_jax.configs.base import get_config as base


def get_config():
    config = base()
    data, model, optim = config.data, config.model, config.optim
    # The usual file name of tiny Shakespeare. Without such a file the run ends with an error that
    # asks for data.path.
    data.source, data.path = "text", "input.txt"
    data.tokenizer = "char"
    data.split, data.val_fraction = "tail", 0.1
    data.seq_len = 64

    model.n_layers, model.n_heads, model.d_model = 4, 4, 128
    model.gelu = "erf"

    config.train.steps, config.train.batch_size = 2000, 12
    optim.lr, config.schedule.final = 1e-3, 0.1
    config.schedule.warmup = "100"
    # A token is seen in few batches of 768, so the second moment needs the longer memory.
    optim.beta2 = 0.99
    # PyTorch's AdamW, on every matrix, embeddings included (decay_on="matrices").
    optim.weight_decay, optim.decay_mode = 0.1, "coupled"

    # The whole held-out text, about 110,000 characters: no sampling error between evaluations.
    config.eval.tokens = 0
    config.eval.batch_size = 96
    return config
