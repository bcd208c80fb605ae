"""A ladder whose losses follow a known law: plan, forecast, score and verdict without training."""

import functools
import json

import numpy as np
import pytest

from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.ladders import forecasts, machine, plan, results, scheduler, verdict, worker
from lmscale_jax.ladders.executors import EndedJob
from lmscale_jax.ladders.run import run_ladder
from lmscale_jax.reports import ladder_report as page

pytestmark = pytest.mark.usefixtures("planned_once")

FLOOR, SCALE, EXPONENT, NOISE = 1.7, 60.0, 0.09, 0.0015
REPORT = functools.partial(page.write_ladder_report, command="ladder --config=x")


def loss_of(cell, shift=0.0, offset=0.02, rng=None) -> float:
    """E + k C^-b, for swiglu with b (1 + shift), or with a smaller k."""
    better = cell.arm == "swiglu"
    c = cell.flops / 1e13
    slope = EXPONENT * (1 + shift * better)
    value = FLOOR + SCALE / 1e13**EXPONENT * (1 - offset * better) * c**-slope
    return value * (1 + (NOISE * rng.standard_normal() if rng else 0.0))


class Oracle:
    """An executor whose runs are finished at once, with the losses of a law."""

    slots = 4

    def __init__(self, workdir, law, fails=()):
        self._workdir, self._law, self._fails, self._ended = workdir, law, fails, []
        self.started = []

    def submit(self, jobs):
        ladder_plan = plan.read_plan(self._workdir)
        for job in jobs:
            self.started += job
            for name in job:
                if name not in self._fails:
                    self._write(ladder_plan.cell(name))
            status = int(any(name in self._fails for name in job))
            self._ended.append(EndedJob(job, status, "no memory" if status else ""))
        return []

    def _write(self, cell):
        directory = plan.cell_dir(self._workdir, cell.id)
        directory.mkdir(parents=True)
        final = {"val_loss": self._law(cell), "val_loss_sem": 0.01, "val_tokens": 1000}
        record = {
            "status": "finished", "final": final, "wall_seconds": 1.0, "epochs": 0.1,
            "data": {"val_fingerprint": "text"}, "versions": {"jax": "0"},
            "device": {"kind": "law", "count": 1}, "code": None,
            "throughput": {"tokens_per_second": 1e4 / (1.4 if cell.arm == "swiglu" else 1.0)},
        }  # fmt: skip
        if cell.role == "held_out":
            record["forecast"] = forecasts.fixed_hash(self._workdir)
        (directory / "run.json").write_text(json.dumps(record))
        line = json.dumps({"step": 1, "tokens": 100, "train_loss": 3.0}) + "\n"
        (directory / "metrics.jsonl").write_text(line)

    def poll(self):
        ended, self._ended = self._ended, []
        return ended

    def stop(self):
        pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(chr(32 + i * i % 90) for i in range(20_000)))
    return path


def go(config, workdir, law=loss_of, until="verdict", only=(), fails=()):
    oracle = Oracle(workdir, law, fails)
    log = []
    last = run_ladder(config, workdir, list(only), until, REPORT, log.append, lambda *_: oracle)
    return oracle, log, last


def read(path):
    return json.loads(path.read_text())


def test_from_a_law_to_a_verdict(ladder, tmp_path):
    """Files of the contract, a forecast that is scored, one HTML page without links."""
    workdir = tmp_path / "w"
    oracle, _, last = go(ladder(), workdir)
    assert "verdict: constant offset" in last
    ladder_plan = plan.read_plan(workdir)
    assert len(oracle.started) == len(set(oracle.started)) == len(ladder_plan.cells) == 36
    # The held-out rung came last, after the forecast.
    held_out = {cell.id for cell in ladder_plan.with_role("held_out")}
    assert set(oracle.started[-6:]) == held_out
    forecast = read(workdir / "forecast.json")
    for arm in ("gelu", "swiglu"):
        target = next(c for c in ladder_plan.with_role("held_out") if c.arm == arm)
        score = forecast["scores"][arm]
        assert score["inside"] and score["loss"] == pytest.approx(loss_of(target))
    judgement = read(workdir / "verdict.json")
    assert judgement["verdict"] == "constant offset" and judgement["runs"] == {"finished": 36}
    assert "a token takes swiglu 1.40 (1.40 to 1.40) times as long" in judgement["answer"]
    assert "d_ff at 100000" in judgement["differences"]["swiglu"]
    header, *lines = (workdir / "results.csv").read_text().splitlines()
    assert len(lines) == 36
    needed = "run_id variant n_total n_non_embedding tokens flops seed val_loss val_loss_sem status"
    assert set(needed.split()) <= set(header.split(","))
    html = (workdir / "report" / "index.html").read_text()
    assert "http" not in html.split("<body", 1)[-1].replace("http-equiv", "")
    assert "time of a token, swiglu / gelu" in html and judgement["answer"] in html
    assert "<script" not in html and html.count("data:image/png;base64") == 4
    assert "<pre>ladder --config=x</pre>" in html


