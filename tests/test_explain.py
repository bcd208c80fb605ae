"""The page of --explain says what a run would do, and does nothing."""

import importlib
import re
import subprocess
import sys

import gpt2_shards
import jax
import pytest
from conftest import ROOT, flags, run
from test_modes import KEYS, PROGRAM, REFUSED
from test_modes import settings as choice_settings

from lmscale_jax.config.resolve import resolve
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError
from lmscale_jax.model import build
from lmscale_jax.model.mesh import make_mesh
from lmscale_jax.optim import schedules
from lmscale_jax.train import aot, explain
from lmscale_jax.train.setup import build_setup


@pytest.fixture(autouse=True)
def compiled(request, monkeypatch):
    """Most pages here are about something else than what is compiled last."""
    if "allocated" not in request.node.name:
        monkeypatch.setattr(explain.aot, "memory_rows", lambda *_: [("peak", "1.0 MiB")])


def explained(config, overrides=(), config_file="configs/base.py") -> str:
    lines = []
    explain.explain(config, dict(overrides), config_file, print=lines.append)
    return "\n".join(lines)


def line_of(page: str, start: str) -> str:
    return next(line for line in page.splitlines() if line.split()[:1] == [start])


def test_the_page_has_every_section(small):
    page = explained(small())
    titles = [line for line in page.splitlines() if line and not line.startswith(" ")]
    wanted = "config schedule parameters counts flops memory data mesh choices time memory"
    assert " ".join(title.split()[0] for title in titles) == wanted
    for path in ("embed/tokens", "blocks/attention/query/weight", "readout/norm/scale"):
        assert path in page
    for convention in ("6n", "6n_non_embedding", "model"):
        assert line_of(page, convention)


# base and laddering hold keys.
SHIPPED = sorted({p.stem for p in (ROOT / "configs").glob("[a-z]*.py")} - {"base", "laddering"})


@pytest.fixture
def no_probe(monkeypatch):
    monkeypatch.setattr(explain, "probe_flops", lambda dtype, width: 1e11)


@pytest.mark.parametrize("path", PROGRAM)
def test_every_choice_is_explained(small, no_probe, path):
    for choice in KEYS[path].choices:
        changes = {k.replace(".", "__"): v for k, v in choice_settings(path, choice).items()}
        config = small(**changes | {"model__vocab_size": 0, "train__steps": 40})
        if (path, choice) in REFUSED:
            with pytest.raises(InputError, match=REFUSED[path, choice]):
                explained(config)
        else:
            assert line_of(explained(config), "embed/tokens")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_explained(no_probe, monkeypatch, tmp_path, name):
    # What configs expect in the working directory.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("First Citizen:\n")
    gpt2_shards.write_shards(tmp_path / "fineweb_edu")
    config = importlib.import_module(f"lmscale_jax.configs.{name}").get_config()
    assert line_of(explained(config), "embed/tokens")


def test_nothing_is_prepared_written_or_allocated(small, tmp_path):
    cache = tmp_path / "cache"
    before = {id(array) for array in jax.live_arrays()}
    page = explained(small(data__cache=str(cache), model__d_model=512))
    new = [array for array in jax.live_arrays() if id(array) not in before]
    # What the probe of the machine's speed multiplies is all that may be left.
    assert all(array.shape == (1024, 1024) for array in new)
    assert "not prepared yet" in page
    # Nothing but the compiled step, so that training need not compile it.
    assert {path.name for path in cache.glob("*")} <= {"compiled"}


def test_epochs_are_counted_where_the_data_is_prepared(small):
    config = small()
    data = prepare.prepare_data(config.data, 0, log=lambda line: None)
    page = explained(config)
    windows = (data.train.n_tokens - 1) // 32
    assert float(line_of(page, "epochs").split()[1]) == pytest.approx(12 * 8 / windows, rel=1e-2)


def test_every_value_has_its_origin(small):
    config = small(optim__lr=0.002)
    origins = explain.value_origins("configs/other.py", {"optim.lr": 0.002, "seed": 0}, config)
    assert origins["optim.lr"] == "--config.optim.lr"
    assert origins["seed"] == "--config.seed"  # given, though equal to the default
    assert origins["model.d_model"] == "configs/other.py"
    assert origins["optim.beta1"] == "base"

    page = explained(config, {"optim.lr": 0.002}, "configs/other.py")
    assert line_of(page, "head_dim").split() == ["head_dim", "16", "derived"]
    assert line_of(page, "rope_theta").endswith("not used here")
    marked = [line.split()[1] for line in page.splitlines() if line.startswith("   * ")]
    assert "lr" in marked
    assert "beta1" not in marked


