"""The faults of the program that this one grew out of, one test each: they stay dead."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit import EvaluateResult, Trainer, TrainResult
from fedsplit.aggregation import Update, check_update
from fedsplit.errors import PeerMissingError, RecordError, StateMismatchError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request
from fedsplit.run.history import weighted_mean
from fedsplit.states.state_dict import decode, encode, load_into
from fedsplit.trainer.progress import Progress
from fedsplit.workloads.runner import run_workload
from tests.programs import ROOT

PACKAGE = [*(ROOT / "fedsplit").rglob("*.py"), *ROOT.glob("*_main.py")]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ClientSide]:
    exchange = Exchange(tmp_path / "exchange", 1)
    with exchange.hold("client"):
        yield ClientSide(exchange)


def offer(client: ClientSide, state: dict[str, torch.Tensor], server_round: int = 1) -> int:
    blob = b"".join(encode(state))
    digest = hashlib.sha256(blob).hexdigest()
    request = Request(run_id="run", kind="train", server_round=server_round, total_rounds=9)
    version = client.offer(request, digest, lambda wanted: Source(bytes=len(blob), content=blob))
    assert version is not None
    return version


def test_training_starts_from_the_received_weights(client: ClientSide, tmp_path: Path) -> None:
    class Noting:
        model = nn.Linear(1, 1, bias=False)
        seen: float | None = None

        def train(self, task: Any) -> TrainResult:
            self.seen = self.model.weight.item()
            return TrainResult(1)

        def evaluate(self, task: Any) -> EvaluateResult:
            return EvaluateResult(0.0, 1)

    workload = Noting()
    offer(client, {"weight": torch.tensor([[42.0]])})
    trainer = Trainer(1, workload.model, exchange_dir=tmp_path / "exchange", checkpoint_dir=tmp_path / "checkpoints")
    with trainer:
        run_workload(_Once(trainer, next(iter(trainer))), workload, Progress(1))  # type: ignore[arg-type]
    assert workload.seen == 42.0


class _Once:
    """A trainer with one task."""

    def __init__(self, trainer: Trainer, task: Any) -> None:
        self._task, self.outcome = task, None
        self.process, self.processes = trainer.process, trainer.processes

    def __iter__(self) -> Iterator[Any]:
        yield self._task


def test_the_newest_version_is_taken_and_not_the_newest_time_stamp(client: ClientSide, tmp_path: Path) -> None:
    for server_round in (1, 2):
        version = offer(client, {"weight": torch.tensor([float(server_round)])}, server_round)
    old = client.exchange.payload_path("task", version - 1)
    if not old.exists():
        old.write_bytes(b"".join(encode({"weight": torch.tensor([1.0])})))
    future = time.time() + 1000
    os.utime(old, (future, future))
    trainer = Trainer(1, exchange_dir=tmp_path / "exchange", checkpoint_dir=tmp_path / "checkpoints")
    with trainer:
        task = next(iter(trainer))
        assert (task.server_round, task.state_dict["weight"].item()) == (2, 2.0)


def test_a_torn_file_is_not_read_as_a_state(client: ClientSide) -> None:
    version = offer(client, {"weight": torch.zeros(100)})
    path = client.exchange.payload_path("task", version)
    whole = path.read_bytes()
    task = client.exchange.read_task()
    assert task is not None
    assert task.payload is not None
    for length in (0, 7, 50, len(whole) - 1):
        os.truncate(path, length)
        with pytest.raises(RecordError):
            client.exchange.check_payload(task.payload)
    with pytest.raises(RecordError):
        decode(whole[:-1])


def test_parameters_are_matched_by_name_and_not_by_position() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    load_into(model, {"1.weight": torch.ones(2, 2), "0.weight": torch.zeros(2, 2)})
    assert model[0].weight.sum().item() == 0
    assert model[1].weight.sum().item() == 4
    with pytest.raises(StateMismatchError, match=r"'0\.weight'"):
        load_into(model, {"a": torch.ones(2, 2), "b": torch.ones(2, 2)})


@pytest.mark.parametrize("value", [0, 1, 5, 2**53 + 1])
def test_a_0_d_tensor_stays_one_with_its_value(value: int) -> None:
    found = decode(b"".join(encode({"num_batches_tracked": torch.tensor(value)})))["num_batches_tracked"]
    assert (found.shape, found.dtype, found.item()) == (torch.Size([]), torch.int64, value)


def test_counts_and_metrics_are_the_trainers_own_or_the_update_is_refused() -> None:
    state = {"weight": torch.zeros(1)}
    assert check_update(Update(rank=1, state_dict=state, num_examples=0), state) is not None
    # A workload that reports nothing adds nothing to the history.
    assert weighted_mean([(10, {}), (30, {"accuracy": 0.5})]) == {"accuracy": 0.5}
    assert weighted_mean([(10, {})]) == {}


def test_a_wait_has_a_bound_and_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedsplit")
    trainer = Trainer(1, exchange_dir=tmp_path / "exchange", checkpoint_dir=tmp_path, client_wait_s=0.3)
    began = time.monotonic()
    with trainer, pytest.raises(PeerMissingError, match="no client of rank 1"):
        next(iter(trainer))
    assert time.monotonic() - began >= 0.3
    assert "waiting for a client" in caplog.text


def test_no_pickle_is_ever_loaded() -> None:
    for path in PACKAGE:
        text = path.read_text()
        assert "import pickle" not in text, path
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{path}: {call}"
