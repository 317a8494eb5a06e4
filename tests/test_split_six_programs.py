"""A model that is cut, in six processes: the whole model's result, whoever is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.states.state_dict import map_file
from fedsplit.workloads import WorkloadContext, create_workload
from tests.bounds import BOUND_S
from tests.chaos import disturb
from tests.halves import whole
from tests.programs import Programs, programs
from tests.reference import federated_averaging
from tests.six_programs import SixPrograms

pytestmark = pytest.mark.slow


def workload(rank: int) -> object:
    return create_workload("digits", WorkloadContext(rank=rank, num_partitions=2, options={"epochs": "1"}))


def test_sfl_v1_is_the_ordinary_federated_average_whoever_is_killed(tmp_path: Path) -> None:
    """The server, both clients, both trainers of the ranks and that of the upper part, each in a round."""
    rounds, victims = 8, ["upper", "model-1", "client-2", "server", "model-2", "client-1"]
    with programs(tmp_path, SixPrograms, server_flags=("--rounds", str(rounds))) as federation:
        federation.start_all(["upper", "model-2", "client-1", "server", "client-2", "model-1"])
        for done, victim in enumerate(victims, start=1):
            federation.wait_until(lambda done=done: len(federation.history()) >= done)  # type: ignore[misc]
            federation.kill(victim)
            federation.start(victim, *(["--resume"] if victim == "server" else []))
        codes = federation.wait()
        assert codes == dict.fromkeys(codes, 0), f"{codes}\n{federation.tails()}"
        assert federation.history()[-1]["evaluate"]["accuracy"] > 0.9  # type: ignore[index]
        check(federation, rounds)


def test_killed_and_stopped_at_random_it_is_that_too(tmp_path: Path) -> None:
    rounds = 20
    with programs(tmp_path, SixPrograms, server_flags=("--rounds", str(rounds))) as federation:
        disturb(federation, faults=8, seed=3, timeout_s=BOUND_S)
        check(federation, rounds)


def check(federation: Programs, rounds: int) -> None:
    """Compare with plain loops over the whole model."""
    assert [line["round"] for line in federation.history()] == list(range(1, rounds + 1))
    found = whole(map_file(federation.final_state()))
    torch.set_num_threads(1)
    expected = federated_averaging(workload, ranks=2, rounds=rounds)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert set(found) == set(expected) and not different, different


@pytest.mark.parametrize("mode", ["sfl-v2", "sequential"])
def test_the_other_modes_learn_the_digits(mode: str, tmp_path: Path) -> None:
    with programs(tmp_path, SixPrograms, mode=mode, server_flags=("--rounds", "4")) as federation:
        federation.start_all()
        codes = federation.wait()
        assert codes == dict.fromkeys(codes, 0), f"{codes}\n{federation.tails()}"
        assert federation.history()[-1]["evaluate"]["accuracy"] > 0.9  # type: ignore[index]
