"""What a step costs a chip, against sums made by hand for a small model."""

import itertools

import pytest
from ml_collections import ConfigDict

from lmscale_jax.config.resolve import resolve
from lmscale_jax.configs.base import get_config
from lmscale_jax.model import build, costs, flops, memory

# Width 64, 4 heads of 16, MLP of 256, 2 blocks, 512 tokens of vocabulary, windows of 32.
SMALL = {
    "model.n_layers": 2, "model.d_model": 64, "model.n_heads": 4, "model.positions": "rope",
    "model.head": "untied", "model.dtype": "bfloat16", "model.stack": "scan", "model.d_ff": 256,
    "data.seq_len": 32, "train.batch_size": 16,
}  # fmt: skip
# A chip of round figures: 1 GB/s over links, 0.1 GB/s between nodes of four.
ROUND = flops.CHIPS["H100"]._replace(link=1e9, network=1e8, domain=4)


def small(**changes) -> ConfigDict:
    config = get_config()
    config.update_from_flattened_dict(
        SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return resolve(config, 512)


def specs_of(config) -> dict:
    return build.build_model(config, platform="tpu").specs


def sent(config, chip=ROUND, **sizes) -> dict:
    """{(kind, axes): message}."""
    messages = costs.step_messages(config, specs_of(config), sizes, chip)
    return {(message.kind, *message.axes): message for message in messages}


# Values of a block's matrices: query, key, value and out of 64 x 64, up and down of 64 x 256.
BLOCK = 4 * 64 * 64 + 2 * 64 * 256
TABLE = 512 * 64


def test_one_chip_sends_nothing():
    assert sent(small()) == {}
    assert sent(small(), data=1, fsdp=1, tensor=1, replica=1, sequence=1) == {}


def test_weights_are_gathered_twice_and_their_gradients_scattered_by_hand():
    messages = sent(small(), fsdp=4)
    # bfloat16 twice for the blocks, float32 once for embedding and readout; 3 of 4 parts.
    gathered = (2 * 2 * BLOCK * 2 + 2 * TABLE * 4) * 3 / 4
    gathers = messages["gather weights", "fsdp"]
    assert gathers.fast == pytest.approx(gathered)
    # 6 matrices of 2 blocks twice, embedding and readout once.
    assert gathers.count == 2 * 6 * 2 + 2
    assert gathers.network == 0
    assert gathers.hidden
    taken = gathered / 1e9 / costs.LINK_SHARE + gathers.count * costs.LATENCY
    assert gathers.seconds == pytest.approx(taken)
    scattered = 4 * (2 * BLOCK + 2 * TABLE) * 3 / 4
    assert messages["scatter gradients", "fsdp"].fast == pytest.approx(scattered)
    # Gains are whole everywhere: 2 of each block and the last, float32, summed: twice 3 of 4 parts.
    assert messages["sum gradients", "fsdp"].fast == pytest.approx(2 * 4 * 5 * 64 * 3 / 4)


def test_each_micro_batch_gathers_again_and_so_does_recomputing():
    once, cut = sent(small(), fsdp=4), sent(small(train__accum=4), fsdp=4)
    key = ("gather weights", "fsdp")
    assert cut[key].fast == pytest.approx(4 * once[key].fast)
    again = sent(small(model__remat="block"), fsdp=4)[key].fast - once[key].fast
    assert again == pytest.approx(2 * BLOCK * 2 * 3 / 4)


def test_the_loss_in_chunks_gathers_the_readout_once_and_multiplies_again():
    # 4 rows a chip: 32 tokens a chunk are 8 positions, 4 chunks, each computed again.
    whole, cut = small(), small(model__loss_chunk=32)
    assert costs.loss_chunks(cut, {"fsdp": 4}, ROUND) == 4
    assert sent(cut, fsdp=4) == sent(whole, fsdp=4)
    more = [
        costs.recomputed_flops(config, specs_of(config), {"fsdp": 4}, ROUND)
        for config in (whole, cut)
    ]
    assert more == [0, 2 * TABLE]


def test_gradients_of_parts_are_summed_over_what_else_splits_tokens():
    messages = sent(small(), replica=2, data=2, fsdp=4)
    # The 4 chips of a node are one fsdp group: what is left crosses nodes only. Ring over 4.
    part = 4 * (2 * BLOCK + 2 * TABLE) / 4
    message = messages["sum gradients", "replica", "data"]
    assert (message.fast, message.network) == (0, pytest.approx(2 * part * 3 / 4))
    taken = message.network / 1e8 / costs.LINK_SHARE + message.count * costs.LATENCY
    assert message.seconds == pytest.approx(taken)


def test_a_ring_through_nodes_shares_out_their_ports():
    # 8 chips in two nodes: half of the array enters each, over four ports.
    message = sent(small(), fsdp=8)["scatter gradients", "fsdp"]
    whole = 4 * (2 * BLOCK + 2 * TABLE)
    assert message.fast == pytest.approx(whole * 7 / 8)
    assert message.network == pytest.approx(whole / 2 / 4)


def test_tensor_sums_activations_by_hand():
    message = sent(small(), data=2, tensor=2)["sum activations", "tensor"]
    stream = 8 * 32 * 64  # values: 8 rows of 32 tokens a chip
    # bfloat16: two branches forward; query, key, value and up backward; the readout's gradient.
    # float32: the embedding there and back. A sum over 2 chips sends each value once.
    assert message.fast == pytest.approx(stream * (2 * (2 * 6 + 1) + 4 * 2))
    assert not message.hidden


def test_keys_and_values_are_gathered_over_sequence_by_hand():
    config = small(model__n_kv_heads=2)
    message = sent(config, data=2, sequence=2)["gather keys and values", "sequence"]
    # 2 blocks, keys and values of 2 heads of 16 for 8 whole rows, bfloat16, there and back; half.
    assert message.fast == pytest.approx(2 * 2 * (8 * 32 * 2 * 16) * 2 * 2 / 2)


def test_memory_by_hand():
    config, sizes = small(), {"data": 2, "fsdp": 2}
    estimate = memory.chip_memory(config, specs_of(config), sizes, platform="tpu", kernel="splash")
    # Matrices and tables are halved, the 5 gains of 64 are not.
    local = 4 * ((2 * BLOCK + 2 * TABLE) / 2 + 5 * 64)
    assert estimate["parameters"] == local
    assert estimate["optimizer"] == 2 * local
    assert estimate["total"] == sum(size for name, size in estimate.items() if name != "total")
    # 4 rows of 32 tokens and 2 blocks; of a token two float32 streams, in bfloat16 two normed
    # inputs and their twins, queries, keys, values and results, 2 sizes of the MLP, both branches.
    assert memory.tokens_on_chip(config, sizes) == 4 * 32
    token = 2 * 4 * 64 + 2 * (4 * 64 + 256 + 2 * 64 + 2 * 64 + 256)
    assert estimate["activations"] == 128 * 2 * token


@pytest.mark.parametrize("name", ["data", "fsdp", "tensor"])
def test_more_chips_hold_and_compute_no_more_each(name):
    config, seen = small(), []
    for n in (1, 2, 4):
        specs, sizes = specs_of(config), {name: n}
        held = memory.chip_memory(config, specs, sizes, platform="tpu", kernel="splash")["total"]
        step = costs.step_cost(config, specs, sizes, ROUND)
        seen.append((held, step.chip_flops, step.moved))
    for before, after in itertools.pairwise(seen):
        assert all(b <= a for a, b in zip(before, after, strict=True))
        assert after[0] < before[0]


def test_a_larger_batch_has_a_higher_mfu_and_recomputing_a_lower_one():
    def mfu(**changes) -> float:
        config = small(**changes)
        return costs.step_cost(config, specs_of(config), {"fsdp": 8}, ROUND).mfu

    assert mfu(train__batch_size=16) < mfu(train__batch_size=64) < mfu(train__batch_size=4096)
    assert mfu(train__batch_size=4096, model__remat="block") < mfu(train__batch_size=4096)
    assert mfu(train__batch_size=4096) < costs.PRODUCT_SHARE


def test_what_is_waited_for_is_added_and_what_is_not_is_hidden():
    config = small()
    step = costs.step_cost(config, specs_of(config), {"data": 2, "fsdp": 4, "tensor": 2}, ROUND)
    assert step.exposed > 0
    assert step.hidden > 0
    assert step.seconds == pytest.approx(max(step.compute, step.hidden) + step.exposed)


def test_a_checkpoint_is_parameters_and_moments():
    config = small()
    size, seconds = costs.checkpoint_cost(specs_of(config), 16, flops.CHIPS["v5p"])
    assert size == 3 * 4 * (2 * BLOCK + 2 * TABLE + 5 * 64)
    # Four hosts of four chips.
    assert seconds == pytest.approx(size / (4 * costs.WRITE_PER_HOST))


def test_the_search_fits_and_is_no_slower_than_any_other_mesh_that_does():
    config = small(train__batch_size=4096)
    specs = specs_of(config)
    need = memory.chip_memory(config, specs, {"data": 8}, platform="gpu", kernel="cudnn")["total"]
    tight = ROUND._replace(memory=need / 4 / costs.FILL)
    layout = costs.best_layout(config, specs, tight, 8)
    assert layout.bytes["total"] <= costs.FILL * tight.memory
    assert layout.accum > 1
    roomy = costs.best_layout(config, specs, ROUND, 8)
    assert roomy.step.seconds <= layout.step.seconds
    for sizes in costs.candidate_meshes(config, ROUND, 8):
        config.train.accum, config.model.remat = 1, "none"
        assert roomy.step.seconds <= costs.step_cost(config, specs, sizes, ROUND).seconds


def test_the_search_says_why_there_is_none():
    config = small()
    specs = specs_of(config)
    assert costs.best_layout(config, specs, ROUND, 1024) == (
        "16 rows cannot be split over 1024 chips, not with 4 sharing each"
    )
    told = costs.best_layout(config, specs, ROUND._replace(memory=1e5), 8)
    assert told.startswith("does not fit: ")
