"""Measures the project and prints a table; the figures also go to ``benchmarks/results/`` as JSON.

    make bench                                        all of it, half an hour on two cores
    python -m benchmarks --quick                      fewer repeats
    python -m benchmarks round merge                  only these topics
    python -m benchmarks stragglers                   slow ranks by a simulated clock; only if named
    python -m benchmarks wire                         --wire: bytes, accuracy, a slow link; needs root; only if named
    python -m benchmarks secure                       secure sums, and Flower's; only if named
    python -m benchmarks long                         memory over 2,000 rounds; some minutes, only if named
    python -m benchmarks peers                        other federations; some minutes, only if named
    python -m benchmarks algorithms                   examples/algorithms; 72 runs of 20 s and more, only if named

Exit code 0 also where a target is missed: the table says so, and a busy machine is no fault of the code's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import (
    algorithms,
    handoff,
    idle,
    large,
    limits,
    long,
    memory,
    merge,
    noticing,
    peers,
    rounds,
    scaling,
    secure,
    split,
    startup,
    stragglers,
    superlink,
    wire,
)  # fmt: skip
from benchmarks.common import RESULTS, Figure, Options, machine, spread

MODULES = (handoff, noticing, idle, rounds, limits, merge, startup, memory, scaling, split, superlink, large)
USUAL = {module.TOPIC: module for module in MODULES}
# Accuracies are no figures of this project's speed, and the others take long.
TOPICS = {**USUAL, **{module.TOPIC: module for module in (algorithms, stragglers, wire, secure, long, peers)}}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "topics",
        nargs="*",
        metavar="TOPIC",
        help=f"any of {', '.join(TOPICS)} (default: all but {', '.join(name for name in TOPICS if name not in USUAL)})",
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs; the figures mean nothing")
    parser.add_argument("--large", action="store_true", help="also 1.5 GB in messages and 4 GB by reference")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes (default: results/)")
    arguments = parser.parse_args(argv)
    if unknown := [topic for topic in arguments.topics if topic not in TOPICS]:
        parser.error(f"no such topic: {', '.join(unknown)}; there are {', '.join(TOPICS)}")
    options = Options(quick=arguments.quick, tiny=arguments.tiny, large=arguments.large)
    # In a file a table of the terminal's default 80 columns could not be read.
    console = Console(width=None if sys.stdout.isatty() else 180)
    figures: list[Figure] = []
    failed = False
    before = machine()
    path = arguments.output or RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for topic in arguments.topics or USUAL:
        console.print(f"measuring {topic} …", style="dim")
        began = time.monotonic()
        try:
            figures += TOPICS[topic].run(options)
        except Exception as exc:  # noqa: BLE001  (one topic that fails must not lose the others' figures)
            failed = True
            traceback.print_exc()
            reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
            figures.append(Figure(topic=topic, name="failed", unit="", missing=reason))
        console.print(f"  {time.monotonic() - began:.0f} s", style="dim")
        # After each topic: half an hour must not be lost to the last one.
        record = {"machine": before, "options": vars(options), "figures": [figure.to_json() for figure in figures]}
        path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(table_of(figures))
    versions = ", ".join(f"{name} {before['packages'][name]}" for name in ("fedsplit", "flwr", "torch"))
    hardware = f"{before['processor']}, {before['cores']} cores, {before['memory_gb']} GB"
    console.print(f"{hardware}, Python {before['python']}, {versions}, load {before['load_average']}", style="dim")
    console.print(f"written to {path}", style="dim")
    return int(failed)


def table_of(figures: Sequence[Figure]) -> Table:
    """Lay the figures out as a table."""
    table = Table(caption="median (first to third quartile)", caption_justify="left")
    for name, justify in (("topic", "left"), ("what", "left"), ("ours", "right"), ("peer", "right"), ("", "right"),
                          ("target", "right"), ("note", "left")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    last = None
    for figure in figures:
        if last is not None and figure.topic != last:
            table.add_section()
        table.add_row("" if figure.topic == last else figure.topic, *_cells(figure))
        last = figure.topic
    return table


def _cells(figure: Figure) -> tuple[str, ...]:
    if figure.median is None:
        return figure.name, "-", "-", "-", "-", figure.missing
    peer = f"{_shown(figure.peer_samples)} {figure.unit}" if figure.peer_samples else ""
    sign = {"ratio": "x", "speedup": "times faster", "difference": f"{figure.unit} more"}
    judged = "" if figure.judged_by == "median" else f"{figure.judged:.3g} {sign[figure.judged_by]}"
    target = ""
    if figure.target is not None:
        bound = ">=" if figure.wants_more else "<="
        target = f"[{'green' if figure.reached else 'red'}]{bound} {figure.target:.3g}"
    note = ", ".join(part for part in (f"peer: {figure.peer}" if figure.peer else "", figure.note) if part)
    return figure.name, f"{_shown(figure.samples)} {figure.unit}", peer, judged, target, note


def _shown(samples: Sequence[float]) -> str:
    low, high = spread(samples) or (0.0, 0.0)
    return f"{statistics.median(samples):.3g} ({low:.3g}-{high:.3g})"


if __name__ == "__main__":
    sys.exit(main())
