"""Loads a user's code, named by a value FILE.py:NAME: by its content, never by a module's name.

`adopt` reads the file, and the modules that it imports from its own folder, and returns the value
by which records and hashes name it: DIGEST/FILE.py:NAME, where DIGEST is the hash of these files.
So the same bytes in another folder are the same code, and an edited file is another. A run's
directory has a copy of the files in source/DIGEST/, from which `load` takes code that no path of
this process named; it executes them only if the user trusts their digest.
"""

import ast
import builtins
import functools
import hashlib
import re
import sys
import traceback
import types
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lmscale_jax.errors import InputError

SOURCE = "source"
_PATTERN = re.compile(r"(?P<path>[^,]+\.py):(?P<name>[A-Za-z_]\w*)")
_ADOPTED = re.compile(r"(?P<digest>[0-9a-f]{12})/(?P<file>[^/]+\.py):(?P<name>[A-Za-z_]\w*)")
# Never taken from the folder of a user's file, even if it has files of these names.
_INSTALLED = sys.stdlib_module_names | {"lmscale_jax", "jax", "jaxlib", "flax", "optax", "numpy"}


class SourceFiles(NamedTuple):
    """The files of a user's code.

    Attributes:
      main: name of the file that the value names.
      contents: {path relative to its folder: bytes}, of that file and of those that it imports.
      folder: where they were read.
    """

    main: str
    contents: dict[str, bytes]
    folder: Path

    @property
    def sha256(self) -> str:
        """Returns the hash of the names and bytes of all files."""
        total = hashlib.sha256(self.main.encode())
        for name, content in sorted(self.contents.items()):
            total.update(f"\0{name}\0{len(content)}\0".encode() + content)
        return total.hexdigest()

    @property
    def digest(self) -> str:
        return self.sha256[:12]


class OwnCode(NamedTuple):
    """What a value FILE.py:NAME stands for.

    Attributes:
      value: as `adopt` returns it.
      entry: the user's class, function or object.
      group: name of its keys' group, config.own.GROUP: that of the file.
      keys: {name: `Key`}, declared as KEYS by the entry, or else by the file.
    """

    value: str
    entry: object
    group: str
    keys: dict

    @property
    def where(self) -> str:
        """Names file and entry for a message: "poly.py:PolyMLP"."""
        return self.value.partition("/")[2]

    def settings(self, config):
        """Returns the group config.own.GROUP of a resolved config; empty without KEYS."""
        return config.own.get(self.group, ConfigDict()) if self.keys else ConfigDict()

    def require(self, kind: str, fits: bool) -> None:
        """Raises InputError where the entry is not of the kind that its key takes."""
        if not fits:
            raise InputError(
                f"{self.where} is a {type(self.entry).__name__}, and not {kind}; examples/ has "
                f"one for each key"
            )


# The code of this process, by digest: read from a path that the user named, or trusted.
_SOURCES: dict[str, SourceFiles] = {}
_MODULES: dict[tuple[str, str], types.ModuleType] = {}
# Directories with a folder source/, and beginnings of digests that --trust_code names.
_DIRECTORIES: list[Path] = []
_TRUSTED: list[str] = []


def is_code(value) -> bool:
    """Returns whether a value has the form FILE.py:NAME; or several of them, with commas."""
    parts = split_code(value) if isinstance(value, str) else [""]
    return all(_PATTERN.fullmatch(part) for part in parts)


def split_code(value: str) -> list[str]:
    """Splits a value at its commas."""
    return [part.strip() for part in value.split(",")]


def adopt(value: str) -> str:
    """Reads the files of a FILE.py:NAME and returns DIGEST/FILE.py:NAME. Executes nothing.

    Of several with commas it adopts each.

    Raises InputError where a file is missing or is not Python.
    """
    if len(parts := split_code(value)) > 1:
        return ",".join(map(adopt, parts))
    if _ADOPTED.fullmatch(value):
        return value
    match = _PATTERN.fullmatch(value)
    path = Path(match["path"]).expanduser()
    if not path.is_file():
        raise InputError(
            f"{value}: no file {path}; a relative path is relative to the working directory "
            f"({Path.cwd()}), and here(__file__) + 'FILE.py:NAME' to the config file"
        )
    source = _read_files(path.parent.absolute(), path.name)
    _SOURCES[source.digest] = source
    return f"{source.digest}/{source.main}:{match['name']}"


