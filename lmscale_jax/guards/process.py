"""Runs guards in a process of its own, on simulated CPU devices.

Its parent may hold an accelerator, or have one device; `check_in_process` starts it:

python -m lmscale_jax.guards.process --request=FILE.json --response=FILE.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.config import own_code
from lmscale_jax.config.own_keys import code_parts
from lmscale_jax.errors import RunFailed
from lmscale_jax.files import plain_values, write_json


class ArmRequest(NamedTuple):
    """An arm to be checked.

    Attributes:
      name: in config.arms.
      trained: its config at the small size, as a plain dict.
      anchor: the config of one of its anchors, or None.
      vocab_size: the tokenizer's.
      guards: names of those to run.
    """

    name: str
    trained: dict
    anchor: dict | None
    vocab_size: int
    guards: list[str]


def check_in_process(
    arms: list[ArmRequest], baseline: str | None, say: Callable[[str], None]
) -> dict[str, dict[str, dict]]:
    """Returns {arm: {guard: {"fault", "note", "skipped", "seconds"}}}.

    Args:
      arms: the baseline among them, with no guards where it needs none.
      baseline: name of that arm; None: there is none.
      say: prints a line for each guard.

    Raises:
      RunFailed: the process ended without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        request, response = Path(folder, "request.json"), Path(folder, "response.json")
        write_json(request, {"arms": [arm._asdict() for arm in arms], "baseline": baseline})
        for arm in arms:
            for config in filter(None, (arm.trained, arm.anchor)):
                own_code.save_sources(code_parts(ConfigDict(config)), Path(folder))
        command = [
            sys.executable, "-m", "lmscale_jax.guards.process", f"--request={request}",
            f"--response={response}", f"--trust_code={','.join(own_code.trusted_digests())}",
        ]  # fmt: skip
        # A file, as a pipe that nobody reads would stop the process when it is full.
        errors = Path(folder, "errors.txt")
        with open(errors, "w", encoding="utf-8") as errors_file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors_file,
                text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )  # fmt: skip
        try:
            for line in process.stdout:
                say(line.rstrip("\n"))
            process.wait()
        finally:
            process.kill()
        if process.returncode or not response.exists():
            text = errors.read_text(encoding="utf-8", errors="replace").strip()
            last = (text.splitlines() or ["no message"])[-1]
            raise RunFailed(
                f"the guards ended with status {process.returncode}: {last}; "
                f"--config.guards.mode=never trains without them"
            )
        return json.loads(response.read_text(encoding="utf-8"))


def answer(request: Path, response: Path) -> None:
    """Runs the guards of a request and writes their findings."""
    import jax

    from lmscale_jax.guards.arm import SmallArm
    from lmscale_jax.guards.table import GUARDS, run_guard
    from lmscale_jax.guards.variants import SIMULATED
    from lmscale_jax.model import mesh
    from lmscale_jax.train.watchdog import leave_with_parent

    leave_with_parent()
    own_code.look_in(request.parent)
    fields = json.loads(request.read_text(encoding="utf-8"))
    requests = [ArmRequest(**arm) for arm in fields["arms"]]
    mesh.start_jax(ConfigDict(requests[0].trained), SIMULATED)
    # Small programs that run for moments: to compile them takes most of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    arms = {
        each.name: SmallArm(
            each.name,
            ConfigDict(each.trained),
            each.anchor and ConfigDict(each.anchor),
            each.vocab_size,
        )
        for each in requests
    }
    baseline = arms.get(fields["baseline"])
    findings: dict[str, dict] = {each.name: {} for each in requests}
    for guard in GUARDS:
        wanted = [each.name for each in requests if guard in each.guards]
        begin = time.perf_counter()
        for name in wanted:
            start = time.perf_counter()
            finding = run_guard(guard, arms[name], baseline)
            seconds = round(time.perf_counter() - start, 2)
            findings[name][guard] = finding._asdict() | {"seconds": seconds}
        if wanted:
            print(_line(guard, findings, wanted, time.perf_counter() - begin), flush=True)
    write_json(response, plain_values(findings))


def _line(guard: str, findings: dict, names: list[str], seconds: float) -> str:
    """Sums up a guard in a line: which arms have a fault, or were not looked at."""
    words = {"fault": [], "skipped": []}
    for name in names:
        for kind, arms in words.items():
            if findings[name][guard][kind]:
                arms.append(name)
    faults, skipped = words["fault"], words["skipped"]
    result = f"FAULT in {', '.join(faults)}" if faults else "passed"
    if len(skipped) == len(names):
        result = "skipped"
    elif skipped:
        result += f" (skipped: {', '.join(skipped)})"
    return f"  {guard:<13} {seconds:5.1f} s  {result}"


if __name__ == "__main__":
    from lmscale_jax import cli

    REQUEST = cli.path_flag("request", "JSON file with the arms", required=True)
    RESPONSE = cli.path_flag("response", "JSON file that is written", required=True)
    cli.trust_flag()
    cli.run_command(lambda: answer(REQUEST.value, RESPONSE.value))
