"""Lightning: an existing LightningModule and Lightning Trainer take part, round after round.

::

    with fedsplit.Trainer(rank=1, model=module) as trainer:
        federate(trainer, module, L.Trainer(max_epochs=1, …), datamodule=data, epochs_per_round=1)

One Lightning Trainer serves the whole run: its loggers and callbacks live on, and its epochs and steps count on.
``fit()`` makes new optimizers and schedulers each time; they are given the state that they had at the end of the round
before, also in a restarted process.

Not covered: what callbacks remember does not outlive the process (have them write their own checkpoints). Lightning's
own multi-process strategies work only if the process group is initialised before `fedsplit.Trainer` is made.
"""

from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size

from fedsplit.errors import TrainingError, UsageError
from fedsplit.exchange.work import steps_to_do, work_share
from fedsplit.trainer.task import Task
from fedsplit.trainer.trainer import Trainer


def federate(
    trainer: Trainer, module: lightning.LightningModule, lightning_trainer: lightning.Trainer, *,
    train_dataloaders: Any = None, val_dataloaders: Any = None,
    datamodule: lightning.LightningDataModule | None = None, epochs_per_round: int = 1, loss: str = "val_loss",
) -> None:  # fmt: skip
    """Answer every task of a run with ``fit()`` and ``validate()``.

    The data are given as to ``fit()``. Its ``max_epochs`` is set here; ``max_steps`` is for the whole run. With
    ``--balance`` each epoch has the share of its batches that the server asks for. `trainer` is entered already; `loss`
    is the name under which ``validation_step`` logs the loss. Raises TrainingError if it logs none, or a round trained
    not a single step.
    """
    rounds, limit = _Rounds(), lightning_trainer.limit_train_batches
    lightning_trainer.callbacks.append(rounds)  # type: ignore[attr-defined]
    for task in trainer:
        task.load_into(module)
        rounds.begin(task, lightning_trainer)
        if task.kind == "evaluate":
            lightning_trainer.validate(module, val_dataloaders, datamodule=datamodule, verbose=False)
            metrics = _numbers(lightning_trainer.callback_metrics)
            if loss not in metrics:
                raise TrainingError(f"validation_step logged no {loss!r}, only {sorted(metrics)}; name it with loss=…")
            task.reply(loss=metrics.pop(loss), num_examples=rounds.examples, metrics=metrics)
            continue
        before = lightning_trainer.global_step
        # fit() counts the epochs of earlier rounds, and would train nothing.
        lightning_trainer.fit_loop.max_epochs = lightning_trainer.current_epoch + epochs_per_round
        # Each epoch is shortened: fit() would go on in the middle of one that is left there.
        share: Any = steps_to_do(task.config, limit) if isinstance(limit, int) else limit * work_share(task.config)
        for least in (share, 1):
            lightning_trainer.limit_train_batches = least
            try:
                lightning_trainer.fit(module, train_dataloaders, val_dataloaders, datamodule=datamodule)
                break
            except MisconfigurationException as exc:
                # The share of an epoch is less than one batch.
                if share == limit or least == 1 or "< 1" not in str(exc):
                    raise
        if lightning_trainer.global_step == before and not task.should_stop():
            raise TrainingError(
                f"round {task.server_round} trained not a single step (epoch {lightning_trainer.current_epoch}, step "
                f"{before}); is max_steps of the Lightning Trainer reached, or its training data empty?"
            )
        metrics, kept = _numbers(lightning_trainer.callback_metrics), rounds.keep(lightning_trainer)
        task.reply(module, num_examples=rounds.examples, metrics=metrics, local_state=kept)


class _Rounds(Callback):
    """Carries optimizers and schedulers from one ``fit()`` to the next, and counts examples."""

    _task: Task
    _first_epoch: int

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None
        self.examples = 0

    def begin(self, task: Task, trainer: lightning.Trainer) -> None:
        """Prepare for a task. After a restart, or if the server went back, read what was kept with the round before."""
        self._task, self.examples, self._first_epoch = task, 0, trainer.current_epoch
        if task.kind == "evaluate" or not task.restore:
            return
        self._kept = task.local_state
        if self._kept is not None:
            trainer.fit_loop.load_state_dict(self._kept["loops"])
            # Only the counters are wanted. Else Lightning resumes the last epoch as if it had been interrupted.
            trainer.fit_loop.restarting = False
            trainer.fit_loop.on_iteration_done()
            self._first_epoch = trainer.current_epoch
        elif trainer.global_step:
            raise UsageError(
                "the run starts afresh, and this Lightning Trainer has trained already; start the script again"
            )

    def keep(self, trainer: lightning.Trainer) -> dict[str, Any]:
        """Keep, and return, what the next ``fit()`` needs, also in another process."""
        self._kept = {
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "loops": trainer.fit_loop.state_dict(),
            "random": torch.get_rng_state(),
        }
        return self._kept

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._kept is None:
            return
        for config, state in zip(trainer.lr_scheduler_configs, self._kept["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        # After the schedulers: making or loading one changes the learning rates, and the optimizer's state has the
        # right ones.
        for optimizer, state in zip(trainer.optimizers, self._kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        # Evaluation and the first fit() of a process draw random numbers; this must not change the training.
        torch.set_rng_state(self._kept["random"])

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self._first_epoch:
            self.examples += extract_batch_size(batch)
        if self._task.should_stop():
            trainer.should_stop = True

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if self._task.kind == "evaluate":
            self.examples += extract_batch_size(batch)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
