r"""A small transformer, cut: ranks train embeddings and the lower block, beside the server LoRA adapts the upper ones.

    python -m fedsplit run --rounds 4 --split-learning sfl-v2 --workload examples.split_lora:Languages

Or in six terminals, as in docs/split-learning.md: the ranks' trainers with `--part lower`, the upper part's with
`--part upper`, all of them with `--workload examples.split_lora:Languages`. Needs `pip install fedsplit[transformers]`,
and no network: the model has random weights, the text is that of `examples/lora_languages.py`. The large part of the
model, its frozen upper blocks, is never at a rank; what a rank sends are hidden states, 64 numbers for each letter, and
which language it is. Four rounds reach an accuracy over 0.8; chance is 0.33.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from examples.lora_languages import LETTERS, WINDOW, Windows
from fedsplit.workloads import WorkloadContext


class Lower(torch.nn.Module):
    """From letters to hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embeddings, self.block = model.bert.embeddings, model.bert.encoder.layer[0]

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        return first(self.block(self.embeddings(letters)))


class Upper(torch.nn.Module):
    """From hidden states to a score for each language; only adapters, pooler and classifier learn."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks, self.pooler = model.bert.encoder.layer[1:], model.bert.pooler
        self.classifier = model.classifier

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = first(block(hidden))
        return self.classifier(self.pooler(hidden))


class Languages:
    """The workload of both parts; see docs/split-learning.md."""

    def __init__(self, context: WorkloadContext) -> None:
        torch.manual_seed(context.seed)
        config = BertConfig(
            vocab_size=len(LETTERS) + 1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=WINDOW, num_labels=3, initializer_range=0.1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        adapters = LoraConfig(
            r=8, target_modules=["query", "key", "value", "dense"], layers_to_transform=[1, 2], layers_pattern="layer"
        )
        model = get_peft_model(BertForSequenceClassification(config), adapters).base_model.model
        for part in (model.bert.embeddings, model.bert.encoder.layer[0], model.bert.pooler, model.classifier):
            part.requires_grad_(True)
        self.lower, self.upper = Lower(model), Upper(model)
        self._data = {
            "train": Windows(held_out=False, rank=context.rank, ranks=context.num_partitions),
            "evaluate": Windows(held_out=True),
        }
        self._order = torch.Generator().manual_seed(context.seed + context.rank)
        self.num_examples = len(self._data["train"])

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, target)

    def metrics(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
        return {"accuracy": (output.argmax(1) == target).float().mean().item()}

    def optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW((each for each in module.parameters() if each.requires_grad), lr=5e-3)

    def batches(self, task: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        training = task.kind == "train"
        data = DataLoader(self._data[task.kind], batch_size=16 if training else 64, shuffle=training,
                          generator=self._order if training else torch.Generator())  # fmt: skip
        for batch in data:
            yield batch["input_ids"], batch["labels"]

    def local_state(self) -> dict[str, Any]:
        return {"order": self._order.get_state()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        self._order.set_state(state["order"])


def first(output: Any) -> torch.Tensor:
    """A block returns its hidden states, alone or before other things, as the version of Transformers has it."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
