"""Runs the client of a rank: a relay between the server and the exchange directory of the trainer of the same rank.

    python client_main.py --rank 1

It may be started before the server and before the trainer, and waits for both. Beside it runs, started by hand:

    python model_main.py --rank 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fedsplit import cli
from fedsplit.commands import client


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.make_parser(__doc__, "client_main.py")
    client.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client; returns its exit code."""
    return cli.run(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
