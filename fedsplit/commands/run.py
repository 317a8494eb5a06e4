"""Runs a whole federation on this machine: a server, and a client and a trainer for each rank.

    python -m fedsplit run --ranks 10 --rounds 5 --workload mnist
    python -m fedsplit run --ranks 10 --rounds 5 --gpus 2 -- python train.py --rank {rank}

It takes every flag of the server.

The command after -- is started for each rank in place of `python -m fedsplit trainer`. {rank}, {ranks}, {exchange_dir}
and {checkpoint_dir} in it are filled in; `python` is the one that runs this. The script must use the exchange
directory that its client uses: `exchange` in the working directory, unless --exchange-dir says otherwise.

The server has the terminal; the others write logs, in CHECKPOINT_DIR/logs. Ctrl-C ends all of them. If one of them
fails, the end of its log is shown, the others are ended, and its exit code is the exit code of this command.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from fedsplit import cli
from fedsplit.commands import client, server, trainer
from fedsplit.commands.status import NOBODY, at_work, read_status
from fedsplit.disk.files import make_private_directory
from fedsplit.engines.embedded import parse_address
from fedsplit.engines.processes import Child, free_port
from fedsplit.engines.together import Restarts, end, explain, received_signals, shown, watch
from fedsplit.errors import CheckpointError, RoleTakenError, RunFailedError, UsageError
from fedsplit.run.directory import Places
from fedsplit.run.history import Line, read_history
from fedsplit.watch.rounds import refusals


class _Default:
    """A default that is found later: false, and a text in the help. A str would be read as if it had been typed."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        return False


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=cli.positive_int, default=2, metavar="N", help="how many clients, each with its trainer")
    add("--gpus", type=gpus, default=[], metavar="N|ID,ID…",
        help="deal GPUs to the trainers in turns: how many, or which: 0,1,3 or 3, (default: all see all)")  # fmt: skip
    add("--restart", type=cli.natural, default=0, metavar="N",
        help="how often each program that dies is started again; a killed server goes on with its run")  # fmt: skip
    add("--logs", action="store_true",
        help="show the lines of all programs, as in `trainer 1 | …`, in place of the server's table")  # fmt: skip
    add("script", nargs="*", metavar="-- COMMAND", help="the trainer of each rank, with {rank} in it (default: ours)")
    trainer.add_workload(parser)
    trainer.add_cut(parser)
    server.add_own_flags(parser)
    parser.set_defaults(
        run=run, program="fedsplit", address=_Default("a free port of 127.0.0.1"), min_clients=_Default("--ranks")
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the programs to the end of the run; see `execute`."""
    arguments.min_clients = arguments.min_clients or arguments.ranks
    # Before anything is started.
    server.read_settings(arguments)
    if arguments.supernode_public_key:
        raise UsageError("--supernode-public-key: this command has no keys for its clients; use --join-token-file")
    if arguments.script:
        _check_script(arguments)
    places = Places(arguments.checkpoint_dir)
    if arguments.resume and (lines := read_history(places.history)) and lines[-1]["round"] >= arguments.rounds:
        # The server alone would end well; trainers that come after that would wait.
        print(f"the run in {places.server} has {cli.count(lines[-1]['round'], 'round')}; to go on, give more --rounds")
        return 0
    return execute(arguments)


def gpus(text: str) -> list[str]:
    """GPUs: so many of those that this process may use, or these."""
    if not text.isdecimal():
        ids = text.removesuffix(",").split(",")
        if not all(re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", each) for each in ids):
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
    # Before the logs of programs that are at work here are overwritten.
    for rank, role, holder in at_work(arguments.exchange_dir, arguments.ranks):
        raise RoleTakenError(
            f"rank {rank} already has a {role} in {arguments.exchange_dir}: {holder}; stop that one, or take another "
            "--exchange-dir"
        )
    programs = f"a server, {cli.count(arguments.ranks, 'client')} and {cli.count(arguments.ranks, 'trainer')}"
    writers = "all" if arguments.logs else "all but the server"
    print(f"starting {programs}; {writers} write logs in {places.logs}", flush=True)
    children, environment = plan(arguments, places), _environment(arguments.ranks)
    trainers = {child: rank for rank, child in enumerate(children[2::2], 1)}
    restarts = Restarts(children, environment, places.run, arguments.restart)

    def has_left(child: Child) -> bool:
        # A script may do more after its last task; while it holds its role it waits for another one in vain.
        return child in trainers and read_status(arguments.exchange_dir, trainers[child])["trainer"] == NOBODY

    with received_signals() as received, ExitStack() as stack:
        try:
            for child in children:
                child.start(environment)
            if arguments.logs:
                stack.enter_context(shown(children))
            failed = watch(children, received, restarts.revive, has_left)
        finally:
            end(children, received)
    if received:
        print(f"interrupted by {received[0].name}: all {len(children)} programs have ended", flush=True)
        return 128 + received[0]
    if failed:
        failure, code = RunFailedError(explain(failed)), failed[0].exit_code or 0
        failure.exit_code = 128 - code if code < 0 else code
        raise failure
    _conclude(read_history(places.history), places)
    # Also here: the server's table is drawn over what is said meanwhile.
    for what in restarts.told:
        print(f"restarted:   {what}", flush=True)
    return 0


def _conclude(lines: Sequence[Line], places: Places) -> None:
    """Add to the server's last lines where the logs are; a run in which nothing was ever learned is a failed one."""
    if not any(line.get("accepted") for line in lines):
        reasons = [f"round {number}: rank {rank}: {reason}" for number, rank, reason in refusals(lines)[-2:]]
        raise RunFailedError(
            f"no update of any trainer was accepted ({'; '.join(reasons) or 'no round was run'}); "
            f"see the logs in {places.logs}"
        )
    print(f"logs:        {places.logs}", flush=True)


# -- what is run -------------------------------------------------------------------------------------------------------


def plan(arguments: argparse.Namespace, places: Places) -> list[Child]:
    """Return the programs: the server, then client and trainer of each rank, and last the trainer of an upper part."""
    values, ranks = vars(arguments), arguments.ranks
    address = arguments.address or f"127.0.0.1:{free_port()}"
    serving = {**values, "address": address, "min_clients": arguments.min_clients or ranks}
    relaying = {**values, "server_address": _reachable(address), "root_certificates": arguments.ssl_ca_certfile}
    # The server's --client-wait is another one.
    training = {**values, "num_partitions": ranks, "client_wait": None}
    training |= {"part": "lower"} if arguments.split_learning else {}
    children = [Child("server", _command(server, serving), places.logs / "server.log" if arguments.logs else None)]
    for rank in range(1, ranks + 1):
        own = _fill_in(arguments, rank)
        # By `env`: what a child is started with is otherwise the same for all.
        gpu = arguments.gpus[(rank - 1) % len(arguments.gpus)] if arguments.gpus else None
        train = [*(["env", f"CUDA_VISIBLE_DEVICES={gpu}"] if gpu else []), *(own or _command(trainer, training, rank))]
        for role, command in (("client", _command(client, relaying, rank)), ("trainer", train)):
            children.append(Child(f"{role} of rank {rank}", command, places.logs / f"{role}-{rank}.log"))
    training |= {"cut_dtype": None, "cut_noise": None, "window": 1, "part": "upper"}
    for number in range(1, arguments.upper_trainers + 1) if arguments.split_learning else ():
        # The first one's directories are those of the ranks.
        end = f"-{number}" if number > 1 else ""
        inside = {name: values[name] / f"upper{end}" for name in ("exchange_dir", "checkpoint_dir") if end}
        command = _command(trainer, {**training, **inside})
        children.append(Child(f"trainer of the upper part{end}", command, places.logs / f"trainer-upper{end}.log"))
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
    words, values = arguments.script, {**vars(arguments), "rank": rank}
    for name in ("rank", "ranks", "exchange_dir", "checkpoint_dir"):
        words = [word.replace(f"{{{name}}}", str(values[name])) for word in words]
    return [sys.executable, *words[1:]] if words[:1] == ["python"] else words


def _reachable(address: str) -> str:
    """Return where clients of this machine find a server that listens at an address."""
    host, port = parse_address(address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_script(arguments: argparse.Namespace) -> None:
    command = shlex.join(arguments.script)
    if arguments.split_learning:
        raise UsageError("--split-learning: the command after -- trains at the ranks only; start the programs by hand")
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


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment of the programs: so many at once must not each start a thread for every core."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    return {"PYTHONUNBUFFERED": "1", **limits, **os.environ}
