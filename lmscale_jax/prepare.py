"""Turns text into token shards.

python -m lmscale_jax.prepare --config=C                      prepares into the cache of training
python -m lmscale_jax.prepare --source=text --path='corpus/*.txt' --tokenizer=bpe --out=D
"""

from absl import flags

from lmscale_jax import cli

CONFIG = cli.config_flag(required=False, default="configs/base.py")
SOURCE = flags.DEFINE_string("source", None, "replaces config.data.source")
PATH = flags.DEFINE_string("path", None, "replaces config.data.path")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "replaces config.data.tokenizer")
OUT = cli.path_flag("out", "new or empty directory; default: the cache")


def main() -> None:
    from lmscale_jax.config.resolve import check_names, resolve
    from lmscale_jax.data import prepare

    config = CONFIG.value
    check_names(config)
    for name, flag in (("source", SOURCE), ("path", PATH), ("tokenizer", TOKENIZER)):
        if flag.value is not None:
            config.data[name] = flag.value
    config = resolve(config)
    if OUT.value:
        data = prepare.prepare_directory(config.data, OUT.value)
    else:
        data = prepare.prepare_data(config.data, config.model.vocab_size)
    for side, shards in (("training", data.train), ("validation", data.val)):
        print(f"{side:<12} {shards.n_tokens:>14,} tokens  in {len(shards.paths)} shard(s)")
    print(f"{'vocabulary':<12} {data.vocab_size:>14,} ids")
    print(f"{'directory':<12} {data.train.paths[0].parent}")


if __name__ == "__main__":
    cli.run_command(main)
