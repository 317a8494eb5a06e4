"""Runs a study: every combination of what its file varies, and one table and one plot of all of them.

    python -m fedsplit study study.toml

The keys of the file are flags of `python -m fedsplit run`; a list is varied over:

    ranks = 4
    rounds = 5
    seed = [0, 1, 2]
    aggregate = ["fedavg", "median"]

    [options]                        # of the workload
    partition = "dirichlet"
    alpha = [0.1, 0.5]

These are 12 runs, each in a directory of DIR that is named after what is varied. Called again, after Ctrl-C, a kill, or
with more values in the file, it skips the runs that are done and goes on with those that are not. In the end DIR has
results.csv, results.md, by-rank.csv and plot.png. docs/studies.md has the rest, such as a script of your own.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from fedsplit import cli
from fedsplit.commands import compare, server
from fedsplit.commands import run as federation
from fedsplit.commands.status import at_work
from fedsplit.disk.files import make_private_directory, write_json
from fedsplit.engines.processes import Child
from fedsplit.engines.together import end, explain, received_signals
from fedsplit.errors import CheckpointError, MissingPackageError, RunFailedError, UsageError
from fedsplit.run.directory import Places
from fedsplit.run.events import format_seconds
from fedsplit.run.history import JUDGED_BY, read_history
from fedsplit.study.plan import PlannedRun, plan_runs, read_study
from fedsplit.study.results import Result, as_text, group, read_result

_POLL_S = 0.05
# How long the programs of a run have to end once they are asked to, and those of a killed study to notice.
_STOP_S = 30.0
# What the study gives every run itself, or what says nothing of a run.
_NOT_IN_A_FILE = (
    "address", "checkpoint-dir", "exchange-dir", "resume", "logs", "log-format", "verbose", "script", "run", "program",
)  # fmt: skip

log = logging.getLogger("fedsplit")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of the study: its directory, and the flags that it is run with, parsed."""

    run: PlannedRun
    directory: Path
    flags: argparse.Namespace

    @property
    def places(self) -> Places:
        """Where its files are."""
        return Places(self.directory)

    def rounds_done(self) -> int:
        """Return how far it is."""
        return max((line["round"] for line in read_history(self.places.history)), default=0)

    def is_done(self) -> bool:
        """Tell whether nothing is left to do; a run in which nothing was ever learned has failed."""
        is_complete = self.rounds_done() >= self.flags.rounds
        return is_complete and any(line.get("accepted") for line in read_history(self.places.history))

    def describe(self) -> str:
        """Say how far it is."""
        if self.is_done():
            return "done"
        return f"round {self.rounds_done()} of {self.flags.rounds}" if self.places.run.exists() else "to do"

    def check(self) -> None:
        """Raise UsageError if its directory has a run with other settings."""
        places, settings = self.places, self.run.settings
        if not places.settings.exists():
            if places.server.exists():
                raise UsageError(f"{self.directory} has a run that is not of a study; take another --output-dir")
            return
        try:
            noted = dict(json.loads(places.settings.read_bytes()))
        except (OSError, ValueError, TypeError) as exc:
            raise CheckpointError(f"{places.settings} cannot be read; remove {self.directory} to run it again") from exc
        for key in {**noted, **settings}:
            if noted.get(key) != settings.get(key):
                before, now = (
                    f"{key} {as_text(each[key])}" if key in each else f"no {key}" for each in (noted, settings)
                )
                raise UsageError(
                    f"{self.directory} was run with {before}, and now it is {now}; take another --output-dir, or "
                    "remove that directory to run it again"
                )

    def is_in_use(self) -> bool:
        """Tell whether programs of it are at work, as those of a killed study are until they notice."""
        places, lock = self.places, FileLock(self.places.lock, fallback_to_soft=False, mode=0o600)
        if places.lock.exists():
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return True
            lock.release()
        return places.exchange.exists() and any(at_work(places.exchange, self.flags.ranks))

    def start(self) -> Child:
        """Start it, or go on with it."""
        places, script = self.places, self.run.command()
        # A run that failed to learn anything has all its rounds: it begins anew.
        is_unfinished = places.run.exists() and self.rounds_done() < self.flags.rounds
        make_private_directory(places.logs, CheckpointError)
        write_json(places.settings, dict(self.run.settings), durable=True)
        command = [
            sys.executable, "-m", "fedsplit", "run", *self.run.words(), f"--checkpoint-dir={self.directory}",
            f"--exchange-dir={places.exchange}", *(["--resume"] if is_unfinished else []),
            *(["--", *script] if script else []),
        ]  # fmt: skip
        child = Child(f"run {self.run.name}", command, places.logs / "run.log")
        child.start({"PYTHONUNBUFFERED": "1", **os.environ})
        return child


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="the study, in TOML; without it all of it is in --set")
    add("--set", dest="changes", action="append", type=cli.key_value, default=[], metavar="KEY=VALUE",
        help="a key of the file, and its value in TOML, as in rounds=2, 'seed=[0, 1]' or options.alpha=0.1; "
        "repeatable")  # fmt: skip
    add("--output-dir", type=Path, default=Path("study"), metavar="DIR", help="has a directory for each run")
    add("--jobs", type=cli.positive_int, default=1, metavar="N", help="how many runs at a time")
    add("--dry-run", action="store_true", help="only list the runs, and how far each is")


