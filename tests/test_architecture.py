"""The rooms of the repository and the arrows between them, as docs/architecture.md draws them.

A room is a row of the table there: a folder with the files directly in it, or a single file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dpofast": ROOT / "dpofast",
    "dpofast_kernels": ROOT / "kernels" / "dpofast_kernels",
    "benchmarks": ROOT / "benchmarks",
}
# Three ways to import. A room may use none of them to reach a room that its row leaves out.
FORMS = (
    "from {module} import thing",
    "def function():\n    import {module}",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {module} import thing",
)

Graph = Mapping[str, set[str]]


def module_paths() -> dict[str, Path]:
    """Path of every module of the three packages, by its dotted name."""
    paths = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


PATHS = module_paths()
SOURCES = {module: path.read_text(encoding="utf-8") for module, path in PATHS.items()}


def imports(source: str) -> set[str]:
    """Modules of the three packages that a source imports, inside functions or for types too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in PATHS}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                # `from package import name`: the name is a module, or something inside one.
                name = f"{node.module}.{alias.name}"
                found |= {name} if name in PATHS else {node.module or ""} & PATHS.keys()
    return found


def other_packages(source: str) -> set[str]:
    """Top-level names of all imports in a source, except those for type checking."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body.clear()  # `ast.walk` would visit the body next
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


IMPORTS = {module: imports(source) for module, source in SOURCES.items()}


def rows_of_the_table() -> dict[str, set[str]]:
    """The rooms that each room may import, from the table of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("| room |"))
    table = {}
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        room, _, allowed = (cell.strip() for cell in line.strip("|").split("|"))
        name = room.strip("`")
        assert name not in table, f"two rows for {name}"
        table[name] = set(re.findall(r"`([^`]+)`", allowed))
    return table


TABLE = rows_of_the_table()


def room_of(path: Path) -> str:
    """The room of a file: its own row in the table where it has one, its folder otherwise."""
    for package, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            inside = path.relative_to(folder)
            # The table names dpofast's rooms without the package: `train`, `data/reading`.
            name = inside if package == "dpofast" else Path(package) / inside
    in_package = name.parent != Path() and name.as_posix() not in TABLE
    return (name.parent if in_package else name).as_posix()


def is_marker(path: Path) -> bool:
    """Whether a file is an `__init__.py` without code, which makes its folder a package."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return path.name == "__init__.py" and all(isinstance(node, ast.Expr) for node in body)


ROOMS = {module: room_of(path) for module, path in PATHS.items()}
ROOMS_OF_THE_TREE = {ROOMS[module] for module, path in PATHS.items() if not is_marker(path)}


def arrows(found: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str, str, str]]:
    """(room, room, module, module) of every import from one room into another."""
    for module, targets in found.items():
        for target in targets:
            if ROOMS[module] != ROOMS[target]:
                yield ROOMS[module], ROOMS[target], module, target


def offenders(found: Mapping[str, Iterable[str]], table: Graph) -> list[str]:
    """Imports that the table does not allow."""
    return [
        f"{module} imports {target}, but the row of {room} leaves out {other}"
        for room, other, module, target in arrows(found)
        if other not in table.get(room, set())
    ]


def circle(graph: Graph) -> list[str]:
    """One circle of a graph, its first node repeated at the end; [] if there is none."""
    finished: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for target in sorted(graph.get(node, ())):
            if found := search(target, [*path, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def test_every_room_has_a_row_and_every_row_a_room() -> None:
    assert set(TABLE) == ROOMS_OF_THE_TREE
    assert {other for allowed in TABLE.values() for other in allowed} <= set(TABLE)


def test_rooms_import_only_what_their_row_allows() -> None:
    assert not offenders(IMPORTS, TABLE)


def test_rooms_do_without_the_packages_that_they_are_to_do_without() -> None:
    """Check imports of packages that aren't ours, by their top-level names."""
    forbidden = {
        "data/packing": {"transformers", "datasets", "tokenizers", "accelerate", "deepspeed"},
        "reference/store": {"torch", "transformers", "datasets", "accelerate", "deepspeed"},
        "reference/identity": {"transformers", "datasets", "accelerate", "deepspeed"},
        "reference/build": {"torch", "transformers", "accelerate", "deepspeed"},
        "data/reading": {"torch", "transformers", "accelerate", "deepspeed"},
        "monitor": {"accelerate", "deepspeed"},
    }
    assert forbidden.keys() <= TABLE.keys()
    found = [
        f"{module} imports {name}"
        for module, source in SOURCES.items()
        for name in other_packages(source)
        if name == "tests" or name in forbidden.get(ROOMS[module], set())
    ]
    assert not found


