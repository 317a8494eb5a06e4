"""Draws loss, accuracy and time of every round as a PNG.

    python -m fedsplit plot --checkpoint-dir checkpoints --output plot.png

The mean over the clients is bold, each client is a faint line; a round's seconds are divided into training, hand-off,
transfer, merging, evaluation and waiting. It may be drawn while the run is on; the server draws it as the run ends.
"""

import argparse

from fedsplit import cli
from fedsplit.disk.files import write_chunks
from fedsplit.run.directory import Places
from fedsplit.run.history import read_rounds
from fedsplit.watch.plot import draw

_ENDINGS = (".png",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    cli.add_files(parser, _ENDINGS)


def run(arguments: argparse.Namespace) -> int:
    cli.check_output(arguments.output, _ENDINGS)
    path = Places(arguments.checkpoint_dir).history
    lines = read_rounds(path)
    write_chunks(arguments.output, [draw(lines)])
    print(f"{arguments.output}: {cli.count(len(lines), 'round')} of {path}")
    return 0
