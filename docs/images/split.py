"""Draws the kinds of split learning as an SVG: ``python docs/images/split.py``."""

from __future__ import annotations

from pathlib import Path

OUTPUT = Path(__file__).with_name("split.svg")
WIDTH, HEIGHT, PANEL = 900, 500, 225
STYLE = """
.ground { fill: #ffffff; stroke: #d0d7de; } .rank { fill: #ddf4ff; stroke: #57606a; }
.beside { fill: #fff1e5; stroke: #57606a; }
text { font: 14px ui-sans-serif, system-ui, "Segoe UI", sans-serif; fill: #1f2328; text-anchor: middle; }
.title { font-weight: 600; } .small { font-size: 12px; }
.way { stroke: #0969da; stroke-width: 1.5; fill: none; marker-end: url(#tip); }
.tip { fill: #0969da; }
@media (prefers-color-scheme: dark) { .ground { fill: #0d1117; stroke: #30363d; }
.rank { fill: #0c2d49; stroke: #8b949e; } .beside { fill: #3d2510; stroke: #8b949e; }
text { fill: #e6edf3; } .way { stroke: #58a6ff; } .tip { fill: #58a6ff; } }
"""
Part = tuple[float, float, str, str]
Way = tuple[float, float, float, float]

# x and y of the middle, text, and where it is; then from where to where.
PARTS: dict[str, tuple[list[Part], list[Way], list[str]]] = {
    "sfl-v1": (
        [(56, 360, "lower 1", "rank"), (168, 360, "lower 2", "rank"), (56, 160, "upper 1", "beside"),
         (168, 160, "upper 2", "beside")],
        [(46, 340, 46, 182), (66, 182, 66, 340), (158, 340, 158, 182), (178, 182, 178, 340)],
        ["all ranks at the same time;", "each part merged", "after the round"],
    ),
    "sfl-v2": (
        [(56, 360, "lower 1", "rank"), (168, 360, "lower 2", "rank"), (112, 160, "upper", "beside")],
        [(46, 340, 88, 182), (100, 182, 62, 340), (162, 340, 124, 182), (136, 182, 178, 340)],
        ["a batch of each rank in turn;", "the lower parts merged", "after the round"],
    ),
    "sequential": (
        [(56, 360, "lower", "rank"), (168, 360, "lower", "rank"), (112, 160, "upper", "beside")],
        [(46, 340, 88, 182), (100, 182, 62, 340), (92, 360, 130, 360), (162, 340, 124, 182),
         (136, 182, 178, 340)],
        ["one rank after the other;", "the lower part goes on", "from rank to rank"],
    ),
    "U-shaped": (
        [(56, 360, "lower", "rank"), (168, 360, "tail", "rank"), (112, 160, "upper", "beside")],
        [(46, 340, 88, 182), (100, 182, 62, 340), (124, 182, 162, 340), (178, 340, 136, 182)],
        ["labels, loss and tail", "stay with the rank;", "in each of the three"],
    ),
}  # fmt: skip


def main() -> None:
    """Draw it."""
    OUTPUT.write_text(draw(), encoding="utf-8")


def draw() -> str:
    """Return the SVG."""
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>The kinds of split learning: which parts there are, and in which order they train</title>",
        f"<style>{STYLE}</style>",
        '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0L10 5L0 10z"/></marker>',
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
    ]
    for index, (title, (parts, ways, said)) in enumerate(PARTS.items()):
        drawn.append(f'<g transform="translate({index * PANEL},0)">')
        drawn.append(f'<text class="title" x="112" y="36">{title}</text>')
        drawn.append('<text class="small" x="112" y="112">beside the server</text>')
        drawn.append('<text class="small" x="112" y="402">at the ranks</text>')
        for x, y, text, where in parts:
            drawn.append(f'<rect class="{where}" x="{x - 38}" y="{y - 20}" width="76" height="40" rx="5"/>')
            drawn.append(f'<text x="{x}" y="{y + 5}">{text}</text>')
        for x1, y1, x2, y2 in ways:
            drawn.append(f'<path class="way" d="M{x1} {y1}L{x2} {y2}"/>')
        for line, text in enumerate(said):
            drawn.append(f'<text class="small" x="112" y="{436 + 18 * line}">{text}</text>')
        drawn.append("</g>")
    drawn.append(f'<text class="small" x="{WIDTH / 2}" y="72">up: activations; down: their gradient</text></svg>')
    return "\n".join(drawn) + "\n"


if __name__ == "__main__":
    main()
