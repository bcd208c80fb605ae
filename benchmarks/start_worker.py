"""A training command that stops after its first step and says when each part of it was done.

What runs is `lmscale_jax.main` and below it, with marks put around some of its functions; the times
are wall-clock seconds as JSON in the last line. See start.py.
"""

import json
import os
import time

from lmscale_jax import cli, main
from lmscale_jax.train import run

MARKS = {}


def mark(name: str) -> None:
    MARKS[name] = time.time()


def watch() -> None:
    """Puts marks into run.train, and an end after the first step."""
    import jax

    from lmscale_jax.train import loop

    prepare, restore, make = run.build_run, loop.restore_or_begin, loop.TrainStep

    def marked_prepare(*arguments):
        mark("imports, devices")
        prepared = prepare(*arguments)
        mark("data and model")
        return prepared

    def marked_restore(prepared, checkpoints, say):
        mark("record, checkpoints")
        state = restore(prepared, checkpoints, say)
        jax.block_until_ready(state)
        mark("initial state")
        return state

    def marked_step(*arguments):
        program = make(*arguments)

        def first(state, batch, measure):
            mark("loop, first batch")
            compiled = program.lower(state, batch, measure=measure).compile()
            mark("step compiled")
            jax.block_until_ready(compiled(state, batch, program.hparams))
            mark("first step")
            kind = jax.devices()[0].device_kind
            message = MARKS | {"device": {"kind": kind, "count": jax.device_count()}}
            print("\n" + json.dumps(message), flush=True)
            # The run is not to go on, and its threads are not to be waited for.
            os._exit(0)

        return first

    run.build_run, loop.restore_or_begin, loop.TrainStep = (
        marked_prepare,
        marked_restore,
        marked_step,
    )


def timed() -> None:
    watch()
    main.main()


if __name__ == "__main__":
    cli.run_command(timed)
