"""Runs the trainer of a rank: the model, the data, the optimizer. It imports no Flower and knows no server.

    python model_main.py --rank 1

Your own training instead of the shipped digits:

    python model_main.py --rank 1 --workload my_package.my_module:make_workload

or a script of your own around `fedsplit.Trainer`: see docs/own-training.md. In several processes, as one trainer:

    torchrun --standalone --nproc-per-node 2 model_main.py --rank 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fedsplit import cli
from fedsplit.commands import trainer


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = cli.make_parser(__doc__, "model_main.py")
    trainer.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer; returns its exit code."""
    return cli.run(make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
