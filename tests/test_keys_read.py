"""Every key of the configuration is read by what it is for, as recorded while real work is done."""

import contextlib
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import config_dict
from test_modes import SMALL, program

from lmscale_jax.config.keys import keys
from lmscale_jax.configs import base
from lmscale_jax.data import prepare
from lmscale_jax.errors import InputError
from lmscale_jax.reports import final_summary
from lmscale_jax.train import explain, loop

LIBRARY = config_dict.__file__
# Functions that read all keys alike, to check, name, compare or copy a config; a key that nothing
# else reads is one without a meaning. `resolve` reads by name those that only derive others.
ALIKE = {
    "keys.py": {"get", "has", "is_used"},
    "resolve.py": {
        "validate", "check_keys", "_check_names", "_check_value", "_check_used", "differences",
        "fingerprint",
    },
    "durations.py": {"steps_of", "in_steps"},
    "conflicts.py": None,
}  # fmt: skip


def _reads_alike(frame) -> bool:
    path = Path(frame.f_code.co_filename)
    if str(path) == LIBRARY:
        return True
    if path.parent.name == "config" and path.name in ALIKE:
        functions = ALIKE[path.name]
        return functions is None or frame.f_code.co_qualname.split(".")[0] in functions
    return "lmscale_jax" not in path.parts


@pytest.fixture
def reads(monkeypatch) -> set[str]:
    """Dotted paths of the keys that the package reads from now on."""
    recorded: set[str] = set()
    plain = ConfigDict.__getitem__

    def __getitem__(self, name):
        value = plain(self, name)
        path = self.__dict__.get("_path_in_test", "") + name
        if isinstance(value, ConfigDict):
            object.__setattr__(value, "_path_in_test", f"{path}.")
            return value
        frame = sys._getframe(1)
        if frame.f_code is ConfigDict.__getattr__.__code__:
            frame = frame.f_back
        if not _reads_alike(frame):
            recorded.add(path)
        return value

    monkeypatch.setattr(ConfigDict, "__getitem__", __getitem__)
    return recorded


# Small configs whose steps are lowered: together they turn every feature on.
LOWERED = [
    {"optim.name": "normuon", "model.attn_gate": "elementwise", "model.dropout": 0.1,
     "model.positions": "rope", "model.window_layers": "ends", "model.value_embeddings": 1,
     "model.logit_softcap": 15.0, "freeze.mode": "unfreeze", "optim.ema_decay": 0.9},
    {"parametrization.name": "completep", "parametrization.base_width": 16,
     "parametrization.base_depth": 2, "freeze.mode": "random_near_input", "optim.name": "sgd"},
    {"mur.mode": "loss", "mur.reduce": "sample_k", "freeze.mode": "fixed", "freeze.blocks": "0"},
    {"mur.mode": "update", "mur.reduce": "top_loss", "schedule.name": "wsd",
     "model.head": "untied", "train.steps": 0, "train.tokens": 2560.0},
]  # fmt: skip
# Sources that can only be looked for here, without network and packages.
SOURCES = [
    {"data.source": "hf", "data.path": "no/such"},
    {"data.source": "tfds", "data.path": "none"},
    {"data.source": "tinystories"},
    {"data.source": "fineweb10B_gpt2"},
    {"data.source": "bin", "data.path": __file__, "data.val_path": "none.bin"},
    {"data.source": "stdlib", "data.tokenizer": "hf", "data.tokenizer_path": "none"},
]


# Keys that cannot be read here, and where a test depends on what they do.
ELSEWHERE = {
    "mesh.start_timeout": "of several processes: tests/test_processes.py",
    "mesh.peer_timeout": "of several processes: tests/test_processes.py",
    "data.document_mark": "of bare shards, which are not here: tests/test_data_doors.py",
    "log.wandb_project": "of a package that is not installed: train/metrics.py:Wandb",
}


def test_every_key_is_read(reads, small, tmp_path):
    for changes in LOWERED:
        program.__wrapped__(tuple(sorted((SMALL | changes).items())))
    shared = {"schedule__name": "constant", "schedule__warmup": "1", "checkpoint__every": 1}
    workdir = tmp_path / "run"
    config = small(train__steps=3, checkpoint__keep_every=2, eval__redundancy_every="2", **shared)
    final_summary.show_final_summary(
        loop.train(config, workdir, say=lambda line: None), say=lambda line: None
    )
    child = small(
        train__steps=3, train__parent=str(workdir), train__parent_step=2,
        eval__redundancy_every="2", **shared,
    )  # fmt: skip
    explain.explain(child, {}, "configs/base.py", print=lambda text: None)
    divided = small(data__tokenizer="bpe", data__vocab_size=300, data__overlap=13)
    prepare.prepare_data(divided.data, 0, log=lambda line: None)
    for changes in SOURCES:
        config = base.get_config()
        config.data.cache = str(tmp_path / "none")
        with config.ignore_type():
            config.update_from_flattened_dict(changes)
        with contextlib.suppress(InputError, ImportError):
            prepare.prepare_data(config.data, 300, log=lambda line: None)
    unread = [path for path, _ in keys() if path not in reads | ELSEWHERE.keys()]
    assert not unread, f"nothing reads {', '.join(unread)}"
