"""Converts weights of GPT-2 and Llama from and to Hugging Face's format:

python -m lmscale_jax.convert --from_hf=DIR --workdir=W [--config=C]
python -m lmscale_jax.convert --workdir=W --to_hf=DIR

A config names the data on which the imported model is evaluated; the model's own shape and
tokenizer replace those of the config. Without a config nothing is evaluated.
"""

from lmscale_jax import cli
from lmscale_jax.errors import InputError

CONFIG = cli.config_flag(required=False, default="configs/base.py")
WORKDIR = cli.path_flag("workdir", "directory of a run, or a new one")
FROM = cli.path_flag("from_hf", "directory with config.json and safetensors")
TO = cli.path_flag("to_hf", "new directory for transformers to load")
cli.trust_flag()


def main() -> None:
    if not WORKDIR.value or bool(FROM.value) == bool(TO.value):
        raise InputError(
            "convert needs --workdir and either --from_hf or --to_hf; "
            "use --workdir=runs/first --to_hf=exported"
        )
    if TO.value:
        from lmscale_jax.model import hf
        from lmscale_jax.model.parametrization import multiplied_params
        from lmscale_jax.train import restore

        loaded = restore.load_run(WORKDIR.value)
        # What the forward pass reads.
        params = multiplied_params(loaded.run.model.param_rules, loaded.params)
        hf.write_hf(TO.value, loaded.run.config, params)
        restore.copy_tokenizer(loaded.run.config.data, TO.value)
        print(f"written {TO.value}, from the checkpoint after step {loaded.step}")
        return
    from lmscale_jax.config.resolve import check_names
    from lmscale_jax.train import restore

    named = CONFIG.present or cli.overrides()
    if named:
        check_names(CONFIG.value)
    config = CONFIG.value if named else None
    record = restore.import_run(config, FROM.value, WORKDIR.value, print)
    loss = record["final"]["val_loss"]
    outcome = (
        "not evaluated, since no data is named; use --config=configs/base.py or another with data"
        if loss is None
        else f"held-out loss {loss:.4f} nats/token"
    )
    print(f"written {WORKDIR.value}: {outcome}")


if __name__ == "__main__":
    cli.run_command(main)
