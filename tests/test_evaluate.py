"""Evaluation and report of runs as they are, broken and unfinished."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import record, run

from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.evals import mur_stats, redundancy
from lmscale_jax.reports import pairs, run_report
from lmscale_jax.train import loop
from lmscale_jax.train.evaluation import evaluate_run
from lmscale_jax.train.run import build_run

SUITES = ["perplexity", "redundancy", "mur"]


def silent(_line):
    pass


def config_of(settings, changes):
    config = base.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(settings | {"mesh.cpu_devices": 1} | changes)
    return config


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """A directory with "base" and "loss", two finished and evaluated runs of three blocks."""
    folder = tmp_path_factory.mktemp("runs")
    more = {"model.n_layers": 3, "train.steps": 40, "optim.lr": 1e-2, "checkpoint.every": 20}
    more |= {"log.tensorboard": False, "eval.every": 0, "log.every": 20, "model.stack": "scan"}
    more |= {"eval.redundancy_every": "20", "eval.redundancy_tokens": 500}
    loss = {"mur.mode": "loss", "mur.tau": 0.2, "mur.warmup": "0"}
    for name, changes in (("base", {}), ("loss", loss)):
        loop.train(config_of(settings, more | changes), folder / name, say=silent)
        evaluate_run(folder / name, SUITES, 0, 0, silent)
    return folder


def scores(workdir) -> dict:
    return json.loads((workdir / "eval.json").read_text())


def test_eval_json_holds_the_contract(runs):
    result, final = scores(runs / "base"), record(runs / "base")["final"]
    assert result["complete"] and result["step"] == 40 and result["run_status"] == "finished"
    assert result["val_loss"] == pytest.approx(final["val_loss"], rel=1e-6)
    assert result["perplexity"] == pytest.approx(np.exp(result["val_loss"]))
    assert result["val_loss_sem"] > 0
    assert len(result["block_influence"]) == len(result["layer_drop"]) == 3
    assert all(0 < b < 2 for b in result["block_influence"])
    # At the end of training the same numbers, but for fewer tokens.
    lines = (runs / "base" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    np.testing.assert_allclose(last["block_influence"], result["block_influence"], rtol=0.2)
    for name in ("mean", "p10", "p50", "p90", "frac_below_tau", "delta_norm", "grad_norm"):
        assert len(result["mur"][name]) == len(result["mur"]["mlp"][name]) == 3
    assert result["mur"]["tokens"] == result["redundancy_tokens"] == result["val_tokens"]
    pruned = result["layer_drop_cumulative"]
    assert pruned["damage"][0] == pytest.approx(result["layer_drop"][pruned["order"][0]], rel=1e-5)
    for pair in result["rank_correlation"].values():
        assert -1 <= pair["low"] <= pair["rho"] <= pair["high"] <= 1


def test_training_in_loss_mode_logs_its_blocks(runs):
    """Null for the block that is not chosen."""
    for text in (runs / "loss" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in ("mean", "p10", "p90", "frac_below_tau", "delta_norm", "hinge"):
            assert [value is None for value in line[f"mur/{name}"]] == [True, False, True]
        assert line["mur/hinge"][1] == pytest.approx(max(0, 0.2 - line["mur/mean"][1]), rel=1e-4)
        assert len(line["layer_drop"]) == len(line["block_influence"]) == 3
    assert record(runs / "loss")["choices"]["mur"].startswith("loss: cos, blocks 1 to 1 of 3")


def test_suites_add_up(runs, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(runs / "base", workdir)
    whole = scores(workdir)
    (workdir / "eval.json").unlink()
    for suite in ("mur", "perplexity"):
        evaluate_run(workdir, [suite], 0, 0, silent)
        assert ("val_loss" in scores(workdir)) == (suite == "perplexity")
    result = scores(workdir)
    assert result["mur"] == whole["mur"] and result["val_loss"] == whole["val_loss"]
    # Of another checkpoint: the first is set aside.
    evaluate_run(workdir, ["perplexity"], 20, 0, silent)
    assert not scores(workdir)["complete"]
    assert json.loads((workdir / "eval_step_40.json").read_text()) == result


def damage(folder):
    """Overwrites part of the largest file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    largest.write_bytes(data)


def test_never_random_weights(runs, tmp_path):
    """No checkpoint, a damaged one: an error, which the command says in a line; no eval.json."""
    for name, message in (("without", "no checkpoint"), ("damaged", "cannot be read")):
        workdir = tmp_path / name
        shutil.copytree(runs / "base", workdir)
        (workdir / "eval.json").unlink()
        if name == "without":
            shutil.rmtree(workdir / "checkpoints")
        else:
            damage(workdir / "checkpoints" / "40" / "params")
        with pytest.raises(InputError, match=message):
            evaluate_run(workdir, SUITES, 0, 0, silent)
        assert not (workdir / "eval.json").exists()
    status, _, err = run("evaluate", f"--workdir={tmp_path / 'without'}")
    assert status == 2 and err.count("\n") == 1 and "no checkpoint" in err


