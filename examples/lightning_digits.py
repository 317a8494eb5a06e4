"""Lightning: a LightningModule with Adam, a learning-rate schedule and a CSV log, on the digits.

    python server_main.py --rounds 3
    python client_main.py --rank 1
    python client_main.py --rank 2
    python examples/lightning_digits.py --rank 1
    python examples/lightning_digits.py --rank 2

Needs `pip install fedsplit[lightning]`. Three rounds of two epochs reach an accuracy over 0.9; chance is 0.1. The last
lines of `main` are all that a script of plain Lightning has to change; docs/integrations.md says what they do.
"""

from __future__ import annotations

import argparse
import logging

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fedsplit import Trainer
from fedsplit.integrations.lightning import federate


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_index):
        images, labels = batch
        loss = functional.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        self.log("lr", self.optimizers().param_groups[0]["lr"], on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_index):
        images, labels = batch
        logits = self.network(images)
        self.log("val_loss", functional.cross_entropy(logits, labels))
        self.log("accuracy", (logits.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)]


def loaders(rank: int, ranks: int) -> tuple[DataLoader, DataLoader]:
    """Every `ranks`-th of the training images, and all that nobody trains on."""
    from fedsplit.workloads.digits import load_data

    data = load_data()
    train = TensorDataset(data.train_images[rank - 1 :: ranks] / 16, data.train_labels[rank - 1 :: ranks])
    test = TensorDataset(data.test_images / 16, data.test_labels)
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--exchange-dir", default="exchange")
    parser.add_argument("--checkpoint-dir", default="checkpoints")
    parser.add_argument("--standalone", action="store_true", help="without a federation, for a debugger")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    L.seed_everything(arguments.rank)

    module = Digits()
    train, test = loaders(arguments.rank, arguments.ranks)
    lightning_trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=CSVLogger("logs", name=f"rank-{arguments.rank}"),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        log_every_n_steps=1,
    )  # fmt: skip
    # Was: lightning_trainer.fit(module, train, test)
    with Trainer(
        arguments.rank, module, exchange_dir=arguments.exchange_dir, checkpoint_dir=arguments.checkpoint_dir,
        standalone=arguments.standalone,
    ) as trainer:  # fmt: skip
        federate(trainer, module, lightning_trainer, train_dataloaders=train, val_dataloaders=test, epochs_per_round=2)


if __name__ == "__main__":
    main()
