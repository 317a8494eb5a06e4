"""Asynchronous rounds: what is merged when and with which weight, and that nobody waits for whoever is slow or gone."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import inside
from benchmarks.inside import Federation, InsideRank
from fedsplit.aggregation import AggregationContext, Update
from fedsplit.aggregation.numeric import moved
from fedsplit.aggregation.staleness import parse_staleness
from fedsplit.asynchronous import rounds as asynchronous
from fedsplit.asynchronous.rounds import AsyncRounds
from fedsplit.engines.assembly import open_server
from fedsplit.errors import UsageError
from fedsplit.server.round import Task
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import StateDict
from fedsplit.wire.protocol import EMBEDDED
from tests.bounds import BOUND_S

INITIAL = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64), "n": torch.tensor(0)}
FAST_S = 0.01


@pytest.fixture(autouse=True)
def short_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends with its last question; a rank that is held by a test gives no answer to it."""
    monkeypatch.setattr(inside, "EMBEDDED", replace(EMBEDDED, hold_s=0.05))


def only_the_lost_is_gone(monkeypatch: pytest.MonkeyPatch, rank: InsideRank) -> None:
    """Let a rank be gone a moment after it was lost, and no other one, however late a busy machine lets it answer."""
    monkeypatch.setattr(asynchronous, "_GONE_S", 0.2)
    away_s = Task.away_s.fget
    assert away_s is not None

    def counted(task: Task) -> float:
        return away_s(task) if task.rank == rank.rank and rank.is_lost else 0.0

    monkeypatch.setattr(Task, "away_s", property(counted))


def step(rank: int) -> Callable[[Any], tuple[StateDict, int]]:
    """Train a little: what comes out depends on the rank, the round and the state, and on nothing else."""

    def train(task: Any) -> tuple[StateDict, int]:
        state = task.state_dict
        generator = torch.Generator().manual_seed(1000 * rank + task.server_round)
        w = 0.9 * state["w"] + torch.rand(2, generator=generator, dtype=torch.float64)
        return {"w": w, "n": state["n"] + 1}, 10 * rank

    return train


def sleeping(rank: int, seconds: float) -> InsideRank:
    def train(task: Any) -> tuple[StateDict, int]:
        time.sleep(seconds)
        return step(rank)(task)

    return InsideRank(rank, train)


def settings(directory: Path, **flags: Any) -> ServerSettings:
    values: dict[str, Any] = {"rounds": 4, "min_clients": 1, "evaluate_every": 0, "checkpoint_dir": directory} | flags
    return ServerSettings(**values)


class Gates:
    """Ranks that hand in their updates when the test says so."""

    def __init__(self, ranks: int, train: Callable[[int], Callable[[Any], tuple[StateDict, int]]] = step) -> None:
        self._may = {rank: threading.Semaphore(0) for rank in range(1, ranks + 1)}
        self._train = train
        self.ranks = [self._make(rank) for rank in self._may]

    def _make(self, rank: int) -> InsideRank:
        def train(task: Any) -> tuple[StateDict, int]:
            result = self._train(rank)(task)
            assert self._may[rank].acquire(timeout=BOUND_S)
            return result

        return InsideRank(rank, train)

    def let(self, rank: int, count: int = 1) -> None:
        self._may[rank].release(count)


def started(federation: Federation) -> threading.Thread:
    thread = threading.Thread(target=federation.run, daemon=True)
    thread.start()
    return thread


def end(thread: threading.Thread) -> None:
    """Wait for the end of a run."""
    thread.join(BOUND_S)
    assert not thread.is_alive()


def lines(directory: Path) -> list[dict[str, Any]]:
    path = directory / "server" / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], Any], seconds: float = BOUND_S) -> None:
    over = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < over
        time.sleep(0.005)


def stalenesses(line: Mapping[str, Any]) -> dict[str, int]:
    return {rank: row["staleness"] for rank, row in line["clients"].items()}


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def test_the_weight_of_a_stale_update_is_what_the_papers_say() -> None:
    """FedAsync, section 5.2, and FedBuff, section 5: (1 + staleness)^-a."""
    assert [parse_staleness("constant")(n) for n in (0, 5)] == [1.0, 1.0]
    polynomial = parse_staleness("polynomial:0.5")
    assert [polynomial(n) for n in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3, rel=1e-15)]
    assert parse_staleness("polynomial:2")(1) == 0.25
    assert parse_staleness("math:sqrt")(9) == 3.0


