"""Lists every checkpoint, and checks each file against its digest.

    python -m fedsplit checkpoints checkpoints

The server's store and every trainer's are listed. Ends with exit code 13 if one of them is corrupt.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit import cli
from fedsplit.disk.checkpoints import Checkpoint, CheckpointStore
from fedsplit.errors import CheckpointError
from fedsplit.run.history import read_history
from fedsplit.run.paths import HISTORY_FILE

_STORE = re.compile(r"server|rank-[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One round of a store: what it holds, or what is wrong with it."""

    store: str
    server_round: int
    checkpoint: Checkpoint | None
    size_bytes: int = 0
    metrics: str = ""
    problem: str = ""

    def cells(self) -> list[str]:
        """Return what is shown: store, round, run, files, bytes, metrics, state."""
        if self.checkpoint is None:
            return [self.store, str(self.server_round), "", "", "", "", f"corrupt: {self.problem}"]
        return [
            self.store, str(self.server_round), self.checkpoint.run_id, str(len(self.checkpoint.files)),
            f"{self.size_bytes:,}", self.metrics, "valid",
        ]  # fmt: skip


def add_to(commands: cli.Commands) -> None:
    """Add the command's parser."""
    parser = cli.add_command(commands, "checkpoints", __doc__, run)
    parser.add_argument(
        "checkpoint_dir", nargs="?", type=Path, default=Path("checkpoints"), metavar="CHECKPOINT_DIR",
        help="the --checkpoint-dir of the programs, or one store in it, such as checkpoints/server",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Print the list; raises CheckpointError at its end if a checkpoint is corrupt."""
    listed = [row for store in find_stores(arguments.checkpoint_dir) for row in list_store(store)]
    _print(listed)
    corrupt = [row for row in listed if row.checkpoint is None]
    if corrupt:
        names = ", ".join(f"{row.store} round {row.server_round}" for row in corrupt)
        raise CheckpointError(
            f"{len(corrupt)} of {len(listed)} checkpoints are corrupt ({names}); --resume passes over them"
        )
    return 0


def find_stores(directory: Path) -> list[CheckpointStore]:
    """Return the stores of a checkpoint directory, the server's first; or the one store that it is.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    if CheckpointStore(directory).rounds():
        return [CheckpointStore(directory)]
    try:
        found = [path for path in directory.iterdir() if path.is_dir() and _STORE.fullmatch(path.name)]
    except OSError as exc:
        raise CheckpointError(
            f"cannot look into {directory}: {exc.strerror}; give the programs' --checkpoint-dir"
        ) from exc
    if not found:
        raise CheckpointError(f"{directory} holds no checkpoints: neither server nor rank-K is in it")
    found.sort(key=lambda path: (path.name != "server", len(path.name), path.name))
    return [CheckpointStore(path) for path in found]


def list_store(store: CheckpointStore) -> list[Listed]:
    """Read and check every round of a store."""
    rows = []
    # A round's checkpoint is written before it is evaluated: the test metrics stand in the history only.
    history = read_history(store.directory / HISTORY_FILE)
    evaluated = {line["round"]: line.get("evaluate", {}) for line in history}
    for server_round in store.rounds():
        name = store.directory.name
        try:
            checkpoint = store.read(server_round)
            size = sum(checkpoint.path(file).stat().st_size for file in checkpoint.files)
            metrics = _shown({**checkpoint.metrics, "test": evaluated.get(server_round)})
            rows.append(Listed(store=name, server_round=server_round, checkpoint=checkpoint, size_bytes=size,
                               metrics=metrics))  # fmt: skip
        except (CheckpointError, FileNotFoundError) as exc:
            # One that is gone was pruned meanwhile, by a run that is on.
            if store.round_directory(server_round).exists():
                rows.append(Listed(store=name, server_round=server_round, checkpoint=None, problem=str(exc)))
    return rows


def _shown(metrics_by_phase: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{phase} {name} {value:.4f}"
        for phase, metrics in metrics_by_phase.items()
        if isinstance(metrics, dict)
        for name, value in metrics.items()
        if isinstance(value, int | float)
    )


def _print(listed: list[Listed]) -> None:
    from rich.console import Console
    from rich.table import Table

    headings = ["store", "round", "run", "files", "bytes", "metrics", "state"]
    console = Console()
    if not console.is_terminal:
        print("\t".join(headings))
        for row in listed:
            print("\t".join(row.cells()))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        is_number = heading in ("round", "files", "bytes")
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in listed:
        table.add_row(*row.cells(), style=None if row.checkpoint else "bold red")
    console.print(table)
