"""An answer that does not count: its client and its trainer are told why, and a run of nothing else is a failed one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit import EvaluateResult, TrainResult, WorkloadContext
from tests.programs import programs
from tests.test_five_programs import link_tests

WHY = "NaN or Inf in 'weight'"


class Diverging:
    """Its weight becomes NaN when the model is trained; it counts how often it was told so."""

    def __init__(self, *, diverges: bool) -> None:
        self.model = nn.Linear(2, 1)
        self._diverges = diverges
        self._told: list[str] = []

    def train(self, task: Any) -> TrainResult:
        self._hear(task)
        with torch.no_grad():
            self.model.weight.fill_(math.nan if self._diverges else 1.0)
        return TrainResult(1)

    def evaluate(self, task: Any) -> EvaluateResult:
        self._hear(task)
        return EvaluateResult(0.0, 1, {"told": len(self._told)})

    def _hear(self, task: Any) -> None:
        if task.refused is not None:
            assert task.refused == WHY
            self._told.append(task.refused)


def on_rank_2(context: WorkloadContext) -> Diverging:
    return Diverging(diverges=context.rank == 2)


def on_every_rank(context: WorkloadContext) -> Diverging:
    return Diverging(diverges=True)


@pytest.mark.slow
def test_a_trainer_is_told_why_its_answer_did_not_count(tmp_path: Path) -> None:
    with run(tmp_path, "on_rank_2") as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        rows = [line["clients"] for line in federation.history()]
        assert [line["merged"] for line in federation.history()] == [True, True]
        said = f"rank 2: the server did not count its last answer: {WHY}"
        assert said in federation.log("model-2") and said in federation.log("client-2"), federation.tails()
        assert "did not count" not in federation.log("model-1") + federation.log("client-1")
    # Told once for each answer, with the task that follows it.
    assert [row["2"]["evaluate"]["told"] for row in rows] == [1, 2]  # type: ignore[index]
    assert [row["1"]["evaluate"]["told"] for row in rows] == [0, 0]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--strategy", "FedAvg")])
def test_a_run_in_which_nothing_was_merged_is_a_failed_one(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with run(tmp_path, "on_every_rank", *flags) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {15}, federation.tails()
        assert "nothing was merged in any of 2 rounds" in federation.log("server")
        assert f"rank 1: {WHY}; rank 2: {WHY}" in federation.log("server")
        for name in federation.names[1:]:
            assert "nothing was merged in any of 2 rounds" in federation.log(name), federation.tails()
        assert [line["merged"] for line in federation.history()] == [False, False]
        # To look at it again changes nothing.
        for name in ("server", "client-1", "client-2"):
            federation.start(name, *(["--resume"] if name == "server" else []))
        assert federation.wait(names=["server"]) == {"server": 15}, federation.tails()


@pytest.mark.slow
def test_a_local_pattern_that_no_trainer_has_entries_for_ends_the_run_before_the_first_round(tmp_path: Path) -> None:
    with run(tmp_path, "on_rank_2", "--aggregate", "haed.*=local", "--aggregate", "fedavg") as federation:
        federation.start_all()
        assert federation.wait(names=["server"]) == {"server": 2}, federation.tails()
        assert "no entry matches the local patterns 'haed.*'; there are 'weight', 'bias'" in federation.log("server")
        assert not federation.history()


def run(directory: Path, factory: str, *server_flags: str) -> Any:
    link_tests(directory)
    flags = ("--threads", "1", "--workload", f"tests.test_refused:{factory}")
    return programs(directory, model_flags=flags, server_flags=("--rounds", "2", *server_flags))
