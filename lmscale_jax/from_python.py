"""The functions of `import lmscale_jax as lm`: what the commands do, for programs and notebooks.

Each does its work in this process and prints what its command prints; docs/python.md shows them in
use. Bad input raises InputError, work that fails RunFailed, and Ctrl-C KeyboardInterrupt after the
run has been saved.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from lmscale_jax import cli
from lmscale_jax.config import own_code
from lmscale_jax.config.resolve import hint, validate
from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json, user_path

Say = Callable[[str], None]


def load_config(file: str | Path, changes: dict | None = None) -> ConfigDict:
    """Reads a config file, as --config=FILE.py[:ARG] does.

    Args:
      file: a path; configs/NAME.py is a shipped one where there is none of that name here.
      changes: {dotted key: value}, as --config.KEY=VALUE.

    Raises InputError where the file or a key does not exist.
    """
    loaded, fault = cli.load_config(cli.find_config(str(file)))
    if loaded is None:
        raise InputError(fault)
    paths = list(cli.config_paths(loaded))
    for path, value in (changes or {}).items():
        if path not in paths:
            raise InputError(f"config.{path} is not a key; {hint(path, paths)}")
        with loaded.ignore_type():  # `validate` names a wrong type in one line
            loaded.update_from_flattened_dict({path: value})
    cli.settle_unused(loaded, changes or {})
    return loaded


def train(config: ConfigDict, workdir: str | Path, say: Say = print) -> dict:
    """Trains a run, from its last checkpoint if it has one, and returns its record (run.json)."""
    from lmscale_jax.config.own_keys import adopted
    from lmscale_jax.model import mesh
    from lmscale_jax.reports.final_summary import show_final_summary
    from lmscale_jax.train import loop, run_dir

    config = adopted(config)
    validate(config)
    mesh.start_jax(config)
    with _interruptible():
        if finished := loop.train(config, user_path(str(workdir)), say):
            show_final_summary(finished, say)
    return run_dir.read_record(user_path(str(workdir)))


def ladder(
    config: ConfigDict,
    workdir: str | Path,
    only: Sequence[str] = (),
    allow_code_change: str = "",
    say: Say = print,
) -> dict | None:
    """Trains and judges a ladder, or goes on with it, and returns its verdict (verdict.json).

    Its runs are processes, as those of the command. Where this process holds an accelerator, which
    they could not share, executor.name="local" becomes "here".

    Args:
      only: terms that select cells to train, as --only does; then the result is None.
      allow_code_change: why runs that other code of this package trained are comparable.
    """
    from lmscale_jax.ladders import machine, run
    from lmscale_jax.reports.ladder_report import write_ladder_report

    folder = user_path(str(workdir))
    if config.executor.name == "local" and machine.holds_accelerator():
        config = ConfigDict(config.to_dict())
        config.executor.name = "here"
    repeat = f'lmscale_jax.ladder(config, workdir="{workdir}")  # config: the one in plan.json'
    with _interruptible():
        message = run.run_ladder(
            config,
            folder,
            only=list(only),
            until="verdict",
            write_report=functools.partial(write_ladder_report, command=repeat),
            say=say,
            code_change=allow_code_change,
        )
    say(message)
    return None if only else read_json(folder / "verdict.json")


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A trained run that was read back.

    Attributes:
      record: run.json.
      config: resolved, with durations in steps.
      step: of the checkpoint.
      params: nested dict of arrays, those to evaluate.
      tokenizer: has `encode_batch(texts)` and `decode(ids)`; None for bare shards of tokens.
    """

    record: dict
    config: ConfigDict
    step: int
    params: dict
    tokenizer: object
    _run: object

    @functools.cached_property
    def _logits(self) -> Callable:
        import jax

        return jax.jit(self._run.model.logits)

    def apply(self, tokens):
        """Computes the logits [B, T, V] of tokens [B, T], the next token's at each position.

        V is model.vocab_size; rows that only pad the vocabulary have -inf.
        """
        import jax.numpy as jnp

        return self._logits(self.params, jnp.asarray(tokens))

    def generate(self, prompt: str = "", tokens: int = 200, **options) -> str:
        """Continues a prompt by so many tokens; empty: a new document.

        `options` are temperature (0.8; 0: the likeliest token), top_k (50; 0: all) and seed (0).
        """
        from lmscale_jax.reports.final_summary import sample_text

        options = {"temperature": 0.8, "top_k": 50, "seed": 0} | options
        return sample_text(self._run, self.params, tokens, prompt, **options)


