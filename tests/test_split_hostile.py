"""Of a model that is cut: a rank that is wrong, hostile, slow or away costs itself its round, and nobody else."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from fedsplit.disk.payload_store import PayloadStore
from fedsplit.errors import TaskOverError
from fedsplit.split_learning import rounds as split_rounds
from fedsplit.trainer.trainer import Trainer
from fedsplit.wire.protocol import pack, unpack
from tests.bounds import BOUND_S
from tests.halves import Halves, Local, Small, unsplit
from tests.hostile import ESCAPES, Grammar
from tests.test_split_learning import same, script

TARGETS = torch.zeros(4, dtype=torch.int64)
GOOD = torch.ones(4, 8)
Handed = tuple[dict[str, torch.Tensor], dict[str, Any]]

WRONG: dict[str, tuple[Handed, str]] = {
    "NaN": (({"activations": GOOD * math.nan, "targets": TARGETS}, {"what": "loss"}),
            "NaN or infinity in the activations"),
    "too large": (({"activations": GOOD * 1e38, "targets": TARGETS}, {"what": "loss"}), "NaN or infinity in the loss"),
    "running means": (({"activations": torch.arange(32.0).view(4, 8) * 1e30, "targets": TARGETS}, {"what": "loss"}),
                      "NaN or infinity in the loss"),
    "shape": (({"activations": torch.ones(4, 9), "targets": TARGETS}, {"what": "loss"}), "RuntimeError"),
    "no batch": (({"activations": torch.ones(0, 8), "targets": TARGETS[:0]}, {"what": "loss"}), "ValueError"),
    "dtype": (({"activations": GOOD.long(), "targets": TARGETS}, {"what": "loss"}), "RuntimeError"),
    "no targets": (({"activations": GOOD}, {"what": "loss"}), "it came without targets, only with 'activations'"),
    "no activations": (({"targets": TARGETS}, {"what": "loss"}), "it came without activations, only with 'targets'"),
    "targets": (({"activations": GOOD, "targets": TARGETS + 99}, {"what": "loss"}), "IndexError"),
    "generator": (({"activations": GOOD, "targets": TARGETS, "generator": torch.zeros(7, dtype=torch.uint8)},
                   {"what": "loss"}), "could not do its step"),
    "another wish": (({"activations": GOOD}, {"what": ESCAPES}), "of the upper part, expected one of loss, forward"),
    "no wish": (({"activations": GOOD}, {}), "its trainer wants None of the upper part"),
    "the end": (({"activations": GOOD}, {"what": "end"}), "its trainer wants 'end' of the upper part"),
    "gradient": (({"gradient": GOOD}, {"what": "backward"}), "gave a gradient for no output of the upper part"),
}  # fmt: skip


@pytest.mark.parametrize("what", [
    each if each in ("NaN", "running means", "no targets", "gradient") else pytest.param(each, marks=pytest.mark.slow)
    for each in WRONG
])  # fmt: skip
def test_wrong_numbers_leave_no_trace_in_the_part_that_all_share(what: str, tmp_path: Path) -> None:
    """Rank 1 comes to what it does alone, bit for bit: also the running means of the upper part's BatchNorm."""
    handed, says = WRONG[what]

    def wrong(trainer: Trainer, workload: Any, parts: Any) -> None:
        if trainer.exchange.rank == 1:
            return script(trainer, workload, parts)
        for task in trainer:
            try:
                if task.kind == "train":
                    task.hand_over(*handed)
                task.reply(parts.at_rank(), loss=1.0, num_examples=1)
            except TaskOverError:
                continue
        return None

    halves = Halves(tmp_path, "sfl-v2", rounds=1, cut="0", script=wrong)
    found = halves.run()
    (line,) = halves.history
    assert list(line["refused"]) == ["2"] and says in line["refused"]["2"]
    same(found, unsplit("sfl-v2", ranks=1, rounds=1, cut=1))


