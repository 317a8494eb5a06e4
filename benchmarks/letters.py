"""A small language model for `benchmarks.wire`: it reads Python's reference manual, and says which letter comes next.

The text is the one that `help()` shows, 0.7 MB, so nothing is downloaded. Each rank trains on a part of its own; the
last tenth of all is held out, the same for everybody, and evaluated as a whole.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional

from fedsplit import EvaluateResult, TrainResult, WorkloadContext

LETTERS, LENGTH, WIDTH = 128, 32, 64
STEPS, BATCH, LR = 60, 32, 3e-3


class Model(nn.Module):
    """A decoder of two blocks, as GPT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        """Return the logits of the letter after each of (batch, length) letters."""
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = self.letters(letters) + self.places(torch.arange(LENGTH))
        logits: torch.Tensor = self.head(self.blocks(x, mask=mask, is_causal=True))
        return logits


class LanguageModel:
    """The workload."""

    def __init__(self, context: WorkloadContext) -> None:
        text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
        border = len(text) * 9 // 10
        self._own = text[:border].chunk(context.num_partitions)[context.rank - 1]
        held_out = text[border:]
        windows = held_out[: (len(held_out) - 1) // LENGTH * LENGTH + 1]
        self._before, self._after = windows[:-1].view(-1, LENGTH), windows[1:].view(-1, LENGTH)
        self._generator = torch.Generator().manual_seed(1000 * context.seed + context.rank)
        torch.manual_seed(context.seed)
        self.model = Model()

    def train(self, task: object) -> TrainResult:
        """Do some steps of AdamW, with new moments in each round."""
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        for _ in range(STEPS):
            begins = torch.randint(len(self._own) - LENGTH, (BATCH, 1), generator=self._generator)
            letters = self._own[begins + torch.arange(LENGTH + 1)]
            logits = self.model(letters[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), letters[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return TrainResult(len(self._own), {"loss": loss.item()})

    @torch.no_grad()
    def evaluate(self, task: object) -> EvaluateResult:
        """Return the share of held-out letters that are foreseen, and the cross entropy in nats."""
        self.model.eval()
        right, loss = 0, 0.0
        for before, after in zip(self._before.split(256), self._after.split(256), strict=True):
            logits = self.model(before)
            right += int((logits.argmax(-1) == after).sum())
            loss += functional.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="sum").item()
        count = self._after.numel()
        return EvaluateResult(loss / count, count, {"accuracy": right / count})


def letters(context: WorkloadContext) -> LanguageModel:
    """Make the workload; it has no options."""
    return LanguageModel(context)
