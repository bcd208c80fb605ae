"""Executors of jobs: processes on this machine, this process, Ray tasks, Slurm jobs.

A job is a list of cell ids, trained by one process `lmscale_jax.ladders.worker`, or by this one.
All executors have the same interface: `submit(jobs)` starts as many as there are free slots and
returns the others, `poll()` returns the jobs that ended, `stop()` asks all running jobs to save and
exit, and `slots` is the number that run at a time.
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

from lmscale_jax.config.key import Modes
from lmscale_jax.config.own_code import trusted_digests
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.ladders import machine, worker

Job = list[str]


class EndedJob(NamedTuple):
    """A job that ended: its exit status, and the last line of its log."""

    job: Job
    status: int
    message: str


def make_executor(settings, workdir: Path):
    """Makes the executor of a ladder's `executor` group. Raises InputError without its package."""
    return EXECUTORS[settings["name"]].make(settings, workdir)


def executor_slots(settings) -> int:
    """Returns the number of simultaneous processes, without starting anything.

    Raises InputError where the executor's package or the cores are missing.
    """
    return EXECUTORS[settings["name"]].slots(settings)


def _slots_of_machine(settings) -> int:
    each, available = settings["cpus"], machine.available_cores()
    workers = settings["workers"] or (max(1, available // each) if machine.runs_on_cpu() else 1)
    if machine.runs_on_cpu() and workers * each > available:
        raise InputError(
            f"config.executor.workers={workers} of {each} core(s) need more than the {available} "
            f"of this machine; use {max(1, available // each)}"
        )
    return workers


def trains_on_cpu(settings) -> bool:
    """Returns whether jobs certainly run on CPUs: on this machine, without an accelerator."""
    return EXECUTORS[settings["name"]].make in (LocalExecutor, HereExecutor) and (
        machine.runs_on_cpu()
    )


def worker_command(workdir: Path, job: Job) -> list[str]:
    """Returns the command line of a job, for any machine that sees the same directory."""
    return [
        sys.executable, "-m", "lmscale_jax.ladders.worker", f"--workdir={workdir.absolute()}",
        f"--ids={','.join(job)}", f"--trust_code={','.join(trusted_digests())}",
    ]  # fmt: skip


def log_path(workdir: Path, job: Job) -> Path:
    """Returns the file to which a job's stdout and stderr are appended."""
    return workdir / "logs" / f"{job[0]}.log"


def last_line(path: Path) -> str:
    """Returns the last line of a log that is not blank, or ""."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


class LocalExecutor:
    """Runs jobs as processes on this machine. On CPU each is pinned to its own cores."""

    def __init__(self, settings, workdir: Path):
        self._workdir, self._running = workdir, {}
        self.slots, each = executor_slots(settings), settings["cpus"]
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        # Each of several workers sees one accelerator: JAX would reserve all of them.
        self._places = [
            {"cores": cores[i * each : (i + 1) * each] if machine.runs_on_cpu() else []}
            | ({"gpu": i} if not machine.runs_on_cpu() and self.slots > 1 else {})
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
        with open(path, "a", encoding="utf-8") as log, pin_to(place["cores"]):
            return subprocess.Popen(
                worker_command(self._workdir, job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # Ctrl-C must reach only this process, which stops the jobs itself.
                start_new_session=True,
            )

    def poll(self) -> list[EndedJob]:
        ended = []
        for slot, (job, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                message = last_line(log_path(self._workdir, job))
                ended.append(EndedJob(job, process.returncode, message))
        return ended

    def stop(self, seconds: float = 120.0) -> None:
        for _, process in self._running.values():
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        for _, process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))


@contextlib.contextmanager
def pin_to(cores: list[int]):
    """Pins this process and children started inside to these cores; an empty list pins nothing."""
    if not cores:
        yield
        return
    previous = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, previous)


class HereExecutor:
    """Runs jobs in this process; `submit` returns when the first of them has ended."""

    slots = 1

    def __init__(self, settings, workdir: Path):
        self._workdir, self._ended = workdir, []

    def submit(self, jobs: list[Job]) -> list[Job]:
        if not jobs:
            return []
        status, message = 0, ""
        try:
            worker.train_job(self._workdir, jobs[0])
        except (InputError, RunFailed, OSError) as error:
            status, message = 1, " ".join(str(error).split())
        except SystemExit as stop:
            # The run took the signal for itself; the scheduler must hear of it too.
            status, message = stop.code, "stopped"
            os.kill(os.getpid(), signal.Signals(stop.code - 128))
        self._ended.append(EndedJob(jobs[0], status, message))
        return jobs[1:]

    def poll(self) -> list[EndedJob]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self, seconds: float = 120.0) -> None:
        """Does nothing: no job is running when it can be called."""


def _run_job(arguments: list[str], log: str) -> int:
    """Runs a command as the body of a remote task, and returns its exit status."""
    Path(log).parent.mkdir(exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    return process.returncode


class RayExecutor:
    """Runs jobs as tasks of a Ray cluster: that of RAY_ADDRESS, else one on this machine."""

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
            self._running[self._task.remote(worker_command(self._workdir, job), str(log))] = job
        return []

    def poll(self) -> list[EndedJob]:
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._ended(reference) for reference in done]

    def _ended(self, reference) -> EndedJob:
        job = self._running.pop(reference)
        message = last_line(log_path(self._workdir, job))
        try:
            return EndedJob(job, self._ray.get(reference), message)
        except Exception as error:
            return EndedJob(job, 1, message or " ".join(str(error).split())[:200])

    def stop(self, seconds: float = 120.0) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=False)
        self._ray.wait(list(self._running), num_returns=len(self._running), timeout=seconds)


class SlurmExecutor:
    """Runs jobs as Slurm job arrays through submitit, whose logs are in WORKDIR/slurm/."""

    def __init__(self, settings, workdir: Path, cluster: str = "slurm"):
        import submitit

        self._workdir, self._running = workdir, []
        try:
            self._executor = submitit.AutoExecutor(str(workdir / "slurm"), cluster=cluster)
        except RuntimeError as error:
            raise InputError(
                f"config.executor.name='slurm' does not work here ({error}); use 'local'"
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
                tasks = [
                    self._executor.submit(
                        _run_job,
                        worker_command(self._workdir, job),
                        str(log_path(self._workdir.absolute(), job)),
                    )
                    for job in jobs
                ]
            self._running += zip(jobs, tasks, strict=True)
        return []

    def poll(self) -> list[EndedJob]:
        ended = []
        for job, task in list(self._running):
            if not task.done():
                continue
            self._running.remove((job, task))
            message = last_line(log_path(self._workdir, job))
            error = task.exception()
            ended.append(
                EndedJob(job, 1, message or " ".join(str(error).split())[-200:])
                if error
                else EndedJob(job, task.result(), message)
            )
        return ended

    def stop(self, seconds: float = 120.0) -> None:
        for _, task in self._running:
            task.cancel(check=False)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(task.done() for _, task in self._running):
            time.sleep(0.5)


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"config.executor.name='{extra}' needs the package {package}; run pip install "
            f"'lmscale_jax[{extra}]', or use 'local'"
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
        "local": Executor(LocalExecutor, _slots_of_machine),
        "here": Executor(HereExecutor, lambda settings: 1),
        "ray": Executor(RayExecutor, _slots_elsewhere("ray", "ray")),
        "slurm": Executor(SlurmExecutor, _slots_elsewhere("submitit", "slurm")),
    },
)
