"""Compares runs: final and best accuracy and loss, the worst rank, seconds, bytes; means and deviations over seeds.

    python -m fedsplit compare study

Each DIR is the --checkpoint-dir of a run, or has such directories in it, as that of a study has. Runs whose settings
differ only in the seed are put together: mean ± standard deviation of the sample. A server does not know what its
trainers were started with: runs by hand, outside a study, are told apart by the server's flags alone.
"""

import argparse
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsplit import cli
from fedsplit.disk.files import write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.run.events import format_bytes
from fedsplit.run.history import JUDGED_BY, Line, is_number
from fedsplit.study.results import Group, find_runs, group
from fedsplit.watch.plot import draw_comparison
from fedsplit.watch.rounds import PHASES, metrics_at, ranks_of

_MISSING = (math.nan, math.nan)
# Shown without a deviation.
_PLAIN: dict[str, Callable[[float], str]] = {
    "rounds": "{:g}".format, "seconds": "{:.1f}".format, "bytes a round": format_bytes,
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    add = parser.add_argument
    add("directories", nargs="+", type=Path, metavar="DIR", help="a --checkpoint-dir, or a directory of these")
    add("--output", type=Path, metavar="FILE",
        help="also write the table as .csv or .md, or the curves as .png (default: only what is printed)")  # fmt: skip
    add("--by-rank", type=Path, metavar="FILE",
        help="also write a .csv with one line for each run, round and rank (default: none)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    output, by_rank = arguments.output, arguments.by_rank
    if output:
        cli.check_output(output, tuple(_WRITERS))
    if by_rank:
        cli.check_output(by_rank, (".csv",), "--by-rank")
    groups = group(find_runs(arguments.directories))
    print_groups(groups)
    if output:
        write(groups, output)
    if by_rank:
        write_by_rank(groups, by_rank)
    return 0


def print_groups(groups: Sequence[Group]) -> None:
    """Print the table on stdout."""
    headings, rows = _table(groups)
    cli.print_table(rows, headings, numbers=headings[1:])


def write(groups: Sequence[Group], output: Path) -> None:
    """Write the table or the curves, by the file's ending; raises MissingPackageError for curves without matplotlib."""
    _WRITERS[output.suffix](groups, output)


def write_by_rank(groups: Sequence[Group], output: Path) -> None:
    """Write what every rank measured in every round of every run, under the names that trackers get."""
    rows = [
        {"run": result.directory, **each.varied, "seed": result.seed, "round": line["round"], "rank": rank,
         **_metrics(line, rank)}
        for each in groups for result in each.runs for line in result.lines for rank in ranks_of([line])
    ]  # fmt: skip
    _write_rows(rows, output)


def _metrics(line: Line, rank: str) -> dict[str, float]:
    found = {f"{phase}/{name}": each for phase in PHASES for name, each in metrics_at(line, phase, rank).items()}
    return {name: each for name, each in found.items() if is_number(each)}


def _write_csv(groups: Sequence[Group], output: Path) -> None:
    """Write every number that there is, mean and deviation in columns of their own."""
    rows = []
    for each in groups:
        row = {"settings": each.label, **each.varied, "seeds": len(each.runs)}
        for name, (mean, deviation) in each.numbers().items():
            row |= {name: mean, f"{name} deviation": deviation}
        rows.append(row)
    _write_rows(rows, output)


def _write_markdown(groups: Sequence[Group], output: Path) -> None:
    headings, rows = _table(groups)
    ruler = ["---", *["---:"] * len(headings[1:])]
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in (headings, ruler, *rows))
    write_chunks(output, [f"| {line} |\n".encode() for line in lines])


def _write_plot(groups: Sequence[Group], output: Path) -> None:
    names = [name for name in JUDGED_BY if any(name in each.numbers() for each in groups)]
    if not names:
        raise CheckpointError("none of these runs has an accuracy or a loss of an evaluation: there is nothing to draw")
    curves = {name: {each.label: each.curve(name) for each in groups} for name in names}
    write_chunks(output, [draw_comparison(curves)])


def _write_rows(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Write rows by their headings; what a row does not have, or is NaN, stays empty."""
    text, headings = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, headings, lineterminator="\n")
    writer.writeheader()
    # Only a NaN is not equal to itself.
    writer.writerows({name: each for name, each in row.items() if each == each} for row in rows)
    write_chunks(output, [text.getvalue().encode()])


def _table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells for people: all of what the runs are judged by, of the other metric the end alone."""
    numbers = [each.numbers() for each in groups]
    judged, *others = [name for name in JUDGED_BY if any(name in found for found in numbers)] or [""]
    columns = {judged: judged, "best": f"best {judged}", "worst rank": f"worst rank's {judged}"} if judged else {}
    columns |= {name: name for name in (*others, "rounds", "seconds", "bytes a round")}
    rows = [
        [each.label, str(len(each.runs)), *(_shown(name, *found.get(name, _MISSING)) for name in columns.values())]
        for each, found in zip(groups, numbers, strict=True)
    ]
    return ["settings", "seeds", *columns], rows


def _shown(name: str, mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "–"
    if name in _PLAIN:
        return _PLAIN[name](mean)
    return f"{mean:.3f}" + ("" if math.isnan(deviation) else f" ± {deviation:.3f}")


_WRITERS = {".csv": _write_csv, ".md": _write_markdown, ".png": _write_plot}
