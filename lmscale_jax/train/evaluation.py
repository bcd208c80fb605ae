"""Evaluates a finished or checkpointed run and writes eval.json beside run.json."""

from collections.abc import Callable
from pathlib import Path

from lmscale_jax.errors import InputError
from lmscale_jax.evals import suites
from lmscale_jax.files import read_json, write_json
from lmscale_jax.train.restore import load_run
from lmscale_jax.train.run_dir import provenance


def evaluate_run(
    workdir: Path,
    names: list[str],
    step: int,
    n_tokens: int,
    say: Callable[[str], None],
    folder: Path | None = None,
) -> Path:
    """Runs the suites of these names on a checkpoint of a run and writes eval.json.

    Args:
      workdir: of the run.
      names: of suites.
      step: of the checkpoint; 0: the newest.
      n_tokens: held-out tokens of the suites redundancy, mur and attention; 0: eval.tokens.
      say: prints a line.
      folder: for eval.json, made where it does not exist; None: `workdir`.

    Raises:
      InputError: there is no such run or checkpoint, or a suite cannot measure such a model; then
        nothing is written.
    """
    suites.check_suite_names(names)
    loaded = load_run(workdir, step)
    record, run = loaded.record, loaded.run
    suites.check_suite(names, run.config.model)
    status, last = record["status"], run.config.train.steps
    if status != "finished" or loaded.step != last:
        say(f"{workdir} is {status}: this is its checkpoint after step {loaded.step} of {last}")
    header = {
        "name": record["name"],
        "config_hash": record["config_hash"],
        "run_status": status,
        "step": loaded.step,
        "last_step": last,
        "complete": status == "finished" and loaded.step == last,
        "val_fingerprint": run.data.val_fingerprint,
        "versions": provenance()["versions"],
    }
    path = (folder or workdir) / "eval.json"
    earlier = _earlier_evaluation(path, header)
    trained = suites.TrainedModel(
        config=run.config,
        model=run.model,
        mesh=run.mesh,
        params=loaded.params,
        held_out=run.held_out,
        validate=run.validate,
    )
    scores = suites.run_suites(names, trained, n_tokens or run.config.eval.tokens, say)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, earlier | header | scores)
    return path


def _earlier_evaluation(path: Path, header: dict) -> dict:
    """Reads an earlier eval.json of the same checkpoint; one of another checkpoint is renamed."""
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
