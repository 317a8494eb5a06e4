"""Runs the server of a federation: rounds, merging, checkpoints. It holds no model code and no data.

    python server_main.py --rounds 5

A tiny run on one machine, in five terminals and any order:

    python server_main.py --rounds 2
    python client_main.py --rank 1        python client_main.py --rank 2
    python model_main.py --rank 1         python model_main.py --rank 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fedsplit import cli
from fedsplit.commands import server


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.make_parser(__doc__, "server_main.py")
    server.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; returns its exit code."""
    return cli.run(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
