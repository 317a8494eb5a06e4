"""An asynchronous run done again from its journal: the same updates in the same merges, and the same bits, or not.

The server runs as ever, with its clients and trainers started afresh, but asks and merges what the journal says. After
each merge every update and the state must have the digests that they had. What is not done again are the evaluations.

Importing this module imports torch.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsplit.asynchronous.rounds import AsyncRounds
from fedsplit.errors import CheckpointError, RunFailedError, UsageError
from fedsplit.exchange.work import WORK_SHARE
from fedsplit.run.history import Line, is_damaged
from fedsplit.run.journal import Entry, read_journal
from fedsplit.run.time_account import Stages
from fedsplit.server.round import Task
from fedsplit.server.settings import ServerSettings

log = logging.getLogger("fedsplit")


class _AllBut(set[int]):
    """All ranks but these, whoever may still come."""

    def __contains__(self, rank: object) -> bool:
        return not super().__contains__(rank)


@dataclass(kw_only=True)
class Replay(AsyncRounds):
    """Runs the rounds of a journal; raises RunFailedError where something came out differently."""

    entries: list[Entry]

    @property
    def last_round(self) -> int:
        return int(self.entries[-1]["round"])

    def _offer_who_is_free(self) -> None:
        """Offer the ranks that were asked then, once they are here and have done what they were asked before."""
        wanted = {int(rank) for rank in self._expected(self._entry["round"])["asked"]}
        for rank in wanted:
            while not self.roster.wait_for_rank(rank, 1.0):
                log.info("waiting for rank %d, which was asked then", rank)
        with self._changed:
            while wanted & self._buffer.at_work.keys():
                self._check_threads()
                self._changed.wait(1.0)
            for rank in wanted & self._buffer.arrived.keys():
                # Then it came to nothing, and now it is there.
                del self._buffer.arrived[rank]
            self.roster.at_work = _AllBut(wanted)

    def _work(self, rank: int) -> dict[str, Any]:
        """Ask for as much work as then; what else the configuration says is in the settings."""
        config = self._expected(self._entry["round"])["asked"][str(rank)]["config"]
        return {WORK_SHARE: config[WORK_SHARE]} if WORK_SHARE in config else {}

    def _count_ranks(self) -> int:
        return int(self._expected(self._entry["round"]).get("num_ranks", 0))

    def _evaluate(self, server_round: int, stages: Stages, line: Line) -> None:
        """Do nothing: an evaluation does not change the state."""

    def _take(self, newest: int) -> list[Task] | None:
        arrived, failed = self._buffer.arrived, {task.rank: task for task in self._failed}
        taken = []
        for text, update in self._expected(newest + 1)["updates"].items():
            rank, base_round = int(text), update["base_round"]
            if rank in failed and failed[rank].base_round == base_round:
                raise self._left(newest + 1, f"rank {rank} gave an update, and now: {failed[rank].refused}")
            work = arrived.get(rank) or self._buffer.at_work.get(rank)
            if work is None or work.base_round != base_round:
                raise self._left(newest + 1, f"rank {rank} was not asked to train from the state of round {base_round}")
            if rank not in arrived:
                return None
            found = arrived[rank].reply.payload
            if found is None or found.digest != update["digest"]:
                raise self._left(
                    newest + 1, f"the update of rank {rank} from the state of round {base_round} has other bits"
                )
            taken.append(arrived[rank])
        for task in taken:
            del arrived[task.rank]
        return taken

    def _save(self, server_round: int, line: Line) -> None:
        if self._state.payload.digest != self._expected(server_round)["state"]:
            what = "the merge of the same updates" if server_round else "the initial state"
            raise self._left(server_round, f"{what} has other bits")
        super()._save(server_round, line)

    def _expected(self, server_round: int) -> Entry:
        return self.entries[server_round]

    def _left(self, server_round: int, why: str) -> RunFailedError:
        return RunFailedError(f"the replay left the track at round {server_round} of {self.last_round}: {why}")


def read_track(journal: Path) -> list[Entry]:
    """Read a journal to be followed; raises CheckpointError unless it has every merge from the first state on."""
    entries = read_journal(journal)
    if is_damaged(journal, len(entries)):
        raise CheckpointError(f"{journal}: line {len(entries) + 1} cannot be read, so the run cannot be followed")
    rounds = [entry["round"] for entry in entries if not entry["round"] or {"asked", "updates"} <= entry.keys()]
    if rounds != list(range(len(entries))) or len(entries) < 2:
        raise CheckpointError(f"{journal} does not have every merge of a run: is it that of an asynchronous run?")
    return entries


def replayed(settings: dict[str, Any], checkpoint_dir: Path) -> ServerSettings:
    """Return the settings of a run for doing it again in another directory; raises UsageError where that cannot be."""
    found = ServerSettings.from_run_config(settings)
    if private := [spec for spec in found.rules if spec.inner]:
        raise UsageError(f"a run with {private[0]} cannot be replayed: nobody can draw its noise again")
    # Asked are all that were asked then, and nobody has to be as quick.
    return replace(
        found, checkpoint_dir=checkpoint_dir, resume=False, evaluate_every=0, tracker=(), fraction_train=1.0,
        round_timeout=None,
    )  # fmt: skip