@pytest.mark.slow
def test_nothing_is_run_or_forecast_twice(ladder, tmp_path):
    workdir = tmp_path / "w"
    go(ladder(), workdir, until="forecast")
    before = (workdir / "forecast.json").read_bytes()
    assert not (workdir / "report").exists()
    oracle, _, _ = go(ladder(), workdir)
    assert len(oracle.started) == 6
    third, _, _ = go(ladder(), workdir)
    assert third.started == []
    fixed, after = json.loads(before), read(workdir / "forecast.json")
    assert {k: after[k] for k in forecasts.FIXED} == {k: fixed[k] for k in forecasts.FIXED}


@pytest.mark.slow
def test_a_forecast_cannot_be_written_afterwards(ladder, tmp_path):
    workdir = tmp_path / "w"
    go(ladder(), workdir)
    path = workdir / "forecast.json"
    text = path.read_text()
    content = json.loads(text)
    content["arms"]["gelu"]["high"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="was changed after it was written"):
        go(ladder(), workdir)
    path.unlink()
    with pytest.raises(InputError, match="cannot be written afterwards"):
        go(ladder(), workdir)
    path.write_text(text)
    # More anchors join; what was forecast stays.
    oracle, _, _ = go(ladder(rungs__sizes=(1e5, 3e5, 6e5, 1e6, 3e6, 1e7)), workdir)
    assert len(oracle.started) == 6
    assert read(path)["arms"] == json.loads(text)["arms"]
    assert len(list((workdir / "plans").iterdir())) == 1


def test_the_held_out_rung_waits_for_the_forecast(ladder, tmp_path):
    workdir = tmp_path / "w"
    go(ladder(), workdir, only=["100k"])
    ladder_plan = plan.read_plan(workdir)
    with pytest.raises(InputError, match="is not written yet"):
        worker.train_cells(ladder_plan, ladder_plan.with_role("held_out")[:1], workdir)


def test_what_fails_is_left_out_and_tried_again(ladder, tmp_path):
    workdir, config = tmp_path / "w", ladder()
    ladder_plan = plan.make_plan(config, print)
    bad = ladder_plan.with_role("anchor")[0].id
    _, log, _ = go(config, workdir, fails={bad})
    assert any("no memory" in line for line in log)
    judgement = read(workdir / "verdict.json")
    assert judgement["runs"] == {"finished": 35, "planned": 1}
    assert judgement["left_out"] == [{"run_id": bad, "status": "planned", "why": "no memory"}]
    second, _, _ = go(config, workdir)
    assert second.started == [bad] and read(workdir / "verdict.json")["left_out"] == []
    with pytest.raises(RunFailed, match="no run finished"):
        go(ladder(rungs__held_out=0.0), tmp_path / "b", fails={c.id for c in ladder_plan.cells})


def test_each_arm_is_compared_at_its_own_best_rate(ladder, tmp_path):
    """The tuned value with the least mean loss is taken; at the edge of its grid it is said."""
    config = ladder(rungs__sizes=(1e5, 1e6, 1e7), rungs__held_out=3e7, seeds=2)
    config.tune.all = {"optim": {"lr": (1e-3, 2e-3, 4e-3)}}
    best = {"gelu": 2e-3, "swiglu": 4e-3}

    def law(cell):
        return loss_of(cell) + 0.1 * (np.log2(cell.tune["optim.lr"] / best[cell.arm])) ** 2

    oracle, _, _ = go(config, tmp_path / "w", law)
    held_out = [plan.read_plan(tmp_path / "w").cell(name) for name in oracle.started[-4:]]
    assert {(c.arm, c.tune["optim.lr"]) for c in held_out} == set(best.items())
    assert all(c.role == "held_out" for c in held_out) and len(oracle.started) == 36 + 4
    rows, warnings = results.choose_tuned(
        results.finished_rows(results.result_rows(plan.read_plan(tmp_path / "w"), tmp_path / "w"))
    )
    assert {(r["variant"], r["tune"]["optim.lr"]) for r in rows} == set(best.items())
    assert [w["code"] for w in warnings] == ["edge_of_grid"] * 3
    assert all("swiglu" in w["message"] for w in warnings)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shift"), [("change", 0.08), ("constant offset", 0.0)])
