"""The journal of merges: explored interleavings with kills, going on after a kill, and the run done again from it.

An interleaving is one run of the real `AsyncRounds`, with its store, checkpoints and journal on a real disk, in one
thread: wherever it would wait, the next rank of a schedule does its training and hands in. All schedules up to a length
are tried, each undisturbed and with the server killed, once, at a moment of each kind, and resumed. Checked for each:
no update is merged twice, nor two of one rank in a merge; what was merged is what the rank made of the state of the
round that is noted as its base; nothing is trained twice; and the last state is that of plain arithmetic over the
journal. Not covered: two kills in one run, and a kill within a single write (see test_files.py).
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.inside import Federation, InsideRank
from fedsplit.asynchronous.replay import Replay, read_track, replayed
from fedsplit.asynchronous.rounds import AsyncRounds
from fedsplit.disk.digest import bytes_digest
from fedsplit.errors import CheckpointError, RunFailedError, UsageError
from fedsplit.run.directory import Run
from fedsplit.run.history import History
from fedsplit.run.journal import Journal, read_journal
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import StateDict, encode
from tests.depth import scaled
from tests.reference import mean
from tests.test_asynchronous import INITIAL, lines, settings, sleeping, step

RANKS, ROUNDS = 3, 4
SCHEDULES = list(itertools.product(range(RANKS), repeat=scaled(3, 5)))
KILLS = (None, "waiting", "before the journal", "before the checkpoint", "before the history")
MODES = ({"buffer": 1}, {"buffer": 2}, {"merge_after": 2}, {"buffer": 2, "max_staleness": 1})


class Killed(BaseException):
    """The server dies here."""


class Scheduled(threading.Condition):
    """Where the rounds would wait, somebody else does something."""

    def __init__(self, schedule: Iterator[int], kill_at: int | None) -> None:
        super().__init__()
        self.pending: dict[int, Any] = {}
        self._schedule, self._left = schedule, kill_at

    def wait(self, timeout: float | None = None) -> bool:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self._left = None
                raise Killed
        ranks = sorted(self.pending)
        # Beyond the schedule, whoever has the lowest rank.
        self.pending.pop(ranks[next(self._schedule, 0) % len(ranks)])()
        return True


class Stepped(AsyncRounds):
    """Asynchronous rounds in one thread."""

    def __init__(self, *, schedule: Iterator[int], kill_at: int | None, **parts: Any) -> None:
        self._given = Scheduled(schedule, kill_at)
        super().__init__(**parts)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._changed = self._given

    def _spawn(self, job: Any, task: Any) -> None:
        self._given.pending[task.rank] = partial(job, task)


def recording(rank: int, made: dict[tuple[int, int], str]) -> InsideRank:
    """Train as `step` does, and note the digest of what came out by rank and round."""

    def train(task: Any) -> tuple[StateDict, int]:
        state, number = step(rank)(task)
        assert (rank, task.server_round) not in made, "trained twice"
        made[rank, task.server_round] = digest(state)
        return state, number

    return InsideRank(rank, train)


def digest(state: StateDict) -> str:
    return bytes_digest(b"".join(encode(state)))


def killing(monkeypatch: pytest.MonkeyPatch, where: str | None, call: int) -> None:
    """Let the server die in the so-manieth merge."""
    target, name = {
        "before the journal": (Journal, "append"), "before the checkpoint": (Run, "save"),
        "before the history": (History, "append"),
    }.get(where or "", (None, ""))  # fmt: skip
    if target is None:
        return
    real, left = getattr(target, name), [call]

    def die(self: Any, *given: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise Killed
        return real(self, *given)

    monkeypatch.setattr(target, name, die)


def by_hand(entries: Sequence[dict[str, Any]], flags: dict[str, Any]) -> StateDict:
    """Return the last state of a journal by plain arithmetic, and check each digest in it on the way."""
    states = [INITIAL]
    assert entries[0]["state"] == digest(INITIAL)
    for entry in entries[1:]:
        now, updates = states[-1], []
        for rank, update in sorted(entry["updates"].items(), key=lambda item: int(item[0])):
            base = states[update["base_round"]]
            made, number = step(int(rank))(SimpleNamespace(state_dict=base, server_round=update["base_round"] + 1))
            assert update["digest"] == digest(made), "merged against a base that it did not have"
            if staleness := entry["round"] - 1 - update["base_round"]:
                weight = float((1 + staleness) ** -0.5)
                made["w"] = now["w"] + weight * (made["w"] - base["w"])
            updates.append((number, made))
        merged = {name: mean([(n, made[name]) for n, made in updates]) for name in INITIAL} if updates else now
        states.append(merged)
        assert entry["state"] == digest(merged)
    return states[-1]


@pytest.fixture
def on_ram() -> Iterator[Path]:
    """A directory in which a thousand checkpoints are written at once."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        yield Path(directory)


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_update_is_merged_twice_or_against_a_base_that_it_did_not_have(
    on_ram: Path, mode: dict[str, Any], kill: str | None
) -> None:
    # With a kill every third schedule, each killed at another of the merges.
    for number, schedule in enumerate(SCHEDULES[:: 3 if kill else 1]):
        directory, made = on_ram / str(number), dict[tuple[int, int], str]()
        ranks = [recording(rank, made) for rank in range(1, RANKS + 1)]
        wanted = settings(directory, rounds=ROUNDS, min_clients=RANKS, **mode)
        choices = iter(schedule)
        moment = number % ROUNDS

        def rounds(kill_at: int | None, choices: Iterator[int] = choices) -> Any:
            return partial(Stepped, schedule=choices, kill_at=kill_at)

        if kill:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                killing(patch, kill, moment + 1 - (kill == "before the history"))
                at = moment if kill == "waiting" else None
                Federation(directory, wanted, INITIAL, ranks, make_rounds=rounds(at)).run()
        federation = Federation(directory, wanted, INITIAL, ranks, make_rounds=rounds(None))
        federation.run(resume=kill is not None)

        entries = read_journal(directory / "server" / "journal.jsonl")
        assert [entry["round"] for entry in entries] == list(range(ROUNDS + 1))
        merged = [(rank, u["base_round"]) for entry in entries[1:] for rank, u in entry["updates"].items()]
        assert len(merged) == len(set(merged)), "merged twice"
        expected, found = by_hand(entries, mode), federation.final_state()
        assert all(torch.equal(found[name], expected[name]) for name in INITIAL)
        assert [line["round"] for line in lines(directory)] == list(range(1, ROUNDS + 1))


