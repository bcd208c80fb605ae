"""Sources yield the same documents in the same order, and say what is wrong with a bad file."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from lmscale_jax.config.keys import SPEC
from lmscale_jax.configs.base import get_config
from lmscale_jax.data import sources
from lmscale_jax.errors import InputError

TEXT = "one\nstill one\n\n  \ntwo\n\n\n\n    three é\r\n\r\nfour"


def config(**keys):
    data = get_config().data
    data.update(keys)
    return data


def documents(**keys):
    return list(sources.documents(config(**keys)))


@pytest.mark.parametrize("document, count", [("file", 1), ("paragraph", 4), ("line", 11)])
@pytest.mark.parametrize("text", [TEXT, TEXT + "\n", "\n\n" + TEXT, TEXT.replace("\n", "\n ")])
def test_documents_joined_are_the_file(tmp_path, document, count, text):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    texts = documents(source="text", path=str(path), document=document)
    assert "".join(texts) == text
    if text == TEXT:
        assert len(texts) == count


def test_paths_may_be_files_directories_globs_and_lists(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.md", ".hidden/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"zipped"))
    t = tmp_path
    assert documents(source="text", path=f"{t}/b.txt,{t}/a.txt") == ["b.txt", "a.txt"]
    assert documents(source="text", path=f"{t}/**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert documents(source="text", path=f"{t}/sub, {t}/z.txt.gz") == [
        "sub/c.txt",
        "sub/deep/d.md",
        "zipped",
    ]
    assert documents(source="text", path=f"{t}/*.txt,{t}/a.txt") == ["a.txt", "b.txt"]
    assert len(documents(source="text", path=str(t))) == 5


def test_a_comma_in_a_name_that_exists_is_part_of_the_name(tmp_path):
    (tmp_path / "a,b.txt").write_text("ab")
    assert documents(source="text", path=str(tmp_path / "a,b.txt")) == ["ab"]


def test_jsonl_plain_and_gz(tmp_path):
    rows = [{"text": "uno\u2028dos", "id": 1}, {"text": "", "id": 2}, {"text": "tres", "id": 3}]
    content = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "notes.txt").write_text("not JSON")
    assert documents(source="jsonl", path=str(tmp_path)) == ["uno\u2028dos", "tres"] * 2


def test_stdlib_is_the_standard_library_and_nothing_installed():
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in sources.source_files(config())]
    assert {"json/decoder.py", "dataclasses.py"} <= set(names)
    assert names == sorted(names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


def test_stdlib_obeys_declared_encodings_and_counts_what_it_cannot_decode(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "c.py").write_bytes(b"# coding: no-such-thing\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "d.py").write_text("installed")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    skipped = []
    assert list(sources.documents(config(), skipped.append)) == [
        "# -*- coding: latin-1 -*-\nx = 'é'\n"
    ]
    assert [path.name for path in skipped] == ["b.py", "c.py"]


BAD = {
    "missing": (None, {}, ["data.path=", "no text file"]),
    "binary": (b"ab\0cd", {}, ["binary", "UTF-8 text only"]),
    "not UTF-8": (b"abc\xe9 d", {}, ["not UTF-8", "0xe9 at 3"]),
    "not gzip": (b"abc", {"name": "a.txt.gz"}, ["cannot be read"]),
    "half a gzip": (gzip.compress(b"abc" * 999)[:-9], {"name": "a.txt.gz"}, ["cannot be read"]),
    "no field": (b'{"text": "a"}\n{"body": "b", "id": 1}', {"name": "a.jsonl"}, [":2", "body, id"]),
    "broken": (b'{"text": "a"}\n\n{"text": ', {"name": "a.jsonl"}, [":3", "broken JSON"]),
    "no object": (b"[1]", {"name": "a.jsonl"}, [":1", "not a JSON object"]),
    "no text": (b'{"text": 5}', {"name": "a.jsonl"}, [":1", "holds int"]),
    "surrogate": (rb'{"text": "\ud800"}', {"name": "a.jsonl"}, [":1", "surrogate"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_the_place(tmp_path, case):
    content, options, expected = BAD[case]
    path = tmp_path / options.get("name", "a.txt")
    if content is not None:
        path.write_bytes(content)
    source = "jsonl" if path.suffix == ".jsonl" else "text"
    with pytest.raises(InputError) as caught:
        documents(source=source, path=str(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("path", ["", "no/such/**/*.txt", "a.txt,,"])
def test_nothing_found_names_the_item(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"data\.path='.*': no text file there; name"):
        documents(source="text", path=path)


@pytest.mark.parametrize("name", [n for n, entry in sources.SOURCES.items() if entry.documents])
def test_prepared_data_is_named_by_all_that_chooses_documents(name):
    """What a key of some sources says is in `Source.keys`, or another value would find old data."""
    texts = {source for source, entry in sources.SOURCES.items() if entry.documents}
    some = {
        key_name
        for key_name, key in SPEC["data"].items()
        if name in key.when.get("data.source", ()) and not texts <= set(key.when["data.source"])
    }
    # The files that are read are noted themselves, wherever they are.
    assert some - {"path", "directory"} <= set(sources.SOURCES[name].keys), "SOURCES"
