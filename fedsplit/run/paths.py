"""Every path of a run on the server's disk.

==================  ============================================================================================
``server.lock``     held for life: one server a directory
``run.json``        the run's id and settings, written before anything else
``history.jsonl``   one line a round
``round-…/``        checkpoints; the global state in each is ``state.safetensors``
``plot.png``        loss, accuracy and time, drawn as the run ends
``payloads/``       the payload store; nothing in it outlives the run
``old-runs/<id>/``  what a run that was not resumed left here
==================  ============================================================================================

All of these are in ``<checkpoint_dir>/server/``. The demo keeps the logs of its programs beside it, in ``logs/``.
"""

from __future__ import annotations

from pathlib import Path

HISTORY_FILE = "history.jsonl"
STATE_FILE = "state.safetensors"


class Places:
    """The paths in a checkpoint directory.

    Parameters
    ----------
    checkpoint_dir
        The directory above ``server/`` and ``rank-<k>/``.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self.server = checkpoint_dir / "server"
        self.lock = self.server / "server.lock"
        self.run = self.server / "run.json"
        self.history = self.server / HISTORY_FILE
        self.payloads = self.server / "payloads"
        self.final_plot = self.server / "plot.png"
        self.logs = checkpoint_dir / "logs"

    def old_run(self, run_id: str) -> Path:
        """Return where the files of a run go that was here and was not resumed."""
        return self.server / "old-runs" / run_id
