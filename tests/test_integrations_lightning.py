"""Lightning: every round trains, what fit() makes anew goes on, and a restarted process ends at the same bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fedsplit.errors import TrainingError
from fedsplit.states.state_dict import StateDict, own_state
from tests.test_trainer import bits
from tests.training import Client as Federation

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed: pip install fedsplit[lightning]", allow_module_level=True)

import lightning as L
from lightning.pytorch.callbacks import Callback

from fedsplit.integrations.lightning import federate


class Line(L.LightningModule):
    """Momentum, a schedule and a shuffled data set: everything that a restart may lose."""

    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.automatic_optimization = automatic
        self.steps_seen: list[tuple[int, float]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = (self.layer(batch[0]).squeeze(1) - batch[1]).square().mean()
        self.steps_seen.append((self.global_step, self.optimizers().param_groups[0]["lr"]))  # type: ignore[union-attr]
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            optimizer.step()  # type: ignore[union-attr]
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", (self.layer(batch[0]).squeeze(1) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)]


def data(size: int = 24) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(dim=1)), batch_size=8, shuffle=True)


def lightning_trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, accelerator="cpu", **options,
    )  # fmt: skip


def script(module: L.LightningModule, trainer: L.Trainer, **options: Any) -> Callable[[Any], None]:
    # As a script does at its start; here the process does not really start anew.
    torch.manual_seed(5)
    return lambda ours: federate(
        ours, module, trainer, **{"train_dataloaders": data(), "val_dataloaders": data(), **options}
    )


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def rounds(federation: Federation, state: StateDict, *numbers: int) -> StateDict:
    for server_round in numbers:
        state = federation.run("train", server_round, state)
    return state


@pytest.mark.slow
def test_every_round_trains_though_max_epochs_was_reached_in_the_first(federation: Federation) -> None:
    module, trainer = Line(), lightning_trainer(max_epochs=1)
    with federation.script(script(module, trainer), module):
        state = federation.run("initialize", 0)
        result = federation.wait(federation.ask("train", 1, state))
        assert result.num_examples == 24 and "train_loss" in result.metrics
        rounds(federation, federation.state_of(result), 2, 3)
    assert [step for step, _ in module.steps_seen] == list(range(9))


@pytest.mark.slow
def test_the_schedule_goes_on_over_rounds(federation: Federation) -> None:
    module = Line()
    with federation.script(script(module, lightning_trainer(max_epochs=1)), module):
        rounds(federation, own_state(Line()), 1, 2, 3)
    assert [rate for _, rate in module.steps_seen[::3]] == pytest.approx([0.05, 0.05 * 0.8, 0.05 * 0.64])


@pytest.mark.slow
def test_rounds_of_one_epoch_with_momentum_are_one_fit_of_as_many_epochs(federation: Federation) -> None:
    module, single, state = Line(), Line(), own_state(Line())
    with federation.script(script(module, lightning_trainer(max_epochs=1)), module):
        found = rounds(federation, state, 1, 2, 3)
    torch.manual_seed(5)
    lightning_trainer(max_epochs=3).fit(single, data(), data())
    for name, tensor in own_state(single).items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name


@pytest.mark.slow
def test_validation_speaks_for_its_examples_and_changes_nothing(federation: Federation) -> None:
    module = Line()
    with federation.script(script(module, lightning_trainer(max_epochs=1)), module):
        state = rounds(federation, own_state(Line()), 1)
        result = federation.wait(federation.ask("evaluate", 1, state))
        assert result.num_examples == 24 and result.loss is not None
        assert bits(own_state(module)) == bits(state)
        rounds(federation, state, 2)
    assert [step for step, _ in module.steps_seen] == list(range(6))


@pytest.mark.slow
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual optimization"])
def test_a_restarted_process_goes_on_to_the_same_bits(tmp_path: Path, automatic: bool) -> None:
    states = []
    for restarts in (False, True):
        federation = Federation(tmp_path / str(restarts))
        state = own_state(Line())
        module = Line(automatic)
        for part in ((1, 2), (3, 4)) if restarts else ((1, 2, 3, 4),):
            with federation.script(script(module, lightning_trainer(max_epochs=1)), module):
                state = rounds(federation, state, *part)
            module = Line(automatic)
        states.append(bits(state))
    assert states[0] == states[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "size"), [({"max_steps": 3}, 24), ({"limit_train_batches": 0}, 24), ({}, 0)],
    ids=["max_steps is reached", "no batches", "no data"],
)  # fmt: skip
def test_a_round_without_a_step_is_an_error_on_both_sides(
    federation: Federation, options: dict[str, Any], size: int
) -> None:
    module = Line()
    loader = DataLoader(TensorDataset(torch.empty(0, 3), torch.empty(0))) if size == 0 else data(size)
    serve = script(module, lightning_trainer(max_epochs=1, **options), train_dataloaders=loader)
    with federation.script(serve, module, fails=TrainingError):
        state = own_state(Line())
        if "max_steps" in options:
            state = rounds(federation, state, 1)
        result = federation.wait(federation.ask("train", 2, state))
    assert result.error["type"] == "TrainingError" and "not a single step" in result.error["message"]


@pytest.mark.slow
def test_a_loss_under_another_name_is_asked_for(federation: Federation) -> None:
    module = Line()
    with federation.script(script(module, lightning_trainer(), loss="test_loss"), module, fails=TrainingError):
        result = federation.wait(federation.ask("evaluate", 1, own_state(Line())))
    assert "logged no 'test_loss', only ['val_loss']" in result.error["message"]


class Cancelling(Callback):
    """Cancels the task in the middle of round 2's epoch."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.version = 0

    def on_train_batch_end(self, *args: Any) -> None:
        if self.version:
            import time

            self.federation.client.cancel(self.version)
            time.sleep(0.1)  # should_stop looks at most every 50 ms


@pytest.mark.slow
def test_a_cancelled_round_ends_early_and_the_next_one_trains_in_full(federation: Federation) -> None:
    cancelling = Cancelling(federation)
    module = Line()
    trainer = lightning_trainer(max_epochs=1, callbacks=[cancelling])
    with federation.script(script(module, trainer), module):
        state = rounds(federation, own_state(Line()), 1)
        with federation.client.exchange.handoff():  # so that the version is known before the trainer sees the task
            pass
        cancelling.version = federation.client._highest + 1
        federation.ask("train", 2, state)
        from tests.handoffs import wait_until

        wait_until(lambda: len(module.steps_seen) >= 4)
        cancelling.version = 0
        before = len(module.steps_seen)
        result = federation.wait(federation.ask("train", 3, state))
        assert result.status == "ok" and result.num_examples == 24
    assert before < 6 and len(module.steps_seen) >= before + 3
