"""Hugging Face's Trainer: the schedule spans the rounds, a restart changes nothing, and adapters may travel alone."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.errors import TrainingError
from fedsplit.states.state_dict import StateDict, own_state
from tests.test_trainer import bits
from tests.training import Client as Federation

if any(importlib.util.find_spec(name) is None for name in ("transformers", "peft", "accelerate")):
    pytest.skip("not installed: pip install fedsplit[transformers]", allow_module_level=True)

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import TrainerCallback

from examples.lora_languages import Windows, make_model, make_trainer
from fedsplit.integrations.transformers import adapter_state, federate


class Seen(TrainerCallback):
    """Notes the learning rate before each step, and what a logger is given."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.logs: list[tuple[int, int]] = []

    def on_step_begin(self, *args: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        self.rates.append(lr_scheduler.get_last_lr()[0])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append((logs["round"], logs["total_step"]))


def script(directory: Path, *, adapter_only: bool = False, steps: int = 2, seen: Seen | None = None) -> Any:
    """Return a script that starts as in a new process, and the state that its trainer enters with."""
    model = make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    trainer = make_trainer(model, 1, 2, str(directory / "logs"))
    trainer.args.max_steps = steps
    if seen is not None:
        trainer.add_callback(seen)
    torch.manual_seed(5)

    def serve(ours: Any) -> None:
        federate(ours, trainer, adapter_only=adapter_only)

    return serve, adapter_state(model) if adapter_only else model


def rounds(federation: Federation, state: StateDict, *numbers: int, **fields: Any) -> StateDict:
    for server_round in numbers:
        state = federation.run("train", server_round, state, **fields)
    return state


@pytest.mark.slow
def test_one_schedule_spans_all_rounds_and_the_log_counts_on(tmp_path: Path) -> None:
    federation, seen, start = Federation(tmp_path), Seen(), own_state(make_model())
    with federation.script(*script(tmp_path, seen=seen)):
        result = federation.wait(federation.ask("train", 1, start))
        assert result.num_examples == len(Windows(held_out=False, rank=1, ranks=2)) and result.metrics["loss"] > 0
        rounds(federation, federation.state_of(result), 2, 3)
    # The client of this test speaks of 9 rounds, of 2 steps each.
    assert seen.rates == pytest.approx([5e-3 * (1 - step / 18) for step in range(6)])
    assert [number for number, _ in seen.logs] == sorted(number for number, _ in seen.logs)
    assert seen.logs[-1] == (3, 6)


@pytest.mark.slow
@pytest.mark.parametrize("adapter_only", [False, True], ids=["whole model", "adapters only"])
def test_a_restarted_process_goes_on_to_the_same_bits(tmp_path: Path, adapter_only: bool) -> None:
    states = []
    for restarts in (False, True):
        federation, model = Federation(tmp_path / str(restarts)), make_model()
        state = {n: t.clone() for n, t in (adapter_state(model) if adapter_only else own_state(model)).items()}
        for part in ((1,), (2, 3)) if restarts else ((1, 2, 3),):
            serve, source = script(tmp_path, adapter_only=adapter_only)
            with federation.script(serve, source):
                for number in part:
                    state = rounds(federation, state, number)
                    if not restarts:  # it draws random numbers, and is not repeated by a new process
                        federation.run("evaluate", number, state)
        states.append(bits(state))
    assert states[0] == states[1]


@pytest.mark.slow
def test_with_adapter_only_the_base_is_no_part_of_the_federation(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    serve, source = script(tmp_path, adapter_only=True)
    with federation.script(serve, source):
        start = federation.run("initialize", 0)
        after = rounds(federation, start, 1)
        result = federation.wait(federation.ask("evaluate", 1, after))
        assert result.num_examples == len(Windows(held_out=True)) and 0 <= result.metrics["accuracy"] <= 1
    assert start.keys() == after.keys() and all("lora_" in name or "classifier" in name for name in after)
    assert bits(start) != bits(after)
    assert sum(tensor.numel() for tensor in after.values()) < 0.4 * sum(p.numel() for p in make_model().parameters())


@pytest.mark.slow
def test_the_split_keeps_the_frozen_base_at_home(tmp_path: Path) -> None:
    split = (("*lora_*", False), ("*modules_to_save*", False), ("*", True))
    federation, whole = Federation(tmp_path), own_state(make_model())
    travels = {name: tensor for name, tensor in whole.items() if "lora_" in name or "modules_to_save" in name}
    serve, source = script(tmp_path)
    with federation.script(serve, source):
        after = rounds(federation, travels, 1, split=split)
    assert after.keys() == travels.keys() and bits(after) != bits(travels)
    now = own_state(source)
    assert bits({n: t for n, t in now.items() if n not in travels}) == bits(
        {n: t for n, t in whole.items() if n not in travels}
    )


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path) -> None:
    from fedsplit.errors import StateMismatchError

    federation = Federation(tmp_path)
    serve, source = script(tmp_path, adapter_only=True)
    with federation.script(serve, source, fails=StateMismatchError):
        result = federation.wait(federation.ask("train", 1, {"other": torch.ones(1)}))
    assert "lacks" in result.error["message"] and "'other'" in result.error["message"]


class Stream(torch.utils.data.IterableDataset[Any]):
    """A data set without a length, that ends."""

    def __init__(self, size: int) -> None:
        self.pieces = [Windows(held_out=False)[index] for index in range(size)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pieces)


@pytest.mark.slow
def test_a_stream_counts_what_was_taken_from_it(tmp_path: Path) -> None:
    federation, model, start = Federation(tmp_path), make_model(), own_state(make_model())
    trainer = make_trainer(model, 1, 2, str(tmp_path / "logs"))
    trainer.args.max_steps, trainer.train_dataset = 2, Stream(64)
    with federation.script(lambda ours: federate(ours, trainer), model):
        assert federation.wait(federation.ask("train", 1, start)).num_examples == 32


@pytest.mark.slow
def test_a_round_without_a_step_is_an_error_on_both_sides(tmp_path: Path) -> None:
    federation, model, start = Federation(tmp_path), make_model(), own_state(make_model())
    trainer = make_trainer(model, 1, 2, str(tmp_path / "logs"))
    serve: Callable[[Any], None] = lambda ours: federate(ours, trainer, epochs_per_round=0)  # noqa: E731
    with federation.script(serve, model, fails=TrainingError):
        result = federation.wait(federation.ask("train", 1, start))
    assert "not a single step" in result.error["message"]
