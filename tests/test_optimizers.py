"""Every entry of the table of optimizers does what it says, the new ones too."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_parametrization import make

from lmscale_jax.config.optim_keys import OPTIM
from lmscale_jax.errors import InputError
from lmscale_jax.model.param import map_named, named
from lmscale_jax.optim import build as optim
from lmscale_jax.optim.optimizers import OPTIMIZERS
from lmscale_jax.optim.rules import update_rules

# Numbers of the group `optim` that belong to some optimizers, but the peaks of learning rates,
# which follow the direction.
OF_SOME = [
    name
    for name, key in OPTIM.items()
    if "optim.name" in key.when and isinstance(key.default, float) and name != "muon_lr"
]


def configured(optimizer: str, **changes):
    """A resolved config at twice the base width, and its model; nothing clips or decays."""
    plain = {"optim__clip": 0.0, "optim__weight_decay": 0.0}
    plain |= {"model__n_layers": 2, "model__d_model": 32, "model__n_heads": 2}
    if changes.get("name") != "sp":
        plain["parametrization__base_width"] = 16
    return make(optim__name=optimizer, **plain | changes)


def gradients(model, scale: float = 1.0, seed: int = 0) -> dict:
    """Random gradients of all parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def draw(path: str, x):
        return scale * np.random.default_rng((seed, len(path))).standard_normal(x.shape, np.float32)

    return map_named(draw, shapes)


def own_part(tree: dict, rules: dict, name: str) -> dict:
    """The part of a nested dict whose rules name this optimizer."""
    part: dict = {}
    for path, leaf in named(tree).items():
        if rules[path].optimizer == name:
            *groups, last = path.split("/")
            node = part
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = leaf
    return part


def two_steps(name: str, config, model, counted: int = 0) -> tuple[Callable, tuple[dict, dict]]:
    """A jitted function of two gradients to the second direction of one optimizer, and them.

    `counted` is added to all that its state counts in between.
    """
    rules = update_rules(model.param_rules, config)
    both = tuple(own_part(gradients(model, seed=seed), rules, name) for seed in (0, 1))
    params = jax.tree.map(jnp.zeros_like, both[0])
    its_rules = {path: rule for path, rule in rules.items() if rule.optimizer == name}
    direction = OPTIMIZERS[name].direction(config, its_rules, None, "cpu")
    transform = optax.with_extra_args_support(direction)

    def second_direction(first, second):
        _, state = transform.update(first, transform.init(params), params, step=0)
        state = jax.tree.map(lambda x: x + counted if x.dtype == jnp.int32 else x, state)
        return transform.update(second, state, params, step=1)[0]

    return jax.jit(second_direction), both


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_entry_says_whether_its_direction_counts_steps(name):
    directions = []
    for counted in (0, 7):
        function, grads = two_steps(name, *configured(name), counted)
        directions.append(jax.tree.leaves(function(*grads)))
    same = all(map(np.array_equal, *directions))
    assert OPTIMIZERS[name].counts_steps != same, "Optimizer.counts_steps"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_key_belongs_to_the_optimizers_that_read_it(name):
    """A key's `when` names an optimizer if and only if its value is in the optimizer's program."""

    def program(config) -> str:
        grads, transform = gradients(model), optim.build_optimizer(config, model.param_rules)
        update = jax.jit(lambda *args: transform.update(*args, step=0))
        state = jax.eval_shape(transform.init, grads)
        return update.lower(grads, state, grads).as_text()

    config, model = configured(name)
    before, used = program(config), set()
    for key in OF_SOME:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.optim[key] = 0.5 * config.optim[key]
        used |= {key} if program(changed) != before else set()
    declared = {key for key in OF_SOME if name in OPTIM[key].when["optim.name"]}
    assert used == declared, "`when` in config/optim_keys.py"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_entry_says_whether_its_direction_divides_by_epsilon(name):
    config, model = configured(name)
    programs = []
    for eps in (1e-8, 1e-3):
        with config.unlocked():
            config.optim.eps = eps
        function, grads = two_steps(name, config, model)
        programs.append(function.lower(*grads).as_text())
    assert OPTIMIZERS[name].divides_by_eps == (programs[0] != programs[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_factors_of_the_table_are_applied(name):
    """An update is that of sp times the learning rate's factor, with epsilon times its own."""

    def first_updates(eps: float, **changes) -> tuple[dict, dict]:
        config, model = configured(name, schedule__warmup="1", **changes)
        with config.unlocked():
            config.optim.eps = eps
        grads, transform = gradients(model, 1e-3), optim.build_optimizer(config, model.param_rules)
        params = jax.tree.map(jnp.zeros_like, grads)
        updates = jax.jit(transform.update)(grads, transform.init(params), params, step=0)[0]
        return named(updates), update_rules(model.param_rules, config)

    # A factor for every role, also where the parametrization has none.
    factors = {"optim__embed_lr_factor": 2.0, "optim__vector_lr_factor": 3.0}
    updates, rules = first_updates(1e-3, **factors)
    assert len({rule.lr_factor for rule in rules.values()}) > 2
    plain = {
        eps_factor: first_updates(1e-3 * eps_factor, name="sp")[0]
        for eps_factor in {rule.eps_factor for rule in rules.values()}
    }
    for path, rule in rules.items():
        wanted = rule.lr_factor * plain[rule.eps_factor][path]
        np.testing.assert_allclose(updates[path], wanted, rtol=1e-3, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_decays_what_its_rules_say(name):
    updates = {}
    for decay in (0.0, 0.1):
        config, model = configured(name, optim__weight_decay=decay, schedule__warmup="1")
        grads, transform = gradients(model), optim.build_optimizer(config, model.param_rules)
        params = jax.tree.map(jnp.ones_like, grads)
        update = jax.jit(transform.update)
        updates[decay] = named(update(grads, transform.init(params), params, step=0)[0])
    for path, rule in update_rules(model.param_rules, config).items():
        shrinkage = updates[0.0][path] - updates[0.1][path]
        np.testing.assert_allclose(shrinkage, 0.1 * rule.decay, atol=1e-6, err_msg=path)


def test_what_is_around_gets_whole_updates(monkeypatch):
    """Rates, factors and decay are in what an optimizer wraps; clipping comes before."""

    def doubled(inner, config):
        def update(grads, state, params=None, **more):
            updates, state = inner.update(grads, state, params, **more)
            return jax.tree.map(lambda u: 2 * u, updates), state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    updates = []
    for around in (None, doubled):
        monkeypatch.setitem(OPTIMIZERS, "adamw", OPTIMIZERS["adamw"]._replace(around=around))
        config, model = configured("adamw", optim__weight_decay=0.1, optim__clip=1.0)
        grads, transform = gradients(model), optim.build_optimizer(config, model.param_rules)
        updates.append(transform.update(grads, transform.init(grads), grads, step=0)[0])
    jax.tree.map(lambda u, twice: np.testing.assert_allclose(twice, 2 * u, rtol=1e-6), *updates)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__block_lr_decay": 0.9},
        {"mur__mode": "update", "train__steps": 40},
        {"freeze__mode": "random", "freeze__count": 1},
    ],
)
def test_what_is_around_goes_with_no_factors_of_blocks(monkeypatch, changes):
    entry = OPTIMIZERS["adamw"]._replace(around=lambda inner, config: inner)
    monkeypatch.setitem(OPTIMIZERS, "adamw", entry)
    config, model = configured("adamw", **changes)
    with pytest.raises(InputError, match=r"treats blocks apart, but .* of optim\.name='adamw'"):
        optim.build_optimizer(config, model.param_rules)