@pytest.mark.parametrize("text", ["", "polynomial", "polynomial:-1", "polynomial:x", "hinge"])
def test_a_weight_that_cannot_be_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(UsageError, match="--staleness"):
        parse_staleness(text)


def test_a_weight_that_is_not_there_is_told_of_before_the_run_is_opened(tmp_path: Path) -> None:
    wanted = settings(tmp_path, buffer=1, staleness="math:nothing")
    with pytest.raises(UsageError, match="the module 'math' has no function 'nothing'"), open_server(wanted, EMBEDDED):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_change_is_added_to_the_newest_state_in_the_wide_type_and_infinities_stay() -> None:
    onto, start, end = (torch.tensor([x, -math.inf]).half() for x in (10.0, 2.0, 4.0))
    assert moved(onto, start, end, 0.5).tolist() == [11.0, -math.inf]
    assert moved(onto, start, end, 0.5).dtype == torch.float16


def test_a_merge_of_stale_updates_against_numbers_worked_out_by_hand(tmp_path: Path) -> None:
    """FedBuff, algorithm 1, in float64: round 1 takes rank 1; round 2 takes rank 2, whose state is one merge old."""

    def add(rank: int) -> Callable[[Any], tuple[StateDict, int]]:
        return lambda task: ({"w": task.state_dict["w"] + rank, "n": task.state_dict["n"] + rank}, 1)

    merge_two(tmp_path, add)
    # w1 = 1 + 0.5 * 1 = 1.5; rank 2 went from 1 to 3: w2 = 1.5 + 0.5 * (1/2 * 2) = 2.0. Whole numbers take the maximum.
    assert final(tmp_path)["w"].tolist() == [2.0, -1.0]
    assert final(tmp_path)["n"].item() == 2
    assert [stalenesses(line) for line in lines(tmp_path)] == [{"1": 0}, {"2": 1}]


def test_fedasync_mixes_what_was_trained_into_the_state(tmp_path: Path) -> None:
    """Xie et al., algorithm 1: w = (1 - alpha_t) w + alpha_t w_new, alpha_t = 0.5 * (1 + staleness)^-1."""

    def add(rank: int) -> Callable[[Any], tuple[StateDict, int]]:
        return lambda task: ({"w": task.state_dict["w"] + rank, "n": task.state_dict["n"]}, 1)

    merge_two(tmp_path, add, mix_states=True)
    # w1 = 1.5; rank 2 trained to 3; alpha = 0.25: 0.75 * 1.5 + 0.25 * 3 = 1.875.
    assert final(tmp_path)["w"].tolist() == [1.875, -1.125]


def merge_two(directory: Path, train: Callable[[int], Any], **more: Any) -> None:
    """Merge rank 1's update, then rank 2's, which started from the same state."""
    gates = Gates(2, train)
    flags = {"buffer": 1, "rounds": 2, "staleness": "polynomial:1", "server_lr": 0.5, **more}
    thread = started(Federation(directory, settings(directory, min_clients=2, **flags), INITIAL, gates.ranks))
    gates.let(1)
    wait_for(lambda: len(lines(directory)) == 1)
    gates.let(2)
    end(thread)


def final(directory: Path) -> StateDict:
    return Federation(directory, settings(directory), INITIAL, []).final_state()


# -- what is merged when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"buffer": 3}, {"merge_after": 3}, {"buffer": 3, "mix_states": True}])
@pytest.mark.parametrize("rule", ["fedavg", "median", "flower.FedAdam(eta=0.1)"])
def test_with_a_buffer_of_all_ranks_the_run_is_the_synchronous_one_bit_for_bit(
    tmp_path: Path, mode: dict[str, Any], rule: str
) -> None:
    found = {}
    for name, flags in (("waiting", {}), ("asynchronous", mode)):
        directory = tmp_path / name
        ranks = [sleeping(rank, FAST_S * rank) for rank in (1, 2, 3)]
        wanted = settings(directory, min_clients=3, evaluate_every=2, aggregate=(rule,), **flags)
        Federation(directory, wanted, INITIAL, ranks).run()
        found[name] = final(directory)
        assert [line["accepted"] for line in lines(directory)] == [3] * 4
    assert all(torch.equal(found["waiting"][name], found["asynchronous"][name]) for name in INITIAL)


