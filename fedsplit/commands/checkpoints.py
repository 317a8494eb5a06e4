"""Lists every checkpoint, and checks each file against its digest.

    python -m fedsplit checkpoints checkpoints

The server's store and every trainer's are listed. Ends with exit code 13 if one of them is corrupt.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsplit import cli
from fedsplit.disk.checkpoints import CheckpointStore
from fedsplit.errors import CheckpointError
from fedsplit.run.directory import HISTORY_FILE
from fedsplit.run.history import read_history

_STORE = re.compile(r"server|rank-[1-9][0-9]*")
_HEADINGS = ("store", "round", "run", "files", "bytes", "metrics", "state")


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    parser.add_argument("checkpoint_dir", nargs="?", type=Path, default=Path("checkpoints"), metavar="CHECKPOINT_DIR",
        help="the --checkpoint-dir of the programs, or one store in it, such as checkpoints/server")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print the list; raises CheckpointError at its end if a checkpoint is corrupt."""
    rows = [row for store in _find_stores(arguments.checkpoint_dir) for row in _read_store(store)]
    corrupt = [f"{row[0]} round {row[1]}" for row in rows if row[-1] != "valid"]
    styles = ["" if row[-1] == "valid" else "bold red" for row in rows]
    cli.print_table(rows, _HEADINGS, styles=styles, numbers=("round", "files", "bytes"))
    if corrupt:
        raise CheckpointError(
            f"{len(corrupt)} of {len(rows)} checkpoints are corrupt ({', '.join(corrupt)}); --resume passes over them"
        )
    return 0


def _find_stores(directory: Path) -> list[CheckpointStore]:
    """Return the stores of a checkpoint directory, the server's first; or the one store that it is."""
    if CheckpointStore(directory).rounds():
        return [CheckpointStore(directory)]
    try:
        found = [path for path in directory.iterdir() if path.is_dir() and _STORE.fullmatch(path.name)]
    except OSError as exc:
        reason = f"{exc.strerror}; give the programs' --checkpoint-dir"
        raise CheckpointError(f"cannot look into {directory}: {reason}") from exc
    if not found:
        raise CheckpointError(f"{directory} holds no checkpoints: neither server nor rank-K is in it")
    found.sort(key=lambda path: (path.name != "server", len(path.name), path.name))
    return [CheckpointStore(path) for path in found]


def _read_store(store: CheckpointStore) -> Iterator[list[str]]:
    """Read and check every round of a store; yields the cells of its row, the last is ``valid`` or what is wrong."""
    # A round's checkpoint is written before the round is evaluated: only the history has its test metrics.
    history = read_history(store.directory / HISTORY_FILE)
    evaluated = {line["round"]: line.get("evaluate") for line in history}
    for server_round in store.rounds():
        first = [store.directory.name, str(server_round)]
        try:
            checkpoint = store.read(server_round)
            size = sum(checkpoint.path(file).stat().st_size for file in checkpoint.files)
        except (CheckpointError, FileNotFoundError) as exc:
            # One that is gone was pruned meanwhile, by a run that is on.
            if store.round_directory(server_round).exists():
                yield [*first, "", "", "", "", f"corrupt: {exc}"]
        else:
            phases = {**checkpoint.metrics, "test": evaluated.get(server_round)}
            metrics = ", ".join(text for phase, numbers in phases.items() for text in _describe(phase, numbers))
            yield [*first, checkpoint.run_id, str(len(checkpoint.files)), f"{size:,}", metrics, "valid"]


def _describe(phase: str, numbers: Any) -> Iterator[str]:
    for name, value in numbers.items() if isinstance(numbers, dict) else ():
        if isinstance(value, int | float):
            yield f"{phase} {name} {value:.4f}"
