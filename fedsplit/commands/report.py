"""Writes what a run did and how to repeat it as one HTML page.

    python -m fedsplit report --checkpoint-dir checkpoints --output report.html

The page needs no network and no script: it can be sent by mail, and reads well on a phone and in dark mode. It may be
written while the run is on.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsplit import cli
from fedsplit.disk.checkpoints import CheckpointStore
from fedsplit.disk.files import write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.run.directory import STATE_FILE, Places
from fedsplit.run.events import format_bytes, format_seconds
from fedsplit.run.history import Line, read_rounds
from fedsplit.run.time_account import STAGES, STEP_STAGES, account, account_step, update_bytes
from fedsplit.watch import plot, rounds

_ENDINGS = (".html", ".htm")
# What the server measured for each rank, from sending to merging.
_RANK_STAGES = ("training", "hand-off", "transfer", "checking", "merging", "waiting", "turn")
# What every rank measured itself, at its last evaluation and at its best.
_JUDGED = ("rank", "accuracy", "best accuracy", "loss", "best loss", "test examples")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page tells: ``run.json``, the history of at least one round, and the newest checkpoint if there is one."""

    record: Mapping[str, Any]
    lines: Sequence[Line]
    state_round: int = 0
    state_digest: str = ""


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    cli.add_files(parser, _ENDINGS)


def run(arguments: argparse.Namespace) -> int:
    cli.check_output(arguments.output, _ENDINGS)
    report = read_report(Places(arguments.checkpoint_dir))
    write_chunks(arguments.output, [render(report).encode()])
    print(f"{arguments.output}: {cli.count(len(report.lines), 'round')} of run {report.record.get('run_id')}")
    return 0


def read_report(places: Places) -> Report:
    """Read all that a page tells; raises CheckpointError if there is no run, or it has no rounds yet."""
    try:
        record = json.loads(places.run.read_bytes())
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"no run in {places.server}: is it the server's --checkpoint-dir?") from exc
    lines = read_rounds(places.history)
    newest = CheckpointStore(places.server).newest()
    if newest is None:
        return Report(record=record, lines=lines)
    digest = newest.files[STATE_FILE]
    return Report(record=record, lines=lines, state_round=newest.server_round, state_digest=digest)


def render(report: Report) -> str:
    """Return the page; raises MissingPackageError without matplotlib."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    record, lines, charts = report.record, report.lines, plot.charts(report.lines)
    time_chart, step_chart = charts.pop("time"), charts.pop("step", "")
    sessions = record.get("sessions", [])
    software = sessions[-1].get("software", {}) if sessions else {}
    metrics = rounds.columns(lines)
    # Names, reasons and settings come from clients and users: every text is escaped on its way into the page.
    environment = Environment(
        loader=PackageLoader("fedsplit.commands", "page"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        run_id=record.get("run_id"), began=record.get("began", "at an unknown time"),
        sessions=cli.count(len(sessions) or 1, "session"), tiles=_tiles(lines),
        charts=charts, charts_left_out=len({name for _, name in rounds.metrics_of(lines)} - charts.keys()),
        time_chart=time_chart, stages=_stages(lines), step_chart=step_chart, step_stages=_step_stages(lines),
        judged_headings=_JUDGED, judged_ranks=list(_judged_ranks(lines)),
        rank_headings=("rank", *_RANK_STAGES), seconds_by_rank=list(_seconds_by_rank(lines)),
        headings=rounds.headings(metrics), rounds=[rounds.cells(line, metrics) for line in lines],
        refusals=rounds.refusals(lines),
        split=[(row["part"], row["rule"], f"{row['entries']:,}", format_bytes(row["bytes"]))
               for row in record.get("split", [])],
        settings=record.get("settings", {}), software=software,
        pins=[f"{name}=={version}" for name, version in software.items() if name not in ("python", "platform")],
        # Under `flwr run` there is no command of ours: the settings are the run config.
        starts=[f"# {each.get('began')}\n{each.get('command') or 'flwr run'}" for each in sessions],
        ranks=rounds.ranks_of(lines), state_round=report.state_round, state_digest=report.state_digest,
    )  # fmt: skip


def _tiles(lines: Sequence[Line]) -> dict[str, str]:
    tiles = {}
    for name, best_of in (("accuracy", max), ("loss", min)):
        if judged := rounds.judged(lines, name):
            server_round, last = judged[-1]
            best = best_of(judged, key=lambda pair: pair[1])
            tiles[f"test {name} after round {server_round}"] = f"{last:.4f}"
            tiles[f"best test {name}, in round {best[0]}"] = f"{best[1]:.4f}"
            break
    seconds = sum(line.get("seconds") or 0.0 for line in lines)
    if cut := [line["split"] for line in lines if line.get("split")]:
        tiles["steps a second, mean"] = f"{sum(each['steps_per_second'] for each in cut) / len(cut):.1f}"
        tiles["of activations up"] = format_bytes(sum(each["bytes_up"] for each in cut))
        tiles["of gradients down"] = format_bytes(sum(each["bytes_down"] for each in cut))
    return tiles | {
        "rounds": str(len(lines)), "ranks": str(len(rounds.ranks_of(lines))), "in all rounds": format_seconds(seconds),
        "a round, mean": f"{seconds / len(lines):.2f} s",
        "of updates merged": format_bytes(sum(map(update_bytes, lines))),
        "answers not counted": str(len(rounds.refusals(lines))),
    }  # fmt: skip


def _stages(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    accounts = [account(line) for line in lines]
    spent = {stage: sum(seconds[stage] for seconds in accounts) for stage in STAGES}
    total = sum(spent.values()) or 1.0
    return [(stage, f"{spent[stage]:.2f}", f"{spent[stage] / total:.0%}", what) for stage, what in STAGES.items()]


def _step_stages(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    accounts = [found for line in lines if (found := account_step(line))]
    means = {stage: sum(each[stage] for each in accounts) / len(accounts) for stage in STEP_STAGES if accounts}
    total = sum(means.values()) or 1.0
    return [(stage, f"{1000 * mean:.2f}", f"{mean / total:.0%}", STEP_STAGES[stage]) for stage, mean in means.items()]


def _seconds_by_rank(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    for rank in rounds.ranks_of(lines):
        answers = [line.get("clients", {}).get(rank, {}) for line in lines]
        if measured := [answer["stages"] for answer in answers if answer.get("stages")]:
            means = (sum(each.get(stage, 0.0) for each in measured) / len(measured) for stage in _RANK_STAGES)
            yield rank, *(f"{mean:.3f}" for mean in means)


def _judged_ranks(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    for rank in rounds.ranks_of(lines):
        cells = list[str]()
        for name, best_of in (("accuracy", max), ("loss", min)):
            found = [number for _, number in rounds.judged(lines, name, rank)]
            cells += [f"{found[-1]:.4f}", f"{best_of(found):.4f}"] if found else ["–", "–"]
        examples = [f"{number:.0f}" for _, number in rounds.judged(lines, "num_examples", rank)]
        if any(cell != "–" for cell in cells):
            yield rank, *cells, *(examples[-1:] or ["–"])
