"""docs/scale.md is what its script makes of the code as it is."""

import importlib.util
import json

import pytest
from conftest import ROOT

TEXT = (ROOT / "docs/scale.md").read_text()


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("plan", ROOT / "docs/scale/plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_what_the_script_makes(plan):
    assert plan.written(TEXT) == TEXT


def test_a_table_without_its_place_is_an_error(plan):
    with pytest.raises(ValueError, match="0 places for the table 'chips'"):
        plan.written(TEXT.replace("<!-- chips -->", ""))


def test_the_stated_accuracy_is_that_of_the_rows():
    rows = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["rows"].values()
    ratios = [row["estimate"]["total"] / row["compiled"]["peak"] for row in rows]
    assert len(ratios) >= 8
    assert max(abs(ratio - 1) for ratio in ratios) <= 0.15
    measured = [row["compiled"]["peak"] / row["measured"] for row in rows if "measured" in row]
    assert len(measured) >= 3
    assert max(abs(ratio - 1) for ratio in measured) <= 0.15
