"""Evaluates a run on its held-out tokens: python -m lmscale_jax.evaluate --workdir=runs/first

Writes eval.json beside run.json. For an unfinished run it takes the newest checkpoint and says so.
"""

from collections.abc import Callable
from pathlib import Path

from absl import flags

from lmscale_jax import cli
from lmscale_jax.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "directory of a run", required=True)
SUITES = flags.DEFINE_list(
    "suites", ["perplexity", "redundancy", "mur"], "what is evaluated: any of these, and attention"
)
STEP = flags.DEFINE_integer("step", 0, "checkpoint; 0: the newest", lower_bound=0)
TOKENS = flags.DEFINE_integer(
    "tokens", 0, "held-out tokens of redundancy and mur; 0: as eval.tokens", lower_bound=0
)


def main() -> None:
    names = ("perplexity", "redundancy", "mur", "attention")
    wrong = [name for name in SUITES.value if name not in names]
    if wrong or not SUITES.value:
        raise InputError(
            f"--suites={','.join(SUITES.value)}: {wrong or 'nothing'} is not a suite; "
            f"use --suites={','.join(names)}"
        )
    path = evaluate_run(Path(WORKDIR.value), SUITES.value, STEP.value, TOKENS.value, print)
    print(f"written              {path}")


def evaluate_run(
    workdir: Path, names: list[str], step: int, n_tokens: int, say: Callable[[str], None]
) -> Path:
    """Runs the suites of these names on a checkpoint of a run and writes eval.json.

    Args:
      workdir: of the run.
      names: of suites.
      step: of the checkpoint; 0: the newest.
      n_tokens: held-out tokens of redundancy, mur and attention; 0: as eval.tokens.
      say: prints a line.

    Raises:
      InputError: there is no such run or checkpoint, or a suite cannot measure such a model; then
        nothing is written.
    """
    from lmscale_jax.evals import suites
    from lmscale_jax.files import write_json
    from lmscale_jax.train.restore import load_run
    from lmscale_jax.train.run_dir import provenance

    loaded = load_run(workdir, step)
    record, setup = loaded.record, loaded.setup
    suites.check_suite(names, setup.config.model)
    status, last = record["status"], setup.config.train.steps
    if status != "finished" or loaded.step != last:
        say(f"{workdir} is {status}: this is its checkpoint after step {loaded.step} of {last}")
    header = {
        "name": record["name"],
        "config_hash": record["config_hash"],
        "run_status": status,
        "step": loaded.step,
        "last_step": last,
        "complete": status == "finished" and loaded.step == last,
        "val_fingerprint": setup.data.val_fingerprint,
        "versions": provenance()["versions"],
    }
    path = workdir / "eval.json"
    earlier = _earlier_evaluation(path, header)
    trained = suites.TrainedModel(
        config=setup.config,
        model=setup.model,
        mesh=setup.mesh,
        params=loaded.params,
        held_out=setup.held_out,
        validate=setup.validate,
    )
    scores = suites.run_suites(names, trained, n_tokens or setup.config.eval.tokens, say)
    write_json(path, earlier | header | scores)
    return path


def _earlier_evaluation(path: Path, header: dict) -> dict:
    """Reads an earlier eval.json of the same checkpoint; one of another checkpoint is renamed."""
    from lmscale_jax.files import read_json

    try:
        earlier = read_json(path)
        same = all(earlier[name] == header[name] for name in ("step", "config_hash"))
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not an evaluation of this project; move it away") from None
    if same:
        return earlier
    path.rename(path.with_name(f"eval_step_{earlier['step']}.json"))
    return {}


if __name__ == "__main__":
    cli.run_command(main)
