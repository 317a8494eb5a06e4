"""Where the commands look in a checkpoint directory, and what the demo adds to it."""

from __future__ import annotations

import json
from pathlib import Path

HISTORY_FILE = "history.jsonl"


class Places:
    """The paths that commands use in a checkpoint directory.

    Parameters
    ----------
    checkpoint_dir
        The directory above ``server/`` and ``rank-<k>/``.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self.server = checkpoint_dir / "server"
        self.run = self.server / "run.json"
        self.history = self.server / HISTORY_FILE
        self.logs = checkpoint_dir / "logs"
        self.plot = checkpoint_dir / "plot.png"

    def run_id(self) -> str | None:
        """Return the id of the run that is here, or None: it may not have begun yet."""
        try:
            return str(json.loads(self.run.read_bytes())["run_id"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