def test_who_was_at_work_when_the_server_was_killed_is_asked_for_the_same_again(tmp_path: Path) -> None:
    made: dict[tuple[int, int], str] = {}
    ranks = [recording(rank, made) for rank in (1, 2)]
    wanted = settings(tmp_path, rounds=3, min_clients=2, buffer=1)
    # Rank 1 is merged twice while rank 2 is at work on the first state; then the server dies.
    parts = {"schedule": iter([0, 0]), "kill_at": 2}
    with pytest.raises(Killed):
        Federation(tmp_path, wanted, INITIAL, ranks, make_rounds=partial(Stepped, **parts)).run()
    parts = {"schedule": iter([1]), "kill_at": None}
    Federation(tmp_path, wanted, INITIAL, ranks, make_rounds=partial(Stepped, **parts)).run(resume=True)
    last = read_journal(tmp_path / "server" / "journal.jsonl")[-1]
    assert {rank: update["base_round"] for rank, update in last["updates"].items()} == {"2": 0}
    assert ranks[1].begun == [("train", 1, digest(INITIAL))]


# -- the run done again ------------------------------------------------------------------------------------------------


def a_run(directory: Path, **flags: Any) -> ServerSettings:
    ranks = [sleeping(rank, seconds) for rank, seconds in ((1, 0.0), (2, 0.03), (3, 0.1))]
    wanted = settings(directory, rounds=5, min_clients=3, **flags)
    Federation(directory, wanted, INITIAL, ranks).run()
    return wanted


def again(directory: Path, wanted: ServerSettings, into: Path, ranks: list[InsideRank]) -> StateDict:
    entries = read_track(directory / "server" / "journal.jsonl")
    settings = replayed(dict(wanted.to_run_config()), into)
    federation = Federation(into, settings, INITIAL, ranks, make_rounds=partial(Replay, entries=entries))
    federation.run()
    return federation.final_state()


@pytest.mark.parametrize("flags", [{"buffer": 1}, {"merge_after": 2, "server_lr": 0.5, "max_staleness": 1}])
def test_a_replay_comes_to_the_same_bits_though_other_ranks_are_slow(tmp_path: Path, flags: dict[str, Any]) -> None:
    wanted = a_run(tmp_path / "run", **flags)
    ranks = [sleeping(rank, seconds) for rank, seconds in ((1, 0.1), (2, 0.0), (3, 0.0))]
    found = again(tmp_path / "run", wanted, tmp_path / "again", ranks)
    expected = Federation(tmp_path / "run", wanted, INITIAL, []).final_state()
    assert all(torch.equal(found[name], expected[name]) for name in INITIAL)


def test_a_replay_says_where_it_left_the_track(tmp_path: Path) -> None:
    wanted = a_run(tmp_path / "run", buffer=1)
    ranks = [sleeping(rank, 0.0) for rank in (1, 2, 3)]
    (merged, update), *_ = read_journal(tmp_path / "run" / "server" / "journal.jsonl")[2]["updates"].items()
    rank, base_round = int(merged), update["base_round"]

    def other(task: Any) -> tuple[StateDict, int]:
        state, number = step(rank)(task)
        return {**state, "w": state["w"] + 1e-9 * (task.server_round == base_round + 1)}, number

    ranks[rank - 1].train = other
    says = f"at round 2 of 5: the update of rank {rank} from the state of round {base_round} has other"
    with pytest.raises(RunFailedError, match=says):
        again(tmp_path / "run", wanted, tmp_path / "again", ranks)


def test_a_journal_that_is_not_whole_and_a_run_with_noise_are_no_track(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(json.dumps({"round": number, "state": ""}) + "\n" for number in (0, 2)))
    with pytest.raises(CheckpointError, match="does not have every merge"):
        read_track(journal)
    private = settings(tmp_path, buffer=1, aggregate=("dp(fedavg, clip=1.0, noise=1.0)",))
    with pytest.raises(UsageError, match="cannot be replayed"):
        replayed(dict(private.to_run_config()), tmp_path)


def test_a_line_that_a_dying_process_left_unfinished_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"round": 0, "state": "a"}\n{"round": 1, "st')
    assert [entry["round"] for entry in read_journal(path)] == [0]
