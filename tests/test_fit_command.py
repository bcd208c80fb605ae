"""The command `fit`: processes, files and one-line errors."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run
from synthetic import CHINCHILLA, grid, surface, two_arms
from test_scaling_forecast import made_budgets

from lmscale_jax.errors import InputError

SIZES, TOKENS = np.geomspace(1e7, 1e10, 4), np.geomspace(1e9, 1e12, 4)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command in this process, which saves its imports: (status, stdout, stderr)."""
    from absl import flags

    from lmscale_jax import cli
    from lmscale_jax import fit as fit_command

    def called(*arguments) -> tuple[int, str, str]:
        saved = {f: (flags.FLAGS[f].value, flags.FLAGS[f].present) for f in flags.FLAGS}
        monkeypatch.setattr(sys, "argv", ["fit", *map(str, arguments)])
        status = 0
        try:
            cli._parse(sys.argv)
            fit_command.main()
        except InputError as error:
            status = 2
            print(error, file=sys.stderr)
        finally:
            for f, (value, present) in saved.items():
                flags.FLAGS[f].value, flags.FLAGS[f].present = value, present
        return status, *capsys.readouterr()

    return called


def write(path, columns: dict):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def record(folder, n, d, loss, **overrides) -> None:
    folder.mkdir(parents=True)
    fields = {
        "status": "finished", "seed": 0, "counts": {"non_embedding": n, "total": 2 * n},
        "tokens": d, "flops_total": 6 * n * d, "final": {"val_loss": loss},
        "config": {"model": {"mlp": "gelu"}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(fields | overrides))


def curve_file(path, width_n, rows=12) -> None:
    d = np.arange(1, rows + 1) * 655360 * 40
    loss = surface(width_n, d, **CHINCHILLA)
    c = [f"{6 * width_n * x:.2e}" for x in d]
    step = np.arange(1, rows + 1) * 20
    write(path, {"step": step, "training_loss": loss, "validation_loss": loss,
                 "total_flops_profiler": c, "theoretical_flops": c, "tokens": d})  # fmt: skip


def test_a_csv_of_other_names_with_a_forecast_and_a_plan(tmp_path):
    columns = grid(SIZES, TOKENS, noise=0.003)
    table = write(
        tmp_path / "t.csv", {"params": columns["n"], "toks": columns["d"], "nats": columns["loss"]}
    )
    status, out, err = run(
        "fit", f"--input={table}", "--columns=n:params,d:toks,loss:nats", "--bootstrap=300",
        "--forecast_n=2e10", "--forecast_d=1e12", "--budget=1e23", "--advise=1e22",
        f"--out={tmp_path / 'f.json'}",
    )  # fmt: skip
    assert status == 0, err
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["law"] == "chinchilla" and written["n_points"] == 16
    assert set(written["params"]) == {"E", "A", "B", "alpha", "beta"}
    assert written["params"]["alpha"] == pytest.approx(0.3478, abs=0.03)
    assert set(written["intervals"]) >= {"E", "A", "B", "alpha", "beta"}
    assert all({"code", "message"} == set(w) for w in written["warnings"])
    forecast = written["forecast"]
    true = float(surface(2e10, 1e12, **CHINCHILLA))
    assert forecast["low"] < forecast["loss"] < forecast["high"]
    assert forecast["loss"] == pytest.approx(true, rel=0.02)
    assert forecast["level"] == 0.9
    assert written["plan"]["n"] > 0 and written["advice"]["allocation"]
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert "alpha" in out and "forecast" in out and "compute-optimal" in out


def test_a_result_is_replaced_aloud_and_other_files_never(tmp_path, call):
    flags = ("--input=kyo_takano", "--law=power_floor", "--bootstrap=0")
    out = tmp_path / "f.json"
    assert call(*flags, f"--out={out}")[0] == 0
    first = out.read_text()
    status, _, err = call(*flags, f"--out={out}")
    assert status == 0 and "replacing" in err and out.read_text() == first
    out.write_text('{"mine": 1}')
    status, _, err = call(*flags, f"--out={out}")
    assert status == 2 and err.count("\n") == 1 and "no result of fit" in err
    assert json.loads(out.read_text()) == {"mine": 1}
    (tmp_path / "g.png").write_text("mine")
    status, _, err = call(*flags, f"--out={tmp_path / 'g.json'}")
    assert status == 2 and not (tmp_path / "g.json").exists()
    assert (tmp_path / "g.png").read_text() == "mine"


@pytest.fixture
def compared(tmp_path, call):
    """Compares two arms of a constant offset: (what was written, what was printed, the file)."""

    def compare(seeds: int, *flags) -> tuple[dict, str, Path]:
        table = write(tmp_path / "t.csv", two_arms(0.0, tau=0.4, seeds=seeds))
        out = tmp_path / "v.json"
        common = (f"--input={table}", "--compare=A,B", "--law=power_floor", f"--out={out}")
        status, printed, err = call(*common, *flags)
        assert status == 0, err
        return json.loads(out.read_text()), printed, out

    return compare


def test_two_arms_get_a_verdict(compared):
    written, printed, out = compared(3, "--bootstrap=200", "--target_c=1e21")
    assert written["verdict"] == "constant offset" and "verdict: constant offset" in printed
    assert {"s", "se", "interval", "p"} <= set(written["shift"])
    assert all({"c", "k", "low", "high"} == set(row) for row in written["gain"])
    assert written["law"] == "power_floor" and set(written["params"]) == {"E", "a", "b"}
    assert set(written["arms"]) == {"A", "B"}
    assert out.with_suffix(".png").exists()


def test_a_floor_is_pinned_in_the_test_and_in_the_fits(compared):
    written, printed, _ = compared(2, "--bootstrap=0", "--floor=1.7")
    assert written["shift"]["baseline"] == "floor" and written["shift"]["p_bootstrap"] is None
    assert written["shift"]["floor"] == written["params"]["E"] == 1.7
    assert "would have shown" in printed and "joint laws" in printed


def test_three_anchors_in_two_arms_are_compared_without_naming_a_law(tmp_path, call):
    table = write(
        tmp_path / "t.csv", two_arms(0.0, tau=0.3, sizes=3, seeds=2, span=30.0, noise=0.02)
    )
    out = tmp_path / "v.json"
    status, _, err = call(f"--input={table}", "--compare=A,B", "--bootstrap=0", f"--out={out}")
    assert status == 0, err
    written = json.loads(out.read_text())
    assert written["law"] == "power" and written["verdict"] == "undetermined"
    assert "few_sizes" in {w["code"] for w in written["warnings"]}


def test_a_directory_of_runs(tmp_path, call):
    rng = np.random.default_rng(0)
    for i, n in enumerate(np.geomspace(1e6, 1e8, 4)):
        for j, d in enumerate(np.geomspace(1e8, 1e10, 4)):
            loss = float(surface(n, d, **CHINCHILLA) * np.exp(0.002 * rng.standard_normal()))
            mlp = {"model": {"mlp": "gelu" if i % 2 else "swiglu"}}
            record(tmp_path / f"runs/{i}{j}", n, d, loss, config=mlp)
    record(tmp_path / "runs/bad", 1e7, 1e9, None, status="diverged")
    flags = (f"--input={tmp_path}", "--bootstrap=0", f"--out={tmp_path / 'f.json'}")
    status, _, err = call(*flags, "--columns=variant:config.model.mlp")
    assert status == 0, err
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["n_points"] == 16
    assert "mixed_variants" in {w["code"] for w in written["warnings"]}
    status, _, _ = call(*flags, "--columns=n:counts.total,c:")
    total = json.loads((tmp_path / "f.json").read_text())["params"]
    assert status == 0
    scale = 2 ** written["params"]["alpha"]
    assert total["A"] == pytest.approx(written["params"]["A"] * scale, rel=1e-4)
    status, _, err = call(*flags, "--columns=n:counts.none")
    assert status == 2 and "counts.none" in err


def test_curves_in_the_schema_of_the_original(tmp_path, call):
    folder = tmp_path / "data" / "mup_scaling_experiments"
    folder.mkdir(parents=True)
    for width, n in zip((32, 40, 48, 56, 64), np.geomspace(1e6, 3e7, 5), strict=True):
        curve_file(folder / f"mup_{width}d.csv", n)
    (folder / "other.csv").write_text("step,tokens\n1,2\n")
    flags = (f"--datasets={tmp_path / 'data'}", "--bootstrap=0")
    status, out, _ = call(*flags, "--dataset=list")
    assert status == 0 and "mup_scaling_experiments      5 files" in out
    assert out.count("not there") == 4
    status, out, err = call(*flags, "--dataset=all", f"--out={tmp_path / 'f.json'}")
    assert status == 0, err
    written = json.loads((tmp_path / "f.json").read_text())["datasets"]
    assert list(written) == ["mup_scaling_experiments"]
    assert written["mup_scaling_experiments"]["n_points"] == 60
    assert out.count("not fitted") == 4
    (folder / "other.csv").unlink()
    status, out, err = call(f"--input={folder}", "--law=power", "--bootstrap=0")
    assert status == 0 and "5 points of 5 runs" in out, err


def test_isoflop(tmp_path, call):
    table = write(tmp_path / "t.csv", made_budgets(4))
    status, out, err = call(f"--input={table}", "--law=isoflop", "--bootstrap=100",
                           f"--out={tmp_path / 'j.json'}")  # fmt: skip
    assert status == 0, err
    written = json.loads((tmp_path / "j.json").read_text())
    assert written["law"] == "isoflop" and 0.5 < written["params"]["a"] < 0.52
    assert set(written["isoflop"]["methods"]) == {"parabola", "cubic", "surface"}
    assert "bias" in out and (tmp_path / "j.png").exists()


BAD = {
    "nothing": ([], "--input"),
    "no file": (["--input=none.csv"], "--input=none.csv is no file"),
    "no law": (["--input=kyo_takano", "--law=cubic"], "--law=cubic is unknown"),
    "delta": (["--input=kyo_takano", "--delta=-1"], "--delta=-1.0 must be positive"),
    "level": (["--input=kyo_takano", "--level=95"], "--level=95.0 must be between 0 and 1"),
    "draws": (["--input=kyo_takano", "--bootstrap=5"], "--bootstrap=5"),
    "pairs": (["--input=kyo_takano", "--columns=n"], "--columns=n must be NAME:VALUE"),
    "mapped": (["--input=kyo_takano", "--columns=n:size"], "--columns=n:size is no column"),
    "ours": (["--input=kyo_takano", "--columns=size:N"], "--columns=size:... is unknown"),
    "arms": (["--input=kyo_takano", "--compare=a"], "--compare=a must name two"),
    "no arm": (["--input=kyo_takano", "--compare=a,b"], "variant 'a' is not in"),
    "idle": (["--input=kyo_takano", "--compare=a,b", "--forecast_n=1"], "does nothing"),
    "width": (["--input=x.csv", "--compare=a,b", "--delta=1e-3"], "test is by least squares"),
    "cells": (["--input=x.csv", "--compare=a,b", "--cluster=size"], "whose unit is the cell"),
    "repeats": (["--input=x.csv", "--compare=a,b", "--repetition=fit"], "and not its distinct"),
    "no n": (["--input=kyo_takano", "--forecast_d=1e9", "--bootstrap=0"], "--forecast_n"),
    "floor": (["--input=kyo_takano", "--floor=9"], "--floor=9.0 is not below"),
    "points": (["--input=kyo_takano", "--points=all"], "--points=all is unknown"),
    "unit": (["--input=kyo_takano", "--cluster=day"], "--cluster=day is unknown"),
    "out": (["--input=kyo_takano", "--out=f.txt"], "--out=f.txt must end in .json"),
    "no folder": (["--dataset=all"], "--datasets=DIR"),
    "no set": (["--dataset=x", "--datasets=."], "--dataset=x is unknown"),
    "R*": (["--input=kyo_takano", "--repetition=fit"], "'unique' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, call):
    arguments, words = BAD[name]
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert words in err and err.count("\n") == 1


def test_a_bad_table_leaves_nothing_behind(tmp_path):
    columns = grid(SIZES, TOKENS)
    columns["n"] = columns["n"] / 1e9
    table = write(tmp_path / "t.csv", columns | {"c": 6e9 * columns["n"] * columns["d"]})
    status, out, err = run("fit", f"--input={table}", f"--out={tmp_path / 'f.json'}")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "times 6 n d" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv"]
