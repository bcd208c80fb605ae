"""A run that was killed, stopped, damaged or moved ends like one that was left alone."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATHS, ROOT, finish, flags, record, start_program, start_training, wait_until

STEPS = {"train__steps": 40, "checkpoint__every": 5, "eval__every": 10}


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, read without any of our code."""
    import jax
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    reader, path = ocp.PyTreeCheckpointer(), workdir / "checkpoints" / str(step) / "params"
    shapes = reader.metadata(path).item_metadata.tree
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = reader.restore(path, restore_args=arrays)
    flat, stack = {}, [("", tree)]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, dict):
            stack += [(f"{prefix}/{name}", child) for name, child in node.items()]
        else:
            flat[prefix] = np.asarray(node)
    return flat


def same(a: Path, b: Path) -> None:
    """The same parameters to the bit, and the same metrics."""
    ours, theirs = parameters(a), parameters(b)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name in ours:
        assert np.array_equal(ours[name].view(np.uint32), theirs[name].view(np.uint32)), name
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert record(a)["final"] == record(b)["final"]


LEFT_BEHIND = """
import asyncio, sys
from pathlib import Path
from lmscale_jax.train.checkpoint import Checkpoints
Checkpoints(Path(sys.argv[1])).manager
source = '''
async def read():
    try:
        await asyncio.Future(loop=loop)
    finally:
        raise ValueError("cannot read " + __name__)
'''
loop = asyncio.new_event_loop()
for name in ("orbax", "other"):
    names = {"asyncio": asyncio, "loop": loop, "__name__": name}
    exec(compile(source, name + "/serialization.py", "exec"), names)
    names["read"]().send(None)  # dropped while it waits, so closed by Python
for text in ("Event loop is closed", "other loop"):
    sys.excepthook(RuntimeError, RuntimeError(text), None)
"""


