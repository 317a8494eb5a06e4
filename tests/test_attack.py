"""One of five clients sends its update times -100: what each rule makes of it, on the digits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsplit.run.history import weighted_mean
from fedsplit.server.strategy import Strategy, read_update
from fedsplit.states.state_dict import StateDict, decode, encode
from fedsplit.workloads import WorkloadContext, create_workload

RANKS = 5
# Krum follows one client at a time, each with a fifth of the data: it takes longer to get there.
ROUNDS = 10
ATTACKER = 3
ROBUST = ["median", "trimmed-mean(fraction=0.2)", "krum(byzantine=1)", "multi-krum(byzantine=1)", "geometric-median"]


def accuracy(rule: str, *, attacked: bool) -> float:
    """Federate the digits in one process under a rule; returns the accuracy over the whole held-out split."""
    torch.set_num_threads(1)
    workloads = {
        rank: create_workload("digits", WorkloadContext(rank=rank, num_partitions=RANKS, seed=0))
        for rank in range(1, RANKS + 1)
    }
    strategy = Strategy(rule, min_clients=RANKS, rounds=ROUNDS)
    state = payload({name: tensor.clone() for name, tensor in workloads[1].model.state_dict().items()})
    for server_round in range(1, ROUNDS + 1):
        reference = decode(state)
        strategy.begin_run(reference, {})
        merge = strategy.start_fit(server_round)
        for rank, workload in workloads.items():
            update, num_examples = train(workload, state, server_round)
            if attacked and rank == ATTACKER:
                start = decode(state)
                update = {name: start[name] - 100 * (update[name] - start[name]) for name in update}
            read = read_update(rank, payload(update), num_examples, {}, reference)
            if isinstance(read, str):
                assert rule == "fedavg" and "NaN" in read, read
            else:
                merge.add(read)
        merged, _ = strategy.end_fit(server_round, merge, [])
        if merged is not None:
            state = payload(merged)
    return evaluate(workloads, state)


def train(workload: Any, state: bytes, server_round: int) -> tuple[StateDict, int]:
    workload.model.load_state_dict(decode(state))
    task = SimpleNamespace(kind="train", server_round=server_round, config={}, should_stop=lambda: False)
    result = workload.train(task)
    return {name: tensor.clone() for name, tensor in workload.model.state_dict().items()}, result.num_examples


def evaluate(workloads: dict[int, Any], state: bytes) -> float:
    rows = []
    for workload in workloads.values():
        workload.model.load_state_dict(decode(state))
        result = workload.evaluate(SimpleNamespace(kind="evaluate", config={}, should_stop=lambda: False))
        rows.append((result.num_examples, result.metrics))
    return weighted_mean(rows)["accuracy"]


def payload(state: StateDict) -> bytes:
    return b"".join(encode(state))


@pytest.fixture(scope="module")
def clean() -> float:
    return accuracy("fedavg", attacked=False)


def test_the_clean_run_learns(clean: float) -> None:
    assert clean > 0.93


@pytest.mark.slow
def test_one_attacker_ruins_the_mean(clean: float) -> None:
    assert accuracy("fedavg", attacked=True) < clean - 0.3


@pytest.mark.parametrize("rule", [ROBUST[0], *(pytest.param(rule, marks=pytest.mark.slow) for rule in ROBUST[1:])])
def test_a_robust_rule_stays_within_two_points_of_the_clean_run(rule: str, clean: float) -> None:
    assert accuracy(rule, attacked=True) > clean - 0.02
