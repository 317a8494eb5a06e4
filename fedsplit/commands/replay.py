"""Computes an asynchronous run again from its journal and the trainers, bit for bit, or says where it left the track.

    python -m fedsplit replay checkpoints --checkpoint-dir replayed

This is the server again, with the settings that the run was begun with: start its clients and trainers beside it, with
an --exchange-dir and a --checkpoint-dir of their own, so that they begin as they did then. Asked and merged is what
checkpoints/server/journal.jsonl says. Exit code 0: every update and every state had the same bits.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from fedsplit import cli
from fedsplit.commands import server
from fedsplit.errors import CheckpointError, UsageError
from fedsplit.run.directory import Places


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, and what is run."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="the --checkpoint-dir of the run")
    add("--checkpoint-dir", type=Path, required=True, metavar="DIR", help="where the run is done again")
    server.add_connection(parser)
    cli.make_program(parser, "server", run, flower=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the server; returns when the journal is done."""
    from fedsplit.asynchronous.replay import Replay, read_track, replayed

    places = Places(arguments.directory)
    if places.server.resolve() == Places(arguments.checkpoint_dir).server.resolve():
        raise UsageError(f"--checkpoint-dir {arguments.checkpoint_dir} is that of the run itself; take another")
    entries = read_track(places.journal)
    try:
        settings = json.loads(places.run.read_bytes())["settings"]
    except (OSError, ValueError, KeyError) as exc:
        raise CheckpointError(f"{places.run} cannot be read: {exc}") from exc
    wanted = replayed(settings, arguments.checkpoint_dir)
    server.serve(arguments, wanted, rounds=partial(Replay, entries=entries))
    print(f"replayed {cli.count(len(entries) - 1, 'merge')}: every update and every state has the bits that it had")
    return 0