def test_reads_that_orbax_left_behind_are_not_shown(tmp_path):
    program = [sys.executable, "-c", LEFT_BEHIND, str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot read other" in done.stderr and "other loop" in done.stderr
    assert "orbax" not in done.stderr and "Event loop" not in done.stderr


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    named = {k.replace("__", "."): v for k, v in STEPS.items()}
    process = start_training(
        "--config=configs/base.py", f"--workdir={workdir}", *flags(settings | named)
    )
    status, _out, err = finish(process)
    assert status == 0, err
    return workdir


@pytest.mark.slow
def test_killed_five_times_at_random_moments(train, undisturbed, tmp_path):
    workdir, chance = tmp_path / "killed", random.Random(0)
    metrics = workdir / "metrics.jsonl"

    def lines() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    kills = 0
    for goal in sorted(chance.sample(range(1, 19), 5)):
        process = train(workdir, **STEPS)
        wait_until(lambda goal=goal: lines() >= goal, process)
        # Then somewhere inside the next steps, an evaluation or the writing of a checkpoint.
        try:
            process.wait(chance.uniform(0, 0.2))
        except subprocess.TimeoutExpired:
            process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills >= 4
    status, _, err = finish(train(workdir, **STEPS))
    assert status == 0, err
    same(workdir, undisturbed)


def test_sigterm_saves_and_leaves(train, undisturbed, tmp_path):
    workdir = tmp_path / "stopped"
    process = train(workdir, **STEPS)
    wait_until(lambda: (workdir / "metrics.jsonl").exists(), process)
    wait_until(lambda: len((workdir / "metrics.jsonl").read_text()) > 0, process)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert status == 128 + signal.SIGTERM, (out, err)
    assert "stopped by SIGTERM" in out and "goes on from there" in out
    assert record(workdir)["status"] == "running"
    status, out, err = finish(train(workdir, **STEPS))
    assert status == 0 and "going on from step" in out, err
    same(workdir, undisturbed)


NEVER_SAVED = """
import runpy, sys, time
from pathlib import Path
from lmscale_jax.train.checkpoint import Checkpoints
save = Checkpoints.save
def save_part(self, step, state, host):
    if step == 5:
        return save(self, step, state, host)
    part = Path(self._directory, f"{step}.orbax-checkpoint-tmp")
    part.mkdir()
    Path(part, "part").write_text("some")
    print("saving", flush=True)
    time.sleep(600)
Checkpoints.save = save_part
sys.argv[0] = "tests/train_without_plots.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WAITING_LADDER = """
import time
from types import SimpleNamespace
from lmscale_jax.ladders import scheduler
stage = object.__new__(scheduler._Stage)
stage._check_losses = lambda: None
stage._waiting, stage._n_running, stage._say = [], 1, lambda text: print(text, flush=True)
stage._progress = SimpleNamespace(show=lambda: print("ready", flush=True), close=lambda: None)
stage._executor = SimpleNamespace(
    poll=lambda: [], submit=lambda jobs: jobs, stop=lambda: time.sleep(600)
)
stage.train(0.05)
"""
BUSY_COMMAND = """
import signal, time
from lmscale_jax import cli
# Of a test in the background the shell ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
def main():
    print("ready", flush=True)
    time.sleep(600)
cli.run_command(main)
"""


def wait_for_line(process, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_a_second_signal_ends_a_run_that_saves(settings, train, undisturbed, tmp_path):
    """At once, with the one line of the first; the checkpoint before serves."""
    workdir = tmp_path / "twice"
    named = {k.replace("__", "."): v for k, v in STEPS.items()}
    arguments = ["--config=configs/base.py", f"--workdir={workdir}", *flags(settings | named)]
    process = start_program(["-c", NEVER_SAVED], *arguments, PYTHONPATH=PATHS)
    wait_until(lambda: (workdir / "checkpoints" / "5").exists(), process)
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "saving")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert err.count("\n") == 1 and "SIGINT: stops after this step" in err, err
    status, out, err = finish(train(workdir, **STEPS))
    assert status == 0 and "going on from step 5" in out, (out, err)
    same(workdir, undisturbed)


def test_a_second_signal_ends_a_ladder_that_waits():
    process = start_program(["-c", WAITING_LADDER])
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "SIGINT: waiting for the runs to save; once more ends all at once")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (-signal.SIGTERM, "")


def test_ctrl_c_ends_any_command_in_one_line():
    process = start_program(["-c", BUSY_COMMAND])
    wait_for_line(process, "ready")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "damage",
    ["truncated", *(pytest.param(d, marks=pytest.mark.slow) for d in ("flipped", "emptied"))],
)
def test_falls_back_from_a_damaged_checkpoint(train, undisturbed, tmp_path, damage):
    workdir = tmp_path / "damaged"
    process = train(workdir, **STEPS, checkpoint__keep=3)
    wait_until(lambda: (workdir / "checkpoints" / "20").exists(), process)
    process.kill()
    process.communicate()
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    newest = workdir / "checkpoints" / str(saved[-1])
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = b""
    victim.write_bytes(content)
    status, out, err = finish(train(workdir, **STEPS, checkpoint__keep=3))
    assert status == 0, err
    assert f"checkpoint {saved[-1]} cannot be read" in out
    assert (workdir / "checkpoints_unreadable" / str(saved[-1])).is_dir()
    same(workdir, undisturbed)


@pytest.mark.slow
def test_continues_on_another_number_of_devices(train, undisturbed, tmp_path):
    workdir = tmp_path / "moved"
    process = train(workdir, **STEPS)
    wait_until(lambda: (workdir / "checkpoints" / "10").exists(), process)
    process.kill()
    process.communicate()
    meshes = {"mesh__cpu_devices": 4, "mesh__fsdp": 2, "mesh__tensor": 2}
    status, out, err = finish(train(workdir, **STEPS, **meshes))
    assert status == 0 and "going on from step" in out, err
    ours, theirs = record(workdir)["final"], record(undisturbed)["final"]
    assert abs(ours["val_loss"] - theirs["val_loss"]) < 1e-5
    assert ours["val_tokens"] == theirs["val_tokens"]


def test_second_process_refuses(train, tmp_path):
    workdir = tmp_path / "shared"
    first = train(workdir, train__steps=2000)
    wait_until(lambda: (workdir / "run.json").exists(), first)
    status, _out, err = finish(train(workdir, train__steps=2000))
    first.kill()
    first.communicate()
    assert status == 2 and "in use by process" in err and err.count("\n") == 1


def test_finished_run_is_left_alone(train, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    status, out, err = finish(train(undisturbed, **STEPS))
    assert status == 0 and "is finished" in out, err
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}


def test_another_config_is_refused(train, undisturbed):
    status, _out, err = finish(train(undisturbed, **STEPS, optim__lr=0.5))
    assert status == 2 and err.count("\n") == 1
    assert "optim.lr is 0.001 there and 0.5 here" in err


def test_full_disk_leaves_the_earlier_checkpoint(settings, undisturbed, tmp_path):
    """Files above a size fail to be written, as on a full disk; then there is room again."""
    from conftest import flags

    workdir = tmp_path / "full"
    named = {k.replace("__", "."): v for k, v in STEPS.items()}
    command = [sys.executable, "-m", "lmscale_jax.main", "--config=configs/base.py"]
    command += [f"--workdir={workdir}", *flags(settings | named)]

    def attempt(*prefix):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return finish(subprocess.Popen([*prefix, *command], cwd=ROOT, text=True, **pipes))

    status, out, err = attempt("bash", "-c", 'ulimit -f 40; exec "$0" "$@"')
    assert status == 1, (out, err)
    assert "checkpoint 5 could not be written" in out
    # Threads of the storage library that were cut off may write lines of their own around ours.
    assert err.count("error: checkpoint 40 could not be written") == 1
    assert record(workdir)["status"] == "failed"
    status, out, err = attempt()
    assert status == 0, err
    same(workdir, undisturbed)
