"""Guards of a ladder: what a fault does, what is remembered, a user's code, the page."""

import json
from pathlib import Path

import pytest
from conftest import run
from test_guards import arm_of
from test_ladder_verdict import go, loss_of

from lmscale_jax.config.ladder_keys import LADDER
from lmscale_jax.config.own_keys import adopted
from lmscale_jax.config.resolve import apply_overrides
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError, RunFailed
from lmscale_jax.guards import process, record, shrink
from lmscale_jax.guards.arm import Finding, SmallArm
from lmscale_jax.guards.table import ACTIONS, GUARDS, run_guard
from lmscale_jax.ladders import plan

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {name: key.default for name, key in LADDER["guards"].items()}


def judged(fault: Finding, **settings) -> list:
    findings = {name: Finding()._asdict() | {"seconds": 1.0} for name in GUARDS}
    findings["causality"] |= fault._asdict()
    return record.judgements(
        {"arms": {"poly": {"findings": findings}}}, SETTINGS | settings, ["poly"]
    )


def test_the_settings_decide_what_a_fault_does():
    leak = Finding("the model sees the future")
    with pytest.raises(InputError, match="arm poly: the model sees the future; or --config"):
        record.refuse(judged(leak))
    warned = judged(leak, causality="warn")
    record.refuse(warned)
    assert record.summary(warned) == ["arm poly: the model sees the future (guard causality)"]
    skipped = judged(leak, causality="skip")
    record.refuse(skipped)
    assert record.summary(skipped) == ["skipped causality: config.guards.causality='skip' (poly)"]


def test_every_guard_has_a_key_and_an_action():
    assert set(LADDER["guards"]) == {"mode", *ACTIONS}
    refusing = {name for name in ACTIONS if ACTIONS[name][SETTINGS[name]].stops}
    assert ACTIONS.keys() - refusing == {"coordinates", "cost", "stack"}


def test_findings_are_remembered_for_a_config_and_the_code(monkeypatch, tmp_path):
    """Guards run once; another setting or another arm does not run them again."""
    asked = []

    def answer(arms, baseline, say):
        asked.append({arm.name: arm.guards for arm in arms})
        empty = Finding()._asdict() | {"seconds": 0.5}
        return {arm.name: {guard: empty for guard in arm.guards} for arm in arms}

    monkeypatch.setattr(record, "check_in_process", answer)
    gelu, swiglu = base.get_config(), apply_overrides(base.get_config(), {"model.mlp": "swiglu"})

    def check(**arms):
        path, settings = tmp_path / "guards.json", SETTINGS | {"cost": "skip"}
        return record.check_arms(arms, {}, "gelu", 512, settings, path, lambda line: None)

    check(gelu=gelu)
    check(gelu=gelu)
    check(gelu=gelu, swiglu=swiglu)
    assert [len(guards) for guards in asked[0].values()] == [len(GUARDS) - 1]
    assert [{name: len(g) for name, g in each.items()} for each in asked[1:]] == [
        {"gelu": 0, "swiglu": len(GUARDS) - 1}
    ]
    monkeypatch.setattr(record, "code_hash", lambda: "another")
    check(gelu=gelu, swiglu=swiglu)
    assert len(asked) == 3 and all(asked[2].values())
    assert json.loads((tmp_path / "guards.json").read_text())["code"] == "another"


LADDER_OF_CODE = """
from lmscale_jax.configs import laddering, quickstart

def get_config():
    run = quickstart.get_config()
    run.data.source, run.data.path, run.data.tokenizer = "text", {corpus!r}, "bytes"
    run.data.cache, run.data.vocab_size = {cache!r}, 4096
    c = laddering.get_config(run)
    c.question, c.baseline, c.switch = "Which?", "gelu", ("model.mlp",)
    c.arms = {{"gelu": {{}}, "leaky": {{"model": {{"mlp": "{example}"}}}}}}
    c.rungs.by, c.rungs.sizes = "width", (32.0, 64.0)
    for name in ("gradients", "stack", "accumulation", "devices", "counts", "difference",
                 "repeat", "cost"):
        c.guards[name] = "skip"
    return c
"""


def test_a_ladder_with_code_that_sees_the_future_is_refused(corpus, tmp_path):
    """Before anything is trained, in one line; and again from the record."""
    example = f"{EXAMPLES}/leaky_shift.py:LeakyShift"
    text = LADDER_OF_CODE.format(corpus=str(corpus), cache=str(tmp_path / "cache"), example=example)
    (tmp_path / "ladder.py").write_text(text)
    arguments = ["ladder", f"--config={tmp_path / 'ladder.py'}", f"--workdir={tmp_path / 'w'}"]
    for _ in range(2):
        status, out, err = run(*arguments)
        assert (status, err) == (
            2,
            "error: arm leaky: the logits at position 0 depend on the token at position 1 (block "
            "0, through mlp, leaky_shift.py:LeakyShift): the model sees the future; let position "
            "t read positions up to t alone; or --config.guards.causality=warn\n",
        )
    assert "checking" not in out
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == [".lock", "guards.json"]


