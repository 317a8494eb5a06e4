"""Runs a whole federation on this machine: a server, and a client and a trainer for each rank.

    python -m fedsplit demo --rounds 5

The programs are those that are otherwise started by hand, each with a log of its own in CHECKPOINT_DIR/logs.
Ctrl-C ends all of them. Ends with exit code 15 if one of them fails, and says which and why.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedsplit import cli
from fedsplit.commands.demo_follower import Follower
from fedsplit.commands.demo_view import View, make_view, refusals
from fedsplit.commands.plot import write_plot
from fedsplit.commands.programs import Program, Programs
from fedsplit.commands.status import read_status
from fedsplit.disk.files import make_private_directory
from fedsplit.engines.processes import free_port
from fedsplit.errors import CheckpointError, RoleTakenError, RunFailedError
from fedsplit.run.paths import Places

_POLL_S = 0.1
# When one has failed, the others are given a moment: they may fail for the same reason, or be the reason.
_SETTLE_S = 2.0
# When one has ended well, the run is over, the others have this long; a goodbye takes up to 10 s.
_FAREWELL_S = 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_to(commands: cli.Commands) -> None:
    """Add the command's parser."""
    parser = cli.add_command(commands, "demo", __doc__, run)
    add = parser.add_argument
    add("-r", "--rounds", type=cli.positive_int, default=5, metavar="N", help="rounds to run in all")
    add(
        "--clients",
        type=cli.positive_int,
        default=2,
        metavar="N",
        help="how many clients, each with its trainer",
    )
    add(
        "--checkpoint-dir",
        "--directory",
        type=Path,
        default=Path("checkpoints"),
        metavar="DIR",
        help="where checkpoints, logs and the plot go; what an earlier run left there is put aside",
    )
    add(
        "--exchange-dir",
        type=Path,
        default=Path("exchange"),
        metavar="DIR",
        help="where clients and trainers meet; a RAM disk such as /dev/shm is fastest",
    )
    add(
        "--aggregate",
        action="append",
        default=[],
        metavar="RULE",
        help="how the state_dict is merged, as for server_main.py; repeatable (default: fedavg)",
    )
    add("--workload", default="digits", metavar="MODULE:FACTORY", help="what to train, as for model_main.py")
    add(
        "--workload-option",
        action="append",
        type=cli.key_value,
        default=[],
        metavar="KEY=VALUE",
        help="tell the workload, for example partition=dirichlet; repeatable",
    )
    add("--data-dir", type=Path, metavar="DIR", help="where data sets are (default: data)")
    add(
        "--seed",
        type=cli.natural,
        default=0,
        metavar="N",
        help="seed for the initial model, the partitioning and the server",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the programs to the end of the run; returns 128 and the signal's number if one ended it."""
    places = Places(arguments.checkpoint_dir)
    make_private_directory(places.logs, CheckpointError)
    _check_roles_are_free(arguments.exchange_dir, arguments.clients)
    follower = Follower(places, arguments.exchange_dir, arguments.clients)
    parts = cli.count(arguments.clients, "client"), cli.count(arguments.rounds, "round")
    title = f"fedsplit demo: {arguments.workload}, {', '.join(parts)}"
    with _received_signals() as received:
        programs = Programs(plan(arguments, places), _environment(arguments.clients), lambda: len(received) > 1)
        # The view last: its thread must not be there when the programs are forked.
        with programs, make_view(title) as view:
            _watch(programs, follower, view, received)
        if received:
            # Only now: every program has ended.
            print(
                f"interrupted by {received[0].name}: all {len(programs.programs)} programs have ended",
                flush=True,
            )
            return 128 + received[0]
        if programs.failed:
            raise RunFailedError(_explain(programs.failed))
    _conclude(follower, places)
    return 0


def plan(arguments: argparse.Namespace, places: Places) -> list[Program]:
    """Return the programs: the server, then client and trainer of each rank."""
    address, seed, clients = f"127.0.0.1:{free_port()}", str(arguments.seed), str(arguments.clients)
    store, exchange = str(arguments.checkpoint_dir), str(arguments.exchange_dir)
    verbose = ["--verbose"] if arguments.verbose else []
    server = [
        "--address", address, "--rounds", str(arguments.rounds), "--min-clients", clients, "--checkpoint-dir",
        store, "--seed", seed, *(f"--aggregate={rule}" for rule in arguments.aggregate), *verbose,
    ]  # fmt: skip
    client = ["--server-address", address, "--exchange-dir", exchange, *verbose]
    trainer = [
        "--exchange-dir", exchange, "--checkpoint-dir", store, "--num-partitions", clients, "--seed", seed,
        f"--workload={arguments.workload}", *verbose,
        *(f"--workload-option={key}={value}" for key, value in arguments.workload_option),
    ]  # fmt: skip
    if arguments.data_dir:
        trainer += ["--data-dir", str(arguments.data_dir)]
    programs = [Program("server", "fedsplit", ["server", *server], places.logs / "server.log")]
    for rank in map(str, range(1, arguments.clients + 1)):
        for role, flags in (("client", client), ("trainer", trainer)):
            log = places.logs / f"{role}-{rank}.log"
            programs.append(Program(f"{role} of rank {rank}", "fedsplit", [role, "--rank", rank, *flags], log))
    return programs


def _watch(programs: Programs, follower: Follower, view: View, received: Sequence[signal.Signals]) -> None:
    """Watch until all have ended; leaves early when one failed, hangs at the end, or a signal came."""
    over_since: float | None = None
    while not received:
        programs.poll()
        if programs.failed:
            view.show(f"{programs.failed[0].describe_end()}: stopping the others", follower.lines)
            programs.settle(_SETTLE_S)
            return
        activity, running = follower.update(), programs.running
        if not running:
            view.show("", follower.lines)
            return
        view.show(activity, follower.lines)
        if len(running) < len(programs.programs):
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > _FAREWELL_S:
                raise RunFailedError(
                    f"the run is over, but {_FAREWELL_S:.0f} s later these still ran and were stopped: "
                    + ", ".join(f"{program.name} ({program.log})" for program in running)
                )
        time.sleep(_POLL_S)
    view.show(f"{received[0].name}: stopping all programs", follower.lines)


def _explain(failed: Sequence[Program]) -> str:
    first = failed[0]
    text = f"{first.describe_end()}; the last lines of its log, {first.log}:"
    text += "".join(f"\n    {line}" for line in first.tail().splitlines())
    return text + "".join(f"\nalso {program.describe_end()}: see {program.log}" for program in failed[1:])


def _conclude(follower: Follower, places: Places) -> None:
    """Draw the plot and say what came out; a run in which nothing was ever learned is a failed one."""
    follower.update()
    lines = follower.lines
    if not any(line.get("accepted") for line in lines):
        reasons = "; ".join(refusals(lines)[-2:]) or "no round was run"
        raise RunFailedError(f"no update of any trainer was accepted: {reasons}; see the logs in {places.logs}")
    write_plot(lines, places.plot)
    final = lines[-1].get("evaluate", {})
    shown = [f"final {name} {final[name]:.4f}" for name in ("accuracy", "loss") if isinstance(final.get(name), float)]
    print(f"{shown[0] if shown else 'finished'} after {cli.count(lines[-1]['round'], 'round')}")
    for name, path in (("checkpoints", places.server), ("plot", places.plot), ("logs", places.logs)):
        print(f"{name + ':':<12} {path}", flush=True)


def _check_roles_are_free(exchange_dir: Path, clients: int) -> None:
    # Before the logs of programs that are at work here are overwritten.
    for rank in range(1, clients + 1):
        status = read_status(exchange_dir, rank)
        for role, holder in status.holders.items():
            if holder is not None:
                raise RoleTakenError(
                    f"rank {rank} already has a {role} in {status.directory}: {holder}; stop that one, "
                    "or take another --exchange-dir"
                )


def _environment(clients: int) -> dict[str, str]:
    """Return the environment of the programs: so many at once must not each start a thread for every core."""
    threads = str(max(1, (os.cpu_count() or 1) // clients))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    return {"PYTHONUNBUFFERED": "1", **limits, **os.environ}


@contextmanager
def _received_signals() -> Iterator[list[signal.Signals]]:
    """Collect signals instead of being interrupted: one is acted on between two steps, not inside one."""
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
