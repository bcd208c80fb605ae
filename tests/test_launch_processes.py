"""What the scripts of launch/ do with processes, and with how they end.

Schedulers are stand-ins here, small programs on PATH that note how they were called; so are the
processes that local_multiprocess.sh starts, as its own work needs no JAX.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, wait_until

LAUNCH = ROOT / "launch"
on_linux = pytest.mark.skipif(
    not (shutil.which("setsid") and shutil.which("setpriv")), reason="needs util-linux"
)

# In place of Python with lmscale_jax: it prints its arguments, and does what --act asks for.
STAND_IN = """#!{python}
import json, os, pathlib, signal, subprocess, sys, time

arguments = dict(a[2:].split("=", 1) for a in sys.argv if a.startswith("--"))
me, act = int(arguments["process_id"]), arguments.get("act", "end")
print(json.dumps(sys.argv[1:]), flush=True)


def save(*_):
    print("asked", flush=True)
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(143)


signal.signal(signal.SIGTERM, signal.SIG_IGN if act == "refuse" else save)
if act == "leave":
    # A reader that nothing ends when its process dies.
    left = subprocess.Popen(["sleep", "300"], stdout=subprocess.DEVNULL)
    (pathlib.Path("{folder}") / f"left-{{me}}").write_text(str(left.pid))
(pathlib.Path("{folder}") / f"ready-{{me}}").write_text(str(os.getpid()))
if act == "fail":
    time.sleep(0 if me == 1 else 1)
    print("left", flush=True)
    sys.exit(7 if me == 1 else 1)
if act in ("wait", "refuse"):
    while True:
        time.sleep(0.1)
