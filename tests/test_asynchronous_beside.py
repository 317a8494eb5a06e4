"""What goes with asynchronous rounds or is refused: noise, SCAFFOLD, cut models, ranks that come and go, journals."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.inside import Federation, InsideRank, InsideRoster
from examples.algorithms.scaffold import CONTROL, Scaffold
from fedsplit import WorkloadContext
from fedsplit.asynchronous.buffer import Buffer
from fedsplit.asynchronous.replay import _AllBut, read_track
from fedsplit.errors import CheckpointError, RunFailedError, UsageError
from fedsplit.run.directory import Run
from fedsplit.run.journal import read_journal
from fedsplit.server.peer import Reply
from fedsplit.server.strategy import Strategy
from fedsplit.split_learning.uppers import Uppers
from fedsplit.states.extra import separate
from fedsplit.states.state_dict import StateDict, decode
from tests.test_asynchronous import (  # noqa: F401
    FAST_S,
    INITIAL,
    end,
    final,
    lines,
    only_the_lost_is_gone,
    settings,
    short_questions,
    sleeping,
    started,
    wait_for,
)  # fmt: skip
from tests.test_asynchronous_journal import Killed, Stepped, a_run, again, killing

MODES: list[dict[str, Any]] = [{"buffer": 1}, {"buffer": 2}, {"merge_after": 2}]


def stepped(seed: int, kill_at: int | None = None) -> Callable[..., Stepped]:
    """Asynchronous rounds in one thread, in which a seed decides who is quick."""
    draw = random.Random(seed)
    return partial(Stepped, schedule=iter(lambda: draw.randrange(6), -1), kill_at=kill_at)


# -- differential privacy ----------------------------------------------------------------------------------------------


def test_noise_is_spent_once_for_each_merge_as_for_each_round_and_also_over_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drawn for a merge that never counted was given to nobody, and is not spent."""
    pytest.importorskip("dp_accounting")
    spent = {}
    for name, mode in (("waiting", {}), ("asynchronous", {"buffer": 2})):
        directory = tmp_path / name
        rule = ("dp(fedavg, clip=1.0, noise=2.0)",)
        wanted = settings(directory, rounds=6, min_clients=3, aggregate=rule, **mode)
        ranks = [sleeping(rank, 0.0) for rank in (1, 2, 3)]
        rounds = stepped(1) if mode else None
        if mode:
            with monkeypatch.context() as patch, pytest.raises(Killed):
                killing(patch, "before the checkpoint", 3)
                Federation(directory, wanted, INITIAL, ranks, make_rounds=rounds).run()
        Federation(directory, wanted, INITIAL, ranks, make_rounds=rounds).run(resume=bool(mode))
        spent[name] = lines(directory)[-1]["privacy"]
    assert spent["waiting"]["steps"] == 6
    assert spent["asynchronous"] == spent["waiting"]
    assert spent["waiting"]["epsilon"] > 0


def test_the_noise_is_that_of_the_number_of_updates_in_the_merge(tmp_path: Path) -> None:
    """Standard deviation noise * clip / 2 around a state that nobody moves, the server's rate having halved it."""
    size = 20_000

    def still(task: Any) -> tuple[StateDict, int]:
        return dict(task.state_dict), 1

    wanted = settings(
        tmp_path, rounds=1, min_clients=3, buffer=2, server_lr=0.5, aggregate=("dp(fedavg, clip=1.0, noise=4.0)",)
    )
    pytest.importorskip("dp_accounting")
    ranks = [InsideRank(rank, still) for rank in (1, 2, 3)]
    Federation(tmp_path, wanted, {"w": torch.zeros(size, dtype=torch.float64)}, ranks, make_rounds=stepped(1)).run()
    assert float(final(tmp_path)["w"].std()) == pytest.approx(0.5 * 4.0 * 1.0 / 2, rel=0.05)