def test_a_derived_value_keeps_what_was_asked_for(small):
    page = explained(small(train__steps=0, train__tokens=1e5), {"train.tokens": 1e5})
    assert "--config.train.tokens gave 100000" in page
    # 100,000 tokens / (8 x 32), rounded up.
    assert re.search(r"\* steps +391 +configs/base.py gave 0\n", page)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule__warmup": "10%"}, []),
        # Without warm-up the peak comes at once.
        ({"schedule__warmup": "0"}, [(0, 0, 0.0, 1.0)]),
        # A cooldown shorter than the warm-up falls faster than the warm-up rises.
        (
            {"schedule__name": "wsd", "schedule__warmup": "100", "schedule__cooldown": "10"},
            [(991, 999, 1.0, 0.19)],
        ),
        ({"schedule__name": "wsd", "schedule__warmup": "100", "schedule__cooldown": "20%"}, []),
    ],
)
def test_jumps_of_the_schedule(small, changes, expected):
    config = resolve(small(train__steps=1000, optim__lr=1.0, **changes), 256)
    jumps = explain.rate_jumps(config)
    assert [jump[:2] for jump in jumps] == [jump[:2] for jump in expected]
    for ours, wanted in zip(jumps, expected, strict=True):
        assert ours[2:] == pytest.approx(wanted[2:], rel=1e-4, abs=1e-6)


def test_jumps_are_found_across_blocks_of_a_long_run(small):
    config = resolve(small(train__steps=2_500_000, schedule__warmup="400000"), 256)
    assert explain.rate_jumps(config) == []


def test_the_schedule_is_that_of_the_run(small):
    config = resolve(small(optim__lr=0.01, schedule__warmup="3"), 256)
    page = explained(small(optim__lr=0.01, schedule__warmup="3"))
    factor = schedules.make_schedule(config)
    for step, name in ((0, "first"), (2, "done"), (6, "middle"), (11, "last")):
        line = next(
            line for line in page.splitlines() if line.startswith("  step") and name in line
        )
        assert int(line.split()[1]) == step
        assert float(line.split()[3]) == pytest.approx(0.01 * float(factor(step)), rel=1e-3)


def test_time_follows_the_peak_of_a_known_chip(small, monkeypatch):
    config = resolve(small(), 256)
    model = build.build_model(config, platform="cpu")
    mesh = make_mesh(config)
    monkeypatch.setattr(explain.flops, "peak_flops", lambda kind, dtype: 1e12)
    total = explain.flops.flops_per_token(config, model.specs)["model"] * 12 * 8 * 32
    seconds, basis = explain.estimate_seconds(config, model, mesh)
    assert seconds == pytest.approx(total / (1e12 * explain.EFFICIENCY))
    assert "40%" in basis


def test_the_command_prints_the_page_and_leaves(settings, tmp_path):
    workdir = tmp_path / "run"
    arguments = flags(settings | {"mesh.cpu_devices": 4, "mesh.fsdp": 2, "optim.lr": 0.002})
    status, out, err = run(
        "main", "--config=configs/base.py", "--explain", f"--workdir={workdir}", *arguments
    )
    assert (status, err) == (0, "")
    assert "replica 1, data 2, fsdp 2, sequence 1, tensor 1: 4 cpu device(s)" in out
    assert line_of(out, "embed/tokens").endswith("- fsdp")
    last = out.splitlines()[-6:]
    assert last[0] == "memory per device (compiled)"
    sizes = {line.split()[0]: float(line.split()[1]) for line in last[1:]}
    peak = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]
    assert sizes["peak"] == pytest.approx(peak, abs=0.2)
    assert "--config.optim.lr" in out
    assert not workdir.exists()


def test_the_command_explains_a_named_config():
    # For other chips, so that nothing is compiled.
    arguments = ["--config=configs/llama_100m.py", "--explain", "--topology=H100:8"]
    status, out, err = run("main", *arguments)
    assert (status, err) == (0, "")
    assert line_of(out, "total").split()[1] == "119,947,008"
    assert "replica 1, data 1, fsdp 8, sequence 1, tensor 1: 8 gpu device(s)" in out
    assert "\n  mesh        fsdp: default on one node of accelerators; mesh.data=8 splits" in out


# Explains a config in a process without compilers for other chips.
WITHOUT = """
import importlib.util, sys
find, hidden = importlib.util.find_spec, ("libtpu", "jax_cuda13_plugin")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
sys.argv = ["main", *sys.argv[1:]]
from lmscale_jax import cli, main
cli.run_command(main.main)
"""


def run_without_compilers(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-c", WITHOUT, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--explain", "--topology=v5e:4x4"],
            "--topology=v5e:4x4 needs libtpu, which is not installed; "
            "use pip install 'lmscale_jax[tpu]'",
        ),
        (
            ["--explain", "--topology=H900:8"],
            "--topology=H900:8 is not CHIP:COUNT or CHIP:SHAPE of H100, H200, B200, A100, v5e, "
            "v5p, v6e; use --topology=v5e:4x4 or --topology=H100:64",
        ),
        (
            ["--explain", "--topology=H100:4x4"],
            "--topology=H100:4x4: H100 has no torus; use --topology=H100:16",
        ),
        (
            ["--explain", "--topology=H100:48", "--config.mesh.fsdp=32"],
            "config.mesh.fsdp=32: the mesh axes (fsdp=32) do not multiply to 48 device(s); use "
            "mesh.fsdp=1",
        ),
        (
            ["--explain", "--topology=H100:64", "--config.train.batch_size=96"],
            "config.train.batch_size=96 in 1 micro-batch(es) cannot be split over 64 devices; use "
            "128",
        ),
        (
            ["--topology=H100:64", "--workdir=elsewhere"],
            "--topology=H100:64 describes chips of another machine; use it with --explain",
        ),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(arguments, message):
    status, out, err = run_without_compilers("--config=configs/base.py", *arguments)
    assert (status, out, err) == (2, "", f"error: {message}\n")


