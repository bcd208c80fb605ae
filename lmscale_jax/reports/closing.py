"""What a person sees when a run ends: its loss beside simple baselines, plots, and a sample."""

from collections.abc import Callable

import numpy as np

from lmscale_jax.evals import baselines
from lmscale_jax.model import sampling
from lmscale_jax.reports import plots
from lmscale_jax.run import cluster


def show(finished, say: Callable[[str], None] = print) -> None:
    """Adds the baselines to the record, draws the plots and prints the last lines of a run.

    Of several processes all make the sample, and the first one shows it.
    """
    run, setup, params = finished
    config, data = setup.config, setup.data
    sample = continued(setup, params) if config.eval.sample else ""
    if not cluster.is_first():
        return
    if config.eval.baselines:
        scores = baselines.losses(
            data.train, data.val, config.model.vocab_size, run["final"]["val_tokens"]
        )
        run.update(baselines=scores)
    for path in plots.draw(setup.workdir):
        say(f"plot                 {path}")
    if config.eval.sample:
        say("sample\n" + indent(sample))
    say("")
    for name, value in (run["baselines"] if config.eval.baselines else {}).items():
        say(f"{name + ' model':<20} {value:.4f} nats/token, held out")
    final = run["final"]
    say(
        f"{'this run':<20} {final['val_loss']:.4f} ± {final['val_loss_sem'] or 0:.4f} nats/token, "
        f"held out ({final['val_tokens']:,} tokens)"
    )
    if "val_loss_ema" in final:
        say(f"{'running mean':<20} {final['val_loss_ema']:.4f} nats/token, of the weights")
    if final["bits_per_byte"] is not None:
        say(f"{'bits per byte':<20} {final['bits_per_byte']:.4f}")
    say(f"{'record and plots':<20} {setup.workdir}/run.json, {setup.workdir}/plots/")


def continued(setup, params, n_tokens: int = 0, prompt: str = "", **how) -> str:
    """A prompt and its continuation; without one, the model begins a document of its own."""
    config, data = setup.config, setup.data
    ids = (
        data.tokenizer.encode_batch([prompt])[0] if prompt and data.tokenizer else np.zeros(0, int)
    )
    if data.boundary is not None:
        ids = np.concatenate([[data.boundary], ids])
    if not len(ids):
        ids = data.val.read(0, 1)
    new = sampling.sample(
        setup.model.logits,
        params,
        ids,
        n_tokens or config.eval.sample,
        length=config.data.seq_len,
        vocab_size=data.vocab_size,
        **how,
    )
    if data.tokenizer is None:
        return " ".join(map(str, new))
    return prompt + data.tokenizer.decode(new)


def indent(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
