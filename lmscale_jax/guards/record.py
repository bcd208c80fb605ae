"""Keeps what guards said, in guards.json, and judges it by a ladder's settings.

A guard runs once for an arm's config, the baseline's and the code. What follows from a fault is
decided when the record is read, so that another setting needs no second run.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config.keys import keys
from lmscale_jax.config.ladder_keys import LADDER
from lmscale_jax.config.own_keys import adopted, code_values
from lmscale_jax.config.resolve import apply_overrides
from lmscale_jax.errors import InputError
from lmscale_jax.files import read_json, write_json
from lmscale_jax.guards import shrink
from lmscale_jax.guards.process import ArmRequest, check_in_process
from lmscale_jax.guards.table import GUARDS, action_of
from lmscale_jax.train.run_dir import package_hash

NAME = "guards.json"


class Judgement(NamedTuple):
    """What a guard's finding means for an arm.

    Attributes:
      guard, arm: their names.
      status: "passed", "warned", "refused" or "skipped".
      text: the finding in a sentence.
      seconds: it took; 0 where it did not run.
    """

    guard: str
    arm: str
    status: str
    text: str
    seconds: float


@functools.cache
def code_hash() -> str:
    """Hashes the package's source that trains, and the guards; 12 hex digits."""
    total = hashlib.sha256(package_hash().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def check_arms(
    configs: dict[str, ConfigDict],
    anchors: dict[str, ConfigDict],
    baseline: str | None,
    vocab_size: int,
    settings,
    path: Path,
    say: Callable[[str], None],
) -> list[Judgement]:
    """Runs the guards that this config and code have not passed through yet, and judges all.

    Args:
      configs: {arm: unresolved config of its smallest run}.
      anchors: {arm: unresolved config by which time and memory are measured}.
      baseline: the arm that the others are compared with; None: there is none.
      vocab_size: the tokenizer's.
      settings: a ladder's `guards` group.
      path: guards.json.
      say: prints a line.
    """
    record = _read(path)
    small, unfit = _shrunk(configs, vocab_size)
    wanted = [name for name in GUARDS if action_of(settings, name).runs]
    requests = []
    for arm, config in small.items():
        identity = _identity(config, small.get(baseline))
        entry = record["arms"].get(arm)
        if entry is None or entry["id"] != identity:
            entry = record["arms"][arm] = {"id": identity, "findings": {}}
        missing = [name for name in wanted if name not in entry["findings"]]
        anchor = anchors.get(arm)
        requests.append(
            ArmRequest(arm, config.to_dict(), anchor and anchor.to_dict(), vocab_size, missing)
        )
    for arm, why in unfit.items():
        nothing = {"fault": "", "note": "", "skipped": why, "seconds": 0.0}
        record["arms"][arm] = {"id": "", "findings": dict.fromkeys(wanted, nothing)}
    if any(request.guards for request in requests):
        say(f"checking {', '.join(small)} at a small size, about a minute ({path}):")
        for arm, findings in check_in_process(requests, baseline, say).items():
            record["arms"][arm]["findings"] |= findings
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record | {"code": code_hash()})
    return judgements(record, settings, list(configs))


def check_run(config: ConfigDict, path: Path, say: Callable[[str], None]) -> list[Judgement]:
    """Checks a single run; its baseline is the same run without the user's code.

    Raises InputError where a guard refuses it.
    """
    config, plain = adopted(config), dict(keys())
    arms, code = {"run": config}, code_values(config)
    if code:
        without = ConfigDict(config.to_dict() | {"own": {}})
        arms["baseline"] = apply_overrides(without, {name: plain[name].default for name in code})
    settings = {name: key.default for name, key in LADDER["guards"].items()}
    judged = check_arms(arms, {}, "baseline" if code else None, 0, settings, path, say)
    report(judged, say)
    return judged


def report(judged: list[Judgement], say: Callable[[str], None]) -> None:
    """Prints what was warned of or skipped. Raises InputError where an arm is refused."""
    for line in summary(judged):
        say(f"  {line}")
    refuse(judged)


def _read(path: Path) -> dict:
    """Reads guards.json; an empty record where it is missing. Raises InputError."""
    try:
        record = read_json(path)
        assert isinstance(record["arms"], dict)
        return record
    except FileNotFoundError:
        return {"arms": {}}
    except (ValueError, KeyError, TypeError, AssertionError):
        raise InputError(f"{path} is not a record of guards; delete it to run them anew") from None


def _shrunk(configs: dict, vocab_size: int) -> tuple[dict[str, ConfigDict], dict[str, str]]:
    """Returns the small configs, and {arm: why it has none}."""
    n_layers, small, unfit = shrink.blocks_needed(list(configs.values())), {}, {}
    for arm, config in configs.items():
        try:
            small[arm] = shrink.shrink(config, n_layers, vocab_size)
        except InputError as error:
            unfit[arm] = f"its config cannot be made small: {error}"
    return small, unfit


def _identity(config: ConfigDict, baseline: ConfigDict | None) -> str:
    both = [config.to_dict(), baseline and baseline.to_dict(), code_hash()]
    text = json.dumps(both, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def judgements(record: dict, settings, arms: list[str]) -> list[Judgement]:
    """Judges the findings of a record by the present settings, by guard and arm."""
    judged = []
    for guard in GUARDS:
        action = action_of(settings, guard)
        for arm in arms:
            finding = record["arms"].get(arm, {}).get("findings", {}).get(guard)
            if not action.runs or finding is None:
                why = f"config.guards.{guard}='skip'" if not action.runs else "not run"
                judged.append(Judgement(guard, arm, "skipped", why, 0.0))
                continue
            status, text = "passed", finding["note"]
            if finding["skipped"]:
                status, text = "skipped", finding["skipped"]
            elif finding["fault"]:
                status, text = "refused" if action.stops else "warned", finding["fault"]
            judged.append(Judgement(guard, arm, status, text, finding["seconds"]))
    return judged


def read_judgements(path: Path, settings, arms: list[str]) -> list[Judgement]:
    """Judges guards.json; [] where there is none."""
    return judgements(_read(path), settings, arms) if path.exists() else []


def refuse(judged: list[Judgement]) -> None:
    """Raises InputError where a guard refuses an arm."""
    refused = [each for each in judged if each.status == "refused"]
    if refused:
        first = refused[0]
        more = f" (and {len(refused) - 1} more in {NAME})" if len(refused) > 1 else ""
        raise InputError(
            f"arm {first.arm}: {first.text}{more}; or --config.guards.{first.guard}=warn"
        )


def summary(judged: list[Judgement]) -> list[str]:
    """Returns a line for each warning, and one for what was skipped."""
    lines = [f"arm {j.arm}: {j.text} (guard {j.guard})" for j in judged if j.status == "warned"]
    skipped: dict[str, list[str]] = {}
    for each in judged:
        if each.status == "skipped":
            skipped.setdefault(f"{each.guard}: {each.text}", []).append(each.arm)
    lines += [f"skipped {what} ({', '.join(arms)})" for what, arms in skipped.items()]
    return lines