# -- extra tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_scaffolds_control_is_the_mean_of_all_ranks_own_however_late_they_are(
    tmp_path: Path, mode: dict[str, Any]
) -> None:
    """Each rank's change counts by the number of all ranks; by that of the free ones c would drift away."""
    workloads = {rank: Scaffold(WorkloadContext(rank=rank, num_partitions=3, seed=0)) for rank in (1, 2, 3)}
    own: dict[tuple[int, int], StateDict] = {}

    def make(rank: int) -> InsideRank:
        def train(task: Any) -> tuple[StateDict, int]:
            workload = workloads[rank]
            workload.model.load_state_dict(task.state_dict)
            result = workload.train(task)
            own[rank, task.server_round - 1] = dict(workload._own)
            task.sent = dict(result.extra)
            return {name: tensor.clone() for name, tensor in workload.model.state_dict().items()}, result.num_examples

        return InsideRank(rank, train)

    initial = {name: tensor.clone() for name, tensor in workloads[1].model.state_dict().items()}
    wanted = settings(tmp_path, rounds=8, min_clients=3, aggregate=("examples.algorithms.scaffold:merge",), **mode)
    federation = Federation(tmp_path, wanted, initial, [make(rank) for rank in (1, 2, 3)], make_rounds=stepped(3))
    federation.run()
    merged: dict[int, int] = {}
    stalest = 0
    for entry in read_journal(tmp_path / "server" / "journal.jsonl")[1:]:
        assert entry["num_ranks"] == 3
        for rank, update in entry["updates"].items():
            merged[int(rank)] = update["base_round"]
            stalest = max(stalest, entry["round"] - 1 - update["base_round"])
    assert stalest > 0
    state = decode(max((tmp_path / "server").glob("round-*/state.safetensors")).read_bytes())
    _, extra = separate(state)
    for name in workloads[1]._own:
        expected = sum(own[found][name] for found in merged.items()) / 3
        assert torch.allclose(extra[CONTROL + name], expected, atol=1e-5), name


def test_a_replay_counts_the_ranks_as_they_were_and_asks_all_that_were_asked(tmp_path: Path) -> None:
    """Also where a share of the free ranks was drawn, and where a rank came late."""
    ranks = [sleeping(1, 0.0), sleeping(2, 0.02), sleeping(3, 0.0)]
    ranks[2].is_lost = True
    wanted = settings(
        tmp_path / "run", rounds=30, min_clients=2, buffer=1, fraction_train=0.5, round_timeout=60.0,
        aggregate=("tests.test_asynchronous_beside:by_ranks",),
    )  # fmt: skip
    federation = Federation(tmp_path / "run", wanted, INITIAL, ranks)
    thread = started(federation)
    wait_for(lambda: len(lines(tmp_path / "run")) >= 1)
    ranks[2].is_lost = False
    assert federation.roster is not None
    federation.roster.arrive(ranks[2])
    end(thread)
    found = again(tmp_path / "run", wanted, tmp_path / "again", [sleeping(rank, 0.0) for rank in (1, 2, 3)])
    assert all(torch.equal(found[name], final(tmp_path / "run")[name]) for name in INITIAL)


def test_a_rank_that_comes_while_a_round_begins_counts_in_a_replay_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [sleeping(rank, 0.0) for rank in (1, 2, 3)]
    ranks[2].is_lost = True
    wanted = settings(
        tmp_path / "run", rounds=4, min_clients=2, buffer=1, aggregate=("tests.test_asynchronous_beside:by_ranks",)
    )
    federation = Federation(tmp_path / "run", wanted, INITIAL, ranks)
    choose = Strategy.configure_fit

    def late(self: Strategy, server_round: int, *offered: Any) -> Any:
        if server_round == 2:
            ranks[2].is_lost = False
            assert federation.roster is not None
            federation.roster.arrive(ranks[2])
        return choose(self, server_round, *offered)

    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "configure_fit", late)
        federation.run()
    journal = read_journal(tmp_path / "run" / "server" / "journal.jsonl")
    assert [entry["num_ranks"] for entry in journal[1:]] == [2, 3, 3, 3]
    assert "3" in journal[2]["asked"]
    found = again(tmp_path / "run", wanted, tmp_path / "again", [sleeping(rank, 0.0) for rank in (1, 2, 3)])
    assert all(torch.equal(found[name], final(tmp_path / "run")[name]) for name in INITIAL)


