"""What the demo knows of its run: it reads the history and the exchange, as anybody could."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsplit.commands.status import ROLES, RankStatus, read_status
from fedsplit.exchange.records import Request
from fedsplit.run.history import Line, read_history
from fedsplit.run.paths import Places

_DOING = {"initialize": "asking for the initial state", "train": "training", "evaluate": "evaluating"}


class Follower:
    """Follows a run that is about to begin.

    Parameters
    ----------
    places
        Where the server writes; a run that is there already is not the one that is meant.
    exchange_dir
        Where clients and trainers meet.
    clients
        Their ranks are 1 to this.

    Attributes
    ----------
    lines
        The history so far.
    """

    def __init__(self, places: Places, exchange_dir: Path, clients: int) -> None:
        self.lines: list[Line] = []
        self._places = places
        self._exchange_dir = exchange_dir
        self._ranks = range(1, clients + 1)
        self._old_run_id = places.run_id()
        self._run_id: str | None = None
        self._history_bytes = 0
        self._all_came = False

    def update(self) -> str:
        """Read what is new; returns what is going on."""
        # Locks are probed only until everybody has come: who goes is the parent's to notice.
        statuses = [read_status(self._exchange_dir, rank, probe=not self._all_came) for rank in self._ranks]
        self._read_history()
        return self._describe_start(statuses) or self._describe_run(statuses)

    def _read_history(self) -> None:
        if self._run_id is None:
            # The server puts an old run's history aside before it writes its own run's id.
            found = self._places.run_id()
            if found is None or found == self._old_run_id:
                return
            self._run_id = found
        path = self._places.history
        size = path.stat().st_size if path.exists() else 0
        if size != self._history_bytes:
            self._history_bytes, self.lines = size, read_history(path)

    def _describe_start(self, statuses: Sequence[RankStatus]) -> str:
        if self._all_came:
            return ""
        missing = [] if self._run_id else ["the server"]
        for status in statuses:
            missing += [f"{role} {status.rank}" for role in ROLES if status.holders.get(role) is None]
        self._all_came = not missing
        return f"starting: waiting for {', '.join(missing)}" if missing else ""

    def _describe_run(self, statuses: Sequence[RankStatus]) -> str:
        mine = [status for status in statuses if status.task and status.task.run_id == self._run_id]
        if any(status.is_over for status in mine):
            return "the run is over: waiting for the programs to end"
        requests = [status.task for status in mine if status.task]
        if not requests:
            return "starting: waiting for the first task"
        newest = max(requests, key=_place_in_run)
        done = self.lines[-1]["round"] if self.lines else 0
        if newest.server_round == 0:
            return f"starting: {_DOING[newest.kind]}"
        if newest.server_round > done:
            return f"round {newest.server_round} of {newest.total_rounds}: {_DOING[newest.kind]}"
        # What was read of the exchange is older than the history.
        if done < newest.total_rounds:
            return f"round {done + 1} of {newest.total_rounds}: starting"
        return "the last round is done: writing the checkpoint"


def _place_in_run(request: Request) -> tuple[int, bool]:
    return request.server_round, request.kind == "evaluate"
