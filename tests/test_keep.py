"""What of a script outlives its process: optimizers, schedulers, scalers, averages, generators, and plain data."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fedsplit
from fedsplit import Trainer
from fedsplit.errors import UsageError
from fedsplit.states.state_dict import StateDict, own_state
from tests.test_trainer import Federation


class Script:
    """A training script with all that real ones have: one that is started again must go on as if it never ended."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.1, total_steps=50)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.draws, self.order = np.random.default_rng(3), torch.Generator().manual_seed(4)
        random.seed(1)
        np.random.seed(2)
        self.kept = fedsplit.keep(
            optimizer=self.optimizer, scheduler=self.scheduler, scaler=self.scaler, ema=self.ema, draws=self.draws,
            order=self.order,
        )  # fmt: skip

    def draw(self) -> torch.Tensor:
        """Draw from every generator that there is."""
        x = torch.randn(8, 3, generator=self.order) + torch.randn(8, 3)
        return x + self.draws.normal() + random.random() + np.random.rand()

    def serve(self, trainer: Trainer) -> None:
        for task in trainer:
            task.load_into(self.model)
            self.kept.restore(task)
            if task.kind == "evaluate":
                task.reply(loss=float(self.draw().sum()), num_examples=8)
                continue
            self.model.train()
            for _ in range(2):
                x = self.draw()
                self.optimizer.zero_grad()
                self.scaler.scale(self.model(x).square().mean()).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.scheduler.step()
                self.ema.update_parameters(self.model)
            task.reply(self.model, num_examples=8, local_state=self.kept)


def rounds(federation: Federation, numbers: range, state: StateDict, *, evaluations: int = 0) -> StateDict:
    script = Script()
    with federation.script(script.serve, script.model):
        for number in numbers:
            state = federation.run("train", number, state)
            for _ in range(evaluations):
                federation.run("evaluate", number, state)
    return state