def test_every_arrow_of_the_table_is_used() -> None:
    """If the table allowed an unused arrow, the first import to use it would go unnoticed."""
    used = {(room, other) for room, other, _, _ in arrows(IMPORTS)}
    assert {(room, other) for room, row in TABLE.items() for other in row} <= used


def test_rooms_form_no_circle() -> None:
    assert not [(a, b) for a, row in TABLE.items() for b in row if a == b or a in TABLE[b]]
    assert not circle(TABLE)


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_form_no_circle(package: str) -> None:
    inside = {module for module in PATHS if module.split(".")[0] == package}
    assert not circle({module: IMPORTS[module] & inside for module in inside})


def forbidden_room(room: str) -> str:
    """A room that `room` must not import: one that imports `room` if there is one, else any."""
    importers = [other for other, row in TABLE.items() if room in row]
    others = [other for other in TABLE if other != room and other not in TABLE[room]]
    return (importers or others)[0]


def test_a_forbidden_import_is_reported() -> None:
    """One forbidden import per room, where possible a reversed arrow; in all three forms."""
    modules = {room: module for module, room in ROOMS.items()}
    for room in TABLE:
        module, target = modules[room], modules[forbidden_room(room)]
        for form in FORMS:
            found = imports(f"{SOURCES[module]}\n{form.format(module=target)}\n")
            new = set(offenders({module: found}, TABLE)) - set(offenders(IMPORTS, TABLE))
            assert len(new) == 1, (room, form)
            assert f"{module} imports {target}" in new.pop()


def test_a_reversed_arrow_is_reported() -> None:
    """Reversing any arrow of the table forbids at least one import that the code has."""
    for room, row in TABLE.items():
        for other in row:
            reversed_arrow = {
                room: row - {other},
                other: TABLE[other] | {room},
            }
            assert offenders(IMPORTS, {**TABLE, **reversed_arrow}), (room, other)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"a"}}) == ["a", "a"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def paths_of_the_map() -> set[str]:
    """What the README's map names, as paths from the root without a slash at the end.

    A line of the map is `name/  what it is`, indented below its folder. A line can name several
    things (`a/, b/  what they are`), and a name can be a path (`data/reading/`).
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## Map", 1)[1].split("```")[1].strip("\n")
    named, folders = set(), [(-1, "")]
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        while folders[-1][0] >= depth:
            folders.pop()
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        paths = [folders[-1][1] + name for name in names]
        folders.append((depth, paths[-1]))
        named |= {path.rstrip("/") for path in paths}
    return named


def test_the_readme_map_is_the_tree() -> None:
    """The map names every folder of the two packages and the single files of dpofast."""
    tree = {
        path.relative_to(ROOT).as_posix()
        for package in ("dpofast", "dpofast_kernels")
        for folder in [PACKAGES[package]]
        for path in [folder, *folder.rglob("*")]
        if path.is_dir() and any(path.rglob("*.py"))
    }
    tree |= {f"dpofast/{path.name}" for path in PACKAGES["dpofast"].glob("[!_]*.py")}
    named = paths_of_the_map()
    assert not tree - named
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]
