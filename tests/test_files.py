"""Files are written whole or not at all, and their JSON has no NaN."""

import math
import os

import numpy as np
import pytest

from lmscale_jax.files import atomic_write, plain_values, read_json, write_json


def test_atomic_write_replaces_the_file_once_its_content_is_on_disk(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.txt", []
    path.write_text("before")
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        fsync(descriptor)
        calls.append(("fsync", path.read_text()))

    def recording_replace(source, target):
        calls.append(("replace", open(source, encoding="utf-8").read()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    atomic_write(path, "märchen\r\n")
    assert [name for name, _ in calls] == ["fsync", "replace"]
    assert calls[0][1] == "before"
    assert path.read_bytes() == "märchen\r\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_write_takes_bytes(tmp_path):
    atomic_write(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_json_holds_null_for_non_finite_numbers_and_plain_numbers_for_numpys(tmp_path):
    value = {
        "losses": [math.nan, math.inf, -math.inf, 1.5],
        "pair": (np.float32(0.5), np.float64("nan")),
        "array": np.array([[1, 2], [3, 4]]),
        "flag": np.bool_(True),
        3: {"text": "NaN", "none": None},
    }
    write_json(tmp_path / "a.json", value)
    plain = read_json(tmp_path / "a.json")
    assert plain == {
        "losses": [None, None, None, 1.5],
        "pair": [0.5, None],
        "array": [[1, 2], [3, 4]],
        "flag": True,
        "3": {"text": "NaN", "none": None},
    }
    assert plain == plain_values(value)
    assert type(plain_values(np.int64(2))) is int


def test_read_json_refuses_what_is_not_json(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")
    with pytest.raises(OSError):
        read_json(tmp_path / "absent.json")