"""


def default_signals() -> None:
    """What is ignored is ignored by children too, and a shell cannot trap it: tests that were
    started by nohup, or in the background of a script, ignore some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Local:
    """Starts local_multiprocess.sh with stand-ins, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.logs = folder, folder / "the logs"
        self.stand_in = program(
            folder / "stand-in", STAND_IN.format(python=sys.executable, folder=folder)
        )
        self.started: list[subprocess.Popen] = []

    def start(self, *arguments) -> subprocess.Popen:
        process = subprocess.Popen(
            [LAUNCH / "local_multiprocess.sh", *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | {"PYTHON": str(self.stand_in), "LOGS": str(self.logs)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=default_signals,
        )
        self.started.append(process)
        return process

    def run(self, *arguments) -> tuple[int, str, str]:
        return self.finish(self.start(*arguments))

    def finish(self, process) -> tuple[int, str, str]:
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def ready(self, count: int) -> list[int]:
        """Ids of the processes, once all of them are there."""
        files = [self.folder / f"ready-{i}" for i in range(count)]
        wait_until(lambda: all(f.exists() and f.read_text() for f in files), self.started[-1])
        return [int(f.read_text()) for f in files]

    def log(self, i: int) -> list[str]:
        return (self.logs / f"process-{i}.log").read_text().splitlines()

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
        for file in [*self.folder.glob("ready-*"), *self.folder.glob("left-*")]:
            if alive(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and whose parent has not asked yet does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def arguments_in(line: str) -> dict:
    return dict(a[2:].split("=", 1) for a in json.loads(line) if a.startswith("--"))


@pytest.fixture
def local(tmp_path):
    launcher = Local(tmp_path)
    yield launcher
    launcher.end()


# --- local_multiprocess.sh


def test_processes_are_numbered_and_meet_at_one_port(local):
    status, _, err = local.run(3, "--config=C", "--workdir=W")
    assert (status, err) == (0, "")
    each = [arguments_in(local.log(i)[0]) for i in range(3)]
    assert [e["process_id"] for e in each] == ["0", "1", "2"]
    assert {e["num_processes"] for e in each} == {"3"}
    assert {e["cluster"] for e in each} == {"hosts"}
    (coordinator,) = {e["coordinator"] for e in each}
    host, port = coordinator.split(":")
    assert host == "127.0.0.1" and 1024 < int(port) < 32768
    assert {(e["config"], e["workdir"]) for e in each} == {("C", "W")}
    assert json.loads(local.log(0)[0])[:2] == ["-m", "lmscale_jax.main"]


def test_logs_are_apart_and_the_terminal_shows_that_of_process_0(local):
    _, out, _ = local.run(2)
    assert out.splitlines() == local.log(0)
    assert [len(local.log(i)) for i in range(2)] == [1, 1]
    local.run(2)
    assert [len(local.log(i)) for i in range(2)] == [2, 2], "a second start adds to the logs"


def test_the_script_ends_only_when_the_log_is_written(local, monkeypatch):
    (local.folder / "bin").mkdir()
    slow = f'#!/usr/bin/env bash\nsleep 0.5; exec {shutil.which("tee")} "$@"\n'
    program(local.folder / "bin" / "tee", slow)
    monkeypatch.setenv("PATH", f"{local.folder}/bin:{os.environ['PATH']}")
    assert local.start(1).wait(60) == 0
    assert len(local.log(0)) == 1


def test_arguments_with_spaces_stay_whole(local):
    odd = ["--config.data.path=my texts/*.txt", "--said=a  b 'c' \"d\" $HOME"]
    local.run(1, *odd)
    assert json.loads(local.log(0)[0])[-3:-1] == odd


def test_one_cpu_device_unless_said_otherwise(local):
    local.run(1, "--config=C")
    assert json.loads(local.log(0)[0])[-2:] == ["--config=C", "--config.mesh.cpu_devices=1"]
    local.run(1, "--config=C", "--config.mesh.cpu_devices=4")
    assert json.loads(local.log(0)[1])[-2:] == ["--config=C", "--config.mesh.cpu_devices=4"]


def test_the_first_failure_is_the_status_after_all_have_ended(local):
    status, _, _ = local.run(3, "--act=fail")
    assert status == 7
    assert [local.log(i)[-1] for i in range(3)] == ["left"] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_makes_all_save(local, number):
    process = local.start(3, "--act=wait")
    pids = local.ready(3)
    process.send_signal(number)
    status, out, _ = local.finish(process)
    assert status == 128 + signal.SIGTERM
    assert out.splitlines()[1:] == ["asked", "saved"]
    assert [local.log(i)[1:] for i in range(3)] == [["asked", "saved"]] * 3
    assert not [pid for pid in pids if alive(pid)]


def test_a_second_signal_ends_those_that_refuse(local):
    process = local.start(2, "--act=refuse")
    pids = local.ready(2)
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert all(alive(pid) for pid in pids)
    process.terminate()
    status, _, _ = local.finish(process)
    assert status == 128 + signal.SIGKILL
    assert not [pid for pid in pids if alive(pid)]


@on_linux
def test_a_killed_script_leaves_no_process(local):
    process = local.start(2, "--act=wait")
    pids = local.ready(2)
    process.kill()
    wait_until(lambda: not [pid for pid in pids if alive(pid)], seconds=20)
    assert local.log(1)[1:] == ["asked", "saved"]


@on_linux
def test_what_a_process_started_ends_with_it(local):
    assert local.run(2, "--act=leave")[0] == 0

    pids = [int((local.folder / f"left-{i}").read_text()) for i in range(2)]
    assert not [pid for pid in pids if alive(pid)]


def test_a_missing_interpreter_is_a_failure(local):
    local.stand_in = local.folder / "nowhere"
    assert local.run(2)[0] == 127
    assert "nowhere" in local.log(1)[0]


@pytest.mark.parametrize("count", ["", "0", "two", "-1", "1.5", "--config=C"])
def test_a_count_that_is_none_is_refused(local, count):
    status, out, err = local.run(count)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and "use 2" in err
    assert not local.logs.exists()


# --- schedulers


def scheduler(folder: Path, **programs: str) -> dict:
    """An environment in which these programs come first on PATH; each notes its arguments."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        noting = f"#!/usr/bin/env bash\nprintf '%s\\0' {name} \"$@\" >>{folder}/calls\n"
        program(folder / "bin" / name, f"{noting}printf '\\n' >>{folder}/calls\n{body}\n")
    return os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}


def calls(folder: Path, first: str) -> list[list[str]]:
    lines = (folder / "calls").read_text().split("\n")
    return [c[:-1] for line in lines if (c := line.split("\0"))[0] == first]


