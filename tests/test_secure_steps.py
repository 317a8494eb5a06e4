"""The trainer's side of a secure sum: what lies on its disk, and what it answers twice, or never."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.errors import OutOfRangeError, RecordError, UsageError
from fedsplit.exchange.records import SecureTerms, TaskRecord
from fedsplit.secure import messages, protocol
from fedsplit.secure.vector import STEPS, to_fixed, weighted
from fedsplit.states.extra import separate
from fedsplit.trainer.secure_steps import SecureSteps

TERMS = SecureTerms(ranges={"body.*": 2.0, "*": 0.5}, threshold=2)
START = {"body.w": torch.zeros(3), "head.b": torch.ones(2), "norm.n": torch.tensor(3)}
SPLIT = (("body.*", False), ("norm.*", False), ("*", False))


def task(step: int, server_round: int = 1) -> TaskRecord:
    return TaskRecord(
        version=1, run_id="run", kind="train", server_round=server_round, total_rounds=3, split=SPLIT, step=step,
        secure=TERMS,
    )  # fmt: skip


def rows(found: dict[int, bytes]) -> dict[str, torch.Tensor]:
    """What the stages send, as a trainer has it."""
    return {name: torch.from_numpy(array.copy()) for name, array in messages.rows(found).items()}


def read_rows(state: dict[str, torch.Tensor], length: int) -> dict[int, bytes]:
    return messages.read_rows({name: tensor.numpy() for name, tensor in state.items()}, length)


class Ranks:
    """Three ranks, each with a directory of its own; what the server passes on is made here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keys: dict[int, bytes] = {}
        for rank in (1, 2, 3):
            update = {"body.w": torch.full((3,), rank / 2), "head.b": torch.ones(2) - 0.1, "norm.n": torch.tensor(rank)}
            self.keys |= read_rows(self.begin(rank, update), messages.LENGTHS[0])
        self.group = messages.group_of("run", 1, TERMS, self.keys)

    def begin(self, rank: int, update: dict[str, torch.Tensor], weight: int = 10) -> Any:
        return self.steps(rank).begin(task(0), update, START, weight, lambda *_: False)

    def steps(self, rank: int) -> SecureSteps:
        """What a process has that was just started."""
        return SecureSteps(self.directory / str(rank), rank)

    def deal(self) -> dict[int, dict[int, bytes]]:
        dealt = {
            rank: read_rows(self.steps(rank).answer(task(1), rows(self.keys)), messages.LENGTHS[1])
            for rank in self.keys
        }
        return {rank: {sender: dealt[sender][rank] for sender in dealt} for rank in self.keys}


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_every_stage_is_answered_by_a_process_that_was_just_started(ranks: Ranks) -> None:
    inboxes = ranks.deal()
    total, plain = np.zeros(6, np.uint32), []
    for rank in ranks.keys:
        state, extra = separate(ranks.steps(rank).answer(task(2), rows(inboxes[rank])))
        # The entry with another rule travels as it is, the others nowhere but in the sum.
        assert state == {"norm.n": torch.tensor(rank)}
        total += extra[messages.MASKED].numpy().view(np.uint32)
        fixed = [to_fixed(np.full(3, rank / 2), 2.0), to_fixed((START["head.b"] - 0.1).double().numpy() - 1, 0.5)]
        plain.append(weighted(np.concatenate(fixed), 10, 30))
    said = rows({1: b"\1", 2: b"\1", 3: b"\1"})
    revealed = {rank: read_rows(ranks.steps(rank).answer(task(3), said), messages.LENGTHS[3]) for rank in ranks.keys}
    protocol.unmask(ranks.group, [1, 2, 3], [1, 2, 3], revealed, total)
    assert total.tobytes() == sum(plain).astype(np.uint32).tobytes()
    assert abs(total[:3].view(np.int32) - STEPS // 2).max() <= 2


def test_a_masked_vector_is_the_same_each_time_and_the_same_stage_is_answered_to_one_question_only(
    ranks: Ranks,
) -> None:
    inboxes = ranks.deal()
    question = rows(inboxes[1])
    first, second = (ranks.steps(1).answer(task(2), question) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(RecordError, match="asked for stage 2 again, with something else"):
        ranks.steps(1).answer(task(2), rows({1: inboxes[1][1], 2: inboxes[1][2]}))
    everyone, two = (dict.fromkeys(chosen, b"\x01") for chosen in ((1, 2, 3), (1, 2)))
    ranks.steps(1).answer(task(3), rows(everyone))
    with pytest.raises(RecordError, match="asked for stage 3 again, with something else"):
        ranks.steps(1).answer(task(3), rows(two))


def test_a_new_update_has_new_keys_and_nothing_of_the_session_before(ranks: Ranks) -> None:
    inboxes = ranks.deal()
    ranks.steps(1).answer(task(2), rows(inboxes[1]))
    again = read_rows(ranks.begin(1, dict(START)), messages.LENGTHS[0])
    assert again[1][:64] != ranks.keys[1][:64]
    with pytest.raises(RecordError, match="the server left out stage 1"):
        ranks.steps(1).answer(task(2), rows(inboxes[1]))
    with pytest.raises(RecordError, match="gave other keys or another weight for this rank"):
        ranks.steps(1).answer(task(1), rows(ranks.keys))


def test_without_its_secrets_or_for_another_round_or_terms_a_rank_answers_with_an_error(ranks: Ranks) -> None:
    question = rows(ranks.keys)
    with pytest.raises(RecordError, match="the secrets of this round are not here"):
        SecureSteps(ranks.directory / "other", 1).answer(task(1), question)
    with pytest.raises(RecordError, match="of another round, or of other terms"):
        ranks.steps(1).answer(task(1, server_round=2), question)
    loose = replace(task(1), secure=replace(TERMS, threshold=0.5))
    with pytest.raises(RecordError, match="of another round, or of other terms"):
        ranks.steps(1).answer(loose, question)


@pytest.mark.parametrize("wrong", [2.001, float("nan"), float("inf")])
def test_a_change_out_of_range_is_named_with_its_range(ranks: Ranks, wrong: float) -> None:
    update = {**START, "body.w": torch.tensor([0.0, -wrong, 1.0])}
    with pytest.raises(OutOfRangeError, match=r"'body.w' moved by .* beyond the range of 2 of its secure rule"):
        ranks.begin(1, update)
    with pytest.raises(OutOfRangeError, match=r"'head.b' moved by 0.6 .* beyond the range of 0.5"):
        ranks.begin(1, {**START, "head.b": torch.tensor([1.0, 1.6])})
    ranks.begin(1, {**START, "body.w": torch.tensor([2.0, -2.0, 0.0])})


def test_an_update_that_counts_for_nothing_or_has_other_entries_cannot_be_summed(ranks: Ranks) -> None:
    with pytest.raises(UsageError, match="its weight must be at least 1"):
        ranks.begin(1, dict(START), weight=0)
    with pytest.raises(UsageError, match=r"'body.w' cannot be summed"):
        ranks.begin(1, {**START, "body.w": torch.zeros(4)})


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"ranks": torch.tensor([1]), "bytes": torch.zeros(1, 5, dtype=torch.uint8)},
        {"ranks": torch.tensor([1, 1]), "bytes": torch.zeros(2, 4, dtype=torch.uint8)},
        {"ranks": torch.tensor([0]), "bytes": torch.zeros(1, 4, dtype=torch.uint8)},
        {"ranks": torch.tensor([1.0]), "bytes": torch.zeros(1, 4, dtype=torch.uint8)},
        {"ranks": torch.tensor([1]), "bytes": torch.zeros(1, 4)},
        {"ranks": torch.tensor(1), "bytes": torch.zeros(1, 4, dtype=torch.uint8)},
    ],
)
def test_what_is_no_message_of_a_stage_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(RecordError):
        read_rows(state, 4)


def test_a_stage_that_there_is_not_and_a_question_of_another_dtype_are_refused(ranks: Ranks) -> None:
    with pytest.raises(RecordError, match="has no stage 4"):
        ranks.steps(1).answer(task(4), rows(ranks.keys))
    question = {name: tensor.bfloat16() for name, tensor in rows(ranks.keys).items()}
    with pytest.raises(RecordError, match="expected 72 bytes for each of some ranks"):
        ranks.steps(1).answer(task(1), question)


def test_secrets_go_before_what_was_asked_of_them(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, a rank would otherwise answer a stage again, with another list."""
    inboxes = ranks.deal()
    ranks.steps(1).answer(task(2), rows(inboxes[1]))
    gone: list[str] = []
    monkeypatch.setattr("fedsplit.secure.steps.remove", lambda path: gone.append(path.name) or path.unlink())
    ranks.steps(1).forget()
    assert gone[0] == "session.safetensors"
    assert sorted(gone[1:]) == ["open.safetensors", "stage-1.safetensors", "stage-2.safetensors"]