OVER_DEVICES = """
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from lmscale_jax.api import Dense, nnx
from lmscale_jax.model.sharding import TOKENS

class Reshaped(nnx.Module):
    def __init__(self, model, settings):
        self.up = Dense({"embed": model.d_model}, {"mlp": model.d_ff}, model.bias)
        self.down = Dense({"mlp": model.d_ff}, {"embed": model.d_model}, model.bias, residual=True)

    def mixed(self, x_NxD, context):
        x_BxTxD = x_NxD.reshape(context.batch, context.length, -1)
        before_BxTxD = jnp.pad(x_BxTxD[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return (x_BxTxD + before_BxTxD).reshape(x_NxD.shape)

    def __call__(self, x_NxD, context):
        return self.down(jnp.tanh(self.up(self.mixed(x_NxD, context), context)), context)

class Local(Reshaped):
    def mixed(self, x_NxD, context):
        centred = lambda x: x - x.mean(axis=0)
        if context.sharding.mesh is not None:
            centred = context.sharding.shard(centred, (P(TOKENS, None),), P(TOKENS, None))
        return centred(x_NxD)
"""


@pytest.mark.slow
def test_devices(tmp_path):
    """In a process of eight devices, which gets the user's code."""
    (tmp_path / "mixed.py").write_text(OVER_DEVICES)
    arms = []
    for name in ("Reshaped", "Local"):
        config = base.get_config()
        config.model.mlp = f"{tmp_path}/mixed.py:{name}"
        small = shrink.shrink(adopted(config), 1, shrink.VOCAB)
        arms.append(process.ArmRequest(name, small.to_dict(), None, 0, ["devices"]))
    lines = []
    findings = process.check_in_process(arms, None, lines.append)
    reshaped, local = (findings[name]["devices"]["fault"] for name in ("Reshaped", "Local"))
    assert "under mesh.sequence=2 the" in reshaped and "not reshape" in reshaped
    assert "under mesh.data=2 the" in local
    assert len(lines) == 1 and "FAULT in Reshaped, Local" in lines[0]


def test_devices_are_not_checked_without_devices():
    assert "this process has 1 device(s), not 8" in run_guard("devices", arm_of(), None).skipped


@pytest.mark.slow
def test_the_example_passes_and_its_off_is_relu2(tmp_path):
    config = base.get_config()
    config.model.norm, config.model.positions = "rmsnorm", "rope"
    config.model.mlp = f"{EXAMPLES}/poly.py:PolyMLP"
    config = adopted(config)
    assert config.own.poly.share == "learned"
    arm = SmallArm("poly", shrink.shrink(config, 1, shrink.VOCAB))
    for mlp, note in (("relu2", "OFF equals the baseline"), ("gelu", "equals model.mlp='relu2'")):
        finding = run_guard("difference", arm, arm_of(mlp, model__mlp=mlp))
        assert finding.fault == "" and note in finding.note
    quick = [name for name in GUARDS if name not in ("devices", "cost", "difference")]
    assert {run_guard(name, arm, None).fault for name in quick} == {""}


def test_an_arm_that_is_too_good_to_be_true_stops_the_ladder(ladder, tmp_path):
    """A nat below the other arm, once a rung has ended: no further rung is trained."""

    def law(cell):
        return loss_of(cell) - 1.1 * (cell.arm == "swiglu")

    config, workdir = ladder(), tmp_path / "w"
    with pytest.raises(RunFailed, match=r"arm swiglu reaches .* nats at 100k where gelu, the"):
        go(config, workdir, law)
    records = len(list(workdir.glob("runs/*/run.json")))
    assert records < len(plan.read_plan(workdir).cells)
    config.guards.held_out = "warn"
    _, log, last = go(config, workdir, law)
    assert "verdict" in last
    assert sum("it probably sees its targets" in line for line in log) >= 1
    assert "it probably sees its targets" in (workdir / "report/index.html").read_text()


def test_the_page_shows_what_the_guards_found(ladder, tmp_path):
    """Also what they warn of, and those that were skipped."""
    config, workdir = ladder(), tmp_path / "w"
    workdir.mkdir()
    finding = {"fault": "", "note": "", "skipped": "", "seconds": 1.0}
    findings = {
        "causality": finding | {"note": "exact over 120 pairs"},
        "cost": finding | {"fault": "1.42 x step time"},
        "devices": finding | {"skipped": "this process has 1 device"},
    }
    arms = {arm: {"id": "", "findings": findings} for arm in ("gelu", "swiglu")}
    (workdir / "guards.json").write_text(json.dumps({"arms": arms}))
    go(config, workdir)
    html = (workdir / "report/index.html").read_text()
    assert "exact over 120 pairs" in html and "this process has 1 device" in html
    assert "Guard cost, arm swiglu: 1.42 x step time" in html
