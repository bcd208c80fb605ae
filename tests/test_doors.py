"""A key means the same through every door: single runs, packs, populations, coordinate checks, and
four devices.

`settings_of` makes configs that together have every choice of every key that has choices, as in
`test_modes`, and another number than the default for every other key of a program. Each is
trained for a few steps through every door; the losses are those of the single run.
"""

import json
import random

import pytest
import simulated
from test_modes import PROGRAM, REFUSED, SMALL, settings

from lmscale_jax.config.keys import keys
from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs import base
from lmscale_jax.errors import InputError
from lmscale_jax.ladders import pack
from lmscale_jax.model.mesh import put_batch
from lmscale_jax.train.run import OpenRun, build_run
from lmscale_jax.train.setup import TrainStep

KEYS = dict(keys())
# Another value than the default for each key without named choices that a program depends on.
NUMBERS = {
    "seed": 3, "model.n_layers": 3, "model.d_model": 48, "model.n_heads": 2,
    "model.n_kv_heads": 2, "model.head_dim": 16, "model.d_ff": 40, "model.norm_eps": 0.1,
    "model.bias": True, "model.rope_theta": 7.0, "model.max_seq_len": 20,
    "model.logit_softcap": 2.0, "model.vocab_multiple": 64, "model.ids": 258, "model.window": 5,
    "model.window_block": 4, "model.window_growth": "4", "model.value_embeddings": 1,
    "model.attention_skip": "1", "model.gate_bias": True, "model.gate_bias_init": 1.0,
    "model.dropout": 0.2,
    "parametrization.base_width": 16, "parametrization.base_depth": 2,
    "parametrization.base_head_dim": 16, "parametrization.base_d_ff": 48,
    "parametrization.depth_exponent": 0.5, "parametrization.embed_scale": 3.0,
    "parametrization.attention_scale": 3.0, "parametrization.output_scale": 3.0,
    "parametrization.embed_lr_exponent": -0.5, "parametrization.init_std": 0.05,
    "parametrization.embed_std": 0.1, "optim.lr": 0.003, "optim.embed_lr_factor": 3.0,
    "optim.head_lr_factor": 3.0, "optim.vector_lr_factor": 3.0, "optim.beta1": 0.5,
    "optim.beta2": 0.5, "optim.eps": 1e-3, "optim.momentum": 0.5, "optim.momentum_start": 0.5,
    "optim.momentum_warmup": "2", "optim.muon_lr": 0.05, "optim.muon_beta2": 0.5,
    "optim.weight_decay": 0.05, "optim.block_lr_decay": 0.5, "optim.ema_decay": 0.5,
    "optim.clip": 0.1, "schedule.warmup": "2", "schedule.cooldown": "39", "schedule.final": 0.5,
    "freeze.blocks": "1", "freeze.count": 2, "freeze.near_input": 0.5, "freeze.every": "1",
    "freeze.seed": 1, "mur.eps": 0.05, "mur.start": 0.0, "mur.end": 1.0, "mur.first_block": 0,
    "mur.last_block": 3, "mur.tau": 0.7, "mur.lambda_max": 3.0, "mur.alpha": 3.0, "mur.decay": 0.5,
    "mur.warmup": "0", "mur.ramp": "0", "mur.sample_k": 4, "mur.top_share": 0.5, "train.accum": 2,
}  # fmt: skip
# Keys that decide no loss of a step, or whose value here is part of every config.
ELSEWHERE = {
    "model.vocab_size": "the tokenizer's here",
    "optim.max_bad_steps": "ends a run; tests/test_train.py",
    "parametrization.rule": "takes a user's code alone; tests/test_examples.py",
    "train.steps": "40 here, and traced",
    "train.tokens": "another name for train.steps",
    "train.batch_size": "4 here",
    "train.parent": "refused by populations; tests/test_branch.py",
    "train.parent_step": "as train.parent",
}
# What changes rounding too much to stand beside other choices, with its tolerance.
ROUNDING = {
    ("model.dtype", "bfloat16"): 4e-3,
    ("optim.muon_dtype", "bfloat16"): 2e-3,
}
# Configs that the choices are spread over, so that they do not hide each other's effect.
COUNT = 5
STEPS = 3


def items() -> list[tuple]:
    """Every (key, value other than the default) that some program on a CPU can have."""
    named = [
        (path, choice)
        for path in PROGRAM
        for choice in KEYS[path].choices
        if choice != KEYS[path].default and (path, choice) not in REFUSED
    ]
    return named + list(NUMBERS.items())


def config_of(changes: dict):
    config = base.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict(COMMON | changes)
    return config


COMMON = {k: v for k, v in SMALL.items() if k != "model.vocab_size"} | {
    "data.source": "jsonl", "data.path": "texts.jsonl", "data.tokenizer": "bytes",
    "data.val_fraction": 0.2, "optim.lr": 0.01,
    "optim.weight_decay": 0.01, "schedule.warmup": "0", "mesh.cpu_devices": 1, "eval.tokens": 200,
}  # fmt: skip


