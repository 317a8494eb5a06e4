"""Runs a whole federation on this machine: a server, and a client and a trainer for each rank.

    python -m fedsplit demo --rounds 5

These are the programs that are otherwise started by hand. The server has the terminal; the others write logs, in
CHECKPOINT_DIR/logs. Ctrl-C ends all of them. If one of them fails, the demo shows why, ends the others, and ends with
exit code 15.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedsplit import cli
from fedsplit.commands.status import NOBODY, UNKNOWN, read_status
from fedsplit.commands.trainer import add_workload
from fedsplit.disk.files import make_private_directory
from fedsplit.engines.processes import Child, free_port
from fedsplit.errors import CheckpointError, RoleTakenError, RunFailedError, RunStoppedError
from fedsplit.run.directory import Places
from fedsplit.run.history import Line, read_history
from fedsplit.watch.rounds import refusals

_POLL_S = 0.05
# How long a program has to end by itself once it is asked to.
_STOP_S = 10.0
# When one has failed, the others are given a moment: they may fail for the same reason, or be the reason.
_SETTLE_S = 2.0
# When one has ended well, the run is over and the others have this long; a goodbye takes up to 10 s.
_FAREWELL_S = 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Exit codes of programs that end because another one did.
_FOLLOWED = (RunStoppedError.exit_code, RunFailedError.exit_code)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, and what is run."""
    cli.make_tool(parser, run)
    add = parser.add_argument
    add("-r", "--rounds", type=cli.positive_int, default=5, metavar="N", help="rounds to run in all")
    add("--clients", type=cli.positive_int, default=2, metavar="N", help="how many clients, each with its trainer")
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="where checkpoints and logs go; what an earlier run left there is put aside")  # fmt: skip
    add("--aggregate", action="append", default=[], metavar="RULE",
        help="how the state_dict is merged, as for the server; repeatable (default: fedavg)")  # fmt: skip
    add_workload(parser)
    add("--seed", type=cli.natural, default=0, metavar="N",
        help="seed for the initial model, the partitioning and the server")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the programs to the end of the run; returns 128 and the signal's number if one ended it."""
    places = Places(arguments.checkpoint_dir)
    make_private_directory(places.logs, CheckpointError)
    _check_roles_are_free(arguments.exchange_dir, arguments.clients)
    programs = f"a server, {cli.count(arguments.clients, 'client')} and {cli.count(arguments.clients, 'trainer')}"
    print(f"starting {programs}; all but the server write logs in {places.logs}", flush=True)
    children = plan(arguments, places)
    with _received_signals() as received:
        try:
            for child in children:
                child.start(_environment(arguments.clients))
            failed = _watch(children, received)
        finally:
            _end(children, received)
        if received:
            print(f"interrupted by {received[0].name}: all {len(children)} programs have ended", flush=True)
            return 128 + received[0]
    if failed:
        raise RunFailedError(_explain(failed))
    _conclude(read_history(places.history), places)
    return 0