def test_chips_that_are_not_here_are_explained_by_arithmetic():
    arguments = ["--explain", "--topology=H100:64", "--config.mesh.fsdp=16"]
    batch = ["--config.train.batch_size=1024", "--config.train.accum=2"]
    status, out, err = run_without_compilers("--config=configs/llama_300m.py", *arguments, *batch)
    assert (status, err) == (0, "")
    assert "pip install 'lmscale_jax[cuda13]'" in line_of(out, "shares")
    titles = [line.split()[0] for line in out.splitlines() if line and line[0] != " "]
    assert titles[-5:] == ["choices", "fit", "communication", "time", "checkpoint"]
    assert "replica 1, data 4, fsdp 16, sequence 1, tensor 1: 64 gpu device(s)" in out
    assert "cudnn" in out
    # 322,479,104 parameters of 4 bytes over 16, the 41 gains of 1,024 whole.
    held = 4 * ((322_479_104 - 41 * 1024) / 16 + 41 * 1024)
    row = next(line for line in out.splitlines() if line.startswith("  parameters "))
    assert row.split()[1:] == [f"{held / 2**20:,.0f}", "MiB"]
    assert line_of(out, "gather").split()[:3] == ["gather", "weights", "fsdp"]
    assert float(line_of(out, "MFU").split()[1].rstrip("%")) < 75


def test_float32_products_have_no_forecast(small, monkeypatch):
    monkeypatch.setattr(aot.gpu_descriptions, "gpu_compiler_installed", lambda: False)
    lines = []
    config = small(train__batch_size=64)
    explain.explain(config, {}, "configs/base.py", print=lines.append, topology="H100:64")
    assert "H100 has no known peak in float32; use bfloat16" in lines[0]
    assert len(lines) == 1


def test_the_page_comes_before_anything_is_compiled(small, monkeypatch):
    seen = []
    monkeypatch.setattr(
        explain.aot, "memory_rows", lambda *_: seen.append(len(lines)) or [("x", "y")]
    )
    lines = []
    explain.explain(small(), {}, "configs/base.py", print=lines.append)
    assert seen == [1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_estimate_of_memory_is_near_the_compilers(small, dtype):
    # Docs/scale.md says within 20 %; small things weigh more in a small model.
    config = resolve(
        small(model__d_model=128, data__seq_len=128, train__batch_size=32, model__dtype=dtype), 1024
    )
    mesh = make_mesh(config, jax.devices()[:1])
    setup = build_setup(config, None, mesh)
    compiled_bytes = aot.compiled_memory(setup.lower_step().compile())
    assert compiled_bytes["peak"] == sum(
        compiled_bytes[name] * sign
        for name, sign in (("arguments", 1), ("outputs", 1), ("aliased", -1), ("temporaries", 1))
    )
    # AdamW's state, which is given back in place, a counter or two and the batch.
    batch = 2 * 4 * 32 * 128
    ours = aot.memory_sizes(config, setup.model, mesh.shape, "cpu")
    state = ours["parameters"] + ours["optimizer"]
    assert compiled_bytes["arguments"] == pytest.approx(state + batch, abs=200)
    assert ours["total"] == pytest.approx(compiled_bytes["peak"], rel=0.2)


@pytest.mark.slow
def test_training_starts_with_what_explaining_compiled(settings, tmp_path):
    cache = tmp_path / "cache"
    common = settings | {"data.cache": str(cache), "mesh.cpu_devices": 1, "log.per_layer": False}
    # Not where the tests of a session share their programs, but where runs do.
    apart = {"JAX_COMPILATION_CACHE_DIR": ""}
    status, _, err = run("main", "--config=configs/base.py", "--explain", *flags(common), **apart)
    assert (status, err) == (0, "")
    steps = sorted(path.name for path in cache.rglob("jit_train_step-*-cache"))
    assert len(steps) == 1
    # So do runs of equal shape: only numbers differ, that of the steps among them.
    others = {"seed": 3, "optim.lr": 2e-3, "optim.weight_decay": 0.2, "data.seed": 4}
    others |= {"train.steps": common["train.steps"] + 3, "schedule.warmup": "40%"}
    for name, changes in (("one", {}), ("another", others)):
        workdir = f"--workdir={tmp_path / name}"
        status, _, err = run(
            "main", "--config=configs/base.py", workdir, *flags(common | changes), **apart
        )
        assert status == 0, err
        assert sorted(path.name for path in cache.rglob("jit_train_step-*-cache")) == steps