def test_a_script_that_is_started_again_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    start = {name: tensor.clone() for name, tensor in own_state(Script().model).items()}
    expected = rounds(Federation(tmp_path / "undisturbed"), range(1, 7), start)
    federation, state = Federation(tmp_path / "started again"), start
    for first in (1, 3, 5):
        state = rounds(federation, range(first, first + 2), state)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_an_evaluation_that_draws_random_numbers_changes_no_training(tmp_path: Path) -> None:
    """It is not repeated when a trainer is started again: that must come to the same bits."""
    start = {name: tensor.clone() for name, tensor in own_state(Script().model).items()}
    expected = rounds(Federation(tmp_path / "without"), range(1, 4), start)
    found = rounds(Federation(tmp_path / "with"), range(1, 4), start, evaluations=2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_script_that_is_started_again_evaluates_with_what_it_kept(tmp_path: Path) -> None:
    federation, losses = Federation(tmp_path), []

    def serve(trainer: Trainer) -> None:
        personal = nn.Linear(1, 1)
        nn.init.zeros_(personal.weight)
        kept = fedsplit.keep(personal=personal)
        for task in trainer:
            kept.restore(task)
            if task.kind == "train":
                nn.init.ones_(personal.weight)
                task.reply(dict(task.state_dict), num_examples=1, local_state=kept)
            else:
                losses.append(personal.weight.item())
                task.reply(loss=0.0, num_examples=1)

    for kind in ("train", "evaluate"):
        with federation.script(serve):
            federation.run(kind, 1, {"a": torch.ones(1)})
    assert losses == [1.0]


def test_training_draws_new_numbers_each_round(tmp_path: Path) -> None:
    draws, kept, federation = [], fedsplit.keep(), Federation(tmp_path)

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            kept.restore(task)
            draws.append(random.random())
            if task.kind == "train":
                task.reply(dict(task.state_dict), num_examples=1, local_state=kept)
            else:
                task.reply(loss=0.0, num_examples=1)

    with federation.script(serve):
        for kind, number in (("evaluate", 0), ("train", 1), ("evaluate", 1), ("train", 2)):
            federation.run(kind, number, {"a": torch.ones(1)})
    before, first, after, second = draws
    assert before == first and after == second and first != second


def test_when_a_run_begins_again_the_objects_are_what_they_were_at_first() -> None:
    script = Script()
    before = script.kept.state()
    first = script.draws.normal()
    script.scheduler.last_epoch = 9
    script.kept.restore(SimpleNamespace(kind="train", restore=True, local_state=None))  # type: ignore[arg-type]
    assert script.scheduler.last_epoch == before["objects"]["scheduler"]["last_epoch"]
    assert script.draws.normal() == first


@pytest.mark.parametrize("wrong", [3, {"a": 1}, nn.functional.relu])
def test_what_has_no_state_is_refused_by_its_name(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"keep\(thing=…\): a \w+ has no state_dict"):
        fedsplit.keep(thing=wrong)


def test_a_checkpoint_with_other_objects_is_refused() -> None:
    other = fedsplit.keep(scaler=Script().scaler).state()
    task: Any = SimpleNamespace(kind="train", restore=True, local_state=other)
    with pytest.raises(UsageError, match="do not both have draws, ema, optimizer, order, scheduler"):
        Script().kept.restore(task)


def test_an_answer_without_what_was_kept_is_told_of_and_one_that_failed_is_not() -> None:
    model = nn.Linear(1, 1)
    kept = fedsplit.keep(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with Trainer(rank=1, model=model, standalone=True, standalone_rounds=4) as trainer:
        for task in trainer:
            if task.kind == "evaluate":
                task.reply(loss=0.0, num_examples=1)
            elif task.server_round == 1:
                kept.restore(task)
                task.fail(ValueError("of the script's own"))
            elif task.server_round < 4:
                kept.restore(task)
                task.reply(model, num_examples=1, local_state=kept if task.server_round == 2 else None)
            else:
                with pytest.raises(UsageError, match="round 3 was answered without what keep"):
                    kept.restore(task)
                task.reply(model, num_examples=1)


def test_a_local_state_that_was_made_by_hand_is_refused() -> None:
    task: Any = SimpleNamespace(kind="train", restore=True, local_state={"optimizer": {}})
    with pytest.raises(UsageError, match="a local_state that keep"):
        Script().kept.restore(task)


def test_what_real_scripts_keep_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    draws, order = np.random.Generator(np.random.MT19937(3)), torch.Generator().manual_seed(4)
    kept = {
        "arguments": argparse.Namespace(lr=0.1, name="x", layers=[1, 2]), "array": np.arange(6.0).reshape(2, 3),
        "number": np.float32(0.5), "draws": draws, "order": order, "random": random.getstate(),
        "nested": {"a": [(np.int64(3), None)], 5: True}, "milestones": Counter({3: 1, 5: 2}),
    }  # fmt: skip
    federation, state, seen = Federation(tmp_path), {"a": torch.ones(1)}, []

    def serve(trainer: Trainer) -> None:
        for task in trainer:
            seen.append(task.local_state)
            task.reply(dict(task.state_dict), num_examples=1, local_state=kept)

    for number in (1, 2):
        with federation.script(serve):
            federation.wait(federation.ask("train", number, state))
    found = seen[1]
    assert found["arguments"] == {"lr": 0.1, "name": "x", "layers": [1, 2]}
    assert np.array_equal(found["array"], kept["array"]) and found["array"].dtype == np.float64
    assert found["number"] == 0.5 and found["nested"] == {"a": [(3, None)], 5: True}
    assert found["random"] == kept["random"]
    assert list(found["milestones"].elements()) == [3, 5, 5]
    assert found["draws"].normal() == draws.normal()
    assert torch.equal(torch.rand(3, generator=found["order"]), torch.rand(3, generator=order))
