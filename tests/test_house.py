"""The rooms of ``fedsplit/``: which may import which. The sources are read, nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from typing import NamedTuple

import pytest

from tests.programs import ROOT

PACKAGE = ROOT / "fedsplit"
SCRIPTS = ("server_main", "client_main", "model_main")

# room -> what it must never import, at the top of a module or inside a function.
FLOWER_SIDE = frozenset({"flwr", "grpc", "wire", "server", "client", "engines"})
NEVER = {
    "trainer": FLOWER_SIDE,
    "exchange": FLOWER_SIDE,
    "states": FLOWER_SIDE,
    "disk": FLOWER_SIDE,
    "secure": FLOWER_SIDE,
    "server": frozenset({"engines", "watch", "commands"}),
}
# Rooms that an interpreter may import without loading these packages.
WITHOUT = {
    "client": {"torch"},
    "trainer": {"flwr", "grpc"},
    "exchange": {"flwr", "grpc"},
    "states": {"flwr", "grpc"},
    "disk": {"flwr", "grpc"},
}
# (module, room or package) that a change under way removes. It must be empty in the end.
EXPECTED_LATER: set[tuple[str, str]] = set()


class Import(NamedTuple):
    """One import: who, of what, and whether it happens when the module itself is imported."""

    module: str
    target: str
    at_top: bool


@cache
def sources() -> dict[str, ast.Module]:
    """Return every module of the package and the three scripts, by dotted name."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if "template" not in path.parts
    }
    paths |= {name: ROOT / f"{name}.py" for name in SCRIPTS}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST, *, at_top: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node below, and whether it runs when the module is imported; without what is only for types."""
    for child in ast.iter_child_nodes(node):
        if is_for_types(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield other, at_top
            continue
        yield child, at_top
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, at_top=at_top and not inside)


@cache
def imports() -> frozenset[Import]:
    """Return every import of the package and the scripts."""
    found = set()
    for module, tree in sources().items():
        for node, at_top in walk(tree):
            if isinstance(node, ast.Import):
                found |= {Import(module, alias.name, at_top) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(Import(module, whole if whole in sources() else str(node.module), at_top))
    return frozenset(found)


def room_of(name: str) -> str:
    """Return the room of a module of ours, the package of another; the top of ``fedsplit/`` is a room of its own."""
    parts = name.split(".")
    if parts[0] != "fedsplit":
        return parts[0]
    return parts[1] if len(parts) > 1 else "fedsplit"


def check(found: set[tuple[str, str]]) -> None:
    """Compare with what is expected to be gone later; what is gone already may not stay in that list."""
    assert not found - EXPECTED_LATER


def forbidden() -> set[tuple[str, str]]:
    found = set()
    for module, target, _ in imports():
        room, other = room_of(module), room_of(target)
        ours = target.startswith("fedsplit.")
        if other in NEVER.get(room, ()) and (ours or other in ("flwr", "grpc")):
            found.add((module, other))
        if room == "disk" and ours and other not in ("disk", "errors"):
            found.add((module, other))
        if room == "states" and ours and other == "exchange":
            found.add((module, other))
        is_door = module in (*SCRIPTS, "fedsplit.__main__")
        if ours and other == "commands" and room != "commands" and not is_door:
            found.add((module, other))
    return found


def test_no_room_imports_what_it_must_never_import() -> None:
    check(forbidden())
    assert forbidden() >= EXPECTED_LATER, "what no longer occurs is taken out of EXPECTED_LATER"


def loaded_with(module: str) -> dict[str, str]:
    """Return every module that is loaded with one, each with the one that loads it."""
    after: dict[str, list[str]] = {}
    for each in imports():
        if each.at_top:
            after.setdefault(each.module, []).append(each.target)
    found, waiting = {module: module}, [module]
    while waiting:
        current = waiting.pop()
        parents = [current.rsplit(".", dots)[0] for dots in range(1, current.count(".") + 1)]
        for target in [*after.get(current, []), *parents]:
            if target not in found:
                found[target] = current
                waiting.append(target)
    return found


@pytest.mark.parametrize("room", WITHOUT)
def test_a_room_can_be_imported_without_the_packages_that_it_does_not_need(room: str) -> None:
    for module in sources():
        if room_of(module) == room and module.startswith("fedsplit."):
            loaded = loaded_with(module)
            wrong = {name: by for name, by in loaded.items() if name.split(".")[0] in WITHOUT[room]}
            assert not wrong, f"{module} loads {wrong}"


def test_no_circle_of_modules_and_none_of_rooms() -> None:
    # Both raise CycleError, which shows the circle.
    modules: dict[str, set[str]] = {name: set() for name in sources()}
    rooms: dict[str, set[str]] = {}
    for module, target, at_top in imports():
        if target in modules and target != module and at_top:
            modules[module].add(target)
            if room_of(module) != room_of(target):
                rooms.setdefault(room_of(module), set()).add(room_of(target))
    TopologicalSorter(modules).prepare()
    # Without circles the rooms stand on floors, and no import runs up.
    TopologicalSorter(rooms).prepare()


def test_every_room_has_a_sign_of_one_sentence() -> None:
    for folder in (path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"):
        sign = ast.get_docstring(sources()[f"fedsplit.{folder.name}"]) or ""
        first = sign.split("\n\n")[0]
        assert first.endswith("."), folder.name
        assert len(re.findall(r"\.(?:\s|$)", first)) == 1, f"{folder.name}: {first}"
