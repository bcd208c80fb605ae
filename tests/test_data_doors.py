"""Every command that takes data: from bare shards, and from a glob of a prepared directory."""

import json
import shutil

import gpt2_shards
import numpy as np
import pytest
from conftest import record

from lmscale_jax.configs import base, coord_check, laddering, lr_transfer, speedrun_record26
from lmscale_jax.configs.ladders import families, gelu_vs_swiglu
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError
from lmscale_jax.ladders import pack, preview
from lmscale_jax.ladders.plan import make_plan
from lmscale_jax.model import sampling
from lmscale_jax.reports import final_summary
from lmscale_jax.sweeps import coord_check as coordinates
from lmscale_jax.sweeps import lr_transfer as transfer
from lmscale_jax.train import evaluation, explain, loop, restore


def quiet(_):
    pass


@pytest.fixture(scope="module")
def forms(corpus, tmp_path_factory):
    """The same shards without their manifest and with it: {form: `data` and `model` keys}."""
    root = tmp_path_factory.mktemp("forms")
    data = base.get_config().data
    data.update(source="text", path=str(corpus), tokenizer="bytes", val_fraction=0.2)
    prepare.prepare_directory(data, root / "prepared", log=quiet)
    (root / "bare").mkdir()
    for path in (root / "prepared").glob("*.bin"):
        shutil.copy(path, root / "bare")
    shared = {"data.source": "bin", "data.cache": str(root / "cache")}
    return {
        "glob": shared | {"data.path": f"{root}/prepared/*.bin"},
        "bare": shared
        | {"data.path": f"{root}/bare/*.bin", "model.vocab_size": 257, "data.document_mark": 256},
    }


def make(config, form: dict, **changes):
    small = {
        "model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "data.seq_len": 16,
        "train.batch_size": 4, "train.steps": 3, "eval.tokens": 64, "eval.sample": 4,
    }  # fmt: skip
    named = {k.replace("__", "."): v for k, v in changes.items()}
    config.update_from_flattened_dict(small | form | named)
    return config


def train(form, tmp_path):
    """main, evaluate and generate."""
    config = make(base.get_config(), form, model__mask="document")
    final_summary.show_final_summary(loop.train(config, tmp_path / "run", say=quiet), say=quiet)
    evaluation.evaluate_run(tmp_path / "run", ["perplexity"], 0, 0, quiet)
    loaded = restore.load_run(tmp_path / "run")
    ids = sampling.sample(
        loaded.run.model.logits, loaded.params, [loaded.run.data.boundary], 4, length=16,
        vocab_size=257,
    )  # fmt: skip
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())
    return record(tmp_path / "run")["final"]["val_loss"], scores["val_loss"], list(ids)


def page(form, tmp_path):
    """The tokens and epochs of --explain."""
    pages = []
    explain.explain(make(base.get_config(), form), {}, "configs/base.py", print=pages.append)
    return [row for row in pages[0].split("\n") if row.strip().startswith(("epochs", "prepared"))]


def check(form, tmp_path):
    config = make(coord_check.get_config(), form, model__mask="document", train__steps=2)
    plan = coordinates.plan_sizes(config, "width", [16, 32, 64])
    return coordinates.check_coordinates(plan, 1, tmp_path / "check", quiet)["losses"]


def sweep(form, tmp_path):
    config = make(lr_transfer.get_config(), form, parametrization__base_width=16)
    result = transfer.sweep_rates(config, [16, 32], [-7.0, -6.0, -5.0], 1, tmp_path / "w", quiet)
    return [arm["val_loss"] for arm in result["arms"].values()]


def packed(form, tmp_path):
    members = [
        (make(base.get_config(), form, seed=seed, eval__sample=0), tmp_path / f"{seed}")
        for seed in (0, 1)
    ]
    pack.run_pack(members, say=quiet)
    return [record(workdir)["final"]["val_loss"] for _, workdir in members]


def ladder(form, tmp_path):
    config = laddering.get_config(make(base.get_config(), form))
    config.arms, config.baseline = {"gelu": {}, "relu2": {"model": {"mlp": "relu2"}}}, "gelu"
    config.switch, config.seeds = ("model.mlp",), 1
    config.rungs.by, config.rungs.sizes, config.rungs.held_out = "width", (8.0, 16.0), 32.0
    plan = make_plan(config, quiet)
    table = preview.preview_table(plan, plan.cells, tmp_path, 1)
    return [cell.counts for cell in plan.cells], table.split("\n")[:10][3].split()[:10]


COMMANDS = [
    train,
    ladder,
    *(pytest.param(f, marks=pytest.mark.slow) for f in (page, check, sweep, packed)),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_bare_shards_and_a_glob_give_the_same_numbers(command, forms, tmp_path):
    results = []
    for name, form in forms.items():
        (tmp_path / name).mkdir()
        results.append(command(form, tmp_path / name))
    assert results[0] == results[1]


def test_a_glob_keeps_what_the_manifest_says(forms, tmp_path):
    """Bits per byte and the tokenizer; without a mark the document mask is refused."""
    glob = loop.train(make(base.get_config(), forms["glob"]), tmp_path / "run", say=quiet)
    assert glob.record["final"]["bits_per_byte"] > 0 and glob.run.data.tokenizer.name == "bytes"
    unmarked = make(base.get_config(), forms["bare"], data__document_mark=-1)
    unmarked.model.mask = "document"
    with pytest.raises(InputError, match=r"for bare shards of GPT-2's .*document_mark=50256"):
        loop.train(unmarked, tmp_path / "unmarked", say=quiet)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Shards as the speedruns have them, by the script beside this file."""
    return f"{gpt2_shards.write_shards(tmp_path_factory.mktemp('published'))}/*.bin"


@pytest.mark.parametrize("module", [gelu_vs_swiglu, families], ids=["gelu_vs_swiglu", "families"])
def test_shipped_ladders_plan_on_published_shards(module, published, tmp_path):
    config = module.get_config(published)
    config.rungs.sizes, config.rungs.held_out = (3e5, 6e5), 1.2e6
    config.rungs.by, config.seeds, config.rungs.match = "non_embedding", 1, "none"
    config.rungs.head_dim = 32
    if "optim" in config.per_rung:
        config.per_rung = {}
    config.run.data.cache = str(tmp_path / "cache")
    plan = make_plan(config, quiet)
    assert plan.vocab_size == gpt2_shards.VOCAB_SIZE
    tables = plan.cells[0].counts["embedding"]
    assert tables >= gpt2_shards.VOCAB_SIZE * plan.cells[0].shape["d_model"]


@pytest.mark.slow
def test_record_26_trains_on_published_shards(published, tmp_path):
    """With the document mask: its windows are those that hold a mark, or the part of one."""
    config = speedrun_record26.get_config(published)
    assert config.model.mask == "document" and config.data.document_mark == gpt2_shards.MARK
    changes = {"model__n_layers": 6, "model__attention_skip": "3"}
    config = make(config, {}, **changes, data__cache=str(tmp_path / "cache"))
    config.data.seq_len, config.eval.sample, config.model.window_block = 64, 0, 16
    config.train.accum = 1
    result = loop.train(config, tmp_path / "run", say=quiet)
    assert result.run.data.boundary == gpt2_shards.MARK
    assert np.isfinite(result.record["final"]["val_loss"])