def plan(arguments: argparse.Namespace, places: Places) -> list[Child]:
    """Return the programs: the server, then client and trainer of each rank."""
    address, clients = f"127.0.0.1:{free_port()}", str(arguments.clients)
    program = [sys.executable, "-m", "fedsplit"]
    verbose = ["--verbose"] if arguments.verbose else []
    exchange = ["--exchange-dir", str(arguments.exchange_dir), *verbose]
    kept = ["--checkpoint-dir", str(arguments.checkpoint_dir), "--seed", str(arguments.seed)]
    server = [
        "server", "--address", address, "--rounds", str(arguments.rounds), "--min-clients", clients, *kept,
        *(f"--aggregate={rule}" for rule in arguments.aggregate), *verbose,
    ]  # fmt: skip
    client = ["client", "--server-address", address, *exchange]
    trainer = [
        "trainer", *exchange, *kept, "--num-partitions", clients, f"--workload={arguments.workload}",
        *(f"--workload-option={key}={value}" for key, value in arguments.workload_option),
        *(["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []),
    ]  # fmt: skip
    children = [Child("server", [*program, *server])]
    for rank in range(1, arguments.clients + 1):
        for words in (client, trainer):
            command, log = [*program, *words, "--rank", str(rank)], places.logs / f"{words[0]}-{rank}.log"
            children.append(Child(f"{words[0]} of rank {rank}", command, log))
    return children


def _watch(children: Sequence[Child], received: Sequence[signal.Signals]) -> list[Child]:
    """Watch until all have ended, one has failed, or a signal came; returns those that failed, the cause first."""
    over_since: float | None = None
    while not received:
        codes = [child.poll() for child in children]
        if any(codes):
            _settle(children, _SETTLE_S, lambda: bool(received))
            failed = [child for child in children if child.exit_code]
            return sorted(failed, key=lambda child: child.exit_code in _FOLLOWED)
        if None not in codes:
            break
        if 0 in codes:
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > _FAREWELL_S:
                running = ", ".join(child.name for child in children if child.is_running)
                raise RunFailedError(
                    f"the run is over, but {_FAREWELL_S:.0f} s later these still ran and were stopped: {running}; "
                    "see their logs"
                )
        time.sleep(_POLL_S)
    return []


def _explain(failed: Sequence[Child]) -> str:
    first = failed[0]
    text = f"{first.describe_end()}; what it said is above"
    if first.log:
        lines = "".join(f"\n    {line}" for line in first.tail().splitlines())
        text = f"{first.describe_end()}; the last lines of its log, {first.log}:{lines}"
    return text + "".join(f"\nalso {child.describe_end()}" for child in failed[1:])


def _settle(children: Sequence[Child], seconds: float, hurry: Callable[[], bool]) -> None:
    """Wait until all have ended, at most so long, and no longer once ``hurry`` says so."""
    deadline = time.monotonic() + seconds
    while any(child.is_running for child in children) and time.monotonic() < deadline and not hurry():
        time.sleep(_POLL_S)


def _end(children: Sequence[Child], received: Sequence[signal.Signals]) -> None:
    """End all that still run: asked by SIGINT, and killed if that takes too long or the user is in a hurry."""
    running = [child for child in children if child.is_running]
    for child in running:
        child.send(signal.SIGINT)
    _settle(running, _STOP_S, lambda: len(received) > 1)
    for child in running:
        child.kill()


def _conclude(lines: Sequence[Line], places: Places) -> None:
    """Add to the server's last lines where the logs are; a run in which nothing was ever learned is a failed one."""
    if not any(line.get("accepted") for line in lines):
        reasons = [f"round {number}: rank {rank}: {reason}" for number, rank, reason in refusals(lines)[-2:]]
        raise RunFailedError(
            f"no update of any trainer was accepted ({'; '.join(reasons) or 'no round was run'}); "
            f"see the logs in {places.logs}"
        )
    print(f"logs:        {places.logs}", flush=True)


def _check_roles_are_free(exchange_dir: Path, clients: int) -> None:
    # Before the logs of programs that are at work here are overwritten.
    for rank in range(1, clients + 1):
        status = read_status(exchange_dir, rank)
        for role in ("client", "trainer"):
            if status[role] not in (NOBODY, UNKNOWN):
                raise RoleTakenError(
                    f"rank {rank} already has a {role} in {exchange_dir}: {status[role]}; stop that one, "
                    "or take another --exchange-dir"
                )


def _environment(clients: int) -> dict[str, str]:
    """Return the environment of the programs: so many at once must not each start a thread for every core."""
    threads = str(max(1, (os.cpu_count() or 1) // clients))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    return {"PYTHONUNBUFFERED": "1", **limits, **os.environ}


@contextmanager
def _received_signals() -> Iterator[list[signal.Signals]]:
    """Collect signals instead of being interrupted: each is acted on between two steps, not inside one."""
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
