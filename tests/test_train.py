"""What a run leaves behind, and how it behaves when things go wrong."""

import json
import math

import pytest
from conftest import finish, record, run


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    """(workdir, stdout) of a finished small run."""
    from conftest import flags, start

    workdir = tmp_path_factory.mktemp("runs") / "done"
    more = settings | {"train.steps": 400, "optim.lr": 1e-2, "eval.every": 100, "log.every": 20}
    more |= {"checkpoint.every": 40, "checkpoint.keep": 2, "checkpoint.keep_every": 160}
    process = start("main", "--config=configs/base.py", f"--workdir={workdir}", *flags(more))
    status, out, err = finish(process)
    assert status == 0, err
    return workdir, out


def test_record_holds_the_contract(done):
    workdir, _ = done
    run_json = record(workdir)
    assert run_json["status"] == "finished"
    assert run_json["counts"]["total"] == sum(
        math.prod(row["shape"])
        for row in json.loads((workdir / "parametrization.json").read_text())
    )
    counts = run_json["counts"]
    assert counts["total"] == counts["embedding"] + counts["non_embedding"]
    assert run_json["tokens"] == 400 * 8 * 32
    assert run_json["flops_total"] == run_json["flops_per_token"] * run_json["tokens"]
    assert run_json["epochs"] == pytest.approx(
        run_json["tokens"] / run_json["data"]["train_tokens"], rel=0.01
    )
    final = run_json["final"]
    assert final["perplexity"] == pytest.approx(math.exp(final["val_loss"]))
    # One byte a token, so bits per byte is the loss in bits, but for document marks.
    assert final["bits_per_byte"] == pytest.approx(final["val_loss"] / math.log(2), rel=0.01)
    assert final["val_tokens"] == 2000 and final["val_loss_sem"] > 0
    assert run_json["throughput"]["tokens_per_second"] > 0
    assert run_json["throughput"]["mfu"] is None
    for field in ("seed", "wall_seconds", "versions", "device", "config_hash", "code", "started"):
        assert field in run_json
    assert len(run_json["data"]["fingerprint"]) == len(run_json["data"]["val_fingerprint"]) == 64


def test_it_learns_and_beats_the_unigram(done):
    run_json = record(done[0])
    assert run_json["final"]["val_loss"] < run_json["baselines"]["unigram"] - 0.1


def test_metrics_lines(done):
    workdir, _ = done
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, 401, 20))
    for line in lines:
        assert line["tokens"] == line["step"] * 256
        assert {"train_loss", "lr", "grad_norm"} <= line.keys()
        for name in ("grad_norm_layers", "param_norm_layers", "update_norm_layers"):
            assert len(line[name]) == 2 and all(v > 0 for v in line[name])
        assert ("val_loss" in line) == (line["step"] % 100 == 0)
    norms = lines[0]
    parts = [*norms["grad_norm_layers"], norms["grad_norm_embed"], norms["grad_norm_readout"]]
    assert math.hypot(*parts) == pytest.approx(norms["grad_norm"], rel=1e-5)


def test_files_and_closing_lines(done):
    workdir, out = done
    for name in ("loss.png", "layers.png"):
        assert (workdir / "plots" / name).read_bytes()[:4] == b"\x89PNG"
    assert list((workdir / "tb").glob("events.*"))
    # The last two, and the multiples of keep_every.
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"160", "320", "360", "400"}
    last = out.strip().splitlines()[-5:]
    assert "unigram" in last[0] and "bigram" in last[1]
    assert "this run" in last[2] and "bits per byte" in last[3] and "plots" in last[4]
    assert "sample" in out


def test_event_files_hold_the_metrics(done):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(done[0] / "tb"))
    events.Reload()
    lines = (done[0] / "metrics.jsonl").read_text().splitlines()
    wanted = [json.loads(line)["train_loss"] for line in lines]
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx(wanted, rel=1e-6)


def test_generate(done):
    workdir, _ = done
    arguments = [f"--workdir={workdir}", "--prompt=import ", "--tokens=40"]
    first = run("generate", *arguments)
    second = run("generate", *arguments, "--temperature=0")
    assert first[0] == second[0] == 0, first[2]
    assert first[1].startswith("import ") and first[1] != second[1]
    assert run("generate", *arguments, "--temperature=0")[1] == second[1]
    status, _, err = run("generate", "--workdir=nowhere")
    assert status == 2 and err.count("\n") == 1


def test_divergence_is_recorded(train, tmp_path):
    workdir = tmp_path / "diverged"
    changes = {"optim__lr": 1e30, "optim__max_bad_steps": 3, "train__steps": 30}
    status, _out, err = finish(train(workdir, **changes))
    assert status == 1 and err.count("\n") == 1 and "diverged" in err
    assert record(workdir)["status"] == "diverged"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped"] >= 1


def test_a_batch_without_labels_is_no_bad_step(small):
    """A gradient of zero, not 0 / 0."""
    from lmscale_jax.data.batches import Batch
    from lmscale_jax.train.run import build_run
    from lmscale_jax.train.setup import TrainStep

    run = build_run(small(), None, say=lambda line: None)
    tokens_BxT, targets_BxT = run.batches.at(0)
    _, metrics = TrainStep(run)(run.begin(), Batch(tokens_BxT, targets_BxT * 0 - 1))
    assert float(metrics["train_loss"]) == 0 and int(metrics["bad"]) == 0


def test_evaluation_does_not_depend_on_the_batch(small):
    import jax

    from lmscale_jax.train.run import build_run

    results = []
    for size in (1, 3, 64):
        run = build_run(small(eval__batch_size=size), None, say=lambda line: None)
        params = run.model.init(jax.random.key(0))
        results.append(run.validate(params))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-6)
