"""Where cells train: processes on this machine, Ray tasks, Slurm jobs.

Each starts the same command, `lmscale_jax.cell`, as a process with devices of its own, and each
has the same verbs: `submit` takes as many jobs as there is room for and returns the rest, `poll`
returns those that have ended, `stop` asks all that run to save and leave, `slots` is how many run
at a time. A job is a list of cell ids.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lmscale_jax.errors import InputError
from lmscale_jax.modes import Modes
from lmscale_jax.run.mesh import ACCELERATORS

Job = list[str]


class Ended(NamedTuple):
    """A job that is no longer running; `status` is its exit status, `said` its last line."""

    job: Job
    status: int
    said: str


def make(settings, workdir: Path):
    """The executor of a ladder's `executor` group. Raises InputError where it is not installed."""
    return EXECUTORS[settings["name"]].make(settings, workdir)


def slots(settings) -> int:
    """Processes at a time, as far as can be said without starting anything.

    Raises InputError where the executor cannot be had here.
    """
    return EXECUTORS[settings["name"]].slots(settings)


def _slots_here(settings) -> int:
    each, available = settings["cpus"], cores()
    wanted = settings["workers"] or (max(1, available // each) if on_cpu() else 1)
    if on_cpu() and wanted * each > available:
        raise InputError(
            f"config.executor.workers={wanted} of {each} core(s) are more than the {available} of "
            f"this machine; {max(1, available // each)} would work"
        )
    return wanted


def on_cpu() -> bool:
    return not any(importlib.util.find_spec(name) for name in ACCELERATORS)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def command(workdir: Path, job: Job) -> list[str]:
    """How a job is started, anywhere that sees the same directory."""
    return [
        sys.executable, "-m", "lmscale_jax.cell", f"--workdir={workdir.absolute()}",
        f"--ids={','.join(job)}",
    ]  # fmt: skip


def log_path(workdir: Path, job: Job) -> Path:
    return workdir / "logs" / f"{job[0]}.log"


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")


class Local:
    """Processes on this machine. On CPU each is pinned to cores of its own."""

    def __init__(self, settings, workdir: Path):
        self._workdir, self._running = workdir, {}
        self.slots, each = slots(settings), settings["cpus"]
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        # Two workers on accelerators have one each, where they would otherwise share all of them.
        self._places = [
            {"cores": cores[i * each : (i + 1) * each] if on_cpu() else []}
            | ({"gpu": i} if not on_cpu() and self.slots > 1 else {})
            for i in range(self.slots)
        ]

    def submit(self, jobs: list[Job]) -> list[Job]:
        free = [i for i in range(self.slots) if i not in self._running]
        for job, slot in zip(jobs, free, strict=False):
            self._running[slot] = (job, self._start(job, self._places[slot]))
        return jobs[len(free) :]

    def _start(self, job: Job, place: dict) -> subprocess.Popen:
        path = log_path(self._workdir, job)
        path.parent.mkdir(exist_ok=True)
        environment = dict(os.environ)
        if "gpu" in place:
            environment["CUDA_VISIBLE_DEVICES"] = str(place["gpu"])
        with open(path, "a") as log, pinned(place["cores"]):
            return subprocess.Popen(
                command(self._workdir, job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # Ctrl-C reaches this process alone, which passes on what is meant.
                start_new_session=True,
            )

    def poll(self) -> list[Ended]:
        ended = []
        for slot, (job, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                said = last_line(log_path(self._workdir, job))
                ended.append(Ended(job, process.returncode, said))
        return ended

    def stop(self, seconds: float = 120.0) -> None:
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + seconds
        for _, process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, until - time.monotonic()))


@contextlib.contextmanager
def pinned(cores: list[int]):
    """What is started inside runs on these cores only; an empty list leaves it alone."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _run_job(arguments: list[str], log: str) -> int:
    """The body of a remote task: the command, its exit status."""
    Path(log).parent.mkdir(exist_ok=True)
    with open(log, "a") as file:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    return done.returncode


class Ray:
    """Tasks of a Ray cluster (the one RAY_ADDRESS names, else one on this machine)."""

    def __init__(self, settings, workdir: Path):
        import ray

        self._ray, self._workdir, self._running = ray, workdir, {}
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        needs = {"num_cpus": settings["cpus"], "num_gpus": settings["gpus"]}
        self._task = ray.remote(max_retries=0, **needs)(_run_job)
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1) // settings["cpus"]))

    def submit(self, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            log = log_path(self._workdir.absolute(), job)
            self._running[self._task.remote(command(self._workdir, job), str(log))] = job
        return []

    def poll(self) -> list[Ended]:
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._ended(reference) for reference in done]

    def _ended(self, reference) -> Ended:
        job = self._running.pop(reference)
        said = last_line(log_path(self._workdir, job))
        try:
            return Ended(job, self._ray.get(reference), said)
        except Exception as error:
            return Ended(job, 1, said or " ".join(str(error).split())[:200])

    def stop(self, seconds: float = 120.0) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=False)
        self._ray.wait(list(self._running), num_returns=len(self._running), timeout=seconds)


class Slurm:
    """A job array by submitit. Its logs are under slurm/ of the ladder's directory."""

    def __init__(self, settings, workdir: Path, cluster: str = "slurm"):
        import submitit

        self._workdir, self._running = workdir, []
        try:
            self._executor = submitit.AutoExecutor(str(workdir / "slurm"), cluster=cluster)
        except RuntimeError as error:
            raise InputError(
                f"config.executor.name='slurm': {error}; 'local' would work here"
            ) from None
        self.slots = settings["workers"] or 64
        self._executor.update_parameters(
            name="lmscale",
            timeout_min=settings["minutes"],
            cpus_per_task=settings["cpus"],
            slurm_array_parallelism=self.slots,
            **({"gpus_per_node": settings["gpus"]} if settings["gpus"] else {}),
            **({"slurm_partition": settings["partition"]} if settings["partition"] else {}),
        )

    def submit(self, jobs: list[Job]) -> list[Job]:
        if jobs:
            with self._executor.batch():
                started = [
                    self._executor.submit(
                        _run_job,
                        command(self._workdir, job),
                        str(log_path(self._workdir.absolute(), job)),
                    )
                    for job in jobs
                ]
            self._running += zip(jobs, started, strict=True)
        return []

    def poll(self) -> list[Ended]:
        ended = []
        for job, task in list(self._running):
            if not task.done():
                continue
            self._running.remove((job, task))
            said = last_line(log_path(self._workdir, job))
            error = task.exception()
            ended.append(
                Ended(job, 1, said or " ".join(str(error).split())[-200:])
                if error
                else Ended(job, task.result(), said)
            )
        return ended

    def stop(self, seconds: float = 120.0) -> None:
        for _, task in self._running:
            task.cancel(check=False)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(task.done() for _, task in self._running):
            time.sleep(0.5)


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"config.executor.name needs the {package} package, which pip install "
            f"'lmscale_jax[{extra}]' brings; 'local' works without"
        )


def _slots_elsewhere(package: str, extra: str) -> Callable:
    def slots(settings) -> int:
        _need(package, extra)
        return settings["workers"] or 1

    return slots


class Executor(NamedTuple):
    """A way to run jobs.

    Attributes:
      make: (settings, workdir) -> the executor.
      slots: settings -> processes at a time; raises InputError where it cannot be had here.
    """

    make: Callable
    slots: Callable


EXECUTORS = Modes(
    "executor.name",
    {
        "local": Executor(Local, _slots_here),
        "ray": Executor(Ray, _slots_elsewhere("ray", "ray")),
        "slurm": Executor(Slurm, _slots_elsewhere("submitit", "slurm")),
    },
)