def test_how_often_the_verdict_is_right(ladder, tmp_path, kind, shift):
    """100 draws of noise: a real shift of 8 % is found in 95; an offset is taken for one in 8."""
    workdir = tmp_path / "w"
    go(ladder(), workdir)
    ladder_plan = plan.read_plan(workdir)
    rows = results.result_rows(ladder_plan, workdir)
    verdicts = []
    for draw in range(100):
        rng = np.random.default_rng([draw, int(shift * 100)])
        drawn = [
            row | {"val_loss": loss_of(cell, shift, rng=rng)}
            for row, cell in zip(rows, ladder_plan.cells, strict=True)
        ]
        verdicts.append(verdict.judge_ladder(ladder_plan, workdir, drawn, None)["verdict"])
    counts = {word: verdicts.count(word) for word in sorted(set(verdicts))}
    changes = counts.get("exponent shift", 0) + counts.get("changes with scale", 0)
    if shift:
        assert changes >= 95, counts
    else:
        assert changes <= 8, counts
        assert counts.get(kind, 0) >= 80, counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rungs__held_out": 5e6}, "held_out=5e+06 is not beyond the anchors, which reach 1e+07"),
        ({"tokens__held_out": 1.0}, "within the anchors' range"),
        ({"rungs__sizes": (1e5, 2.2e2)}, "must be positive numbers, smallest first"),
        ({"rungs__sizes": (10.0,)}, "the nearest has"),
        ({"switch": ("optim.lr",)}, "config.arms.swiglu sets model.mlp, so the arms differ"),
        ({"baseline": "relu"}, "config.baseline='relu' is not an arm (gelu, swiglu)"),
        ({"seeds": 0}, "config.seeds=0 must be at least 1"),
        ({"tune__optim__lr": (1.0, 2.0)}, "use config.tune.all.optim to try it in every arm"),
        ({"rungs__bi": 1}, "config.rungs.bi is not a key"),
        ({"executor__workers": 99}, "workers=99 of 1 core(s) need more than the"),
        ({"max_hours": 1e-9}, "config.max_hours=1e-09 is less than the"),
        ({"tokens__trunk": "shared"}, "use 'wsd'"),
        ({"run__model__d_modle": 1}, "did you mean model.d_model"),
    ],
)
def test_bad_input_is_refused_in_one_line(ladder, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        go(ladder(**changes), tmp_path / "w")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_two_ladders_that_disagree(ladder, tmp_path):
    workdir = tmp_path / "w"
    go(ladder(), workdir, only=["100k"])
    with pytest.raises(InputError, match=r"disagrees: run\.optim\.lr is 0\.001 there"):
        go(ladder(run__optim__lr=0.5), workdir)
    other = ladder()
    other.arms.swiglu.model.mlp = "geglu"
    with pytest.raises(InputError, match="arm 'swiglu' is"):
        go(other, workdir)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files but no plan\.json"):
        go(ladder(), tmp_path / "x")


@pytest.mark.slow
def test_two_ladders_share_the_cells_they_have_in_common(ladder, tmp_path):
    """More seeds and another arm: only what is new is run."""
    workdir = tmp_path / "w"
    first, _, _ = go(ladder(seeds=1, rungs__held_out=0.0), workdir)
    assert len(first.started) == 10
    larger = ladder(seeds=2, rungs__held_out=0.0)
    larger.arms.relu2 = {"model": {"mlp": "relu2"}}
    second, _, last = go(larger, workdir)
    assert len(second.started) == 20 and not set(first.started) & set(second.started)
    assert "relu2" in last and "swiglu" in last


@pytest.mark.slow
def test_a_run_that_diverges_is_recorded_and_the_rest_go_on(ladder, tmp_path):
    class Diverging(Oracle):
        def _write(self, cell):
            super()._write(cell)
            if cell.id == bad:
                path = plan.cell_dir(self._workdir, cell.id) / "run.json"
                fields = json.loads(path.read_text()) | {"status": "diverged", "final": {}}
                path.write_text(json.dumps(fields))

    config, workdir = ladder(seeds=2), tmp_path / "w"
    bad = plan.make_plan(config, print).with_role("anchor")[0].id
    oracle = Diverging(workdir, loss_of)
    run_ladder(config, workdir, [], "verdict", REPORT, lambda line: None, lambda *_: oracle)
    judgement = read(workdir / "verdict.json")
    assert judgement["runs"] == {"diverged": 1, "finished": 23}
    assert [run["run_id"] for run in judgement["left_out"]] == [bad]
    assert "it diverged" in (workdir / "report" / "index.html").read_text()
    # It would diverge again.
    second, _, _ = go(config, workdir)
    assert second.started == []


def test_several_budgets_branch_off_one_trunk(ladder, tmp_path):
    """Trunks go first; a branch has its own cooldown and its trunk's seed, rate and warm-up."""
    config = ladder(
        tokens__trunk="shared", tokens__rule="budgets", tokens__amounts=(2e6, 4e6, 8e6),
        run__schedule__name="wsd", rungs__sizes=(1e5, 3e5), rungs__held_out=1e6, seeds=1,
    )  # fmt: skip
    oracle, _, _ = go(config, tmp_path / "w")
    ladder_plan = plan.read_plan(tmp_path / "w")
    trunks, branches = ladder_plan.with_role("trunk"), ladder_plan.with_role("anchor")
    assert len(trunks) == 4 and len(branches) == 12 and all(cell.needs for cell in branches)
    assert set(oracle.started[:4]) == {cell.id for cell in trunks}
    for cell in branches:
        trunk, settings = ladder_plan.cell(cell.needs), ladder_plan.config(cell, tmp_path / "w")
        shared = ladder_plan.config(trunk, tmp_path / "w")
        assert (cell.arm, cell.size, cell.seed) == (trunk.arm, trunk.size, trunk.seed)
        assert settings.train.parent_step % shared.checkpoint.keep_every == 0
        assert settings.train.parent_step <= shared.train.steps
        assert settings.schedule.warmup == shared.schedule.warmup
        cooldown = int(settings.schedule.cooldown)
        assert settings.train.parent_step + cooldown == settings.train.steps
        assert 0.15 < cooldown / settings.train.steps < 0.25
        assert abs(cell.tokens / cell.budget - 1) < 0.15
    held_out = ladder_plan.with_role("held_out")
    assert {(cell.needs, cell.budget) for cell in held_out} == {("", 8e6)}


def test_the_table_on_a_terminal_redraws_itself(ladder, tmp_path, capsys, monkeypatch):
    import sys

    from lmscale_jax.ladders.scheduler import CellTable

    go(ladder(), tmp_path / "w", until="forecast")
    ladder_plan = plan.read_plan(tmp_path / "w")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "150")
    table = CellTable(ladder_plan, ladder_plan.with_role("anchor"), tmp_path / "w", print)
    table.show()
    table.close()
    # Once more, in its own place.
    out = capsys.readouterr().err
    assert "\x1b[" in out and "30 of 30" in out and "held out" in out
    assert all(len(line) < 170 for line in out.splitlines())


