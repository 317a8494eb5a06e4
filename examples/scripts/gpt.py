"""A small GPT that learns to write like Python's reference manual, in the style of nanoGPT: one model, one flat loop.

    python examples/scripts/gpt.py

The text is the one that `help()` shows: nothing is downloaded. The script has what such scripts have: tied weights, a
mask as a buffer, half precision with a GradScaler, gradient accumulation, warm-up and cosine decay, averaged weights.
`gpt_federated.py` is the same script as a trainer of a federation; docs/own-training.md shows what differs.
"""

import argparse
import math
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


@dataclass
class GPTConfig:
    vocab_size: int = 128  # ASCII
    block_size: int = 32
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 32
    dropout: float = 0.1


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        # Nobody looks into the future.
        self.register_buffer("mask", torch.full((config.block_size, config.block_size), float("-inf")).triu(1))

    def forward(self, x):
        size, length, width = x.shape
        heads = self.qkv(x).view(size, length, 3, self.n_head, width // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.n_head) + self.mask[:length, :length]
        mixed = self.dropout(scores.softmax(dim=3)) @ v
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(size, length, width)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd), nn.Dropout(config.dropout),
        )  # fmt: skip

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("positions", torch.arange(config.block_size))
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        # What reads a character and what writes it are one matrix.
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(self.positions[: tokens.shape[1]])
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--site", type=int, default=1, help="whose part of the text to train on (default: 1)")
parser.add_argument("--sites", type=int, default=2, help="into how many it is divided (default: 2)")
parser.add_argument("--epochs", type=int, default=5, help="how often to train and look at the loss (default: 5)")
parser.add_argument("--steps", type=int, default=100, help="optimizer steps an epoch (default: 100)")
parser.add_argument("--accumulate", type=int, default=2, help="batches a step (default: 2)")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate (default: 0.003)")
parser.add_argument("--warmup", type=int, default=20, help="steps until it is reached (default: 20)")
parser.add_argument("--decay", type=int, default=500, help="steps until it is a tenth (default: 500)")
parser.add_argument("--compile", action="store_true", help="torch.compile the model")
args = parser.parse_args()

torch.manual_seed(1337)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = GPTConfig()
text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "replace")))
text = text.chunk(args.sites)[args.site - 1]
train_text, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]


def get_batch(text):
    begins = torch.randint(len(text) - config.block_size, (args.batch_size, 1))
    tokens = text[begins + torch.arange(config.block_size + 1)].to(device)
    return tokens[:, :-1], tokens[:, 1:]


def learning_rate(step):
    if step < args.warmup:
        return (step + 1) / args.warmup
    share = min(1.0, (step - args.warmup) / (args.decay - args.warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def estimate_loss(model):
    model.eval()
    loss = sum(model(*get_batch(held_out)).item() for _ in range(20)) / 20
    model.train()
    return loss


model = GPT(config).to(device)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=args.lr)
scheduler = LambdaLR(optimizer, learning_rate)
scaler = torch.amp.GradScaler(device)
if args.compile:
    model = torch.compile(model)

for epoch in range(1, args.epochs + 1):
    for step in range(1, args.steps + 1):
        for _ in range(args.accumulate):
            with torch.autocast(device, dtype=torch.float16):
                loss = model(*get_batch(train_text)) / args.accumulate
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        ema.update_parameters(model)
        if step % 10 == 0:
            print(f"step {step} of {args.steps}: loss {args.accumulate * loss.item():.4f}")
    print(f"epoch {epoch}: loss {estimate_loss(model):.4f}, of the averaged weights {estimate_loss(ema):.4f}")