@pytest.mark.slow
def test_commands(runs, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(runs / "base", workdir)
    (workdir / "eval.json").unlink()
    status, out, err = run("evaluate", f"--workdir={workdir}", "--tokens=500")
    assert status == 0 and "layer drop" in out and scores(workdir)["redundancy_tokens"] == 500
    damage(workdir / "checkpoints" / "40" / "params")
    for arguments in ([f"--workdir={tmp_path}"], [f"--workdir={workdir}"]):
        status, _, err = run("evaluate", *arguments)
        assert status == 2 and err.count("\n") == 1
    status, _, err = run("evaluate", f"--workdir={workdir}", "--suites=none")
    assert status == 2 and "--suites=none" in err
    pair = [f"--baseline={runs / 'base'}", f"--variant={runs / 'loss'}"]
    status, out, err = run("report", f"--workdir={tmp_path}", *pair)
    assert status == 0 and "one pair has no interval" in out, err
    assert run("report", f"--workdir={tmp_path}", pair[0])[0] == 2


def test_an_unfinished_run_is_marked(runs, tmp_path):
    workdir, lines = tmp_path / "half", []
    shutil.copytree(runs / "base", workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")
    (workdir / "eval.json").unlink()
    (workdir / "run.json").write_text(json.dumps(record(workdir) | {"status": "running"}))
    evaluate_run(workdir, ["perplexity"], 0, 0, lines.append)
    assert "is running: this is its checkpoint after step 20 of 40" in lines[0]
    result = scores(workdir)
    assert result["complete"] is False and result["step"] == 20
    page = run_report.report_run(pairs.read_run(workdir), tmp_path / "report")
    assert "is running; its evaluation is of step 20" in page.read_text()


def test_report_of_a_pair(runs, tmp_path):
    sides = [pairs.read_runs("baseline", str(runs / name)) for name in ("base", "loss")]
    matched = pairs.match_runs(*sides, "mur", allow_differences=False)
    page = run_report.report_pairs(matched, "mur", tmp_path).read_text()
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "index.html", "mur_mean.png", "mur_frac_below_tau.png", "mur_delta_norm.png",
        "mur_grad_norm.png", "bi_curve.png", "layer_drop.png", "ppl_comparison.png",
        "scaling_plot.png", "scaling_table.csv", "baseline_bi_over_training.png",
    } <= names  # fmt: skip
    change = scores(runs / "loss")["val_loss"] - scores(runs / "base")["val_loss"]
    assert f"{change:+.4f} nats" in page and "no interval" in page and "mur.mode" in page
    figures = sum(name.endswith("png") for name in names)
    assert page.count("data:image/png;base64") == figures and 'src="http' not in page


def test_report_refuses_other_differences(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "loss", other)
    changed = record(other)
    changed["config"]["schedule"]["warmup"] = "0"
    changed["config"]["optim"]["lr"] = 3e-3
    (other / "run.json").write_text(json.dumps(changed))
    plain, varied = (pairs.read_runs("x", str(path)) for path in (runs / "base", other))
    with pytest.raises(InputError) as caught:
        pairs.match_runs(plain, varied, "mur", allow_differences=False)
    message = str(caught.value)
    assert "optim.lr (0.01, 0.003)" in message and "schedule.warmup ('2%', '0')" in message
    matched = pairs.match_runs(plain, varied, "mur", allow_differences=True)
    assert (
        "More than mur differs: optim.lr"
        in run_report.report_pairs(matched, "mur", tmp_path).read_text()
    )
    with pytest.raises(InputError, match="same config, mur included"):
        pairs.match_runs(plain, plain, "mur", allow_differences=False)
    with pytest.raises(InputError, match=r"no run\.json"):
        pairs.read_runs("variant", str(tmp_path / "nowhere"))


def test_difference_over_pairs():
    """Student's interval of paired differences."""
    from scipy import stats

    def run_of(loss):
        return pairs.EvaluatedRun(None, {}, {"val_loss": loss}, [])

    base_S, change_S = np.array([3.0, 3.2, 3.1]), np.array([-0.01, 0.02, 0.01])
    difference = pairs.paired_difference(
        [pairs.RunPair(run_of(b), run_of(b + c)) for b, c in zip(base_S, change_S, strict=True)]
    )
    wanted = stats.ttest_1samp(change_S, 0)
    low, high = wanted.confidence_interval(0.95)
    assert difference["p"] == pytest.approx(wanted.pvalue)
    assert (difference["low"], difference["high"]) == pytest.approx((low, high))
    assert "no detectable difference" in run_report.difference_sentence(difference)
    same = {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "n": 5}
    assert run_report.difference_sentence(same).endswith("p = 1: no detectable difference")


@pytest.fixture(scope="module")
def model(settings):

    run = build_run(
        config_of(settings, {"model.n_layers": 4, "model.stack": "scan"}), None, say=silent
    )
    return run, jax.tree.map(lambda x: 3 * x, run.model.init(jax.random.key(0)))


def test_a_mask_drops_what_deleting_drops(model):
    """Against models whose blocks were taken out, and influence against the taps."""
    from lmscale_jax.config.resolve import resolve
    from lmscale_jax.model.build import build_model

    run, params = model
    drops = redundancy.single_blocks(4) + redundancy.contiguous_blocks(4)
    assert redundancy.contiguous_blocks(4) == [(0, 1), (1, 2), (2, 3)]
    batches = list(run.held_out(500))
    drops_of = redundancy.measure_drops(run.drop_sums, params, batches, run.mesh, 4, drops)
    assert drops_of.drops == [(), *drops] and drops_of.damage()[0] == 0
    smaller = base.get_config()
    smaller.update(run.recorded.copy_and_resolve_references())
    for drop in ((1,), (2, 3)):
        kept = jnp.array([layer for layer in range(4) if layer not in drop])
        with smaller.unlocked():
            smaller.model.n_layers = len(kept)
        other = build_model(resolve(smaller), platform="cpu", bos_id=run.data.boundary)
        left = params | {"blocks": jax.tree.map(lambda x, k=kept: x[k], params["blocks"])}
        total = sum(float(other.losses(left, *batch).sum()) for batch in batches)
        row = drops_of.drops.index(drop)
        assert drops_of.nll_MxW[row].sum() == pytest.approx(total, rel=1e-5)
    h = run.model.taps(params, batches[0].tokens_BxT, lambda name, x: x)
    h_LxNxD = jnp.concatenate([h["embed"][None], h["blocks"]["residual"]])
    lengths = jnp.linalg.norm(h_LxNxD, axis=-1)
    cos = (h_LxNxD[1:] * h_LxNxD[:-1]).sum(axis=-1) / (lengths[1:] * lengths[:-1])
    each_LxB = (1 - cos).reshape(4, *batches[0].tokens_BxT.shape).mean(axis=-1)
    rows = len(batches[0].tokens_BxT)
    np.testing.assert_allclose(drops_of.influence_LxW[:, :rows], each_LxB, rtol=1e-4, atol=1e-6)


def test_statistics_are_of_all_labelled_tokens(model):
    """Pooled over batches; the same whatever the size of a batch."""
    run, params = model
    results = []
    for size in (2, 5):
        with run.config.unlocked():
            run.config.eval.batch_size = size
        tokens = mur_stats.make_token_utilities(run.model, run.config, "block", run.mesh)
        values = mur_stats.measure_utilities(tokens, params, run.held_out(300), run.mesh, "block")
        assert len(values.window) == 300
        results.append(mur_stats.utility_summary(values, "block", 0.0))
    for name, values in results[0].items():
        np.testing.assert_allclose(values, results[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_rank_correlations():
    chance = np.random.default_rng(0)
    value_WxL = np.arange(5) + 0.1 * chance.normal(size=(40, 5))
    measures = {
        "a": lambda w: w @ value_WxL / w.sum(),
        "b": lambda w: -(w @ value_WxL) / w.sum(),
        "c": lambda w: w @ (0 * value_WxL + [3, 1, 2, 5, 4]) / w.sum(),
    }
    correlations = redundancy.rank_correlations(measures, 40)
    assert correlations["a, b"] == {"rho": -1.0, "low": -1.0, "high": -1.0}
    assert correlations["a, c"]["rho"] == pytest.approx(0.6)


def test_when_training_looks(small):
    from lmscale_jax.config.resolve import resolve

    config = small(
        train__steps=100, eval__redundancy_every="30", eval__redundancy_early="5",
        eval__redundancy_until="20",
    )  # fmt: skip
    assert sorted(redundancy.redundancy_steps(resolve(config, 256))) == [5, 10, 15, 20, 50, 80, 100]
    assert redundancy.redundancy_steps(resolve(small(), 256)) == frozenset()
    every = small(train__steps=100, eval__redundancy_every="40")
    assert sorted(redundancy.redundancy_steps(resolve(every, 256))) == [40, 80, 100]
    assert redundancy.contiguous_blocks(2) == []
