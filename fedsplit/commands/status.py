"""Shows who is at work in an exchange directory, at what, and for how long.

    python -m fedsplit status exchange

It may be used while a run is on: it disturbs nobody and makes no file. A process is alive if it holds its lock. How
long a step has lasted is the age of its record, which nothing else looks at.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

from fedsplit import cli
from fedsplit.commands.tables import format_seconds, print_table
from fedsplit.errors import ExchangeError, FedSplitError
from fedsplit.exchange.directory import Exchange, Owner, Role
from fedsplit.exchange.records import FinishedRecord, ResultRecord, TaskRecord

_RANK = re.compile(r"rank-([1-9][0-9]*)")
_DOING = {"initialize": "gives the initial state", "train": "trains", "evaluate": "evaluates"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What one rank's exchange directory tells.

    Attributes
    ----------
    holders
        Who holds each role now; None for nobody. A role that could not be looked at is missing.
    task_age_s, result_age_s : float
        Seconds since the newest task and the newest result were written; 0 without one.
    problems
        What could not be read, and why.
    """

    rank: int
    directory: Path
    holders: Mapping[Role, Owner | str | None]
    task: TaskRecord | None
    result: ResultRecord | None
    finished: FinishedRecord | None
    task_age_s: float
    result_age_s: float
    problems: tuple[str, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether the newest thing that the client said is that the run is over."""
        return self.finished is not None and self.finished.version > (self.task.version if self.task else 0)

    @property
    def is_answered(self) -> bool:
        """Whether the newest task has its answer."""
        return bool(self.task and self.result and self.result.version >= self.task.version)

    def describe_role(self, role: Role) -> str:
        """Say who holds a role."""
        holder = self.holders.get(role, "unknown")
        return "nobody" if holder is None else str(holder)

    def describe_task(self) -> str:
        """Say what was asked last."""
        if self.task is None:
            return "none"
        asked = self.task
        what = f"version {self.task.version}: {asked.kind}, round {asked.server_round} of {asked.total_rounds}"
        return what + (", cancelled" if self.task.cancelled else "")

    def describe_result(self) -> str:
        """Say what was answered last, and how long it took."""
        if self.result is None:
            return "none"
        answer = self.result
        text = f"version {answer.version}: {answer.kind}, round {answer.server_round}, {answer.status}"
        if answer.error:
            text += f" ({answer.error.get('type', 'error')}: {answer.error.get('message', '')})"
        return f"{text}, took {format_seconds(answer.seconds)}"

    def describe_now(self) -> str:
        """Say what is going on, and for how long."""
        if self.is_over and self.finished:
            reason = f" ({self.finished.reason})" if self.finished.reason else ""
            return f"the run is over: {self.finished.outcome}{reason}"
        if self.task is None:
            return "no task yet"
        if self.task.cancelled:
            return f"cancelled {format_seconds(self.task_age_s)} ago"
        if self.is_answered:
            return f"answered {format_seconds(self.result_age_s)} ago, waiting for the next task"
        if self.holders.get("trainer", "unknown") is None:
            return f"waiting for a trainer, {format_seconds(self.task_age_s)} since the task came"
        return f"the trainer {_DOING[self.task.kind]}, for {format_seconds(self.task_age_s)}"

    def rows(self) -> dict[str, str]:
        """Return everything that is shown, by its heading."""
        return {
            "client": self.describe_role("client"),
            "trainer": self.describe_role("trainer"),
            "newest task": self.describe_task(),
            "last result": self.describe_result(),
            "now": "; ".join([self.describe_now(), *self.problems]),
        }


def add_to(commands: cli.Commands) -> None:
    """Add the command's parser."""
    parser = cli.add_command(commands, "status", __doc__, run)
    parser.add_argument(
        "exchange_dir", nargs="?", type=Path, default=Path("exchange"), metavar="EXCHANGE_DIR",
        help="the --exchange-dir of the programs, or one rank's directory in it",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print the status of every rank."""
    shown = [(status.rank, heading, text) for status in read_statuses(arguments.exchange_dir)
             for heading, text in status.rows().items()]  # fmt: skip
    styles = ["yellow" if text == "nobody" else "bold" if heading == "now" else "" for _, heading, text in shown]
    print_table([(f"rank {rank}", *rest) for rank, *rest in shown], styles=styles, separator=": ")
    return 0


def read_statuses(directory: Path) -> list[RankStatus]:
    """Read every rank of an exchange directory, or the one rank whose directory it is.

    Raises
    ------
    ExchangeError
        If it is no exchange directory.
    """
    try:
        ranks = sorted(int(match[1]) for path in directory.iterdir() if (match := _RANK.fullmatch(path.name)))
    except OSError as exc:
        raise ExchangeError(f"cannot look into {directory}: {exc.strerror}; give the programs' --exchange-dir") from exc
    if ranks:
        return [read_status(directory, rank) for rank in ranks]
    if match := _RANK.fullmatch(directory.resolve().name):
        return [read_status(directory.resolve().parent, int(match[1]))]
    raise ExchangeError(f"no client and no trainer has used {directory} yet: it has no rank-K; is it the right one?")


def read_status(exchange_dir: Path, rank: int) -> RankStatus:
    """Read one rank."""
    exchange = Exchange(exchange_dir, rank)
    problems: list[str] = []
    holders: dict[Role, Owner | str | None] = {}
    for role in get_args(Role):
        try:
            holders[role] = _holder(exchange, role)
        except (OSError, FedSplitError) as exc:
            problems.append(f"cannot tell who is there: {exc}")
            break  # the other role's lock would take as long to fail
    return RankStatus(
        rank=rank,
        directory=exchange.directory,
        holders=holders,
        task=_read(exchange.read_task, problems),
        result=_read(exchange.read_result, problems),
        finished=_read(exchange.read_finished, problems),
        task_age_s=_age_s(exchange.task_path),
        result_age_s=_age_s(exchange.result_path),
        problems=tuple(problems),
    )


def _holder(exchange: Exchange, role: Role) -> Owner | str | None:
    # Probing a lock that is not there would make it.
    if not exchange.lock_path(role).exists() or not exchange.is_held(role):
        return None
    return exchange.owner(role) or "a process that has not written its name yet"


def _read(read: Callable[[], T | None], problems: list[str]) -> T | None:
    try:
        return read()
    except FedSplitError as exc:
        problems.append(str(exc))
        return None


def _age_s(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0
