"""``Trainer(standalone=True)``: the loop of a federation without one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit import Trainer
from fedsplit.errors import UsageError

EVERY_ROUND = [("train", 1), ("evaluate", 1), ("train", 2), ("evaluate", 2)]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def serve(trainer: Trainer, seen: list[Any]) -> None:
    for task in trainer:
        state = task.state_dict
        seen.append((task.kind, task.server_round, float(state["a"]), task.local_state, task.should_stop()))
        if task.kind == "evaluate":
            task.reply(loss=0.5, num_examples=2)
        else:
            task.reply({"a": state["a"] + 1}, num_examples=3, local_state={"round": task.server_round})


def test_each_task_starts_from_what_the_last_reply_gave(tmp_path: Path) -> None:
    seen: list[Any] = []
    with Trainer(1, {"a": torch.tensor(5.0)}, standalone=True, standalone_rounds=2) as trainer:
        serve(trainer, seen)
    assert [(kind, number) for kind, number, *_ in seen] == EVERY_ROUND
    assert [value for _, _, value, *_ in seen] == [5, 6, 6, 7]
    assert [kept and kept["round"] for *_, kept, _ in seen] == [None, 1, 1, 2]
    assert trainer.outcome is not None and trainer.outcome.outcome == "complete"
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_without_a_model_initializes_in_its_loop() -> None:
    kinds = []
    with Trainer(1, standalone=True, standalone_rounds=1) as trainer:
        for task in trainer:
            kinds.append(task.kind)
            if task.kind == "evaluate":
                task.reply(loss=0.0, num_examples=1)
            else:
                task.reply({"a": torch.ones(1)}, num_examples=1)
    assert kinds == ["initialize", "train", "evaluate"]


def test_writing_to_the_state_changes_nothing_but_the_reply_does() -> None:
    with Trainer(1, {"a": torch.zeros(1)}, standalone=True, standalone_rounds=1) as trainer:
        for task in trainer:
            if task.kind == "train":
                kept = {"a": torch.ones(1)}
                task.reply(kept, num_examples=1)
                kept["a"].zero_()
            else:
                assert task.state_dict["a"].item() == 1
                task.reply(loss=0.0, num_examples=1)


def test_an_exception_is_raised_where_it_happened_and_mistakes_are_those_of_a_federation(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError, match="mine"),
        Trainer(1, {"a": torch.zeros(1)}, standalone=True) as trainer,
    ):
        for _ in trainer:
            raise ZeroDivisionError("mine")
    with pytest.raises(UsageError, match=r"without task\.reply"), Trainer(1, {}, standalone=True) as trainer:
        for _ in trainer:
            pass
    with pytest.raises(UsageError, match="positive integer"):
        Trainer(0, standalone=True)
    assert list(tmp_path.iterdir()) == []


def test_the_log_shows_what_a_server_would_have_received(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "fedsplit"),
        Trainer(1, {"a": torch.zeros(1)}, standalone=True, standalone_rounds=1) as trainer,
    ):
        serve(trainer, [])
    assert [record.message for record in caplog.records] == [
        "standalone: train of round 1/1, 3 examples",
        "standalone: evaluate of round 1/1, 2 examples, loss 0.5",
    ]
