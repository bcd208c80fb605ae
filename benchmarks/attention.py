"""Time and memory of every attention kernel that serves here, by sequence length:

    python -m benchmarks.attention --lengths=256,512,1024,2048

Forward and backward, in turns within one process; memory is what the compiler counts for
temporaries. On a GPU or TPU take --dtype=bfloat16 and longer lengths.
"""

import statistics
import time

from absl import flags

from benchmarks import machine, tables
from lmscale_jax import cli
from lmscale_jax.errors import InputError

LENGTHS = flags.DEFINE_list("lengths", ["128", "256", "512", "1024"], "tokens of a sequence")
TOKENS = flags.DEFINE_integer("tokens", 4096, "tokens of a batch", lower_bound=128)
HEADS = flags.DEFINE_integer("heads", 4, "query and key heads", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "channels of a head", lower_bound=8)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the operands")
ROUNDS = flags.DEFINE_integer("rounds", 9, "turns", lower_bound=1)
SECONDS = flags.DEFINE_float("turn", 0.2, "least seconds of a turn", lower_bound=0.0)


def config_of(length: int):
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.configs import base

    config = base.get_config()
    model = config.model
    model.n_layers, model.n_heads, model.head_dim = 1, HEADS.value, HEAD_DIM.value
    model.d_model, model.vocab_size = HEADS.value * HEAD_DIM.value, 256
    model.dtype, config.data.seq_len = DTYPE.value, length
    return resolve(config)


def compiled(name: str, length: int, platform: str):
    """(the compiled gradient, its operands) of a kernel."""
    import jax
    import jax.numpy as jnp

    from lmscale_jax.model import build, kernels
    from lmscale_jax.model.sharding import ShardingContext

    config = config_of(length)
    batch = max(1, TOKENS.value // length)
    context = build.model_context(config, platform, ShardingContext())
    context = context.replace(batch=batch, length=length)
    shape = (batch, length, HEADS.value, HEAD_DIM.value)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, shape, jnp.dtype(DTYPE.value)) for key in keys]

    def loss(q, k, v):
        return kernels.KERNELS[name].attend(q, k, v, context).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile(), inputs


def rate(program, inputs) -> float:
    """Seconds of one call, over at least the time of a turn."""
    import jax

    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() - start < SECONDS.value:
        jax.block_until_ready(program(*inputs))
        done += 1
    return (time.perf_counter() - start) / done


def measure(length: int, platform: str) -> list[dict]:
    from lmscale_jax.model import kernels

    programs, rows = {}, []
    for name in kernels.KERNELS:
        setting = kernels.unsupported_setting(name, config_of(length), platform)
        if setting:
            print(f"{length}: {name} does not support {setting}", flush=True)
        else:
            programs[name] = compiled(name, length, platform)
    rounds = [{n: rate(*p) for n, p in programs.items()} for _ in range(ROUNDS.value)]
    for name, (program, _) in programs.items():
        seconds = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r["xla"] for r in rounds)
        memory = program.memory_analysis().temp_size_in_bytes
        rows.append({"length": length, "kernel": name, "ms": 1e3 * seconds, "over_xla": ratio,
                     "temporary_bytes": memory})  # fmt: skip
    return rows


def main() -> None:
    import jax

    from lmscale_jax.model import mesh

    lengths = []
    for text in LENGTHS.value:
        if not text.isdigit() or int(text) < 1:
            raise InputError(f"--lengths={','.join(LENGTHS.value)}: 128,256,512 would work")
        lengths.append(int(text))
    mesh.start_jax(config_of(lengths[0]))
    device = jax.devices()[0]
    result = machine.facts(None, machine.asked("tokens", "heads", "head_dim", "dtype", "rounds"))
    result |= {"device": device.device_kind, "rows": []}
    for length in lengths:
        result["rows"] += measure(length, device.platform)
        machine.save(f"attention_{device.platform}_{DTYPE.value}", result)
    print(f"\n{tables.headline(result)}\n\n{tables.attention(result)}")


if __name__ == "__main__":
    cli.run_command(main)