def run(arguments: argparse.Namespace) -> int:
    """Run what is left to do; returns 128 and the signal's number if one ended it.

    Raises RunFailedError, at the end, if runs have failed.
    """
    output_dir: Path = arguments.output_dir
    jobs = plan_jobs(arguments.file, arguments.changes, output_dir)
    for job in jobs:
        job.check()
    if arguments.dry_run:
        cli.print_table([(job.run.name, job.describe()) for job in jobs], ("run", "state"))
        return 0
    make_private_directory(output_dir, CheckpointError)
    lock = FileLock(output_dir / "study.lock", fallback_to_soft=False, mode=0o600)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another study is at work in {output_dir}; take another --output-dir") from None
    with held, received_signals() as received:
        failed = _carry_out(jobs, arguments.jobs, received)
    done = [job for job in jobs if job.is_done()]
    if received:
        print(f"interrupted by {received[0].name}: {len(done)} of {len(jobs)} runs are done; start it again to go on")
        return 128 + received[0]
    if done:
        _conclude([read_result(job.directory) for job in done], output_dir)
    if failed:
        raise RunFailedError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; their logs are above")
    return 0


def plan_jobs(file: Path | None, changes: Sequence[tuple[str, str]], output_dir: Path) -> list[Job]:
    """Return the runs of a study, every flag of each checked; raises UsageError for what cannot be."""
    if file is None and not changes:
        raise UsageError("expected FILE, a study in TOML, or --set KEY=VALUE; see --help")
    parser = _Parser(allow_abbrev=False)
    federation.add_flags(parser)
    flags = [name.replace("_", "-") for name in cli.defaults(federation.add_flags)]
    try:
        runs = plan_runs(read_study(file, changes), [name for name in flags if name not in _NOT_IN_A_FILE])
        parsed = [parser.parse_args([*each.words(), "--", *each.command()]) for each in runs]
        for each in parsed:
            each.min_clients = each.min_clients or each.ranks
            server.read_settings(each)
    except UsageError as exc:
        raise UsageError(f"{file or '--set'}: {exc}") from exc
    return [
        Job(run=each, directory=output_dir / each.name, flags=flags) for each, flags in zip(runs, parsed, strict=True)
    ]


def _carry_out(jobs: Sequence[Job], at_once: int, received: Sequence[signal.Signals]) -> list[str]:
    """Run what is left to do, so many at a time; returns the names of those that failed."""
    waiting, running, failed = [job for job in jobs if not job.is_done()], dict[Child, tuple[Job, float]](), list[str]()
    print(f"{cli.count(len(jobs), 'run')}, {len(jobs) - len(waiting)} done already", flush=True)
    try:
        while (waiting or running) and not received:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                _wait_until_left(job, received)
                if received:
                    break
                how = f"goes on: {job.describe()}" if job.places.run.exists() else "begins"
                print(f"{job.run.name}: {how}", flush=True)
                running[job.start()] = job, time.monotonic()
            for child in [child for child in running if not child.is_running]:
                job, began = running.pop(child)
                failed += [] if child.exit_code == 0 else [job.run.name]
                print(_describe_end(job, child, time.monotonic() - began), flush=True)
            time.sleep(_POLL_S)
    finally:
        end(list(running), received, _STOP_S)
    return failed


def _wait_until_left(job: Job, received: Sequence[signal.Signals]) -> None:
    deadline = time.monotonic() + _STOP_S
    while job.is_in_use() and time.monotonic() < deadline and not received:
        time.sleep(_POLL_S)


def _describe_end(job: Job, child: Child, seconds: float) -> str:
    if child.exit_code == 0:
        numbers = read_result(job.directory).numbers
        shown = next((f", {name} {numbers[name]:.4f}" for name in JUDGED_BY if name in numbers), "")
        return f"{job.run.name}: done in {format_seconds(seconds)}{shown}"
    return f"{job.run.name}: {explain([child])}"


def _conclude(results: Sequence[Result], output_dir: Path) -> None:
    """Print the table, and write it and the plot."""
    groups = group(results)
    compare.print_groups(groups)
    compare.write_by_rank(groups, output_dir / "by-rank.csv")
    for name in ("results.csv", "results.md", "plot.png"):
        try:
            compare.write(groups, output_dir / name)
        except (MissingPackageError, CheckpointError) as exc:
            log.warning("there is no %s: %s", output_dir / name, exc)
