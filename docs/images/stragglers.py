"""Draws accuracy over simulated seconds with slow ranks as an SVG: ``python docs/images/stragglers.py``.

From ``benchmarks/results/stragglers.json``, which ``python -m benchmarks stragglers`` writes; the first seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("stragglers.svg")
FIGURES = Path(__file__).parents[2] / "benchmarks" / "results" / "stragglers.json"
WIDTH, HEIGHT, PANEL = 900, 350, 300
LEFT, TOP, WIDE, HIGH = 44, 48, 236, 210
POINTS = 80
# Of the modes that were measured, and where its name stands below the panels.
MODES = {
    "synchronous": 44, "--round-timeout 2": 180, "--merge-after 6": 344, "--buffer 3 --staleness constant": 500,
    "--balance": 760,
}  # fmt: skip
# Which number of a point is drawn: of the last, what becomes of the class that only the slowest rank has.
PANELS = {
    "IID": ("IID: accuracy", 1),
    "Dirichlet 0.3": ("Dirichlet(0.3): accuracy", 1),
    "one class": ("one class: accuracy, nines", 2),
}
STYLE = """
.ground { fill: #ffffff; stroke: #d0d7de; } .grid { stroke: #d8dee4; }
.wanted { stroke: #57606a; stroke-dasharray: 4 3; }
text { font: 12px ui-sans-serif, system-ui, "Segoe UI", sans-serif; fill: #1f2328; }
.title { font-size: 14px; font-weight: 600; } .end { text-anchor: end; } .middle { text-anchor: middle; }
polyline, .key { fill: none; stroke-width: 1.8; }
.m0 { stroke: #1f2328; } .m1 { stroke: #9a6700; } .m2 { stroke: #0969da; } .m3 { stroke: #1a7f37; }
.m4 { stroke: #8250df; }
@media (prefers-color-scheme: dark) { .ground { fill: #0d1117; stroke: #30363d; } .grid { stroke: #21262d; }
.wanted { stroke: #8b949e; } text { fill: #e6edf3; }
.m0 { stroke: #e6edf3; } .m1 { stroke: #d29922; } .m2 { stroke: #58a6ff; } .m3 { stroke: #3fb950; }
.m4 { stroke: #bc8cff; } }
"""


def main() -> None:
    """Draw it."""
    OUTPUT.write_text(draw(json.loads(FIGURES.read_text())), encoding="utf-8")


def draw(found: list[dict[str, Any]]) -> str:
    """Return the SVG."""
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Digits on eight ranks, one four and one ten times slower: accuracy over simulated seconds</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>',
    ]
    for index, (data, (title, which)) in enumerate(PANELS.items()):
        runs = {each["mode"]: each["runs"][0] for each in found if each["data"] == data}
        drawn.append(f'<g transform="translate({index * PANEL},0)">')
        drawn += _frame(title, next(iter(runs.values()))["most_s"])
        for number, mode in enumerate(MODES):
            run = runs[mode]
            points = " ".join(
                f"{LEFT + WIDE * now / run['most_s']:.1f},{TOP + HIGH * (1 - value):.1f}"
                for now, value in thinned([(entry[0], entry[which]) for entry in run["curve"]], run["most_s"])
            )
            drawn.append(f'<polyline class="m{number}" points="{points}"/>')
        drawn.append("</g>")
    for index, (mode, x) in enumerate(MODES.items()):
        drawn.append(f'<path class="key m{index}" d="M{x} 324h24"/><text x="{x + 30}" y="328">{mode}</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _frame(title: str, most_s: float) -> list[str]:
    drawn = [f'<text class="title" x="{LEFT}" y="28">{title}</text>']
    for percent in (0, 25, 50, 75, 100):
        y = TOP + HIGH * (1 - percent / 100)
        drawn.append(f'<path class="grid" d="M{LEFT} {y}h{WIDE}"/>')
        drawn.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4}">{percent}</text>')
    drawn.append(f'<path class="wanted" d="M{LEFT} {TOP + HIGH * 0.05:.1f}h{WIDE}"/>')
    for share in (0, 0.5, 1):
        seconds = f"{share * most_s:g}" + (" s" if share == 1 else "")
        drawn.append(f'<text class="middle" x="{LEFT + WIDE * share}" y="{TOP + HIGH + 18}">{seconds}</text>')
    return drawn


def thinned(curve: list[tuple[float, float]], most_s: float) -> list[tuple[float, float]]:
    """Return at most `POINTS` points: the means of equal pieces of the time."""
    pieces: dict[int, list[tuple[float, float]]] = {}
    for now, value in curve:
        pieces.setdefault(int(POINTS * now / most_s), []).append((now, value))
    return [(sum(now for now, _ in each) / len(each), sum(value for _, value in each) / len(each))
            for each in pieces.values()]  # fmt: skip


if __name__ == "__main__":
    main()
