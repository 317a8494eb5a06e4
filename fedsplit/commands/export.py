"""Writes the global state_dict of a round as .safetensors or .pt.

    python -m fedsplit export --checkpoint-dir checkpoints --output model.pt

What comes out is plain: it is read by torch.load("model.pt", weights_only=True), or by
safetensors.torch.load_file("model.safetensors").
"""

import argparse

from fedsplit import cli
from fedsplit.disk.checkpoints import Checkpoint, CheckpointStore
from fedsplit.disk.files import write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.run.directory import STATE_FILE, Places

_ENDINGS = (".safetensors", ".pt")


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    cli.add_files(parser, _ENDINGS)
    parser.add_argument("--round", type=cli.natural, metavar="N",
        help="which round (default: the newest that is valid)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    # Before torch is imported: a wrong name is told at once.
    cli.check_output(output := arguments.output, _ENDINGS)
    found = _choose(CheckpointStore(Places(arguments.checkpoint_dir).server), arguments.round)

    from fedsplit.states.state_dict import export_state

    write_chunks(output, export_state(found.path(STATE_FILE), output))
    size = output.stat().st_size
    print(f"{output}: the state after round {found.server_round} of run {found.run_id}, {size:,} bytes")
    return 0


def _choose(store: CheckpointStore, server_round: int | None) -> Checkpoint:
    if not (rounds := store.rounds()):
        raise CheckpointError(f"no checkpoints in {store.directory}; is it the server's --checkpoint-dir?")
    if server_round in rounds:
        return store.read(server_round)
    if server_round is not None:
        there = ", ".join(map(str, rounds))
        raise CheckpointError(f"round {server_round} is not in {store.directory}; there are rounds {there}")
    if newest := store.newest():
        return newest
    raise CheckpointError(f"every checkpoint in {store.directory} is corrupt; see python -m fedsplit checkpoints")