def test_small_models_are_packed_where_it_pays(ladder, monkeypatch):
    """On CPU up to four of the narrowest; never fewer jobs than processes; equal shapes only."""
    monkeypatch.setattr(machine, "runs_on_cpu", lambda: True)
    config = ladder(
        rungs__by="width", rungs__sizes=(16.0, 32.0, 64.0), rungs__held_out=0.0,
        rungs__match="none", rungs__aspect=64.0, rungs__head_dim=64, seeds=8,
    )  # fmt: skip
    config.run.model.d_model, config.run.model.n_heads, config.run.model.n_layers = 16, 2, 1
    ladder_plan = plan.make_plan(config, print)

    def lengths(slots, mode="auto"):
        ladder_plan.ladder["pack"]["mode"] = mode
        jobs = scheduler.pack_jobs(ladder_plan, ladder_plan.cells, slots)
        packs = [[ladder_plan.cell(name) for name in job] for job in jobs]
        ids = sorted(cell.id for cell in ladder_plan.cells)
        assert sorted(cell.id for cells in packs for cell in cells) == ids
        assert all(len({(c.arm, c.size) for c in cells}) == 1 for cells in packs)
        return {s: max(len(cells) for cells in packs if cells[0].size == s) for s in (16, 32, 64)}

    assert lengths(2) == {16: 4, 32: 4, 64: 1}
    assert lengths(2, "always") == {16: 8, 32: 8, 64: 8}
    assert lengths(24) == {16: 2, 32: 2, 64: 1}
    assert lengths(2, "never") == {16: 1, 32: 1, 64: 1}

    # On an accelerator those whose steps are short: all of these, and none of longer steps.
    monkeypatch.setattr(machine, "runs_on_cpu", lambda: False)
    assert lengths(2) == {16: 8, 32: 8, 64: 8}
    ladder_plan.ladder["run"]["train"]["batch_size"] = 2**18
    assert lengths(2) == {16: 1, 32: 1, 64: 1}
