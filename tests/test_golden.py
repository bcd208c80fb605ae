"""Numbers of runs, ladders and fits stay what they were: workdirs and ladders of before go on.

What is counted or named is equal everywhere. What floating point computes is equal to the bit where
the numbers were taken (`taken_on` in the files: processor, versions, compiler), and near elsewhere.
`python -m tests.golden.make` takes them anew.
"""

import json
import math

import pytest

from tests.golden import cases, measure

EXPECTED = {
    name: json.loads((measure.HERE / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("runs", "ladders", "fits")
}
COUNTED = (
    "config_hash", "counts", "flops_per_token", "flops_per_token_by_convention", "data",
    "first_batch", "parametrization", "state", "fields",
)  # fmt: skip
COMPUTED = ("train_loss", "grad_norm", "val_loss")
# Relative, for other processors and versions of JAX. jax 0.12 is within 1.3e-7 of 0.10 in float32,
# where a norm adds up in another order, and within 2.7e-4 in bfloat16; of initial values within
# 1.1e-7: the compilers differ in the last bit of erf_inv.
NEAR = {"float32": 5e-6, "bfloat16": 1e-3}
NEAR_INITIAL = 1e-6
NEAR_FIT = 1e-5


def differences(kind: str, now: dict, also: tuple[str, ...] = ()) -> list[str]:
    """What of this machine differs from the one that the numbers were taken on; of its cores only
    where `also` names them."""
    before = EXPECTED[kind]["taken_on"]
    fields = ["cpu", "system", "xla_flags", "compiler", *also]
    changed = [name for name in fields if before[name] != now[name]]
    versions = before["versions"].items()
    return changed + [name for name, text in versions if now["versions"].get(name) != text]


def exactly_here(kind: str, here: dict, also: tuple[str, ...] = ()) -> None:
    """Skips where the last bits may differ, and says why."""
    if changed := differences(kind, here, also):
        pytest.skip(f"taken with other {', '.join(changed)}: compared within a tolerance only")


def numbers(value, path: str = "") -> dict:
    """{path: leaf} of nested dicts and lists."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, x in items for k, v in numbers(x, f"{path}/{name}").items()}


def check_near(measured, expected, relative: float) -> None:
    """Compares two trees: other values than floats exactly, floats within a tolerance."""
    measured, expected = numbers(measured), numbers(expected)
    assert measured.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, float) and math.isfinite(value):
            assert measured[path] == pytest.approx(value, rel=relative, abs=1e-12), path
        else:
            assert measured[path] == value, path


@pytest.fixture(scope="module")
def apart(plain_process):
    """Calls functions of `measure` in a process that compiles as a user's does."""
    return lambda function: json.loads(json.dumps(plain_process.submit(function).result()))


@pytest.fixture(scope="module")
def here(apart):
    """What decides the last bits of a number on this machine."""
    return apart(measure.taken_on)


@pytest.fixture(scope="module")
def runs(apart):
    """What each of the twelve runs left behind."""
    return apart(measure.runs)


def test_all_cases_are_compared():
    assert EXPECTED["runs"]["values"].keys() == cases.CHANGES.keys() and len(cases.CHANGES) == 12
    assert EXPECTED["ladders"]["values"].keys() == measure.LADDERS.keys()
    assert EXPECTED["fits"]["values"].keys() == measure.FITS.keys()


@pytest.mark.parametrize("name", cases.CHANGES)
def test_counts_names_and_order_of_a_run(runs, name):
    measured, expected = runs[name], EXPECTED["runs"]["values"][name]
    for field in COUNTED:
        assert measured[field] == expected[field], field


@pytest.mark.parametrize("name", cases.CHANGES)
def test_numbers_of_a_run(runs, name):
    measured, expected = runs[name], EXPECTED["runs"]["values"][name]
    dtype = cases.config(name, "cache").model.dtype
    for field in COMPUTED:
        assert measured[field] == pytest.approx(expected[field], rel=NEAR[dtype]), field
    for path, values in expected["initial"].items():
        for field in ("rms", "last"):
            near = pytest.approx(values[field], rel=NEAR_INITIAL)
            assert measured["initial"][path][field] == near, path


@pytest.mark.parametrize("name", cases.CHANGES)
def test_bits_of_a_run(runs, here, name):
    exactly_here("runs", here)
    measured, expected = runs[name], EXPECTED["runs"]["values"][name]
    for field in ("initial", *COMPUTED):
        assert measured[field] == expected[field], field


@pytest.mark.parametrize("name", cases.CHANGES)
def test_bits_of_every_metric_of_a_run(runs, here, name):
    """The whole metrics.jsonl. A mean over all logits is added up by as many threads as cores."""
    exactly_here("runs", here, also=("cores",))
    assert runs[name]["metrics"] == EXPECTED["runs"]["values"][name]["metrics"]


@pytest.mark.parametrize("name", measure.LADDERS)
def test_ids_of_a_ladder(name):
    measured = json.loads(json.dumps(measure.ladder(name)))
    assert measured == EXPECTED["ladders"]["values"][name]


@pytest.mark.parametrize("name", measure.FITS)
def test_fit(here, name):
    measured = json.loads(json.dumps(measure.FITS[name]()))
    expected = EXPECTED["fits"]["values"][name]
    check_near(measured, expected, NEAR_FIT)
    exactly_here("fits", here)
    assert measured == expected