def by_ranks(updates: Any, context: Any) -> StateDict:
    """Let the number of all ranks into every bit."""
    return {"w": updates[0].state_dict["w"] / context.num_ranks, "n": context.previous["n"]}


@pytest.mark.parametrize("wanted", [set(), {2}, {2, 3}], ids=str)
def test_in_a_replay_nobody_is_asked_but_those_that_were_asked_then(wanted: set[int]) -> None:
    roster = InsideRoster("run", None)
    roster.at_work = _AllBut(wanted)
    for rank in (1, 2, 3):
        roster.arrive(sleeping(rank, 0.0))
    assert set(roster.all()) == {str(rank) for rank in wanted}


# -- ranks that come and go --------------------------------------------------------------------------------------------


def leaving(rank: InsideRank, how: str) -> None:
    """Let a rank be gone for good: its client, its trainer, or both in the middle of an evaluation."""
    asked = rank.ask

    def ask(record: Any, blob: Any, *, most_s: float) -> Reply:
        rank.is_lost = True
        if how == "trainer":
            return Reply(status="working", waiting_for="trainer")
        return asked(record, blob, most_s=most_s)

    def evaluate(task: Any) -> tuple[float, int, dict[str, float]]:
        rank.is_lost = True
        time.sleep(1000)
        raise AssertionError

    if how == "evaluation":
        rank.evaluate = evaluate
    else:
        rank.ask = ask  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["client", "trainer", "evaluation"])
@pytest.mark.parametrize("mode", [{"buffer": 3}, {"merge_after": 3}], ids=str)
def test_whoever_is_gone_for_good_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any], how: str
) -> None:
    ranks = [sleeping(rank, FAST_S) for rank in (1, 2, 3)]
    only_the_lost_is_gone(monkeypatch, ranks[2])
    leaving(ranks[2], how)
    evaluate_every = 1 if how == "evaluation" else 0
    wanted = settings(tmp_path, min_clients=3, evaluate_every=evaluate_every, **mode)
    thread = started(Federation(tmp_path, wanted, INITIAL, ranks))
    end(thread)
    assert [sorted(line["clients"])[:2] for line in lines(tmp_path)] == [["1", "2"]] * 4
    assert not any("3" in line["clients"] for line in lines(tmp_path)[1:])


def test_a_rank_that_fails_goes_on_though_all_others_are_gone() -> None:
    buffer = Buffer(size=2)
    gone, fails = (SimpleNamespace(rank=rank, base_round=0) for rank in (1, 2))
    buffer.begin(gone)
    buffer.begin(fails)
    buffer.end(fails, counts=False)
    assert not buffer.is_due(0, lambda work: False), "the other one is at work"
    assert buffer.is_due(0, lambda work: work is gone)


def test_with_no_staleness_allowed_only_what_is_fresh_is_merged_and_the_run_ends(tmp_path: Path) -> None:
    ranks = [sleeping(rank, FAST_S) for rank in (1, 2, 3)]
    wanted = settings(tmp_path, rounds=12, min_clients=3, buffer=1, max_staleness=0)
    Federation(tmp_path, wanted, INITIAL, ranks, make_rounds=stepped(5)).run()
    found = lines(tmp_path)
    assert [line["accepted"] for line in found] == [1] * 12
    assert all(row["staleness"] == 0 for line in found for row in line["clients"].values())
    assert sum(len(line["refused"]) for line in found) > 0


@pytest.mark.parametrize("mode", [{"buffer": 9}, {"merge_after": 9}], ids=str)
def test_a_buffer_larger_than_the_federation_is_one_of_all_ranks(tmp_path: Path, mode: dict[str, Any]) -> None:
    ranks = [sleeping(rank, FAST_S * rank) for rank in (1, 2, 3)]
    Federation(tmp_path, settings(tmp_path, min_clients=3, **mode), INITIAL, ranks).run()
    assert [line["accepted"] for line in lines(tmp_path)] == [3] * 4


