"""Runs a whole federation on this machine: a server, and a client and a trainer for each rank.

    python -m fedsplit run --ranks 10 --rounds 5 --workload mnist
    python -m fedsplit run --ranks 10 --rounds 5 --gpus 2 -- python train.py --rank {rank}

It takes every flag of the server; --address is a free port and --min-clients is --ranks, unless they are given.

The command after -- is started for each rank in place of `python -m fedsplit trainer`. {rank}, {ranks}, {exchange_dir}
and {checkpoint_dir} in it are filled in; `python` is the one that runs this. The script must use the exchange
directory that its client uses: `exchange` in the working directory, unless --exchange-dir says otherwise.

The server has the terminal; the others write logs, in CHECKPOINT_DIR/logs. Ctrl-C ends all of them. If one of them
fails, the end of its log is shown, the others are ended, and its exit code is the exit code of this command.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import IO, Any

from fedsplit import cli
from fedsplit.commands import client, server, trainer
from fedsplit.commands.status import NOBODY, UNKNOWN, read_status
from fedsplit.disk.files import make_private_directory
from fedsplit.engines.processes import Child, free_port
from fedsplit.errors import CheckpointError, RoleTakenError, RunFailedError, RunStoppedError, UsageError
from fedsplit.run.directory import Places
from fedsplit.run.history import Line, read_history
from fedsplit.watch.rounds import refusals

log = logging.getLogger("fedsplit")

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
    add = parser.add_argument
    add("--ranks", type=cli.positive_int, default=2, metavar="N", help="how many clients, each with its trainer")
    add("--gpus", type=gpus, default=[], metavar="N|ID,ID…",
        help="GPUs for the trainers, one each, in turns: how many, or which, as in 0,1,3 (one alone: 3,)")  # fmt: skip
    add("--restart", type=cli.natural, default=0, metavar="N",
        help="how often each program that dies is started again; a killed server goes on with its run")  # fmt: skip
    add("--logs", action="store_true",
        help="show the lines of all programs, as in `trainer 1 | …`, in place of the server's table")  # fmt: skip
    add("script", nargs="*", metavar="-- COMMAND", help="the trainer of each rank, with {rank} in it (default: ours)")
    trainer.add_workload(parser)
    server.add_flags(parser)
    parser.set_defaults(run=run, program="fedsplit", address=None, min_clients=None)


def run(arguments: argparse.Namespace) -> int:
    """Run the programs to the end of the run; see `execute`."""
    arguments.min_clients = arguments.min_clients or arguments.ranks
    # Before anything is started.
    server.read_settings(arguments)
    if arguments.supernode_public_key:
        raise UsageError("--supernode-public-key: this command has no keys for its clients; use --join-token-file")
    if arguments.script:
        _check_script(arguments)
    return execute(arguments)


def gpus(text: str) -> list[str]:
    """GPUs: so many of those that this process may use, or these."""
    if not text.isdecimal():
        ids = text.removesuffix(",").split(",")
        if not all(re.fullmatch(r"\w[\w/-]*", each) for each in ids):
            raise argparse.ArgumentTypeError(f"expected a number of GPUs or their ids, as in 0,1,3, not {text!r}")
        return ids
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = list(map(str, range(int(text)))) if visible is None else [each for each in visible.split(",") if each]
    if not 0 < int(text) <= len(ids):
        limit = "" if visible is None else f" and at most the {len(ids)} of CUDA_VISIBLE_DEVICES={visible}"
        raise argparse.ArgumentTypeError(f"expected at least 1 GPU{limit}, not {text}")
    return ids[: int(text)]


def execute(arguments: argparse.Namespace) -> int:
    """Run the programs to the end of the run; returns 128 and the signal's number if one ended it.

    Raises RunFailedError if a program failed, with the exit code of the first that did.
    """
    places = Places(arguments.checkpoint_dir)
    make_private_directory(places.logs, CheckpointError)
    _check_roles_are_free(arguments.exchange_dir, arguments.ranks)
    programs = f"a server, {cli.count(arguments.ranks, 'client')} and {cli.count(arguments.ranks, 'trainer')}"
    writers = "all" if arguments.logs else "all but the server"
    print(f"starting {programs}; {writers} write logs in {places.logs}", flush=True)
    children, environment = plan(arguments, places), _environment(arguments.ranks)
    restarts = _Restarts(children, environment, places.run, arguments.restart)
    with _received_signals() as received, ExitStack() as stack:
        try:
            for child in children:
                child.start(environment)
            if arguments.logs:
                stack.enter_context(_shown(children))
            failed = _watch(children, received, restarts.revive, may_stay=bool(arguments.script))
        finally:
            _end(children, received)
    if received:
        print(f"interrupted by {received[0].name}: all {len(children)} programs have ended", flush=True)
        return 128 + received[0]
    if failed:
        failure, code = RunFailedError(_explain(failed)), failed[0].exit_code or 0
        failure.exit_code = 128 - code if code < 0 else code
        raise failure
    _conclude(read_history(places.history), places)
    return 0


# -- what is run -------------------------------------------------------------------------------------------------------


def plan(arguments: argparse.Namespace, places: Places) -> list[Child]:
    """Return the programs: the server, then client and trainer of each rank."""
    values, ranks = vars(arguments), arguments.ranks
    address = arguments.address or f"127.0.0.1:{free_port()}"
    serving = {**values, "address": address, "min_clients": arguments.min_clients or ranks}
    relaying = {**values, "server_address": _reachable(address), "root_certificates": arguments.ssl_ca_certfile}
    # The server's --client-wait is another one.
    training = {**values, "num_partitions": ranks, "client_wait": None}
    children = [Child("server", _command(server, serving), places.logs / "server.log" if arguments.logs else None)]
    for rank in range(1, ranks + 1):
        own = _fill_in(arguments, rank)
        # Set by a program and not by us, since it is another for each.
        gpu = arguments.gpus[(rank - 1) % len(arguments.gpus)] if arguments.gpus else None
        train = [*(["env", f"CUDA_VISIBLE_DEVICES={gpu}"] if gpu else []), *(own or _command(trainer, training, rank))]
        for role, command in (("client", _command(client, relaying, rank)), ("trainer", train)):
            children.append(Child(f"{role} of rank {rank}", command, places.logs / f"{role}-{rank}.log"))
    return children


def _command(program: ModuleType, values: Mapping[str, Any], rank: int | None = None) -> list[str]:
    """Return the command of a program, with each of the values that is one of its flags and not the default."""
    words = [sys.executable, "-m", "fedsplit", program.__name__.rpartition(".")[2]]
    for name, default in cli.defaults(program.add_flags).items():
        flag, value = f"--{name.replace('_', '-')}", values.get(name, default)
        if value == default or name in ("run", "program", "rank"):
            continue
        for each in value if isinstance(value, list) else [value]:
            text = "=".join(map(str, each)) if isinstance(each, tuple) else str(each)
            words.append(flag if each is True else f"{flag}={text}")
    return words if rank is None else [*words, "--rank", str(rank)]


def _fill_in(arguments: argparse.Namespace, rank: int) -> list[str]:
    """Return the user's own command for a rank, empty if there is none."""
    words: list[str] = arguments.script
    for name in ("ranks", "exchange_dir", "checkpoint_dir"):
        words = [word.replace(f"{{{name}}}", str(getattr(arguments, name))) for word in words]
    words = [word.replace("{rank}", str(rank)) for word in words]
    return [sys.executable, *words[1:]] if words[:1] == ["python"] else words


