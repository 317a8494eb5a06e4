"""Runs the programs of a federation, looks at a run, and makes files of it; `demo` runs all of them on this machine.

    python -m fedsplit demo

After `pip install fedsplit` the same is called `fedsplit demo`. Each command has its own --help with an example.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fedsplit import cli
from fedsplit.commands import checkpoints, client, demo, export, new, plot, report, server, status, trainer


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    prog = "fedsplit" if Path(sys.argv[0]).name == "fedsplit" else "python -m fedsplit"
    parser = cli.make_parser(__doc__, prog)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in (demo, server, client, trainer, new, status, checkpoints, export, plot, report):
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        return cli.run(make_parser(), argv)
    except BrokenPipeError:
        # Whoever read stdout has left, as `head` does; without this the flush at the end would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