def test_a_rank_that_is_slow_is_not_waited_for_and_its_update_counts_with_its_staleness(tmp_path: Path) -> None:
    gates = Gates(3)
    federation = Federation(tmp_path, settings(tmp_path, min_clients=3, buffer=2), INITIAL, gates.ranks)
    thread = started(federation)
    for done in (1, 2):
        gates.let(1)
        gates.let(2)
        wait_for(lambda done=done: len(lines(tmp_path)) == done)
    gates.let(3)
    wait_for(lambda: has_handed_in(federation, 3))
    gates.let(1)
    wait_for(lambda: len(lines(tmp_path)) == 3)
    gates.let(2)
    gates.let(1)
    end(thread)
    assert [stalenesses(line) for line in lines(tmp_path)[:3]] == [{"1": 0, "2": 0}, {"1": 0, "2": 0}, {"1": 0, "3": 2}]


def has_handed_in(federation: Federation, rank: int) -> bool:
    """Tell whether the update of a rank has come to the server and was not merged yet."""
    rounds = federation.rounds
    assert isinstance(rounds, AsyncRounds)
    with rounds._changed:
        return rank in rounds._buffer.arrived or any(task.rank == rank for task in rounds._failed)


def test_a_round_ends_with_the_first_k_of_its_own_updates_and_takes_late_ones_along(tmp_path: Path) -> None:
    gates = Gates(3)
    wanted = settings(tmp_path, rounds=2, min_clients=3, merge_after=2)
    federation = Federation(tmp_path, wanted, INITIAL, gates.ranks)
    thread = started(federation)
    gates.let(1)
    gates.let(2)
    wait_for(lambda: len(lines(tmp_path)) == 1)
    gates.let(3)
    wait_for(lambda: has_handed_in(federation, 3))
    time.sleep(0.3)
    assert len(lines(tmp_path)) == 1, "a late update is none of the first two of this round"
    gates.let(1)
    gates.let(2)
    end(thread)
    assert [stalenesses(line) for line in lines(tmp_path)] == [{"1": 0, "2": 0}, {"1": 0, "2": 0, "3": 1}]


def test_an_update_that_is_too_old_is_refused_by_name_and_its_rank_goes_on(tmp_path: Path) -> None:
    gates = Gates(2)
    flags = {"rounds": 4, "min_clients": 2, "buffer": 1, "max_staleness": 1}
    federation = Federation(tmp_path, settings(tmp_path, **flags), INITIAL, gates.ranks)
    thread = started(federation)
    for done in (1, 2):
        gates.let(1)
        wait_for(lambda done=done: len(lines(tmp_path)) == done)
    gates.let(2)
    wait_for(lambda: has_handed_in(federation, 2))
    gates.let(1)
    wait_for(lambda: len(lines(tmp_path)) == 3)
    refused = lines(tmp_path)[2]["refused"]
    assert refused == {"2": "it started from the state of round 0, 2 merges ago, and --max-staleness is 1"}
    wait_for(lambda: [each[1] for each in gates.ranks[1].begun] == [1, 4])
    gates.let(2)
    end(thread)
    assert stalenesses(lines(tmp_path)[3]) == {"2": 0}


@pytest.mark.parametrize("mode", [{"buffer": 3}, {"merge_after": 3}])
def test_a_rank_that_leaves_for_good_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any]
) -> None:
    ranks = [sleeping(rank, FAST_S) for rank in (1, 2, 3)]
    only_the_lost_is_gone(monkeypatch, ranks[2])

    def leave(task: Any) -> tuple[StateDict, int]:
        ranks[2].is_lost = True
        time.sleep(1000)
        raise AssertionError

    ranks[2].train = leave
    federation = Federation(tmp_path, settings(tmp_path, min_clients=3, **mode), INITIAL, ranks)
    thread = started(federation)
    end(thread)
    assert [line["accepted"] for line in lines(tmp_path)] == [2] * 4


def test_a_rank_that_comes_late_takes_part_from_the_next_merge_on(tmp_path: Path) -> None:
    gates = Gates(2)
    late = gates.ranks[1]
    late.is_lost = True
    federation = Federation(tmp_path, settings(tmp_path, buffer=1, rounds=5), INITIAL, gates.ranks)
    thread = started(federation)
    gates.let(1, 2)
    wait_for(lambda: len(gates.ranks[0].begun) == 3)
    late.is_lost = False
    assert federation.roster is not None
    federation.roster.arrive(late)
    gates.let(2, 2)
    gates.let(1)
    end(thread)
    assert [sorted(line["clients"]) for line in lines(tmp_path)] == [["1"], ["1"], ["1"], ["2"], ["2"]]