class Hostile(Local):
    """A client that makes of its trainer's step what a test says."""

    make: ClassVar[Callable[[dict[str, Any], list[bytes]], list[bytes]]]

    def fit(self, ins: Any, *_: object) -> Any:
        answer = super().fit(ins)
        record = unpack(answer.metrics, "a test")
        record.pop("schema")
        if record.get("status") == "step" and unpack(ins.config, "a test")["kind"] == "train":
            answer.parameters.tensors = type(self).make(record, answer.parameters.tensors)
            answer.metrics = pack(record)
        return answer


def garbage(record: dict[str, Any], _: list[bytes]) -> list[bytes]:
    content = b"\x07" * 999
    record["payload"] = {"digest": hashlib.sha256(content).hexdigest(), "bytes": len(content), "via": "inline"}
    return [content]


def huge(record: dict[str, Any], _: list[bytes]) -> list[bytes]:
    record["payload"] |= {"bytes": 2**40, "via": "pull"}
    return []


def nowhere(record: dict[str, Any], _: list[bytes]) -> list[bytes]:
    record["payload"] |= {"digest": "0" * 64, "via": "store"}
    return []


def longer(record: dict[str, Any], blobs: list[bytes]) -> list[bytes]:
    record["payload"]["bytes"] += 1
    return blobs


def nothing(record: dict[str, Any], _: list[bytes]) -> list[bytes]:
    del record["payload"]
    return []


def for_ever(record: dict[str, Any], blobs: list[bytes]) -> list[bytes]:
    record["status"] = "again"
    return blobs


LIES: list[tuple[Callable[..., list[bytes]], bool, str]] = [
    (garbage, False, "not a safetensors payload"),
    (huge, False, "it gave 1,099,511,627,776 bytes at once, at most 1,073,741,824 are taken; use smaller batches"),
    (nowhere, True, "cannot read the payload"),
    (longer, True, "its record says"),
    (nothing, False, "it came without a state_dict"),
    (for_ever, False, "its trainer began anew 1001 times in one task"),
]


