"""Bad data and bad work directories, as a user meets them: one line, status 2, nothing written."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, flags, run

SMALL = {
    "model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "data.seq_len": 16,
    "train.steps": 4, "train.batch_size": 4, "eval.tokens": 64, "eval.sample": 0,
}  # fmt: skip


def shard(path, tokens, magic=20240520, version=1, count=None) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def make_empty(folder):
    (folder / "a.txt").write_text("")
    return {"data.source": "text", "data.tokenizer": "bytes", "data.path": folder / "a.txt"}


def make_binary(folder):
    (folder / "a.txt").write_bytes(bytes(range(256)) * 20)
    return {"data.source": "text", "data.tokenizer": "bytes", "data.path": folder / "a.txt"}


def make_missing(folder):
    return {"data.source": "text", "data.tokenizer": "bytes", "data.path": folder / "none.txt"}


def make_short(folder):
    (folder / "a.txt").write_text("short text")
    return {
        "data.source": "text", "data.tokenizer": "bytes", "data.path": folder / "a.txt",
        "data.split": "tail", "data.val_fraction": 0.3,
    }  # fmt: skip


def make_one_document(folder):
    (folder / "a.txt").write_text("one document only\n" * 100)
    return {"data.source": "text", "data.tokenizer": "bytes", "data.path": folder / "a.txt"}


def make_field(folder):
    (folder / "a.jsonl").write_text('{"body": "x", "title": "y"}\n' * 50)
    return {"data.source": "jsonl", "data.tokenizer": "bytes", "data.path": folder / "a.jsonl"}


def make_shards(folder, **damage):
    tokens = np.random.default_rng(0).integers(0, 100, 2000)
    shard(folder / "val.bin", tokens)
    shard(folder / "train.bin", tokens, **damage)
    return {"data.source": "bin", "model.vocab_size": 100, "data.path": folder / "*.bin"}


BAD = {
    "empty source": (make_empty, ["data.path", "a.txt"]),
    "binary source": (make_binary, ["data.path", "a.txt"]),
    "missing source": (make_missing, ["data.path", "none.txt"]),
    "fewer tokens than a window": (make_short, ["data.seq_len=16"]),
    "nothing to hold out": (make_one_document, ["data.split"]),
    "field that is not there": (make_field, ["field", "body", "title"]),
    "wrong magic": (lambda f: make_shards(f, magic=7), ["train.bin", "20240520"]),
    "wrong version": (lambda f: make_shards(f, version=9), ["train.bin", "version"]),
    "truncated body": (lambda f: make_shards(f, count=5000), ["train.bin", "5000"]),
    "ids beyond the vocabulary": (
        lambda f: make_shards(f) | {"model.vocab_size": 50},
        ["train.bin", "id 85", "vocabulary of 50"],
    ),
    "documents without marks": (
        lambda f: make_shards(f) | {"model.mask": "document"},
        ["model.mask='document'", "'causal'"],
    ),
    "no vocabulary": (lambda f: make_shards(f) | {"model.vocab_size": 0}, ["model.vocab_size"]),
}


@pytest.mark.parametrize(("make", "parts"), BAD.values(), ids=BAD)
def test_bad_data(tmp_path, make, parts):
    workdir = tmp_path / "run"
    (tmp_path / "data").mkdir()
    cache = {"data.cache": tmp_path / "cache"}
    overrides = flags(SMALL | cache | make(tmp_path / "data"))
    status, _, err = run("main", "--config=configs/base.py", f"--workdir={workdir}", *overrides)
    assert (status, err.count("\n")) == (2, 1), err
    assert "Traceback" not in err and not workdir.exists()
    for part in parts:
        assert part in err, err
    # What the cache holds is complete.
    for file in (tmp_path / "cache").rglob("*.bin*"):
        assert file.suffix == ".bin" and (file.parent / "manifest.json").exists()


@pytest.mark.parametrize("workdir", ["/proc/run", "/dev/null/run", "{file}", "{full}"])
def test_bad_workdir(tmp_path, settings, workdir):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    workdir = workdir.format(file=tmp_path / "file", full=tmp_path / "full")
    arguments = [f"--workdir={workdir}", *flags(settings)]
    status, _, err = run("main", "--config=configs/base.py", *arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert "--workdir=" in err
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_batch_that_the_devices_cannot_split(tmp_path, settings):
    overrides = flags(settings | {"mesh.cpu_devices": 3})
    workdir = tmp_path / "run"
    status, _, err = run("main", "--config=configs/base.py", f"--workdir={workdir}", *overrides)
    assert (status, err.count("\n")) == (2, 1), err
    assert "train.batch_size=8" in err and "use 9" in err
    assert not workdir.exists()


def test_commands_ask_for_huge_pages_once_and_leave_other_settings(tmp_path):
    """The process restarts with its arguments; what a user has set stays."""
    code = "import os, sys; from lmscale_jax import cli; print('started'); "
    code += "cli.run_command(lambda: "
    code += "print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES', 'unset')))"
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    takes = platform.libc_ver()[0] == "glibc" and modes.exists()
    takes = takes and "[never]" not in modes.read_text()
    ours, other = "glibc.malloc.hugetlb=1", "glibc.malloc.tcache_count=7"
    for tunables, changed in (("", ours), (other, f"{other}:{ours}")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
            | ({"GLIBC_TUNABLES": tunables} if tunables else {}),
        )  # fmt: skip
        printed = "started\n" * (2 if takes else 1)
        setting = changed if takes else tunables or "unset"
        assert (done.returncode, done.stdout) == (0, f"{printed}[] {setting}\n"), done.stderr
    off = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | off,
    )  # fmt: skip
    assert done.stdout == "started\n[] glibc.malloc.hugetlb=0\n"


def test_lines_are_there_when_they_are_printed():
    """Not when a buffer is full: who follows a log would see nothing for a quarter of an hour."""
    code = "import time; from lmscale_jax import cli; "
    code += "cli.run_command(lambda: (print('started'), time.sleep(60)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "started\n" and process.poll() is None
    finally:
        process.kill()
        process.communicate()
