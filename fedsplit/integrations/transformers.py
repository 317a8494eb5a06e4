"""Transformers: an existing Hugging Face Trainer takes part, round after round; with PEFT only the adapters travel.

::

    with fedsplit.Trainer(rank=1, model=model) as trainer:
        federate(trainer, hf_trainer, epochs_per_round=1)

One Hugging Face Trainer serves the whole run. Its optimizer lives on, and one schedule of the learning rate covers all
rounds, also in a restarted process. Logs get ``round`` and ``total_step``, since Transformers' own step starts from 0
in every ``train()``. Of a PEFT model, the server's split says what travels; docs/integrations.md shows the flags.

Not covered: DeepSpeed and FSDP, which wrap the optimizer in their own ways.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fedsplit.errors import StateMismatchError, TrainingError
from fedsplit.exchange.work import steps_to_do, work_share
from fedsplit.states.state_dict import StateDict, describe_difference
from fedsplit.trainer.task import Task
from fedsplit.trainer.trainer import Trainer

# What Transformers and this module add to the metrics of an evaluation.
_NOT_METRICS = {"round", "total_step", "epoch", "runtime", "samples_per_second", "steps_per_second"}


def federate(
    trainer: Trainer, hf_trainer: HuggingFaceTrainer, *, epochs_per_round: float = 1.0, adapter_only: bool = False
) -> None:
    """Answer every task with ``hf_trainer.train()`` or ``evaluate()``; raises TrainingError if a round trains no step.

    `trainer` is entered already. `hf_trainer` has a data set to train on, of a known length or a stream, and one of a
    known length to evaluate on. Its ``num_train_epochs`` is set here; ``max_steps``, if given, is for one round. With
    ``--balance`` a round is the share of these that the server asks for. A metric of ``compute_metrics`` reaches the
    server without its ``eval_``. With `adapter_only` just the adapters of a PEFT model are loaded and sent, with
    `adapter_state` as the trainer's model. Its base is then no part of the federation, and must be the same everywhere.
    """
    hf_trainer.args.num_train_epochs, max_steps = epochs_per_round, hf_trainer.args.max_steps
    rounds = _Rounds(hf_trainer)
    # In front of the loggers, so that they see what it adds to the logs.
    hf_trainer.callback_handler.callbacks.insert(0, rounds)
    model = cast("torch.nn.Module", hf_trainer.model)
    for task in trainer:
        if adapter_only:
            _load_adapter(model, task)
        else:
            task.load_into(model)
        rounds.begin(task)
        if task.kind == "evaluate":
            found = _numbers(hf_trainer.evaluate())
            task.reply(loss=found.pop("loss"), num_examples=_length(hf_trainer.eval_dataset, 0), metrics=found)
            continue
        # After `begin`, whose schedule is over all of the work.
        hf_trainer.args.num_train_epochs = epochs_per_round * work_share(task.config)
        hf_trainer.args.max_steps = steps_to_do(task.config, max_steps) if max_steps > 0 else max_steps
        outcome = hf_trainer.train()
        if outcome.global_step == 0:
            raise TrainingError(
                f"round {task.server_round} trained not a single step; are its epochs 0, or its training data empty?"
            )
        seen = outcome.global_step * hf_trainer.args.train_batch_size * hf_trainer.args.gradient_accumulation_steps
        task.reply(
            adapter_state(model) if adapter_only else model, num_examples=_length(hf_trainer.train_dataset, seen),
            metrics={"loss": float(outcome.training_loss)}, local_state=rounds.keep(outcome.global_step),
        )  # fmt: skip


def adapter_state(model: torch.nn.Module) -> StateDict:
    """Return what of a PEFT model is trained: the adapters, and modules that are saved with them."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model))


class _Rounds(TrainerCallback):
    """Keeps the optimizer and one schedule over all rounds, and adds the round and the total step to the logs."""

    _task: Task

    def __init__(self, hf_trainer: HuggingFaceTrainer) -> None:
        self._trainer: Any = hf_trainer
        self._steps_before = 0
        self._random: torch.Tensor | None = None

    def begin(self, task: Task) -> None:
        """Prepare for a task. After a restart, or if the server went back, read what was kept with the round before."""
        self._task = task
        if task.kind == "evaluate":
            return
        trainer = self._trainer
        if trainer.lr_scheduler is None:
            # train() would begin a new schedule each time.
            steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
            trainer.create_optimizer()
            trainer.create_scheduler(num_training_steps=steps * task.total_rounds, optimizer=trainer.optimizer)
            # Else train() takes the schedule for one of its own, made for a single call, and makes another.
            trainer._created_lr_scheduler = False
        if task.restore and (kept := task.local_state) is not None:
            self._steps_before = kept["steps"]
            trainer.optimizer.load_state_dict(kept["optimizer"])
            trainer.lr_scheduler.load_state_dict(kept["scheduler"])
            self._random = kept["random"]
        if self._random is not None:
            # Evaluations draw random numbers, and are not repeated after a restart.
            torch.set_rng_state(self._random)

    def keep(self, steps: int) -> dict[str, Any]:
        """Return what must outlive the process."""
        self._steps_before += steps
        self._random = torch.get_rng_state()
        return {
            "steps": self._steps_before, "random": self._random,
            "optimizer": self._trainer.optimizer.state_dict(), "scheduler": self._trainer.lr_scheduler.state_dict(),
        }  # fmt: skip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._task.should_stop():
            control.should_training_stop = True
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if logs is not None:
            logs["round"] = self._task.server_round
            logs["total_step"] = self._steps_before + (state.global_step if self._task.kind == "train" else 0)


def _load_adapter(model: torch.nn.Module, task: Task) -> None:
    from peft import set_peft_model_state_dict

    where = f"what the server sent for {task.kind} of round {task.server_round}"
    if difference := describe_difference(adapter_state(model), task.state_dict, expected="the adapter", found=where):
        raise StateMismatchError(difference)
    set_peft_model_state_dict(model, {name: tensor.clone() for name, tensor in task.state_dict.items()})


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name.removeprefix("eval_"): value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if name not in _NOT_METRICS}


def _length(data: Any, streamed: int) -> int:
    """Return how many examples there are, or for a stream how many were taken from it."""
    return len(data) if hasattr(data, "__len__") else streamed
