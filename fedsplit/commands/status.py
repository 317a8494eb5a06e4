"""Shows who is at work in an exchange directory, at what, and for how long.

    python -m fedsplit status exchange

It may be used while a run is on: it disturbs nobody and makes no file. A process is alive if it holds its lock. How
long a step has lasted is the age of its record, which nothing else looks at.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, get_args

from fedsplit import cli
from fedsplit.errors import ExchangeError, FedSplitError
from fedsplit.exchange.directory import Exchange, Place, Role
from fedsplit.exchange.records import FinishedRecord, ResultRecord, TaskRecord
from fedsplit.run.events import format_seconds

NOBODY, UNKNOWN = "nobody", "unknown"
_RANK = re.compile(r"rank-([1-9][0-9]*)")
_DOING = {"initialize": "gives the initial state", "train": "trains", "evaluate": "evaluates"}
T = TypeVar("T")


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    parser.add_argument("exchange_dir", nargs="?", type=Path, default=Path("exchange"), metavar="EXCHANGE_DIR",
        help="the --exchange-dir of the programs, or one rank's directory in it")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    rows = [(Exchange(directory, rank).who, heading, text) for directory, rank in find_ranks(arguments.exchange_dir)
            for heading, text in read_status(directory, rank).items()]  # fmt: skip
    styles = ["yellow" if text == NOBODY else "bold" if heading == "now" else "" for _, heading, text in rows]
    cli.print_table(rows, styles=styles, separator=": ")
    return 0


def find_ranks(directory: Path) -> list[tuple[Path, Place]]:
    """Return exchange directory and rank of every rank in it, an upper part last, or of the one whose directory it is.

    Raises ExchangeError if it is no exchange directory.
    """
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError as exc:
        raise ExchangeError(f"cannot look into {directory}: {exc.strerror}; give the programs' --exchange-dir") from exc
    ranks: list[Place] = sorted(int(match[1]) for name in names if (match := _RANK.fullmatch(name)))
    if ranks := [*ranks, "upper"] if "upper" in names else ranks:
        return [(directory, rank) for rank in ranks]
    if match := _RANK.fullmatch(directory.resolve().name):
        return [(directory.resolve().parent, int(match[1]))]
    raise ExchangeError(f"no client and no trainer has used {directory} yet: it has no rank-K; is it the right one?")


def read_status(exchange_dir: Path, rank: Place) -> dict[str, str]:
    """Return what the directory of a rank tells, by heading: who is there, what was asked and answered last, and now.

    A role that nobody holds is `NOBODY`, and `UNKNOWN` if that cannot be told.
    """
    exchange, problems = Exchange(exchange_dir, rank), list[str]()
    holders = dict.fromkeys(get_args(Role), UNKNOWN)
    try:
        for role in get_args(Role):
            holders[role] = _holder(exchange, role)
    except (OSError, FedSplitError) as exc:
        # The other role's lock would take as long to fail.
        problems.append(f"cannot tell who is there: {exc}")
    task = _read(exchange.read_task, problems)
    result = _read(exchange.read_result, problems)
    finished = _read(exchange.read_finished, problems)
    asked = answered = "none"
    if task:
        asked = f"version {task.version}: {task.kind}, round {task.server_round} of {task.total_rounds}"
        asked += ", cancelled" if task.cancelled else ""
    if result:
        answered = f"version {result.version}: {result.kind}, round {result.server_round}, {result.status}"
        if result.error:
            answered += f" ({result.error.get('type', 'error')}: {result.error.get('message', '')})"
        answered += f", took {format_seconds(result.seconds)}"
    now = _describe_now(exchange, task, result, finished, has_trainer=holders["trainer"] != NOBODY)
    return {**holders, "newest task": asked, "last result": answered, "now": "; ".join([now, *problems])}


def at_work(exchange_dir: Path, ranks: int) -> Iterator[tuple[int, str, str]]:
    """Yield rank, role and holder of every client and trainer of the ranks 1 to `ranks` that is there."""
    for rank in range(1, ranks + 1):
        status = read_status(exchange_dir, rank)
        for role in ("client", "trainer"):
            if status[role] not in (NOBODY, UNKNOWN):
                yield rank, role, status[role]


def _holder(exchange: Exchange, role: Role) -> str:
    # Probing a lock that is not there would make it.
    if not exchange.lock_path(role).exists() or not exchange.is_held(role):
        return NOBODY
    return str(exchange.owner(role) or "a process that has not written its name yet")


def _read(read: Callable[[], T | None], problems: list[str]) -> T | None:
    try:
        return read()
    except FedSplitError as exc:
        problems.append(str(exc))
        return None


def _describe_now(
    exchange: Exchange, task: TaskRecord | None, result: ResultRecord | None, finished: FinishedRecord | None, *,
    has_trainer: bool,
) -> str:  # fmt: skip
    # The newest thing that the client said.
    if finished and finished.version > (task.version if task else 0):
        return f"the run is over: {finished.outcome}" + (f" ({finished.reason})" if finished.reason else "")
    if task is None:
        return "no task yet"
    if task.cancelled:
        return f"cancelled {_age(exchange.task_path)} ago"
    if result and result.version >= task.version:
        return f"answered {_age(exchange.result_path)} ago, waiting for the next task"
    if not has_trainer:
        return f"waiting for a trainer, {_age(exchange.task_path)} since the task came"
    return f"the trainer {_DOING[task.kind]}, for {_age(exchange.task_path)}"


def _age(path: Path) -> str:
    try:
        return format_seconds(max(0.0, time.time() - path.stat().st_mtime))
    except OSError:
        return format_seconds(0.0)
