"""Converts weights of GPT-2 and Llama from and to Hugging Face's format:

python -m lmscale_jax.convert --from_hf=DIR --workdir=W --config=C    then: evaluate --workdir=W
python -m lmscale_jax.convert --workdir=W --to_hf=DIR

The config names the data on which the imported model is evaluated; its `model` group is replaced.
"""

from lmscale_jax import cli
from lmscale_jax.errors import InputError

CONFIG = cli.config_flag(required=False, default="configs/base.py")
WORKDIR = cli.path_flag("workdir", "directory of a run, or a new one")
FROM = cli.path_flag("from_hf", "directory with config.json and safetensors")
TO = cli.path_flag("to_hf", "new directory for transformers to load")


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
        print(f"written {TO.value}, from the checkpoint after step {loaded.step}")
        return
    from lmscale_jax.train import restore

    record = restore.import_run(CONFIG.value, FROM.value, WORKDIR.value, print)
    print(f"written {WORKDIR.value}: held-out loss {record['final']['val_loss']:.4f} nats/token")


if __name__ == "__main__":
    cli.run_command(main)
