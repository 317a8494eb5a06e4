"""Runs the programs of a federation, one by one or all on this machine; looks at a run, and makes files of it.

    python -m fedsplit demo

After `pip install fedsplit` the same is called `fedsplit demo`. Each command has its own --help with an example.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from fedsplit import cli

# Each is a module of `fedsplit.commands`.
COMMANDS = (
    "demo", "run", "study", "server", "client", "trainer", "new", "status", "checkpoints", "export", "plot", "report",
    "compare", "replay",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands: a module each, whose docstring is its help and begins with its summary."""
    parser = cli.make_parser(__doc__, "fedsplit" if Path(sys.argv[0]).name == "fedsplit" else "python -m fedsplit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module = import_module(f"fedsplit.commands.{name}")
        doc = str(module.__doc__)
        summary, style = doc.splitlines()[0].rstrip("."), cli.HelpFormatter
        command = commands.add_parser(name, help=summary, description=doc, formatter_class=style, allow_abbrev=False)
        module.add_flags(command)
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
