"""Tables in the forms in which people have them: each is read right or refused in one line."""

import csv
import gzip
import io
import json

import numpy as np
import pytest
from synthetic import CHINCHILLA, grid

from lmscale_jax.errors import InputError
from lmscale_jax.scaling.read import read_table

COLUMNS = {k: v.tolist() for k, v in grid([1e7, 3e7, 1e8, 3e8], [1e9, 1e10, 1e11]).items()}
assert list(COLUMNS) == ["n", "d", "loss"] and CHINCHILLA


def delimited(delimiter=",", point=".", header=True, before="", columns=COLUMNS, names=None) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    if header:
        writer.writerow(names or columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([f"{x:.12g}".replace(".", point) for x in row])
    return before + file.getvalue()


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as module

    file = io.BytesIO()
    module.write_table(pyarrow.table(COLUMNS), file)
    return file.getvalue()


ROWS = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
SPACED = delimited(" ").replace(" ", "   ")
GOOD = {
    "comma": lambda: delimited(),
    "tab": lambda: delimited("\t"),
    "semicolon": lambda: delimited(";"),
    "semicolon and decimal commas": lambda: delimited(";", ","),
    "spaces": lambda: SPACED,
    "comment lines": lambda: delimited(before="# one campaign\n\n#\n"),
    "other headers": lambda: delimited(names=["Parameters", " Tokens ", "Final_Val_Loss"]),
    "a byte order mark": lambda: "\ufeff" + delimited(),
    "UTF-16": lambda: delimited().encode("utf-16"),
    "JSON": lambda: json.dumps(ROWS, indent=1),
    "JSON columns": lambda: json.dumps(COLUMNS),
    "JSON lines": lambda: "\n".join(map(json.dumps, ROWS)),
    "gzip": lambda: gzip.compress(delimited().encode()),
    "gzip of JSON lines": lambda: gzip.compress("\n".join(map(json.dumps, ROWS)).encode()),
    "Parquet": parquet,
    "commas inside quotes": lambda: delimited().replace("\r\n", ',"a,\nb"\r\n').replace(
        '"a,\nb"', "note", 1
    ),
}  # fmt: skip


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("form", GOOD)
def test_every_form_gives_the_same_table(form, tmp_path):
    table = read_table(write(tmp_path / "table.txt", GOOD[form]()))
    for name, values in COLUMNS.items():
        np.testing.assert_allclose(getattr(table, name), values, rtol=1e-11)
    assert table.notes == ()


def test_a_table_without_header_has_positions(tmp_path):
    source = write(tmp_path / "t.csv", delimited(header=False))
    table = read_table(source, {"n": "1", "d": "2", "loss": "3"})
    np.testing.assert_allclose(table.loss, COLUMNS["loss"], rtol=1e-11)
    with pytest.raises(InputError, match="only the columns 1, 2, 3"):
        read_table(source)


def test_perplexities_become_losses(tmp_path):
    perplexity = {"n": COLUMNS["n"], "d": COLUMNS["d"], "PPL": np.exp(COLUMNS["loss"]).tolist()}
    source = write(tmp_path / "t.csv", delimited(columns=perplexity))
    np.testing.assert_allclose(
        read_table(source, {"loss": "PPL"}).loss, COLUMNS["loss"], rtol=1e-10
    )


def scaled(**factors) -> str:
    columns = {k: [x * factors.get(k, 1) for x in v] for k, v in COLUMNS.items()}
    return delimited(columns=columns)


BAD = {
    "two losses": (lambda: delimited(names=["n", "loss", "loss"]), "2 columns named 'loss'"),
    "a long row": (lambda: delimited() + "1e8,1e9,3,4\r\n", "has 4 cells and the header 3"),
    "thousands": (lambda: "n;d;loss\n1,000;2,000;3.1\n", "decimals or thousands"),
    "perplexity": (lambda: scaled(loss=20), "takes logarithms"),
    "millions and billions": (lambda: scaled(n=1e-6, d=1e-9), "millions or billions"),
    "n in millions": (lambda: scaled(n=1e-6), "column 'n'"),
    "d in billions": (lambda: scaled(d=1e-9), "column 'd'"),
    "lists": (lambda: "[[1, 2]]", "must hold objects"),
    "broken JSON": (lambda: '[{"n": 1', "neither JSON nor JSON lines"),
    "ragged JSON columns": (lambda: '{"n": [1], "d": [1, 2]}', "differ in length"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n\xff", "neither text, Parquet nor gzip"),
    "cut gzip": (lambda: gzip.compress(delimited().encode())[:40], "cannot be read"),
    "broken Parquet": (lambda: b"PAR1" + bytes(20), "not readable Parquet"),
    "empty": (lambda: "", "has no rows"),
    "a header only": (lambda: "n,d,loss\n", "has no rows"),
}


@pytest.mark.parametrize("form", BAD)
def test_what_is_wrong_is_said_in_one_line(form, tmp_path):
    content, words = BAD[form]
    with pytest.raises(InputError) as error:
        read_table(write(tmp_path / "t.csv", content()))
    assert words in str(error.value) and "\n" not in str(error.value).strip()


def sweep(tmp_path) -> str:
    """Three learning rates at every size, of which the second is best."""
    rows = [
        row | {"lr": lr, "loss": row["loss"] * (1 + worse), "seconds": 1.5 * i + k}
        for i, row in enumerate(ROWS)
        for k, (lr, worse) in enumerate([(1e-3, 0.02), (2e-3, 0.0), (4e-3, 0.03)])
    ]
    return write(tmp_path / "sweep.json", json.dumps(rows))


def test_settings_that_are_pooled_are_named(tmp_path):
    notes = {note["code"]: note["message"] for note in read_table(sweep(tmp_path)).notes}
    assert notes["pooled_settings"].startswith("lr of sweep.json take")
    assert "seconds" not in notes["pooled_settings"]


def test_settings_of_pooled_curves_are_named(tmp_path):
    """A setting differs between runs of one size, and the rate of a schedule along a run."""
    lines = ["run_id,n,d,loss,peak,rate,batch"]
    for n in (1e7, 1e8, 1e9):
        for k, peak in enumerate((1e-3, 2e-3)):
            for i in range(4):
                d = (i + 1) * 1e9 * (1 + k / 2)
                lines.append(f"{n:g}-{k},{n},{d},{3 - i / 9 - k / 99},{peak},{peak / (1 + i)},32")
    path = tmp_path / "curves.csv"
    path.write_text("\n".join(lines))
    notes = {note["code"]: note["message"] for note in read_table(str(path), points="curve").notes}
    assert notes["pooled_settings"].startswith("peak of curves.csv take several values at equal n,")
    assert "--best" not in notes["pooled_settings"]


def test_the_best_of_a_sweep(tmp_path):
    table = read_table(sweep(tmp_path), points="best")
    np.testing.assert_allclose(table.loss, COLUMNS["loss"], rtol=1e-12)
    assert [note["code"] for note in table.notes] == ["best_points"]
    assert "12 of 36 runs" in table.notes[0]["message"]
