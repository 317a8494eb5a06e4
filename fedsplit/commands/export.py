"""Writes the global state_dict of a round as .safetensors or .pt.

    python -m fedsplit export --checkpoint-dir checkpoints --output model.pt

What comes out is plain: it is read by torch.load("model.pt", weights_only=True), or by
safetensors.torch.load_file("model.safetensors").
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedsplit import cli
from fedsplit.disk.checkpoints import Checkpoint, CheckpointStore
from fedsplit.disk.files import write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.run.directory import STATE_FILE, Places

_ENDINGS = (".safetensors", ".pt")


def add_to(commands: cli.Commands) -> None:
    """Add the command's parser."""
    parser = cli.add_command(commands, "export", __doc__, run)
    cli.add_files(parser, endings=_ENDINGS)
    parser.add_argument(
        "--round", type=cli.natural, metavar="N", help="which round (default: the newest that is valid)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file."""
    output: Path = arguments.output
    # Before torch is imported: a wrong name is told at once.
    cli.check_output(output, endings=_ENDINGS)
    checkpoint = choose(CheckpointStore(Places(arguments.checkpoint_dir).server), arguments.round)

    from fedsplit.states.state_dict import export_state

    write_chunks(output, export_state(checkpoint.path(STATE_FILE), output))
    print(f"{output}: the state after round {checkpoint.server_round} of run {checkpoint.run_id}, "
          f"{output.stat().st_size:,} bytes")  # fmt: skip
    return 0


def choose(store: CheckpointStore, server_round: int | None) -> Checkpoint:
    """Return a round's checkpoint, the newest valid one by default.

    Raises
    ------
    CheckpointError
        If it is not there or corrupt.
    """
    rounds = store.rounds()
    if not rounds:
        raise CheckpointError(f"no checkpoints in {store.directory}; is it the server's --checkpoint-dir?")
    if server_round is None:
        newest = store.newest()
        if newest is None:
            raise CheckpointError(
                f"every checkpoint in {store.directory} is corrupt; see python -m fedsplit checkpoints"
            )
        return newest
    if server_round not in rounds:
        there = ", ".join(map(str, rounds))
        raise CheckpointError(f"round {server_round} is not in {store.directory}; there are rounds {there}")
    return store.read(server_round)
