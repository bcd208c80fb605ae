"""Trains one run: python -m lmscale_jax.main --config=configs/quickstart.py --workdir=runs/first"""

from absl import flags

from lmscale_jax import __version__, cli
from lmscale_jax.errors import InputError

CONFIG = cli.config_flag()
WORKDIR = cli.path_flag("workdir", "directory of the run; continues an unfinished one")
CLUSTER = flags.DEFINE_enum(
    "cluster",
    "none",
    ["none", "slurm", "tpu", "hosts"],
    "scheduler that starts the processes (launch/README.md); none: a single process",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; for hosts")
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "number of processes; for hosts", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "from 0; for hosts", lower_bound=0)
EXPLAIN = flags.DEFINE_bool("explain", False, "print what the run would do, and why, and exit")
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "with --explain: chips that the run would use, as v5e:4x4 or H100:64"
)


def main() -> None:
    if TOPOLOGY.value and not EXPLAIN.value:
        raise InputError(
            f"--topology={TOPOLOGY.value} describes chips of another machine; use it with --explain"
        )
    if EXPLAIN.value:
        from lmscale_jax.train.explain import explain

        explain(CONFIG.value, cli.overrides(), cli.config_file(), topology=TOPOLOGY.value)
        return
    if not WORKDIR.value:
        raise InputError("--workdir is missing; use --workdir=runs/first")
    from lmscale_jax.config.own_keys import adopted
    from lmscale_jax.config.resolve import fingerprint, validate
    from lmscale_jax.model import mesh
    from lmscale_jax.train import distributed

    config = adopted(CONFIG.value)
    validate(config)
    launch = distributed.Launch(
        CLUSTER.value, COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    )
    # The number of processes that share a host's cores is unknown before they join.
    mesh.start_jax(config, cpu_devices=0 if launch.cluster == "none" else 1)
    shared_facts = {"config": fingerprint(config), "lmscale_jax": __version__}
    with distributed.join_processes(launch, config, shared_facts):
        from lmscale_jax.train.loop import train

        finished = train(config, WORKDIR.value)
        if finished:
            from lmscale_jax.reports import final_summary

            final_summary.show_final_summary(finished)


if __name__ == "__main__":
    cli.run_command(main)