def _read_files(folder: Path, main: str) -> SourceFiles:
    """Reads a file and all modules of its folder that it imports, directly or not."""
    contents, waiting = {}, [main]
    while waiting:
        name = waiting.pop()
        contents[name] = (folder / name).read_bytes()
        for imported in _imported_names(contents[name], folder / name):
            waiting += [f for f in _files_of(imported, folder) if f not in contents]
    return SourceFiles(main, contents, folder)


def _imported_names(content: bytes, path: Path) -> set[str]:
    """Returns the dotted names that a file imports, anywhere in it, from modules or packages."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: {getattr(error, 'msg', error)}") from None
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise InputError(
                    f"{path}:{node.lineno}: relative imports are not supported; use "
                    f"`from {node.module or 'helper'} import ...` for a file of the same folder"
                )
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] not in _INSTALLED}


def _files_of(module: str, folder: Path) -> list[str]:
    """Returns the files of a folder that importing a dotted name executes; [] for other modules."""
    parts, files = module.split("."), []
    for n in range(1, len(parts) + 1):
        stem = "/".join(parts[:n])
        files += [f for f in (f"{stem}.py", f"{stem}/__init__.py") if (folder / f).is_file()]
    return files


def load(value: str) -> OwnCode:
    """Executes the files of an adopted value and returns what it names.

    Raises InputError where the code is missing, not trusted, or fails.
    """
    match = _ADOPTED.fullmatch(value)
    source = _trusted_source(match["digest"], value)
    module = _module(source, Path(source.main).stem)
    group, entry = Path(source.main).stem, getattr(module, match["name"], None)
    if entry is None:
        inside = vars(module).items()
        names = [n for n, v in inside if getattr(v, "__module__", "") == module.__name__]
        raise InputError(
            f"{source.folder / source.main} defines no {match['name']}; it has "
            f"{', '.join(names) or 'no class or function'}"
        )
    if not group.isidentifier():
        raise InputError(
            f"{source.main}: its keys are config.own.{group}, which is no name; use a file such as "
            f"{re.sub(r'[^0-9a-zA-Z_]', '_', group)}.py"
        )
    keys = getattr(entry, "KEYS", getattr(module, "KEYS", {}))
    return OwnCode(value, entry, group, keys)


def _module(source: SourceFiles, name: str) -> types.ModuleType:
    """Returns a module of a user's folder, executed once; its imports find that folder first."""
    if module := _MODULES.get((source.digest, name)):
        return module
    parent, _, leaf = name.rpartition(".")
    if parent:
        _module(source, parent)
    stem = name.replace(".", "/")
    file = next((f for f in (f"{stem}.py", f"{stem}/__init__.py") if f in source.contents), None)
    module = types.ModuleType(f"lmscale_own_{source.digest}.{name}")
    module.__dict__["__builtins__"] = vars(builtins) | {
        "__import__": functools.partial(_import, source)
    }
    # dataclasses and pickle look a class's module up there.
    sys.modules[module.__name__] = _MODULES[source.digest, name] = module
    try:
        if file is not None:
            module.__file__ = str(source.folder / file)
            exec(compile(source.contents[file], module.__file__, "exec"), vars(module))
    except Exception as error:
        del sys.modules[module.__name__], _MODULES[source.digest, name]
        raise InputError(fault_of_code(error) or f"{source.main}: {error}") from error
    if parent:
        setattr(_MODULES[source.digest, parent], leaf, module)
    return module