def submit(folder: Path, status: int, *arguments) -> subprocess.CompletedProcess:
    """slurm.sh as Slurm would run it, where all tasks leave with `status`."""
    env = scheduler(folder, srun=f"exit {status}", scontrol="exit 0")
    env |= {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "n[1-2]"}
    command = ["bash", LAUNCH / "slurm.sh", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_slurm_puts_back_what_was_stopped_and_nothing_else(tmp_path, status):
    assert submit(tmp_path, status, "--workdir=my runs/a").returncode == status
    (srun,) = calls(tmp_path, "srun")
    assert srun[-4:] == ["-m", "lmscale_jax.main", "--cluster=slurm", "--workdir=my runs/a"]
    assert {"--cpus-per-task=8", "--output=logs/42-%t.log", "--open-mode=append"} < set(srun)
    assert (tmp_path / "logs").is_dir(), "Slurm makes no directories"
    expected = [["scontrol", "requeue", "42"]] if status == 143 else []
    assert calls(tmp_path, "scontrol") == expected


def test_slurm_reads_its_options(tmp_path):
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    # Slurm stops reading options at the first command.
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120"} < set(options)
    sizes = dict(option.split("=") for option in options if "=" in option)
    assert sizes["--ntasks-per-node"] == sizes["--gpus-per-node"]


# READY from the first time that it was created; `ends` holds the statuses of training, one a line.
GCLOUD = """
cd {folder}
case $4 in
  describe) cat state 2>/dev/null ;;
  create) echo READY >state ;;
  delete) rm state ;;
  ssh)
    case "$*" in
      *--output-directory=*)
        status=$(head -n 1 ends) && sed -i 1d ends
        [ "$status" != lost ] || {{ echo PREEMPTED >state; exit 255; }}
        [ "$status" = waits ] || exit "$status"
        touch training
        while [ -e training ]; do sleep 0.1; done
        exit 143 ;;
      *"tar -xzf"*) ;;
      *pkill*) rm -f training ;;
    esac ;;
esac
"""


def slice_of(folder: Path, *ends) -> subprocess.Popen:
    """tpu_vm.sh with a gcloud whose trainings end like this, and with pauses that take no time."""
    env = scheduler(folder, gcloud=GCLOUD.format(folder=folder))
    pause = shlex.quote(shutil.which("sleep"))
    program(folder / "bin" / "sleep", f'#!/usr/bin/env bash\n[ "$1" = 0.1 ] && {pause} 0.1\ntrue\n')
    program(folder / "bin" / "git", "#!/usr/bin/env bash\ntrue\n")
    (folder / "ends").write_text("".join(f"{end}\n" for end in ends))
    env |= {"NAME": "llama", "ZONE": "z", "TYPE": "v6e-16", "NFS": "h:/s"}
    command = [LAUNCH / "tpu_vm.sh", "--workdir=my runs/a", "--config.train.steps=5"]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def verbs(folder: Path) -> list[str]:
    """What was asked of gcloud, without looking at the state."""
    verbs_called = []
    for call in calls(folder, "gcloud"):
        trains = any(a.startswith("--output-directory=") for a in call)
        verbs_called.append("train" if trains else call[4])
    return [verb for verb in verbs_called if verb not in ("describe", "scp", "ssh")]


@pytest.mark.parametrize(
    ("ends", "expected", "status"),
    [
        ([0], ["create", "train"], 0),
        ([2], ["create", "train"], 2),
        ([1, 143, 0], ["create", "train", "train", "train"], 0),
        (["lost", 0], ["create", "train", "delete", "create", "train"], 0),
        ([1] * 9, ["create", *["train"] * 5], 1),
        (["lost"] * 6 + [0], [*["create", "train", "delete"] * 6, "create", "train"], 0),
    ],
)
def test_a_tpu_slice_is_made_and_training_goes_on(tmp_path, ends, expected, status):
    process = slice_of(tmp_path, *ends)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert verbs(tmp_path) == expected


def test_all_workers_of_a_slice_get_the_arguments_whole(tmp_path):
    slice_of(tmp_path, 0).communicate(timeout=60)
    train = next(
        c for c in calls(tmp_path, "gcloud") if any(a.startswith("--output-dir") for a in c)
    )
    assert {"--worker=all", "--zone=z"} < set(train)
    (remote,) = [a for a in train if a.startswith("--command=")]
    words = shlex.split(remote)
    assert words[-3:] == ["--cluster=tpu", "--workdir=my runs/a", "--config.train.steps=5"]
    folder = next(a for a in train if a.startswith("--output-dir")).partition("=")[2]
    assert (tmp_path / folder).is_dir(), "gcloud makes no directories"


def test_a_signal_stops_the_workers_of_a_slice(tmp_path):
    process = slice_of(tmp_path, "waits", 0)
    wait_until((tmp_path / "training").exists, process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert verbs(tmp_path) == ["create", "train"]
    last = calls(tmp_path, "gcloud")[-1]
    assert "--worker=all" in last and any(a.startswith("--command=pkill") for a in last)