def _reachable(address: str) -> str:
    """Return where clients of this machine find a server that listens at an address."""
    from fedsplit.engines.embedded import parse_address

    host, port = parse_address(address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_script(arguments: argparse.Namespace) -> None:
    command = shlex.join(arguments.script)
    if not any("{rank}" in word for word in arguments.script):
        raise UsageError(f"expected {{rank}} in the command after --, as in --rank {{rank}}; found: {command}")
    program = _fill_in(arguments, 1)[0]
    if shutil.which(program) is None:
        raise UsageError(f"the command after -- cannot be started: there is no program {program}; found: {command}")
    for name, default in cli.defaults(trainer.add_workload).items():
        if name != "exchange_dir" and getattr(arguments, name) != default:
            raise UsageError(
                f"--{name.replace('_', '-')} is for the trainer that comes with fedsplit, which the command after -- "
                "takes the place of; say it there"
            )


def _check_roles_are_free(exchange_dir: Path, ranks: int) -> None:
    # Before the logs of programs that are at work here are overwritten.
    for rank in range(1, ranks + 1):
        status = read_status(exchange_dir, rank)
        for role in ("client", "trainer"):
            if status[role] not in (NOBODY, UNKNOWN):
                raise RoleTakenError(
                    f"rank {rank} already has a {role} in {exchange_dir}: {status[role]}; stop that one, "
                    "or take another --exchange-dir"
                )


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment of the programs: so many at once must not each start a thread for every core."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    return {"PYTHONUNBUFFERED": "1", **limits, **os.environ}


# -- while it runs -----------------------------------------------------------------------------------------------------


class _Restarts:
    """Starts programs again that died, each so many times; `run_file` tells whether the server began its run."""

    def __init__(self, children: Sequence[Child], environment: Mapping[str, str], run_file: Path, most: int) -> None:
        self._server, self._environment = children[0], environment
        self._left, self._most = dict.fromkeys(children, most), most
        self._run_file, self._before = run_file, _read(run_file)

    def revive(self, child: Child) -> bool:
        """Start a program again, unless that is of no use or it was done often enough; tell whether it was started."""
        code = child.exit_code or 0
        # A server that ended by itself has told the others that the run is over.
        if not self._left[child] or code in (UsageError.exit_code, *_FOLLOWED) or (child is self._server and code > 0):
            return False
        self._left[child] -= 1
        # Before that, an earlier run may be there, and would go on.
        if child is self._server and _read(self._run_file) != self._before and "--resume" not in child.command:
            child.command.append("--resume")
        log.warning(
            "%s; starting it again (%d of %d)", child.describe_end(), self._most - self._left[child], self._most
        )
        # What it has started must not be in the way.
        child.kill()
        child.start(self._environment)
        return True


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _watch(
    children: Sequence[Child], received: Sequence[signal.Signals], revive: Callable[[Child], bool], *, may_stay: bool
) -> list[Child]:
    """Watch until all have ended, one has failed, or a signal came; returns those that failed, the cause first.

    Trainers that `may_stay` have all the time they want when the run is over.
    """
    over_since: float | None = None
    while not received:
        if dead := [child for child in children if child.poll() and not revive(child)]:
            for child in dead:
                child.kill()  # what it has started
            _settle(children, _SETTLE_S, lambda: bool(received))
            failed = [child for child in children if child.exit_code]
            return sorted(failed, key=lambda child: (child.exit_code in _FOLLOWED, child not in dead))
        running = [child for child in children if child.exit_code is None]
        if not running:
            break
        if len(running) < len(children):
            over_since = over_since or time.monotonic()
            if time.monotonic() - over_since > _FAREWELL_S:
                _check_late(children, running, may_stay=may_stay)
        time.sleep(_POLL_S)
    return []


def _check_late(children: Sequence[Child], running: Sequence[Child], *, may_stay: bool) -> None:
    """Raise RunFailedError if something is wrong with those that still run, long after another program has ended."""
    trainers = [child for child in children if child.name.startswith("trainer")]
    ended = [child for child in children if child not in running]
    if children[0] in running and all(child in trainers for child in ended):
        raise RunFailedError(
            f"{ended[0].describe_end()} and {_FAREWELL_S:.0f} s later the run was not over; a trainer has to answer "
            f"tasks until then; the log is {ended[0].log}"
        )
    if not may_stay or not all(child in trainers for child in running):
        raise RunFailedError(
            f"the run is over, but {_FAREWELL_S:.0f} s later these still ran and were stopped: "
            f"{', '.join(child.name for child in running)}; see their logs"
        )


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


@contextmanager
def _shown(children: Sequence[Child]) -> Iterator[None]:
    """Show the lines of the logs as they come, each behind the name of its program, for the length of a block."""
    over = threading.Event()

    def show() -> None:
        with ExitStack() as stack, suppress(BrokenPipeError):
            logs = [(path, stack.enter_context(path.open("rb"))) for child in children if (path := child.log)]
            is_last = False
            while not is_last:
                is_last = over.wait(_POLL_S)
                for path, lines in logs:
                    _show_new(path.stem.replace("-", " "), lines, is_last=is_last)

    thread = threading.Thread(target=show)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _show_new(name: str, lines: IO[bytes], *, is_last: bool) -> None:
    while line := lines.readline():
        if not line.endswith(b"\n") and not is_last:
            # The rest of it is still to come.
            lines.seek(-len(line), os.SEEK_CUR)
            return
        print(f"{name} | {line.decode('utf-8', 'replace').rstrip()}", flush=True)


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