def _import(source: SourceFiles, name: str, globals=None, locals=None, fromlist=(), level=0):
    """Imports as `__import__`, a user's folder first."""
    top = name.partition(".")[0]
    if top in _INSTALLED or not any(f.split("/")[0] in (top, f"{top}.py") for f in source.contents):
        return builtins.__import__(name, globals, locals, fromlist, level)
    module = _module(source, name)
    for child in fromlist or ():
        path = f"{name}.{child}".replace(".", "/")
        if not {f"{path}.py", f"{path}/__init__.py"}.isdisjoint(source.contents):
            _module(source, f"{name}.{child}")
    return module if fromlist else _module(source, top)


def forget_modules() -> None:
    """Lets the next `load` execute the code anew, as another process would."""
    _MODULES.clear()


def fault_of_code(error: BaseException) -> str | None:
    """Explains in one line an error that was raised in a user's code; None for any other."""
    folders = {str(source.folder / f) for source in _SOURCES.values() for f in source.contents}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in folders]
    if not frames:
        return None
    message = " ".join(str(error).split())[:300]
    last = frames[-1]
    return f"{last.filename}:{last.lineno}: in {last.name}: {type(error).__name__}: {message}"


def trust(digests: list[str]) -> None:
    """Lets code be executed that a run's directory holds, by at least 8 digits of its digest."""
    for digest in digests:
        if not re.fullmatch("[0-9a-f]{8,64}", digest):
            raise InputError(
                f"--trust_code={digest} is not the hash of code; use 12 digits, as the run's "
                f"folder {SOURCE}/ is named"
            )
    _TRUSTED.extend(digest[:12] for digest in digests)


def trusted_digests() -> list[str]:
    """Returns the digests of the code that this process may execute."""
    return sorted({*_SOURCES, *_TRUSTED})


def look_in(directory: Path) -> None:
    """Lets `load` find the copies in a run's or a ladder's directory."""
    if directory not in _DIRECTORIES:
        _DIRECTORIES.append(directory)


def _trusted_source(digest: str, value: str) -> SourceFiles:
    """Returns the files with a digest. Raises InputError where they are missing or not trusted."""
    if digest in _SOURCES:
        return _SOURCES[digest]
    for directory in _DIRECTORIES:
        folder = directory / SOURCE / digest
        if not folder.is_dir():
            continue
        paths = sorted(p for p in folder.rglob("*.py"))
        contents = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        main = _ADOPTED.fullmatch(value)["file"]
        source = SourceFiles(main, contents, folder.absolute())
        if source.digest != digest:
            raise InputError(
                f"{folder} was changed: its files have the hash {source.digest}; restore them, or "
                f"train again"
            )
        if not any(digest.startswith(prefix) for prefix in _TRUSTED):
            lines = sum(content.count(b"\n") for content in contents.values())
            raise InputError(
                f"{directory} was trained with code of its own ({SOURCE}/{digest}/{main}, {lines} "
                f"lines); read it, and --trust_code={digest} runs it"
            )
        _SOURCES[digest] = source
        return source
    raise InputError(f"{value}: no code {digest} is here; use FILE.py:NAME with the path of a file")


def save_sources(values: Iterable[str], directory: Path) -> None:
    """Copies the files of adopted values to source/DIGEST/ in a directory, where missing."""
    for part in (part for value in values for part in split_code(value)):
        source = _SOURCES[_ADOPTED.fullmatch(part)["digest"]]
        for name, content in source.contents.items():
            path = directory / SOURCE / source.digest / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def describe_source(value: str) -> dict:
    """Describes the code of an adopted value for run.json."""
    match = _ADOPTED.fullmatch(value)
    source = _SOURCES[match["digest"]]
    return {
        "name": match["name"],
        "sha256": source.sha256,
        "files": sorted(source.contents),
        "source": f"{SOURCE}/{source.digest}/{source.main}",
    }


def here(file: str) -> str:
    """Returns the beginning of a path beside a config file: here(__file__) + "poly.py:PolyMLP"."""
    return f"{Path(file).absolute().parent}/"