@pytest.mark.parametrize(("lie", "by_reference", "says"), [
    each if each[0] in (garbage, longer) else pytest.param(*each, marks=pytest.mark.slow) for each in LIES
])  # fmt: skip
def test_a_client_that_lies_about_a_step_costs_its_rank_the_round(
    lie: Callable[..., list[bytes]], by_reference: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: set[str] = set()
    monkeypatch.setattr(PayloadStore, "clear", lambda self: left.update(path.name for path in self.root.iterdir()))
    liar = type("Liar", (Hostile,), {"make": staticmethod(lie)})
    halves = Halves(tmp_path, "sfl-v2", rounds=1, by_reference=by_reference, clients={2: liar})
    found = halves.run()
    assert list(halves.history[0]["refused"]) == ["2"] and says in halves.history[0]["refused"]["2"]
    same(found, unsplit("sfl-v2", ranks=1, rounds=1))
    # The state, and nothing of what was refused; but who sees the store can put there what he then does not name.
    assert len(left) == 1 + (lie is nowhere)


def test_steps_are_bounded_in_number_and_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_rounds, "_MOST_STEPS", 3)
    halves = Halves(tmp_path / "number", "sfl-v1", rounds=1)  # rank 1 has 3 batches, rank 2 has 4
    halves.run()
    assert halves.history[0]["refused"] == {"2": "its trainer wants more than 3 steps in one task"}

    monkeypatch.setattr(split_rounds, "_MOST_STEPS", 100)
    usage = SimpleNamespace(free=4 * 1_000)
    monkeypatch.setattr(split_rounds, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
    halves = Halves(tmp_path / "bytes", "sfl-v1", rounds=1)  # a step has about 300 bytes
    halves.run()
    assert list(halves.history[0]["clients"]) == ["1"]
    assert "and its share of what is free in" in halves.history[0]["refused"]["2"]


@pytest.mark.slow
def test_what_no_honest_client_would_say_of_a_step_harms_nobody_else(tmp_path: Path) -> None:
    grammar = Grammar(7)

    def spoilt(record: dict[str, Any], blobs: list[bytes]) -> list[bytes]:
        if grammar.random.random() < 0.5:
            wrong = grammar.record(record)
            record.clear()
            record.update(wrong if isinstance(wrong, dict) else {"status": "step"})
        return blobs

    liar = type("Liar", (Hostile,), {"make": staticmethod(spoilt)})
    halves = Halves(tmp_path, "sfl-v1", rounds=30, by_reference=False, clients={2: liar},
                    settings={"evaluate_every": 0})  # fmt: skip
    halves.run()
    assert all("1" in line["clients"] and line["merged"] for line in halves.history)
    assert sum("2" in line["refused"] for line in halves.history) > 10


def test_a_lower_part_that_no_rank_could_load_does_not_go_on_to_the_next(tmp_path: Path) -> None:
    def spoiling(trainer: Trainer, workload: Any, parts: Any) -> None:
        if trainer.exchange.rank == 2:
            return script(trainer, workload, parts)
        for task in trainer:
            if task.kind == "train":
                task.remote(parts.lower(torch.zeros(4, 6)), TARGETS)
                task.reply({"lower.0.weight": torch.full((3, 3), math.nan)}, num_examples=4)
            else:
                task.reply(loss=1.0, num_examples=1)
        return None

    halves = Halves(tmp_path, "sequential", rounds=1, script=spoiling)
    halves.run()
    (line,) = halves.history
    assert list(line["refused"]) == ["1"] and "lacks 'lower.0.bias'" in line["refused"]["1"] and line["merged"]


# -- slow, or away -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_upper_part_that_hangs_holds_a_round_to_its_deadline_only(tmp_path: Path) -> None:
    history = tmp_path / "checkpoints" / "server" / "history.jsonl"

    class Hanging(Small):
        """The loss is found beside the server: the first time when the first round is over."""

        def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            deadline = time.monotonic() + BOUND_S
            while not (history.exists() and history.read_bytes()) and time.monotonic() < deadline:
                time.sleep(0.05)
            return super().loss(output, target)

    settings = {"round_timeout": 5.0, "evaluate_every": 0}
    halves = Halves(tmp_path, "sfl-v2", rounds=2, make=Hanging, settings=settings)
    halves.run()
    first, second = halves.history
    assert not first["merged"] and set(first["refused"]) == {"1", "2"}
    assert "the trainer of the upper part had not answered when the time was over" in first["refused"].values()
    assert second["merged"] and not second["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sfl-v1", "sequential"])
def test_who_is_done_at_the_deadline_counts_and_who_is_not_is_refused(mode: str, tmp_path: Path) -> None:
    def late(trainer: Trainer, workload: Any, parts: Any) -> None:
        if trainer.exchange.rank == 1:
            return script(trainer, workload, parts)
        for task in trainer:
            while not task.should_stop():
                time.sleep(0.05)
            task.reply(parts.at_rank(), num_examples=1)
        return None

    settings = {"round_timeout": 5.0, "evaluate_every": 0}
    halves = Halves(tmp_path, mode, rounds=1, script=late, settings=settings)
    found = halves.run()
    assert halves.history[0]["refused"] == {"2": "not completed within 5 s"}
    same(found, unsplit(mode, ranks=1, rounds=1))


@pytest.mark.slow
def test_in_turns_a_rank_that_never_comes_holds_the_others_to_the_deadline(tmp_path: Path) -> None:
    """And no longer: in the next round it is there."""
    batches: list[int] = []

    class Late(Small):
        """Rank 2 has a batch when the first round is over."""

        def batches(self, task: Any) -> Any:
            for batch in super().batches(task):
                while len(self._targets) == 16 and task.server_round == 1 and not task.should_stop():
                    time.sleep(0.05)
                batches.append(task.server_round)
                yield batch

    settings = {"round_timeout": 5.0, "evaluate_every": 0}
    halves = Halves(tmp_path, "sfl-v2", rounds=2, make=Late, settings=settings)
    halves.run()
    assert set(halves.history[0]["refused"].values()) == {"not completed within 5 s"}
    assert halves.history[1]["merged"] and not halves.history[1]["refused"]
