"""Draws who imports whom in ``fedsplit/`` as an SVG: ``python docs/images/rooms.py``.

A room stands above all that it imports. Imports for type checkers do not count, those inside functions do. An arrow is
left out where a longer way leads to the same room, or there would be too many to follow.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

OUTPUT = Path(__file__).with_name("rooms.svg")
PACKAGE = Path(__file__).parents[2] / "fedsplit"
# The same for all rooms, and imported by nearly all: not drawn.
LEFT_OUT = {"errors", "__main__"}
WIDTH, HEIGHT, GAP, STEP, MARGIN = 128, 40, 24, 92, 24
STYLE = """
.ground { fill: #ffffff; stroke: #d0d7de; } .box { fill: #f3f6fa; stroke: #57606a; stroke-width: 1.5; }
text { font: 14px ui-sans-serif, system-ui, "Segoe UI", sans-serif; fill: #1f2328; text-anchor: middle; }
.way { stroke: #0969da; stroke-width: 1.5; fill: none; opacity: 0.75; }
@media (prefers-color-scheme: dark) { .ground { fill: #0d1117; stroke: #30363d; }
.box { fill: #161b22; stroke: #8b949e; } text { fill: #e6edf3; } .way { stroke: #58a6ff; } }
"""
Graph = dict[str, set[str]]


def main() -> None:
    """Read the sources and draw."""
    OUTPUT.write_text(draw(rooms()), encoding="utf-8")


def rooms() -> Graph:
    """Return which other rooms each room imports."""
    graph: Graph = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "template" in path.parts or path.name == "__init__.py":
            continue
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imported = {name.split(".")[1] for name in imports(ast.parse(path.read_text())) if name.count(".")}
        graph.setdefault(room, set()).update(imported - {room} - LEFT_OUT)
    return {room: imported for room, imported in graph.items() if room not in LEFT_OUT}


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that a piece of source imports when it runs."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedsplit":
        if node.module == "fedsplit":
            yield from (f"fedsplit.{alias.name}" for alias in node.names if alias.name.islower())
        else:
            yield str(node.module)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.startswith("fedsplit."))
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def floors(graph: Graph) -> dict[str, int]:
    """Return how high each room stands: above all that it imports; raises RecursionError for a circle."""

    def height(room: str) -> int:
        return max((height(below) + 1 for below in graph[room]), default=0)

    return {room: height(room) for room in graph}


def reaches(graph: Graph, start: str, end: str) -> bool:
    """Tell whether one room leads to another."""
    return start == end or any(reaches(graph, below, end) for below in graph[start])


def draw(graph: Graph) -> str:
    """Return the picture."""
    height = floors(graph)
    rows = [sorted(room for room in graph if height[room] == floor) for floor in range(max(height.values()), -1, -1)]
    width = max(len(row) for row in rows) * (WIDTH + GAP) - GAP + 2 * MARGIN
    place = {
        room: (
            (width - len(row) * (WIDTH + GAP) + GAP) / 2 + index * (WIDTH + GAP) + WIDTH / 2,
            MARGIN + number * STEP,
        )
        for number, row in enumerate(rows)
        for index, room in enumerate(row)
    }
    shapes = []
    for room, imported in graph.items():
        for below in sorted(imported):
            if any(other != below and reaches(graph, other, below) for other in imported):
                continue
            (x, y), (to_x, to_y) = place[room], place[below]
            y += HEIGHT
            bend = (to_y - y) / 2
            shapes.append(
                f'<path class="way" marker-end="url(#tip)" d="M{x:.0f} {y:.0f} C{x:.0f} {y + bend:.0f} '
                f'{to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y - 2:.0f}"/>'
            )
    for room, (x, y) in place.items():
        shapes.append(
            f'<rect class="box" x="{x - WIDTH / 2:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
            f'<text x="{x:.0f}" y="{y + 25:.0f}">{room}</text>'
        )
    total = MARGIN * 2 + (len(rows) - 1) * STEP + HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img">\n'
        "<title>The rooms of fedsplit, and which imports which: every arrow points down</title>\n"
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        '<path fill="#57606a" d="M0 0 10 5 0 10z"/></marker></defs>\n'
        f'<rect class="ground" x="1" y="1" width="{width - 2}" height="{total - 2}" rx="10"/>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