def test_a_trainer_that_fails_costs_its_own_update_only(tmp_path: Path) -> None:
    ranks = [sleeping(1, FAST_S), sleeping(2, FAST_S)]

    def fail(task: Any) -> tuple[StateDict, int]:
        raise ZeroDivisionError("no data")

    ranks[1].train = fail
    Federation(tmp_path, settings(tmp_path, buffer=2, min_clients=2), INITIAL, ranks).run()
    assert [sorted(line["clients"]) for line in lines(tmp_path)] == [["1"]] * 4
    assert all("no data" in line["refused"]["2"] for line in lines(tmp_path))


# -- the store ---------------------------------------------------------------------------------------------------------


def test_a_state_is_kept_for_as_long_as_somebody_trains_from_it_and_no_longer(tmp_path: Path) -> None:
    gates = Gates(2)
    federation = Federation(tmp_path, settings(tmp_path, rounds=6, min_clients=2, buffer=1), INITIAL, gates.ranks)
    thread = started(federation)
    store = tmp_path / "server" / "payloads"
    for done in (1, 2, 3):
        gates.let(1)
        wait_for(lambda done=done: len(lines(tmp_path)) == done)
    wait_for(lambda: len(gates.ranks[0].begun) == 4)
    first, newest = gates.ranks[1].begun[0][2], gates.ranks[0].begun[-1][2]
    assert {path.name for path in store.iterdir()} >= {first, newest}
    assert len(list(store.iterdir())) <= 4, "states that nobody trains from, and results that were merged, are gone"
    gates.let(2)
    wait_for(lambda: len(lines(tmp_path)) == 4)
    gates.let(2)
    wait_for(lambda: len(lines(tmp_path)) == 5)
    assert first not in {path.name for path in store.iterdir()}
    gates.let(1)
    end(thread)
    assert list(store.iterdir()) == []


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"buffer": 2, "merge_after": 2}, "exclude each other"),
        ({"buffer": 0}, "at least 1"),
        ({"buffer": 1, "min_results": 2}, "--min-results 2"),
        ({"merge_after": 2, "mix_states": True}, "--buffer only"),
        ({"max_staleness": 3}, "--max-staleness is for asynchronous rounds"),
        ({"server_lr": 0.5}, "--server-lr is for asynchronous rounds"),
        ({"buffer": 2, "strategy": "FedAvg"}, "a Flower strategy chooses"),
        ({"buffer": 2, "staleness": "hinge"}, "--staleness hinge"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start_with_the_reason(
    tmp_path: Path, flags: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        settings(tmp_path, **flags)


def test_a_rule_that_needs_more_updates_than_a_merge_has_is_refused_before_anybody_trains(tmp_path: Path) -> None:
    ranks = [sleeping(rank, FAST_S) for rank in (1, 2, 3, 4, 5)]
    wanted = settings(tmp_path, buffer=2, min_clients=5, aggregate=("krum(byzantine=1)",))
    with pytest.raises(UsageError, match="the rules need at least 5 updates a merge, --buffer is 2"):
        Federation(tmp_path, wanted, INITIAL, ranks).run()
    assert all(each.begun == [] for each in ranks)


# -- what goes with it -------------------------------------------------------------------------------------------------

NOTED: list[tuple[int, int, int | None, float, list[float]]] = []


def noting(updates: Sequence[Update], context: AggregationContext) -> StateDict:
    """Add the changes up, and note what a rule sees."""
    for update in updates:
        sent = float(update.extra["sent"]) if "sent" in update.extra else -1.0
        NOTED.append((update.rank, update.staleness, update.base_round, sent, context.previous["w"].tolist()))
    changes = [update.state_dict["w"] - context.previous["w"] for update in updates]
    return {"w": context.previous["w"] + sum(changes), "n": context.previous["n"]}


def test_a_rule_sees_staleness_and_base_and_extra_tensors_and_the_update_carried_over(tmp_path: Path) -> None:
    def add(rank: int) -> Callable[[Any], tuple[StateDict, int]]:
        def train(task: Any) -> tuple[StateDict, int]:
            task.sent = {"sent": torch.tensor(float(task.server_round))}
            return {"w": task.state_dict["w"] + rank, "n": task.state_dict["n"]}, 1

        return train

    NOTED.clear()
    gates = Gates(2, add)
    wanted = settings(
        tmp_path, rounds=2, min_clients=2, buffer=1, staleness="constant", aggregate=("tests.test_asynchronous:noting",)
    )
    thread = started(Federation(tmp_path, wanted, INITIAL, gates.ranks))
    gates.let(1)
    wait_for(lambda: len(lines(tmp_path)) == 1)
    gates.let(2)
    end(thread)
    assert NOTED == [(1, 0, 0, 1.0, [1.0, -2.0]), (2, 1, 0, 1.0, [2.0, -1.0])]
    assert final(tmp_path)["w"].tolist() == [4.0, 1.0]


def test_in_synchronous_rounds_a_rule_sees_the_round_before_as_base(tmp_path: Path) -> None:
    NOTED.clear()
    wanted = settings(tmp_path, rounds=2, aggregate=("tests.test_asynchronous:noting",))
    Federation(tmp_path, wanted, INITIAL, [sleeping(1, 0.0)]).run()
    assert [each[1:3] for each in NOTED] == [(0, 0), (0, 1)]


def test_every_nth_merge_is_evaluated_by_the_ranks_that_are_free(tmp_path: Path) -> None:
    gates = Gates(2)
    for each in gates.ranks:
        each.evaluate = lambda task: (float(task.server_round), 5, {"accuracy": 0.5})
    wanted = settings(tmp_path, min_clients=2, buffer=1, evaluate_every=2)
    thread = started(Federation(tmp_path, wanted, INITIAL, gates.ranks))
    gates.let(1, 4)
    end(thread)
    assert [line["evaluate"] for line in lines(tmp_path)] == [
        {}, {"loss": 2.0, "accuracy": 0.5}, {}, {"loss": 4.0, "accuracy": 0.5},
    ]  # fmt: skip
    assert [sorted(line["clients"]) for line in lines(tmp_path)] == [["1"]] * 4, "rank 2 is at work"


def test_a_private_merge_moves_the_state_by_the_clip_at_most_and_each_is_accounted_for(tmp_path: Path) -> None:
    def far(task: Any) -> tuple[StateDict, int]:
        return {"w": task.state_dict["w"] + 100, "n": task.state_dict["n"]}, 1

    ranks = [InsideRank(rank, far) for rank in (1, 2)]
    wanted = settings(tmp_path, rounds=3, min_clients=2, buffer=1, aggregate=("dp(fedavg, clip=1.0, noise=0.0)",))
    Federation(tmp_path, wanted, INITIAL, ranks).run()
    moved_by = final(tmp_path)["w"] - INITIAL["w"]
    assert float(moved_by.norm()) == pytest.approx(3.0)
    assert lines(tmp_path)[-1]["privacy"] == {"epsilon": None, "delta": 1e-05, "steps": 3}


def test_a_part_that_stays_at_home_is_neither_carried_over_nor_merged(tmp_path: Path) -> None:
    def train(task: Any) -> tuple[StateDict, int]:
        assert list(task.state_dict) == ["w"]
        time.sleep(FAST_S)
        return {"w": task.state_dict["w"] + 1}, 1

    wanted = settings(tmp_path, min_clients=2, buffer=1, aggregate=("n=local", "fedavg"))
    Federation(tmp_path, wanted, INITIAL, [InsideRank(1, train), InsideRank(2, train)]).run()
    assert list(final(tmp_path)) == ["w"]


def test_a_training_that_takes_longer_than_the_timeout_is_given_up_and_begun_anew_from_the_newest(
    tmp_path: Path,
) -> None:
    gates = Gates(2)
    wanted = settings(tmp_path, rounds=3, min_clients=2, buffer=1, round_timeout=0.5)
    thread = started(Federation(tmp_path, wanted, INITIAL, gates.ranks))
    gates.let(1)
    wait_for(lambda: len(lines(tmp_path)) == 1)
    # Given up and asked anew, from a state that rank 1 alone has made.
    wait_for(lambda: len(gates.ranks[1].begun) > 1)
    gates.let(1, 100)
    end(thread)
    refused = [line["refused"].get("2") for line in lines(tmp_path)]
    assert "not completed within 0.5 s" in refused
    assert len({asked[1] for asked in gates.ranks[1].begun}) > 1