def fits(changes: dict) -> bool:
    try:
        resolve(config_of(changes), 257)
    except InputError:
        return False
    return True


def settings_of() -> list[dict]:
    """Few configs that together have all `items`, evenly, as changes of COMMON."""
    alone, configs = [needs(*item) for item in ROUNDING], [{} for _ in range(COUNT)]
    for item in items():
        more = needs(*item)
        if item in ROUNDING or any(more.items() <= changes.items() for changes in configs):
            continue
        for changes in sorted(configs, key=len):
            agree = all(changes.get(path, value) == value for path, value in more.items())
            if agree and fits(changes | more):
                changes |= more
                break
        else:
            configs.append(more)
    return alone + configs


def needs(path: str, value) -> dict:
    """What a config with that value must have beside COMMON."""
    changes = settings(path, value)
    return {k: v for k, v in changes.items() if k not in SMALL or SMALL[k] != v}


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    """Documents of a few letters, so that each window of 16 bytes holds several."""
    rng, folder = random.Random(1), tmp_path_factory.mktemp("doors")
    texts = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(600)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder / "texts.jsonl"


@pytest.fixture
def run_of(corpus_path):
    """Makes the run of a config, with data and without a directory."""

    def build(changes: dict):
        config = config_of(changes)
        config.data.path, config.data.cache = str(corpus_path), str(corpus_path.parent / "cache")
        return build_run(config, corpus_path.parent / "run", say=lambda line: None)

    return build


CONFIGS = settings_of()
SLOW = [config for config in CONFIGS if len(config) < 12]  # few choices, each with much rounding


@pytest.mark.parametrize(
    "changes",
    [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CONFIGS],
    ids=range(len(CONFIGS)),
)
def test_a_pack_trains_what_single_runs_do(run_of, changes):
    runs = [run_of(changes), run_of(changes | {"optim.lr": 0.02})]
    run, losses, packed = runs[0], [], []
    state, take = run.begin(), TrainStep(run)
    members = pack.Pack([OpenRun(run, None, None) for run in runs], print)
    states = members._population.begin()
    for t in range(STEPS):
        state, metrics = take(state, put_batch(run.batches.at(t), run.mesh))
        losses.append(float(metrics["train_loss"]))
        states, metrics = members._population.advance(states, members._read(t, t + 1))
        packed.append(float(metrics["train_loss"][0, 0]))
    assert packed == pytest.approx(losses, rel=tolerance(changes))


ALIKE = """
from lmscale_jax.data.batches import Batch
from lmscale_jax.model.mesh import one_device_mesh, put_batch
from lmscale_jax.sweeps.coord_check import measure_coordinates

rng = np.random.default_rng(0)


def losses_of(setup, batch):
    state, take, losses = setup.begin(), TrainStep(setup), []
    for _ in range(2):
        state, metrics = take(state, put_batch(batch, setup.mesh))
        losses.append(float(metrics["train_loss"]))
    return losses


for changes in argument:
    # XLA for CPUs aborts on sums of bfloat16 over devices.
    axes = {} if changes.get("model.dtype") else {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 1}
    over_mesh = setup(changes | axes)
    config = over_mesh.config
    shape = (config.train.batch_size, config.data.seq_len + 1)
    tokens = rng.integers(0, 64, shape).astype(np.int32)
    tokens[:, ::5] = 0
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    alone = build_setup(config, 0, one_device_mesh())
    checked = measure_coordinates(alone, batch, [config.seed], steps=2)["loss"][:, 0]
    each = losses_of(alone, batch), losses_of(over_mesh if axes else alone, batch), checked.tolist()
    print(json.dumps(each), flush=True)
"""


@pytest.mark.slow
def test_a_coordinate_check_and_four_devices_train_what_one_device_does(tmp_path):
    more = {"mesh.cpu_devices": 4, "data.cache": str(tmp_path), "model.vocab_size": 320}
    lines = simulated.run(ALIKE, [COMMON | changes | more for changes in CONFIGS]).splitlines()
    for changes, line in zip(CONFIGS, lines, strict=True):
        alone, over_mesh, checked = json.loads(line)
        assert checked == pytest.approx(alone, rel=tolerance(changes)), changes
        assert over_mesh == pytest.approx(alone, rel=10 * tolerance(changes)), changes


def test_every_key_of_a_program_has_another_value_here():
    groups = ("seed", "model", "parametrization", "optim", "schedule", "freeze", "mur", "train")
    wanted = {p for p, key in KEYS.items() if key.identity and p.split(".")[0] in groups}
    assert wanted <= {*PROGRAM, *NUMBERS, *ELSEWHERE}


def tolerance(changes: dict) -> float:
    return max([2e-6, *(near for item, near in ROUNDING.items() if item in changes.items())])