def load(workdir: str | Path, step: int = 0, trust_code: Sequence[str] = ()) -> TrainedRun:
    """Reads a run and the parameters of a checkpoint, by default the newest.

    `trust_code` are hashes of code in the run's directory that may be executed, as --trust_code.
    """
    from lmscale_jax.train import restore

    own_code.trust(trust_code)
    r = restore.load_run(user_path(str(workdir)), step)
    return TrainedRun(r.record, r.run.config, r.step, r.params, r.run.data.tokenizer, r.run)


def evaluate(
    workdir: str | Path,
    suites: Sequence[str] = ("perplexity", "redundancy", "mur"),
    step: int = 0,
    tokens: int = 0,
    trust_code: Sequence[str] = (),
    say: Say = print,
) -> dict:
    """Measures a run on held-out tokens; writes eval.json beside run.json and returns it.

    Args:
      suites: any of these, and "attention".
      step: of the checkpoint; 0: the newest.
      tokens: held-out tokens of all suites but perplexity; 0: as eval.tokens.
      trust_code: as `load` takes it.
    """
    from lmscale_jax.train.evaluation import evaluate_run

    own_code.trust(trust_code)
    return read_json(evaluate_run(user_path(str(workdir)), list(suites), step, tokens, say))


def report(workdir: str | Path) -> Path:
    """Writes the page of a run and its figures to report/ in its directory; returns its path."""
    from lmscale_jax.reports import pairs, run_report

    folder = user_path(str(workdir))
    return run_report.report_run(pairs.read_run(folder), folder / "report")


def results(workdir: str | Path) -> list[dict]:
    """Lists the runs of a ladder as rows of its results.csv, or the run of a directory as one row.

    `pandas.DataFrame(lm.results(workdir))` is a table of them.
    """
    from lmscale_jax.ladders import plan, results
    from lmscale_jax.train import run_dir

    folder = user_path(str(workdir))
    if ladder_plan := plan.read_plan(folder):
        rows = results.result_rows(ladder_plan, folder)
        return [{k: v for k, v in row.items() if k != "tune"} | row["tune"] for row in rows]
    return [{"run_id": folder.name} | results.record_columns(run_dir.read_record(folder))]


def metrics(workdir: str | Path) -> dict[str, list]:
    """Returns the columns of a run's metrics.jsonl; None where a line lacks the value."""
    from lmscale_jax.train import run_dir
    from lmscale_jax.train.metrics import read_metrics

    folder = user_path(str(workdir))
    run_dir.read_record(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    return {
        name: [x.get(name) for x in lines] for name in dict.fromkeys(k for x in lines for k in x)
    }


def coord_check(
    config: ConfigDict,
    workdir: str | Path,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    seeds: int = 3,
    control: str = "none",
    say: Say = print,
) -> dict:
    """Checks that activations keep their size over widths; returns coord_check.json.

    Its `passed` is False where a slope is out of bounds, as it must be with a `control`.
    """
    from lmscale_jax.model import mesh
    from lmscale_jax.reports.sweep_plots import draw_coord_check
    from lmscale_jax.sweeps import coord_check

    folder = user_path(str(workdir))
    sizes = coord_check.plan_sizes(config, "width", sorted(set(widths)), control)
    mesh.start_jax(config)
    result = coord_check.check_coordinates(sizes, seeds, folder, say)
    draw_coord_check(result, folder / "coord_check.png")
    return result


def explain(config: ConfigDict, topology: str = "", say: Say = print) -> None:
    """Prints what a run would do, here or on other chips ("H100:8"); trains nothing."""
    from lmscale_jax.train import explain

    explain.explain(config, {}, "", say, topology)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turns the exits of a command that a signal stopped into KeyboardInterrupt."""
    from lmscale_jax.ladders.scheduler import Interrupted

    try:
        yield
    except (SystemExit, Interrupted) as stop:
        raise KeyboardInterrupt("stopped; the same call goes on from there") from stop
