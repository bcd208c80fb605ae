"""The values of a config that are a user's code, and the keys that this code declares.

The group config.own has a group for each file of code, named as the file, whose keys are the file's
KEYS. They are checked, hashed and compared like all others.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from lmscale_jax.config.key import Key
from lmscale_jax.config.keys import get, has, keys
from lmscale_jax.config.own_code import OwnCode, adopt, is_code, load, split_code
from lmscale_jax.errors import InputError

# The keys that take FILE.py:NAME.
CODE_KEYS = tuple(path for path, key in keys() if key.code)


def code_values(config) -> dict[str, str]:
    """Returns {dotted path: FILE.py:NAME, or several} of a run's config, which may lack keys."""
    values = {path: get(config, path) for path in CODE_KEYS if has(config, path)}
    return {path: value for path, value in values.items() if is_code(value)}


def code_parts(config) -> list[str]:
    """Returns every single FILE.py:NAME of a run's config."""
    return [part for value in code_values(config).values() for part in split_code(value)]


def adopted(config: ConfigDict) -> ConfigDict:
    """Returns a config in which code is named by its content, and the keys of code are complete.

    It is the config itself where it has no code. Executes the code. Raises InputError where that
    is missing, fails or may not be executed.
    """
    values = code_values(config)
    if not values:
        return config
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict({path: adopt(value) for path, value in values.items()})
    defaults = {
        f"own.{group}.{name}": key.default
        for group, declared in own_keys(config).items()
        for name, key in declared.items()
    }
    return with_own_values(config, defaults | own_values(config))


def adopted_ladder(tree: dict, path: str = "") -> dict:
    """Copies nested groups of a ladder's config, with code named by its content. Executes none."""

    def with_content(value, path: str):
        if isinstance(value, dict):
            return adopted_ladder(value, path)
        if not path.endswith(CODE_KEYS):
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(adopt(v) if is_code(v) else v for v in value)
        return adopt(value) if is_code(value) else value

    return {name: with_content(value, f"{path}.{name}") for name, value in tree.items()}


def own_keys(config) -> dict[str, dict[str, Key]]:
    """Returns {group: {name: Key}}, what the code of a config with adopted values declares.

    Raises InputError where two files of one name declare different keys.
    """
    groups: dict[str, dict[str, Key]] = {}
    for value in code_parts(config):
        code = load(value)
        _check_declaration(code)
        group = groups.setdefault(code.group, {})
        for name, key in code.keys.items():
            if group.setdefault(name, key) != key:
                raise InputError(
                    f"{code.where}: its key {name} is declared differently by other code in a file "
                    f"of this name; use another name"
                )
    return groups


def _check_declaration(code: OwnCode) -> None:
    if not isinstance(code.keys, dict) or not all(isinstance(k, Key) for k in code.keys.values()):
        raise InputError(
            f"{code.where}: KEYS must map names to lmscale_jax.api.Key; use "
            f"KEYS = {{'power': Key(2, 'exponent', low=1)}}"
        )
    if durations := [name for name, key in code.keys.items() if key.duration]:
        raise InputError(
            f"{code.where}: its key {durations[0]} is a duration, which keys of code cannot be; "
            f"use a fraction of the run, such as Key(0.1, 'fraction', low=0.0)"
        )


def all_keys(config) -> Iterator[tuple[str, Key]]:
    """Yields every (dotted path, Key) of a config with adopted values, those of its code too."""
    yield from keys()
    yield from keys({"own": own_keys(config)})


def with_own_values(config, values: dict[str, object]) -> ConfigDict:
    """Copies a config and sets {dotted path: value} in its group config.own."""
    tree = config.to_dict()
    groups = tree.setdefault("own", {})
    for path, value in values.items():
        _, group, name = path.split(".")
        groups.setdefault(group, {})[name] = value
    return ConfigDict(tree)


def own_values(config) -> dict[str, object]:
    """Returns {dotted path: value} of the group config.own. Executes nothing."""
    groups = config.get("own", {})
    return {
        f"own.{group}.{name}": value
        for group, settings in groups.items()
        for name, value in settings.items()
    }
