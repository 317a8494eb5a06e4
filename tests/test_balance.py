"""Balanced work: from a rank's measured speed to the share of its work, and the trainers that do that share."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.inside import Federation, InsideRank
from fedsplit.exchange.work import steps_to_do, work_share
from fedsplit.server.balance import Balance
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import StateDict
from fedsplit.workloads import WorkloadContext, create_workload
from tests.test_asynchronous import INITIAL, lines, step


def test_the_fastest_does_all_and_every_other_what_it_does_in_that_time() -> None:
    balance = Balance()
    assert balance.share(1) == 0.25, "not measured yet"
    balance.note(1, {"seconds": 1.0, "work_share": 0.5})  # all of it: 2 s
    balance.note(2, {"seconds": 5.0, "work_share": 0.25})  # all of it: 20 s
    balance.note(3, {"seconds": 1000.0, "work_share": 1.0})
    assert [balance.share(rank) for rank in (1, 2, 3, 4)] == [1.0, 0.1, 0.02, 0.25]


def test_a_resumed_run_knows_the_speeds_and_a_line_without_shares_says_nothing() -> None:
    row = {"seconds": 2.0, "work_share": 1.0}
    balance = Balance([{"clients": {"1": row, "2": row | {"seconds": 4.0}, "3": {"seconds": 1.0}}}])
    assert [balance.share(rank) for rank in (1, 2, 3)] == [1.0, 0.5, 0.25]


def test_a_share_is_at_least_one_step_and_without_one_there_is_all_to_do() -> None:
    assert [steps_to_do({"work_share": share}, 30) for share in (1.0, 0.5, 0.34, 0.001)] == [30, 15, 11, 1]
    assert [work_share(config) for config in ({}, {"work_share": "x"}, {"work_share": 0})] == [1.0, 1.0, 1.0]


def test_the_digits_train_the_share_of_their_batches() -> None:
    seen: list[int] = []
    workload: Any = create_workload("digits", WorkloadContext(rank=1, num_partitions=8))
    workload.on_batch = lambda done, total, loss, epochs: seen.append(total)
    task = SimpleNamespace(kind="train", server_round=1, total_rounds=1, config={}, should_stop=lambda: False)
    everything = workload.train(task).num_examples
    all_of_it = len(seen)
    seen.clear()
    task.config = {"work_share": 0.1}
    result = workload.train(task)
    assert len(seen) == -(-all_of_it // 10) == seen[0]
    assert result.num_examples < everything, "what was not trained on is not claimed"


@pytest.mark.parametrize("mode", [{}, {"merge_after": 2}])
def test_ranks_of_other_speeds_are_done_at_the_same_time(tmp_path: Path, mode: dict[str, Any]) -> None:
    def working(rank: int, seconds: float) -> InsideRank:
        def train(task: Any) -> tuple[StateDict, int]:
            # By a clock of its own: how long it really takes depends on the machine.
            task.seconds = seconds * task.config["work_share"]
            return step(rank)(task)

        return InsideRank(rank, train)

    wanted = ServerSettings(rounds=4, min_clients=2, evaluate_every=0, balance=True, checkpoint_dir=tmp_path, **mode)
    Federation(tmp_path, wanted, INITIAL, [working(1, 0.2), working(2, 2.0)]).run()
    rows = lines(tmp_path)[-1]["clients"]
    assert rows["1"]["work_share"] == 1.0
    assert rows["2"]["work_share"] == pytest.approx(0.1, rel=0.5)
    if mode:
        asked = [
            json.loads(line)["asked"] for line in (tmp_path / "server" / "journal.jsonl").read_text().splitlines()[1:]
        ]
        assert asked[0]["1"]["config"] == {"work_share": 0.25}, "a replay asks for the same"


class Told:
    """A task for `federate`, without a server."""

    kind, server_round, total_rounds, restore = "train", 1, 1, False
    local_state = None

    def __init__(self, share: float) -> None:
        self.config = {"work_share": share}
        self.said: dict[str, Any] = {}

    def load_into(self, model: Any) -> None:
        pass

    def should_stop(self) -> bool:
        return False

    def reply(self, model: Any, **said: Any) -> None:
        self.said = said


@pytest.mark.slow
def test_lightning_trains_the_share_of_each_epoch_and_one_batch_at_least() -> None:
    pytest.importorskip("lightning")
    from tests.test_integrations_lightning import Line, data, federate, lightning_trainer

    module, tasks = Line(), [Told(0.5), Told(0.01), Told(1.0)]
    trainer: Any = tasks
    federate(trainer, module, lightning_trainer(max_epochs=1), train_dataloaders=data(48), val_dataloaders=data())
    # Of six batches three, one and six.
    assert [task.said["num_examples"] for task in tasks] == [24, 8, 48]


@pytest.mark.slow
def test_transformers_train_the_share_of_their_epochs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.test_integrations_transformers import federate, make_model, make_trainer

    trainer: Any = make_trainer(make_model(), 1, 2, str(tmp_path))
    trainer.args.max_steps = 4
    steps: list[int] = []
    train = trainer.train

    def counting(*given: Any, **named: Any) -> Any:
        outcome = train(*given, **named)
        steps.append(outcome.global_step)
        return outcome

    trainer.train = counting
    tasks: Any = [Told(1.0), Told(0.5)]
    federate(tasks, trainer)
    assert steps == [4, 2]
