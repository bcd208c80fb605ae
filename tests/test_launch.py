"""Files that start training elsewhere: their form, and what they pass to the command.

What the scripts among them do is in test_launch_processes.py.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

from configs.base import SPEC
from lmscale_jax.config import keys

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
FILES = [*SCRIPTS, *sorted(LAUNCH.glob("*.yaml"))]
PIECES = [*FILES, LAUNCH / "README.md"]
MAX_LINES = 60


def name(path: Path) -> str:
    return path.name


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def job() -> dict:
    return jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]


def sky() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def commands(path: Path) -> list[str]:
    """What follows `lmscale_jax.main` in each command of a file, on one line."""
    if path.name == "gke_jobset.yaml":
        container = job()["template"]["spec"]["containers"][0]
        text = " ".join([*container["command"], *container["args"]])
    else:
        text = path.read_text().replace("\\\n", " ")
    return re.findall(r"lmscale_jax\.main\b(.*)", text)


# --- form


def test_there_is_one_file_for_each_scheduler():
    assert {path.name for path in PIECES} == {
        "slurm.sh",
        "tpu_vm.sh",
        "local_multiprocess.sh",
        "gke_jobset.yaml",
        "skypilot.yaml",
        "README.md",
    }


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short_and_say_what_to_change(path):
    text = path.read_text()
    assert text.count("\n") < MAX_LINES
    assert "CHANGE" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_are_sound(path):
    assert os.access(path, os.X_OK)
    for check in (["bash", "-n"], ["shellcheck", "--norc"]):
        # The wheel of shellcheck puts it beside the interpreter, which may not be on PATH.
        program = shutil.which(check[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        done = subprocess.run([program, *check[1:], path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_jobs_of_the_jobset_follow_the_schema_of_kubernetes():
    template = jobset()["spec"]["replicatedJobs"][0]["template"]
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hosts"}, **template}
    kubernetes_validate.validate(manifest, "1.31", strict=True)
    manifest["spec"]["parallelism"] = "two"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_jobset_around_them_has_the_fields_of_its_documentation():
    manifest = jobset()
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    spec = manifest["spec"]
    assert set(spec) == {"network", "failurePolicy", "replicatedJobs"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    assert set(spec["failurePolicy"]) == {"maxRestarts", "rules"}
    assert type(spec["failurePolicy"]["maxRestarts"]) is int
    (rule,) = spec["failurePolicy"]["rules"]
    assert set(rule) == {"name", "action", "onJobFailureReasons"}
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = spec["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    assert type(replicated["replicas"]) is int


def test_the_hosts_of_the_jobset_agree():
    manifest, pod = jobset(), job()["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    hosts = int(env["LMSCALE_NUM_PROCESSES"]["value"])
    assert hosts == job()["parallelism"] == job()["completions"] >= 2
    (replicated,) = manifest["spec"]["replicatedJobs"]
    host, port = env["LMSCALE_COORDINATOR"]["value"].split(":")
    subdomain = manifest["spec"]["network"]["subdomain"]
    # JOBSET-REPLICATEDJOB-JOB-INDEX.SUBDOMAIN is the name that JobSet gives a pod.
    assert host == f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{subdomain}"
    assert 1024 < int(port) < 32768
    index = env["LMSCALE_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    # All start again together, and only SIGTERM counts as a stop to go on from.
    assert (job()["completionMode"], job()["backoffLimit"]) == ("Indexed", 0)
    codes = job()["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["containerName"] == container["name"]
    assert codes["values"] == [128 + signal.SIGTERM]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60


def test_the_shared_volume_of_the_jobset_holds_the_run_and_the_cache():
    pod = job()["template"]["spec"]
    (container,) = pod["containers"]
    claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    mounts = {m["mountPath"] for m in container["volumeMounts"] if m["name"] in claims}
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    workdir = next(a for a in container["args"] if a.startswith("--workdir=")).partition("=")[2]
    for path in (workdir, env["LMSCALE_CACHE"]):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path


def test_the_skypilot_task_has_the_fields_of_its_documentation():
    task = sky()
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert type(task["num_nodes"]) is int and task["num_nodes"] >= 2
    resources = task["resources"]
    assert set(resources) == {"infra", "accelerators", "use_spot", "job_recovery"}
    assert resources["use_spot"] is True
    assert re.fullmatch(r"\w+:\d+", resources["accelerators"])
    recovery = resources["job_recovery"]
    assert set(recovery) == {"max_restarts_on_errors", "recover_on_exit_codes"}
    assert recovery["recover_on_exit_codes"] == [128 + signal.SIGTERM]
    # Numbers and booleans are refused there.
    assert all(isinstance(value, str) for value in task["envs"].values())


@pytest.mark.parametrize("script", ["setup", "run"])
def test_the_scripts_of_the_skypilot_task_are_sound(script):
    done = subprocess.run(["bash", "-n"], input=sky()[script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_machines_of_skypilot_name_the_first_as_coordinator():
    script = sky()["run"].partition("exec ")[0] + "echo $LMSCALE_COORDINATOR $LMSCALE_PROCESS_ID\n"
    done = subprocess.run(
        ["bash", "-c", script],
        env=os.environ
        | sky()["envs"]
        | {
            "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"10.0.0.7:{sky()['envs']['PORT']} 1\n"


# --- what is passed to main


@pytest.fixture(scope="module")
def main_flags() -> set[str]:
    """Flags of the command, asked in a process of its own: flags are global."""
    code = "import lmscale_jax.main; from absl import flags; print(*flags.FLAGS)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("path", PIECES, ids=name)
def test_every_flag_exists(path, main_flags):
    passed = {f for c in commands(path) for f in re.findall(r"--(\w+)(?![\w.])", c)}
    assert passed or path.suffix == ".md"
    assert passed <= main_flags, passed - main_flags


@pytest.mark.parametrize("path", PIECES, ids=name)
def test_every_config_key_exists(path):
    named = set(re.findall(r"\bconfig\.(\w+\.\w+)", path.read_text()))
    all_keys = {key for key, _ in keys(SPEC)}
    assert named <= all_keys, named - all_keys


@pytest.mark.parametrize("path", PIECES, ids=name)
def test_every_config_file_exists(path):
    named = re.findall(r"\bconfigs/[\w/]+\.py", path.read_text())
    assert named
    assert not [n for n in named if not (ROOT / n).exists()]


@pytest.mark.parametrize("path", PIECES, ids=name)
def test_every_variable_of_ours_is_read(path):
    sources = [p.read_text() for p in (ROOT / "lmscale_jax").rglob("*.py")]
    read = {
        node.value
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    named = set(re.findall(r"\bLMSCALE_[A-Z_]*[A-Z]\b", path.read_text()))
    assert named <= read, named - read
