"""The split through the five programs: each part of the model by its own rule, and a part that never leaves home."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit import EvaluateResult, TrainResult, WorkloadContext
from fedsplit.states.state_dict import map_file
from tests.held import hold
from tests.programs import programs
from tests.test_five_programs import link_tests

RULES = ("--aggregate", "body.*=median", "--aggregate", "head.*=local")


class Parted(nn.Module):
    """A body that is shared and a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.body = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


class Stepping:
    """Training that one can follow by hand: the body grows by rank squared, the head by a tenth of the rank."""

    def __init__(self, rank: int) -> None:
        self.model = Parted()
        self._rank = rank

    def train(self, task: Any) -> TrainResult:
        with torch.no_grad():
            for parameter in self.model.body.parameters():
                parameter += self._rank**2
            for parameter in self.model.head.parameters():
                parameter += 0.1 * self._rank
        hold(task)
        return TrainResult(1, {"head": float(self.model.head.bias[0])})

    def evaluate(self, task: Any) -> EvaluateResult:
        return EvaluateResult(0.0, 1, {"head": float(self.model.head.bias[0])})


def stepping(context: WorkloadContext) -> Stepping:
    return Stepping(context.rank)


def head_after(rank: int, rounds: int) -> torch.Tensor:
    """What the head's weight is by hand."""
    with torch.no_grad():
        weight = Parted().head.weight
        for _ in range(rounds):
            weight += 0.1 * rank
        return weight.clone()


@pytest.mark.slow
def test_the_body_is_the_median_and_the_heads_are_nowhere_but_at_home(tmp_path: Path) -> None:
    rounds = 4
    with run(tmp_path, rounds) as federation:
        federation.start_all()
        # A head that only lives in a process would be lost here.
        federation.allow(2)
        federation.wait_until(lambda: len(federation.history()) >= 2)
        federation.kill("model-2", signal.SIGKILL)
        federation.start("model-2")
        federation.allow(rounds)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert "head.*" in federation.log("server")
        found = map_file(federation.final_state())
        lines = federation.history()
    body = Parted().body
    with torch.no_grad():
        for _ in range(rounds):
            body.weight += 4  # the median of 1, 4 and 9
            body.bias += 4
    assert list(found) == ["body.weight", "body.bias"]
    assert torch.equal(found["body.weight"], body.weight)
    for rank in (1, 2, 3):
        expected = Parted().head.bias[0].item() + 0.1 * rank * rounds
        reported = lines[-1]["clients"][str(rank)]["evaluate"]["head"]  # type: ignore[index]
        assert reported == pytest.approx(expected, abs=1e-5)
    secrets = [head_after(rank, n).numpy().tobytes()[:32] for rank in (1, 2, 3) for n in range(rounds + 1)]
    looked_at = [
        path for top in ("exchange", "checkpoints/server") for path in (tmp_path / top).rglob("*") if path.is_file()
    ]
    assert len(looked_at) > 10
    for path in looked_at:
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets), f"{path} has a head in it"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (("--aggregate", "bodi.*=median", "--aggregate", "fedavg"), "bodi.*"),
        (("--aggregate", "body.*=median"), "head.weight"),
        (("--aggregate", "krum(byzantine=1)"), "--min-clients"),
    ],
)
def test_a_split_that_cannot_work_is_told_before_any_round(tmp_path: Path, rules: tuple[str, ...], said: str) -> None:
    with run(tmp_path, 1, rules) as federation:
        federation.start_all()
        codes = federation.wait()
        assert codes["server"] == 2, federation.tails()
        assert said in federation.log("server")
        assert federation.history() == []
        assert codes["client-1"] == codes["model-1"] == 15, codes


def run(directory: Path, rounds: int, rules: tuple[str, ...] = RULES) -> Any:
    link_tests(directory)
    flags = ("--threads", "1", "--workload", "tests.test_split_programs:stepping")
    server_flags = ("--rounds", str(rounds), "--min-clients", "3", *rules)
    return programs(directory, ranks=3, model_flags=flags, server_flags=server_flags)
