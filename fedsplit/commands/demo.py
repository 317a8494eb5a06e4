"""Runs a whole federation on this machine: a server, and a client and a trainer for each rank.

    python -m fedsplit demo --rounds 5

These are the programs that are otherwise started by hand. The server has the terminal; the others write logs, in
CHECKPOINT_DIR/logs. Ctrl-C ends all of them. If one of them fails, the demo shows why, ends the others, and ends with
exit code 15. `run` does the same with every flag of the server, and for a training script of your own.
"""

import argparse
from pathlib import Path

from fedsplit import cli
from fedsplit.commands import run as federation
from fedsplit.commands.trainer import add_workload
from fedsplit.errors import RunFailedError
from fedsplit.split_learning.order import MODES

# After the first pooling layer.
CUT = "features.2"


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    add = parser.add_argument
    add("-r", "--rounds", type=cli.positive_int, default=5, metavar="N", help="rounds to run in all")
    add("--clients", dest="ranks", type=cli.positive_int, default=2, metavar="N",
        help="how many clients, each with its trainer")  # fmt: skip
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="where checkpoints and logs go; what an earlier run left there is put aside")  # fmt: skip
    add("--aggregate", action="append", default=[], metavar="RULE",
        help="how the state_dict is merged, as for the server; repeatable (default: fedavg)")  # fmt: skip
    add("--split-learning", nargs="?", const="sfl-v2", choices=MODES,
        help=f"cut the model after its module {CUT}, and train the upper part beside the server (default: the model is "
        "whole; without a value: sfl-v2)")  # fmt: skip
    add_workload(parser)
    add("--seed", type=cli.natural, default=0, metavar="N",
        help="seed for the initial model, the partitioning and the server")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the programs to the end of the run; returns 128 and the signal's number if one ended it."""
    cut = {"cut": CUT} if arguments.split_learning else {}
    try:
        return federation.execute(argparse.Namespace(**cli.defaults(federation.add_flags) | vars(arguments) | cut))
    except RunFailedError as exc:
        # Whichever failed, with one exit code.
        raise RunFailedError(str(exc)) from exc
