"""The plan of the house: who imports whom, what names mean, and how much a newcomer has to read."""

import ast
import collections
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lmscale_jax"
# Folders of the checkout that a wheel has inside the package.
LINKS = {"configs", "examples"}
# From the lowest room to the highest; a room imports itself and those before it. `files` of the top
# level that are no commands stand in the same order.
ROOMS = (
    "errors", "files", "config", "cli", "data", "model", "optim", "mur", "evals", "train",
    "scaling", "sweeps", "guards", "ladders", "reports",
)  # fmt: skip
# Assigned names that do not say what they hold.
EMPTY_NAMES = {"found", "one", "made", "said", "own", "given", "known"}
# Every command has a `main`.
SHARED_NAMES = {"main"}
AFTERNOON_FILES, AFTERNOON_LINES = 20, 4000


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(path): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if LINKS.isdisjoint(path.relative_to(PACKAGE).parts)
}


def imported_modules(name: str) -> set[str]:
    """The modules of the package that a module imports, inside functions too."""
    modules = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("lmscale_jax.") in TREES
                modules.add(full if is_module else node.module)
    inside = {m.removeprefix("lmscale_jax.") for m in modules if m.startswith("lmscale_jax.")}
    return inside & TREES.keys() - {name}


IMPORTS = {name: imported_modules(name) for name in TREES}


def room_of(module: str) -> str:
    """The room of a module; "commands" for the verbs on top."""
    first = module.partition(".")[0]
    return first if first in ROOMS else "commands"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan 1972)."""
    index, low, stack, components = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                components.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return components


def test_circles_are_recognised():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_file_or_room_stands_in_a_circle():
    between_rooms = collections.defaultdict(set)
    for module, targets in IMPORTS.items():
        between_rooms[room_of(module)] |= {room_of(t) for t in targets} - {room_of(module)}
    of_files, of_rooms = circles(IMPORTS), circles(between_rooms)
    arrows = sum(map(len, IMPORTS.values()))
    print(f"{len(TREES)} files, {arrows} imports, {len(of_files) + len(of_rooms)} circles")
    assert not of_files and not of_rooms


def test_no_room_imports_a_higher_one():
    order = {room: rank for rank, room in enumerate((*ROOMS, "commands"))}
    upward = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if order[room_of(target)] > order[room_of(module)]
    ]
    print(f"{len(upward)} upward imports")
    assert not upward


def test_every_folder_is_a_room():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders - LINKS <= set(ROOMS)


def test_the_plan_names_every_file():
    """docs/architecture.md, in the list of rooms; a name that ends in * stands for several."""
    plan = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    words = set(re.findall(r"[a-z_0-9]+\*?", plan))
    begins = tuple(word[:-1] for word in words if word.endswith("*"))
    names = {module.rpartition(".")[2] for module in TREES if module}
    assert not [n for n in names if n not in words and not n.startswith(begins)]


def definitions() -> list[tuple[str, str]]:
    """(module, name) of every function and class at the top of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [(m, n.name) for m, tree in TREES.items() for n in tree.body if isinstance(n, kinds)]


def test_a_name_is_defined_once():
    """`grep` for a function finds it: public names are unique in the package, private ones in a
    room."""
    places = collections.defaultdict(list)
    for module, name in definitions():
        if module == "from_python":  # the functions of `import lmscale_jax`, by the same names
            continue
        scope = room_of(module) if name.startswith("_") else ""
        # Each command is a file of its own, and nothing imports it.
        scope = module if scope == "commands" else scope
        places[scope, name].append(module)
    again = {k: v for k, v in places.items() if len(v) > 1 and k[1] not in SHARED_NAMES}
    assert not again


def assigned_names(tree: ast.AST) -> set[tuple[str, int]]:
    names = {(n.id, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Name)
             and isinstance(n.ctx, ast.Store)}  # fmt: skip
    return names | {(n.arg, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.arg)}


@pytest.mark.parametrize("folder", ["lmscale_jax", "configs", "tests", "benchmarks", "docs"])
def test_assigned_names_say_what_they_hold(folder):
    empty = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, line in assigned_names(ast.parse(path.read_text()))
        if name in EMPTY_NAMES
    ]
    assert not empty


def afternoon_path() -> list[Path]:
    """The files of the reading order in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("## An afternoon's reading")[2].partition("\n## ")[0]
    return [ROOT / name for name in re.findall(r"`((?:lmscale_jax|configs)/[\w/]+\.py)`", section)]


def test_an_afternoon_is_enough_to_read_how_a_run_trains():
    paths = afternoon_path()
    lines = sum(path.read_text().count("\n") for path in paths)
    all_lines = sum(path.read_text().count("\n") for path in PACKAGE.rglob("*.py"))
    print(f"afternoon path: {len(paths)} files, {lines} lines of {all_lines}")
    assert len(set(paths)) == len(paths) >= 10
    assert len(paths) <= AFTERNOON_FILES and lines <= AFTERNOON_LINES
