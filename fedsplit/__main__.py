"""Looks at, shows and takes out what the three programs do and leave behind; `demo` runs all of them here.

    python -m fedsplit demo

Each command has its own --help with an example.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from fedsplit import cli
from fedsplit.commands import checkpoints, demo, export, new, plot, report, status


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = cli.make_parser(__doc__, "python -m fedsplit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in (demo, new, status, checkpoints, export, plot, report):
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        return cli.run(lambda arguments: arguments.run(arguments), make_parser(), argv, "fedsplit")
    except BrokenPipeError:
        # Whoever read stdout has left, as `head` does; without this the flush at the end would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
