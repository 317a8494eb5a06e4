"""Every second of a round belongs to exactly one stage."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedsplit.run.time_account import STAGES, account, update_bytes

SERVER = {"wait for clients": 0.25, "train": 4.0, "merge": 0.5, "wait for the last checkpoint": 0.25, "evaluate": 1.0}
SLOW = {"waiting": 0.0, "training": 3.0, "hand-off": 0.25, "transfer": 0.25, "turn": 0.0, "merging": 0.125}
# It has the last turn, and was done with its own work long before.
FAST = {"waiting": 0.0, "training": 1.0, "hand-off": 0.125, "transfer": 0.125, "turn": 2.5, "merging": 0.25}


def line(ranks: list[dict[str, float]], server: dict[str, float] = SERVER) -> dict[str, Any]:
    clients = {str(rank): {"stages": stages, "bytes": 10} for rank, stages in enumerate(ranks, start=1)}
    return {"round": 1, "seconds": sum(server.values()), "stages": server, "clients": clients}


def test_the_slowest_rank_is_the_one_longest_at_work_not_the_last_to_be_merged() -> None:
    assert account(line([SLOW, FAST])) == {
        "training": 3.0,
        "hand-off": 0.25,
        # Its own, and the other's, which came after it.
        "transfer": 0.25 + 0.125,
        "merging": 0.125 + 0.25 + SERVER["merge"],
        "evaluation": 1.0,
        "waiting": SERVER["wait for clients"] + SERVER["wait for the last checkpoint"],
    }


def test_checking_an_update_is_part_of_merging_it() -> None:
    assert account(line([{"training": 3.0, "checking": 0.5, "merging": 0.5}]))["merging"] == 1.0 + SERVER["merge"]


def test_training_that_was_asked_for_along_with_an_evaluation_is_training() -> None:
    found = account(line([{"training": 0.0}], {"train": 0.0, "train ahead": 3.0, "evaluate": 1.0}))
    assert (found["training"], found["evaluation"], found["waiting"]) == (3.0, 1.0, 0.0)


def test_a_rank_that_waited_for_its_client_makes_the_round_wait() -> None:
    assert account(line([{"waiting": 3.5, "training": 0.5}]))["waiting"] == 4.0


def test_the_time_of_ranks_that_were_not_counted_is_waiting() -> None:
    assert account(line([])) == dict.fromkeys(STAGES, 0.0) | {"merging": 0.5, "evaluation": 1.0, "waiting": 4.5}


def test_the_bytes_are_those_of_all_updates() -> None:
    assert update_bytes(line([SLOW, FAST])) == 20


seconds = st.floats(0, 100)
names = st.sampled_from(["waiting", "training", "hand-off", "transfer", "checking", "turn", "merging"])


@given(
    ranks=st.lists(st.dictionaries(names, seconds), max_size=4),
    server=st.fixed_dictionaries(dict.fromkeys(SERVER, seconds)),
)
def test_whatever_was_measured_the_stages_add_up_to_the_round(
    ranks: list[dict[str, float]], server: dict[str, float]
) -> None:
    divided = account(line(ranks, server))
    assert list(divided) == list(STAGES)
    assert all(value >= 0 for value in divided.values())
    assert abs(sum(divided.values()) - sum(server.values())) < 1e-6
