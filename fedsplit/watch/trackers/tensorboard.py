"""TensorBoard: event files under ``PLACE/<run id>``; ``tensorboard --logdir PLACE`` shows all runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Writes event files; see `fedsplit.watch.trackers`."""

    def __init__(self, place: str, run_id: str, first_round: int, settings: Mapping[str, Any]) -> None:
        # A resumed run does its last rounds again: what the dead server wrote of them is not shown any more.
        purge = first_round if first_round > 1 else None
        self._writer = SummaryWriter(str(Path(place) / run_id), purge_step=purge)
        table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", first_round)

    def log(self, scalars: Mapping[str, float], server_round: int) -> None:
        """Write a round; flushed, so that a dashboard that is open shows it."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, server_round)
        self._writer.flush()

    def close(self, *, complete: bool) -> None:
        """Close the file."""
        self._writer.close()