def test_a_run_that_is_resumed_with_another_buffer_merges_what_was_under_way_once(tmp_path: Path) -> None:
    ranks = [sleeping(rank, 0.0) for rank in (1, 2, 3)]
    with pytest.raises(Killed):
        first = settings(tmp_path, rounds=9, min_clients=3, buffer=1)
        Federation(tmp_path, first, INITIAL, ranks, make_rounds=stepped(7, kill_at=3)).run()
    for number, mode in enumerate(({"buffer": 3}, {"merge_after": 2}, {"buffer": 2}), start=2):
        wanted = settings(tmp_path, rounds=3 * number, min_clients=3, **mode)
        Federation(tmp_path, wanted, INITIAL, ranks, make_rounds=stepped(number)).run(resume=True)
    entries = read_journal(tmp_path / "server" / "journal.jsonl")
    assert [entry["round"] for entry in entries] == list(range(13))
    merged = [(rank, update["base_round"]) for entry in entries[1:] for rank, update in entry["updates"].items()]
    assert len(merged) == len(set(merged))


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"buffer": 2}, {"merge_after": 2}], ids=str)
def test_a_model_that_is_cut_and_a_flower_strategy_are_refused_with_the_reason(
    tmp_path: Path, mode: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="trained step by step with the ranks, so there is no update of a single rank"):
        Uppers(settings(tmp_path, **mode), "sfl-v1", tmp_path)
    with pytest.raises(UsageError, match="a Flower strategy chooses its clients for a round"):
        settings(tmp_path, strategy="FedAvg", **mode)


# -- journals that somebody has changed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda line: "5", "line 3 cannot be read"),
        (lambda line: line[:20], "line 3 cannot be read"),
        (lambda line: line.replace('"asked"', '"asks"'), "does not have every merge"),
        (lambda line: line.replace('"round": 2', '"round": 3'), "does not have every merge"),
        (lambda line: line.replace('"base_round"', '"base"'), "line 3 cannot be read"),
        (lambda line: line.replace('"updates": {"', '"updates": {"x'), "line 3 cannot be read"),
        (lambda line: "[" * 100_000, "line 3 cannot be read"),
    ],
)
def test_a_journal_that_was_changed_is_no_track(tmp_path: Path, change: Callable[[str], str], says: str) -> None:
    a_run(tmp_path, buffer=1)
    journal = tmp_path / "server" / "journal.jsonl"
    changed(journal, 2, change)
    with pytest.raises(CheckpointError, match=says):
        read_track(journal)


def test_a_journal_with_another_base_leaves_the_track_and_does_not_wait_for_ever(tmp_path: Path) -> None:
    wanted = a_run(tmp_path / "run", buffer=1)

    def other_base(line: str) -> str:
        entry = json.loads(line)
        for update in entry["updates"].values():
            update["base_round"] += 1
        return json.dumps(entry)

    changed(tmp_path / "run" / "server" / "journal.jsonl", 1, other_base)
    with pytest.raises(
        RunFailedError, match=r"at round 1 of 5: rank \d was not asked to train from the state of round 1"
    ):
        again(tmp_path / "run", wanted, tmp_path / "again", [sleeping(rank, 0.0) for rank in (1, 2, 3)])


def test_a_server_that_resumes_keeps_a_changed_journal_beside_the_new_one(tmp_path: Path) -> None:
    wanted = a_run(tmp_path, buffer=1)
    journal = tmp_path / "server" / "journal.jsonl"
    changed(journal, 2, lambda line: "[]")
    before = journal.read_bytes()
    with Run(tmp_path, resume=True, settings=wanted.to_run_config()) as run:
        assert [entry["round"] for entry in run.journal.entries] == [0, 1]
    assert [path.read_bytes() for path in journal.parent.glob("*unreadable*")] == [before]


def changed(path: Path, number: int, change: Callable[[str], str]) -> None:
    """Change a line of a file, counted from 0."""
    found = path.read_text().splitlines()
    found[number] = change(found[number])
    path.write_text("".join(line + "\n" for line in found))
