"""Prints the summary of a finished run: losses, baselines, plots and sampled text."""

from collections.abc import Callable

import numpy as np

from lmscale_jax.errors import InputError
from lmscale_jax.evals import perplexity
from lmscale_jax.model import sampling
from lmscale_jax.reports import plots
from lmscale_jax.train import distributed


def show_final_summary(finished, say: Callable[[str], None] = print) -> None:
    """Adds baseline losses to the record, plots the run and prints its summary.

    All processes sample, since the model may be split over them; the first one prints.

    Args:
      finished: the result of training: the record, the run, its parameters.
      say: prints a line.
    """
    record, run, params = finished
    config, data = run.config, run.data
    sample = sample_text(run, params) if config.eval.sample else ""
    if not distributed.is_first():
        return
    if config.eval.baselines:
        scores = perplexity.baseline_losses(
            data.train, data.val, config.model.vocab_size, record["final"]["val_tokens"]
        )
        record.update(baselines=scores)
    for path in plots.draw_run(run.workdir):
        say(f"plot                 {path}")
    if config.eval.sample:
        say("sample\n" + indent(sample))
    say("")
    for name, value in (record["baselines"] if config.eval.baselines else {}).items():
        say(f"{name + ' model':<20} {value:.4f} nats/token, held out")
    final = record["final"]
    say(f"{'this run':<20} {perplexity.loss_text(final)}")
    if "val_loss_ema" in final:
        say(f"{'running mean':<20} {final['val_loss_ema']:.4f} nats/token, averaged weights")
    if final["bits_per_byte"] is not None:
        say(f"{'bits per byte':<20} {final['bits_per_byte']:.4f}")
    say(f"{'record and plots':<20} {run.workdir}/run.json, {run.workdir}/plots/")


def sample_text(run, params, n_tokens: int = 0, prompt: str = "", **options) -> str:
    """Samples text from the model; returns the prompt and its continuation.

    Args:
      n_tokens: tokens to add; 0: eval.sample of the config.
      prompt: text to continue; empty: a new document.
      options: further arguments of `sampling.sample`.
    """
    config, data = run.config, run.data
    ids = np.zeros(0, int)
    if prompt and not data.tokenizer:
        raise InputError(
            f"--prompt={prompt}: the run's data has no tokenizer to read it with; leave it empty"
        )
    if prompt:
        ids = data.tokenizer.encode_batch([prompt])[0]
    if data.boundary is not None:
        ids = np.concatenate([[data.boundary], ids])
    if not len(ids):
        ids = data.val.read(0, 1) if data.val.paths else [0]
    sampled = sampling.sample(
        run.model.logits,
        params,
        ids,
        n_tokens or config.eval.sample,
        length=config.data.seq_len,
        vocab_size=data.vocab_size,
        **options,
    )
    if data.tokenizer is None:
        return " ".join(map(str, sampled))
    return prompt + data.tokenizer.decode(sampled)


def indent(text: str) -> str:
    """Marks every line of a text as quoted."""
    return "\n".join("  | " + line for line in text.splitlines())
