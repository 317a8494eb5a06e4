"""Masks that the client makes for its trainer: the same sum, and nothing of an update by any other way."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import FitIns, GetParametersIns, GetPropertiesIns, Parameters
from torch import nn

from fedsplit.client.masks import Masks
from fedsplit.client.relay import Relay
from fedsplit.disk.payload_store import PayloadStore
from fedsplit.engines.assembly import open_server
from fedsplit.exchange.client_side import ClientSide
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request, SecureTerms, TaskRecord, read
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.secure import messages, protocol
from fedsplit.secure.steps import Steps
from fedsplit.secure.vector import to_fixed, weighted
from fedsplit.server.settings import ServerSettings
from fedsplit.states.arrays import Arrays
from fedsplit.states.arrays import encode as encode_arrays
from fedsplit.states.extra import join
from fedsplit.states.header import PREFIX
from fedsplit.states.state_dict import decode, encode, map_file
from fedsplit.trainer.secure_steps import SecureSteps
from fedsplit.trainer.trainer import Trainer
from fedsplit.wire.answers import Answer
from fedsplit.wire.protocol import EMBEDDED, TENSOR_TYPE, ask_record, pack, unpack
from tests.bounds import BOUND_S
from tests.halves import Local, connected, end, serve

State = dict[str, torch.Tensor]
TERMS = SecureTerms(ranges={"body.*": 4.0, "*": 0.5}, threshold=2)
SPLIT = (("<BatchNorm*>", True), ("home.*", True), ("body.*", False), ("*", False))
TIED = torch.arange(6, dtype=torch.float32).reshape(2, 3) / 8
START: State = {
    "body.w": TIED, "body.tied": TIED, "head.bf16": torch.linspace(-3, 3, 7).bfloat16(),
    "head.half": torch.tensor([1e-7, 2.0, -0.0]).half(), "head.double": torch.tensor([1 / 3], dtype=torch.float64),
    "head.scalar": torch.tensor(0.25), "head.empty": torch.zeros(0, 4),
}  # fmt: skip


def update_of(rank: int) -> State:
    """An update of a rank, with the weights tied as before."""
    draw = torch.Generator().manual_seed(rank)
    found = {
        name: (each.double() + torch.rand(each.shape, generator=draw, dtype=torch.float64) * 0.4 - 0.2).to(each.dtype)
        for name, each in START.items()
    }
    return {**found, "body.tied": found["body.w"]}


def payload(state: Mapping[str, torch.Tensor]) -> bytes:
    return b"".join(encode(state))


def rows(found: Mapping[int, bytes]) -> bytes:
    return b"".join(encode_arrays(messages.rows(found)))


def seeded(rank: int) -> protocol.Secrets:
    draw = np.random.default_rng(rank).bytes
    return protocol.Secrets(channel=draw(32), mask=draw(32), own=draw(32))


@dataclass
class Client:
    """A rank whose client masks: each question goes to a client that was just started."""

    directory: Path
    rank: int = 1
    start: State = field(default_factory=lambda: START)
    store: Path | None = None

    def __post_init__(self) -> None:
        self.exchange = Exchange(self.directory / "exchange", self.rank)
        self.exchange.directory.mkdir(parents=True, mode=0o700, exist_ok=True)

    def relay(self) -> Relay:
        relay = Relay(self.exchange, trainer_wait_s=1e9, mask_here=True)
        if self.store:
            store = PayloadStore(self.store)
            name, _ = store.put_nonce()
            hello = {"op": "hello", "run_id": "run", "nonce_name": name, "store_root": str(self.store)}
            relay.get_properties(GetPropertiesIns(pack(hello)))
        return relay

    def ask(self, content: bytes | None, relay: Relay | None = None, **fields: Any) -> tuple[Answer, bytes | None]:
        """Ask for a task; returns the answer, and the payload that came with it."""
        asked: dict[str, Any] = {
            "run_id": "run", "kind": "train", "server_round": 1, "total_rounds": 3, "split": SPLIT, "secure": TERMS,
            "step": 0, **fields,
        }  # fmt: skip
        digest = None if content is None else hashlib.sha256(content).hexdigest()
        record = ask_record(
            Request(**asked), digest=digest, payload_bytes=len(content or b""), hold_s=0.0, cancel=False
        )
        ins = FitIns(Parameters([] if content is None else [content], TENSOR_TYPE), pack(record))
        found = (relay or self.relay()).fit(ins)
        answer = read(unpack(found.metrics, "the client"), Answer, "the client")
        if answer.payload and answer.payload.via == "store":
            return answer, (self.store or Path()).joinpath(answer.payload.digest).read_bytes()
        return answer, next(iter(found.parameters.tensors), None)

    def train(self, update: State | None = None, *, num_examples: int = 10, **fields: Any) -> tuple[Answer, Any]:
        """Let the rank train, and return what its client makes of the update."""
        content = payload(self.start)
        assert self.ask(content, **fields)[0].status == "working"
        self.reply(update_of(self.rank) if update is None else update, num_examples=num_examples)
        return self.ask(content, **fields)

    def reply(self, state: State, **numbers: Any) -> None:
        """Answer as a trainer does that knows nothing of secure sums."""
        task = self.exchange.read_task()
        assert task is not None
        assert (task.step, task.secure, task.wire, task.split) == (None, None, (), SPLIT)
        assert TrainerSide(self.exchange).answer(task, encode(state), loss=0.5, **numbers)

    def stage(self, step: int, question: Mapping[int, bytes], **fields: Any) -> tuple[Answer, Any]:
        return self.ask(rows(question), step=step, **fields)

    def plain_digest(self) -> str:
        result = self.exchange.read_result()
        assert result is not None and result.payload is not None
        return result.payload.digest

    def pull(self, digest: str) -> list[bytes]:
        record = {"op": "pull", "digest": digest, "bytes": 1 << 20, "offset": 0}
        return self.relay().get_parameters(GetParametersIns(pack(record))).parameters.tensors


def read_rows(content: bytes, step: int) -> dict[int, bytes]:
    return messages.read_rows(Arrays(content, "an answer"), messages.LENGTHS[step])


class Mixed:
    """Three ranks: of 1 and 2 the clients mask, of 3 the trainer; what the server passes on is made here."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.clients = {rank: Client(directory, rank, **settings) for rank in (1, 2)}
        self.trainer = SecureSteps(directory / "secure", 3)
        self.keys: dict[int, bytes] = {}
        for rank, client in self.clients.items():
            answer, content = client.train(num_examples=10 * rank)
            assert (answer.status, answer.num_examples, answer.loss) == ("step", 10 * rank, 0.5)
            self.keys |= read_rows(content, 0)
        found = self.trainer.begin(self._task(0), update_of(3), START, 30, lambda *_: False)
        self.keys |= messages.read_rows({name: each.numpy() for name, each in found.items()}, messages.LENGTHS[0])
        self.group = messages.group_of("run", 1, TERMS, self.keys)

    def _task(self, step: int) -> TaskRecord:
        return TaskRecord(
            version=1, run_id="run", kind="train", server_round=1, total_rounds=3, split=SPLIT, step=step, secure=TERMS
        )

    def ask(self, rank: int, step: int, question: Mapping[int, bytes]) -> Arrays:
        """Return the answer of a rank to a stage."""
        if rank in self.clients:
            answer, content = self.clients[rank].stage(step, question)
            assert answer.status == "step", answer.failure
            return Arrays(content, "an answer")
        return Arrays(payload(self.trainer.answer(self._task(step), decode(rows(question)))), "an answer")

    def rows(self, rank: int, step: int, question: Mapping[int, bytes]) -> dict[int, bytes]:
        return messages.read_rows(self.ask(rank, step, question), messages.LENGTHS[step])

    def deal(self) -> dict[int, dict[int, bytes]]:
        boxes = {rank: self.rows(rank, 1, self.keys) for rank in self.keys}
        return {rank: {sender: boxes[sender][rank] for sender in boxes} for rank in self.keys}


# -- the same sum ------------------------------------------------------------------------------------------------------


def plain_vector(rank: int) -> Any:
    """What a rank puts into the sum, from the tensors themselves."""
    update = update_of(rank)
    ranges = {name: 4.0 if name.startswith("body") else 0.5 for name in sorted(START)}
    fixed = [
        to_fixed((update[name].double() - START[name].double()).reshape(-1).numpy(), most)
        for name, most in ranges.items()
    ]
    return weighted(np.concatenate(fixed), 10 * rank, 60)


def test_ranks_that_mask_in_the_client_and_in_the_trainer_mix_and_the_sum_has_the_same_bits(tmp_path: Path) -> None:
    mixed = Mixed(tmp_path)
    inboxes = mixed.deal()
    masked = {rank: mixed.ask(rank, 2, inboxes[rank])[PREFIX + messages.MASKED].view(np.uint32) for rank in (1, 2, 3)}
    total = sum(masked.values()).astype(np.uint32)
    survivors = dict.fromkeys(mixed.keys, b"\1")
    revealed = {rank: mixed.rows(rank, 3, survivors) for rank in mixed.keys}
    protocol.unmask(mixed.group, [1, 2, 3], [1, 2, 3], revealed, total)
    assert total.tobytes() == sum(map(plain_vector, (1, 2, 3))).astype(np.uint32).tobytes()
    for rank in (1, 2, 3):
        assert not (masked[rank] == plain_vector(rank)).any()


def test_with_the_same_secrets_client_and_trainer_send_the_same_masked_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol.Secrets, "new", lambda: seeded(1))
    client, trainer = Client(tmp_path), SecureSteps(tmp_path / "secure", 1)
    _, content = client.train()
    task = TaskRecord(
        version=1, run_id="run", kind="train", server_round=1, total_rounds=3, split=SPLIT, step=0, secure=TERMS
    )
    first = trainer.begin(task, update_of(1), START, 10, lambda *_: False)
    assert payload(first) == content
    keys = {1: messages.to_row(seeded(1).advert(10)), 2: messages.to_row(seeded(2).advert(10))}
    group = messages.group_of("run", 1, TERMS, keys)
    inbox = {rank: protocol.deal(seeded(rank), rank, group)[1] for rank in (1, 2)}
    for step, question in ((1, keys), (2, inbox)):
        _, content = client.stage(step, question)
        answer = trainer.answer(replace(task, step=step), decode(rows(question)))
    assert payload(answer) == content


# -- what is asked twice -----------------------------------------------------------------------------------------------


def test_a_stage_is_answered_again_with_the_same_bytes_and_to_no_other_question(tmp_path: Path) -> None:
    mixed = Mixed(tmp_path)
    client, inboxes = mixed.clients[1], mixed.deal()
    # Shares are drawn at random: dealt anew, they would be others.
    assert len({client.stage(1, mixed.keys)[1] for _ in range(3)}) == 1
    assert len({client.stage(2, inboxes[1])[1] for _ in range(3)}) == 1
    everyone, two = (dict.fromkeys(chosen, b"\1") for chosen in ((1, 2, 3), (1, 2)))
    assert client.stage(3, everyone)[0].status == "step"
    for question, step in ((two, 3), ({1: inboxes[1][1], 2: inboxes[1][2]}, 2), ({1: mixed.keys[1]}, 1)):
        answer, content = client.stage(step, question)
        assert (answer.status, answer.payload, content) == ("error", None, None)
        assert f"asked for stage {step} again, with something else than before" in str(answer.failure)
    assert client.stage(3, everyone)[0].status == "step"


def test_keys_are_the_same_until_they_are_used_and_another_attempt_at_the_round_has_new_ones(tmp_path: Path) -> None:
    mixed = Mixed(tmp_path)
    client = mixed.clients[1]
    again = client.ask(payload(START))
    assert (again[0].status, again[0].num_examples) == ("step", 10)
    assert read_rows(again[1] or b"", 0) == {1: mixed.keys[1]}
    client.stage(1, mixed.keys)
    answer, content = client.ask(payload(START))
    # Its trainer is not asked again: the update is there.
    assert (answer.status, answer.num_examples) == ("step", 10)
    new = read_rows(content or b"", 0)[1]
    assert new[:64] != mixed.keys[1][:64]
    assert "gave other keys or another weight" in str(client.stage(1, mixed.keys)[0].failure)
    # Nor do keys serve on other terms.
    loose = replace(TERMS, threshold=0.5)
    assert read_rows(client.ask(payload(START), secure=loose)[1] or b"", 0)[1][:64] not in (
        new[:64],
        mixed.keys[1][:64],
    )


def test_a_stage_of_another_round_or_without_a_training_is_an_error_and_the_next_task_ends_the_session(
    tmp_path: Path,
) -> None:
    assert "secrets of this round are not here" in str(Client(tmp_path, 7).stage(1, {7: b"k" * 72})[0].failure)
    mixed = Mixed(tmp_path)
    client = mixed.clients[1]
    answer, _ = client.stage(1, mixed.keys, server_round=2)
    assert "of another round, or of other terms" in str(answer.failure)
    session = Masks(client.exchange).sent.directory / "session.safetensors"
    assert session.stat().st_mode & 0o777 == 0o600 and session.parent.stat().st_mode & 0o777 == 0o700
    client.ask(payload(START), kind="evaluate", secure=None, step=None)
    assert not session.exists()
    assert "secrets of this round are not here" in str(client.stage(1, mixed.keys)[0].failure)


def test_a_question_that_does_not_have_its_digest_or_is_none_is_refused(tmp_path: Path) -> None:
    mixed = Mixed(tmp_path)
    client = mixed.clients[1]
    for content in (b"nonsense", payload({"ranks": torch.tensor([1])}), payload({"ranks": torch.ones(1).bfloat16()})):
        answer, _ = client.ask(content, step=1)
        assert answer.status == "error"
    assert "has no stage 4" in str(client.stage(4, mixed.keys)[0].failure)
    record = ask_record(
        Request(run_id="run", kind="train", server_round=1, total_rounds=3, split=SPLIT, secure=TERMS, step=1),
        digest="0" * 64, payload_bytes=8, hold_s=0.0, cancel=False,
    )  # fmt: skip
    found = client.relay().fit(FitIns(Parameters([], TENSOR_TYPE), pack(record)))
    assert read(unpack(found.metrics, "it"), Answer, "it").status == "need"
    # None of these was a question: the right one is answered.
    assert client.stage(1, mixed.keys)[0].status == "step"


# -- nothing openly ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_reference", [True, False])
def test_neither_the_store_nor_a_message_nor_a_piece_ever_has_the_update(tmp_path: Path, by_reference: bool) -> None:
    store = PayloadStore(tmp_path / "store")
    store.open()
    mixed = Mixed(tmp_path, store=store.root if by_reference else None)
    client, said = mixed.clients[1], []
    digest = client.plain_digest()
    inboxes = mixed.deal()
    for step, question in ((1, mixed.keys), (2, inboxes[1]), (3, dict.fromkeys(mixed.keys, b"\1"))):
        answer, content = client.stage(step, question)
        assert answer.payload is not None and answer.payload.via == ("store" if by_reference else "inline")
        assert client.pull(answer.payload.digest) == [content]
        assert client.pull(digest) == []
        said.append(content)
    # Of what lies in the store, and what was said, nothing is the update nor has a part of it.
    kept = [path.read_bytes() for path in store.root.iterdir()] + said
    assert digest not in {hashlib.sha256(each).hexdigest() for each in kept}
    parts = [bytes(buffer) for buffer in encode(update_of(1))[1:] if len(bytes(buffer)) >= 8]
    assert parts and not any(part in each for part in parts for each in kept)
    # The update is where the trainer has put it.
    assert map_file(client.exchange.directory / "result-1.safetensors").keys() == START.keys()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"secure": None, "step": None}, "asks for an update openly, and this client, by --mask-here, masks each"),
        ({"secure": None, "step": 0}, "asks for an update openly"),
        ({"secure": None, "step": 2}, "asks for an update openly"),
        ({"kind": "evaluate", "secure": None, "step": 0}, "takes part in whole models only"),
        ({"kind": "initialize", "secure": None, "step": 1}, "takes part in whole models only"),
        ({"kind": "initialize", "secure": None, "step": None}, "it has trained already; start the server with"),
    ],
)
def test_a_server_that_asks_for_an_update_openly_gets_none(tmp_path: Path, fields: Any, said: str) -> None:
    client = Client(tmp_path)
    client.train()
    answer, content = client.ask(payload(START), **fields)
    assert (answer.status, answer.payload, content) == ("error", None, None)
    assert said in str(answer.failure)
    # Nor by a task that is to follow another one.
    task = client.exchange.read_task()
    then = Request(run_id="run", kind="train", server_round=1, total_rounds=3, split=SPLIT)
    evaluation = replace(then, kind="evaluate")
    digest = hashlib.sha256(payload(START)).hexdigest()
    relay, record = client.relay(), ask_record(
        evaluation, digest=digest, payload_bytes=0, hold_s=0.0, cancel=False, then=then
    )  # fmt: skip
    relay.fit(FitIns(Parameters([], TENSOR_TYPE), pack(record)))
    newest = client.exchange.read_task()
    assert task is not None and newest is not None and newest.kind == "evaluate"
    TrainerSide(client.exchange).answer(newest, encode(update_of(1)), loss=0.5, num_examples=3)
    found = relay.fit(FitIns(Parameters([], TENSOR_TYPE), pack(record)))
    answer = read(unpack(found.metrics, "it"), Answer, "it")
    # What a trainer gives along with an evaluation stays here too.
    assert (answer.status, answer.loss, answer.payload, found.parameters.tensors) == ("ok", 0.5, None, [])
    assert answer.then is not None and "asks for an update openly" in str(answer.then.failure)


def test_the_state_that_a_trainer_begins_with_goes_to_the_server_until_it_has_trained(tmp_path: Path) -> None:
    client = Client(tmp_path)
    first = {"kind": "initialize", "secure": None, "step": None}
    assert client.ask(None, **first)[0].status == "working"
    client.reply(START, num_examples=0)
    answer, content = client.ask(None, **first)
    assert content == payload(START) and answer.payload is not None
    assert client.pull(answer.payload.digest) == [content]
    client.train()
    assert client.ask(None, **first)[0].status == "error"
    # Not before the run is complete: what was stopped may go on.
    ends = Relay(client.exchange, trainer_wait_s=1e9, mask_here=True)
    for outcome in ("stopped", "complete"):
        ends.get_properties(GetPropertiesIns(pack({"op": "finish", "run_id": "run", "outcome": outcome})))
        # Nor while that trainer is there: it has not seen the end yet, and would answer with what it has.
        assert client.ask(None, **first)[0].status == "error"
    end = client.exchange.read_finished()
    assert end is not None
    TrainerSide(client.exchange).leave(end)
    assert [client.ask(None, **first)[0].status for _ in range(2)] == ["working", "working"]


def test_the_secrets_are_gone_before_a_complete_run_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, seen = Client(tmp_path), list[list[Path]]()
    client.train()
    masked = Masks(client.exchange).sent.directory
    finish = ClientSide.finish

    def look(side: ClientSide, *told: str) -> None:
        seen.append(list(masked.iterdir()))
        finish(side, *told)

    monkeypatch.setattr(ClientSide, "finish", look)
    assert list(masked.iterdir())
    # Who sees the end may end the process that tells of it.
    client.relay().get_properties(GetPropertiesIns(pack({"op": "finish", "run_id": "run", "outcome": "complete"})))
    assert seen == [[]]


def test_a_trainer_that_left_a_run_and_has_trained_in_the_next_one_gives_no_state_openly(tmp_path: Path) -> None:
    client = Client(tmp_path)
    client.train()
    client.relay().get_properties(GetPropertiesIns(pack({"op": "finish", "run_id": "run", "outcome": "complete"})))
    end = client.exchange.read_finished()
    assert end is not None
    TrainerSide(client.exchange).leave(end)
    client.train(run_id="next")
    for run_id in ("run", "next", "another"):
        answer, content = client.ask(None, kind="initialize", secure=None, step=None, run_id=run_id)
        assert (answer.status, answer.payload, content) == ("error", None, None)
        assert "it has trained already" in str(answer.failure)


def test_one_question_is_answered_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = Mixed(tmp_path)
    client, answer, within, go_on = mixed.clients[1], Steps.answer, threading.Event(), threading.Event()

    def held(steps: Steps, request: Request) -> Any:
        within.set()
        assert go_on.wait(BOUND_S)
        return answer(steps, request)

    found: dict[str, Any] = {}

    def ask(name: str, question: Any, **fields: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.update({name: client.ask(question, **fields)}), daemon=True)
        thread.start()
        return thread

    monkeypatch.setattr(Steps, "answer", held)
    threads = [ask("first", rows(mixed.keys), step=1)]
    assert within.wait(BOUND_S)
    # In the middle of it: an attempt that would end the session, and another list for the same stage.
    fewer = {rank: mixed.keys[rank] for rank in (1, 2)}
    threads += [ask("anew", payload(START), server_round=2), ask("other", rows(fewer), step=1)]
    threads[1].join(0.5)
    assert not found
    go_on.set()
    for thread in threads:
        thread.join(BOUND_S)
    assert (found["first"][0].status, found["anew"][0].status) == ("step", "working")
    assert read_rows(found["first"][1], 1).keys() == {1, 2, 3}
    assert found["other"][0].status == "error"


def test_of_two_lists_for_one_stage_at_the_same_moment_one_is_answered(tmp_path: Path) -> None:
    mixed = Mixed(tmp_path)
    client, inboxes = mixed.clients[1], mixed.deal()
    client.stage(2, inboxes[1])
    together, found = threading.Barrier(4), []

    def ask(survivors: tuple[int, ...]) -> None:
        together.wait(BOUND_S)
        found.append((survivors, client.stage(3, dict.fromkeys(survivors, b"\1"))))

    lists = [(1, 2, 3), (1, 2), (1, 3), (1, 2, 3)]
    threads = [threading.Thread(target=ask, args=(each,), daemon=True) for each in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    answered = {survivors: content for survivors, (answer, content) in found if answer.status == "step"}
    assert len(found) == 4 and len(answered) == 1
    assert {content for _, (answer, content) in found if answer.status == "step"} == set(answered.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"body.w": START["body.w"] + 5}, r"'body.tied' moved by 5 in this round, beyond the range of 4"),
        ({"head.half": torch.tensor([float("nan"), 2, 0]).half()}, "'head.half' moved by nan"),
        ({"head.bf16": torch.zeros(6).bfloat16()}, "'head.bf16' cannot be summed"),
        ({"head.scalar": torch.tensor(3)}, "'head.scalar' cannot be summed"),
        ({"head.double": torch.zeros(1).to(torch.float8_e5m2)}, "has dtype F8_E5M2, which numpy lacks"),
        ({"home.w": torch.zeros(2)}, "differ in 'home.w'"),
        ({f"{PREFIX}control": torch.zeros(2)}, "extra tensors beside them would travel openly"),
    ],
)
def test_an_update_that_cannot_be_summed_is_refused_by_name(tmp_path: Path, change: State, said: str) -> None:
    update = {**update_of(1), **change}
    if "body.w" in change:
        update["body.tied"] = update["body.w"]
    answer, content = Client(tmp_path).train(update)
    assert (answer.status, answer.payload, content) == ("error", None, None)
    assert re.search(said, str(answer.failure)), answer.failure


def test_a_rule_beside_the_secure_one_is_refused_as_its_part_would_travel_openly(tmp_path: Path) -> None:
    terms = replace(TERMS, ranges={"body.*": 4.0})
    answer, _ = Client(tmp_path).train(secure=terms)
    assert "asks for 'head.bf16', 'head.half', 'head.double' and 2 more openly" in str(answer.failure)
    assert "this client, by --mask-here, was started to send updates into secure sums only" in str(answer.failure)
    # Of entries that are whole numbers as well.
    start = {**START, "steps": torch.tensor(3)}
    answer, _ = Client(tmp_path, 2, start).train({**update_of(2), "steps": torch.tensor(4)})
    assert "'steps' cannot be summed: expected floating point entries" in str(answer.failure)


def test_an_update_of_no_examples_and_no_update_at_all_are_refused(tmp_path: Path) -> None:
    answer, _ = Client(tmp_path).train(num_examples=0)
    assert "its weight must be at least 1" in str(answer.failure)
    client = Client(tmp_path, 2)
    client.ask(payload(START))
    task = client.exchange.read_task()
    assert task is not None
    TrainerSide(client.exchange).answer(task, num_examples=5)
    assert "its trainer answered train with something else" in str(client.ask(payload(START))[0].failure)


def test_extra_tensors_from_the_server_reach_the_trainer(tmp_path: Path) -> None:
    start = join(START, {"control": torch.ones(3)})
    answer, _ = Client(tmp_path, 1, start).train()
    assert answer.status == "step"


def test_an_error_of_the_trainer_reaches_the_server(tmp_path: Path) -> None:
    client = Client(tmp_path)
    client.ask(payload(START))
    task = client.exchange.read_task()
    assert task is not None
    relay = client.relay()
    client.ask(payload(START), relay)
    TrainerSide(client.exchange).answer(task, error={"type": "ValueError", "message": "no"})
    assert client.ask(payload(START), relay)[0].failure == "ValueError: no"


# -- a whole run, in one process ---------------------------------------------------------------------------------------


@dataclass
class Federation:
    """Three ranks and two rounds, each trainer a thread; of the ranks in `masked` the clients mask."""

    directory: Path
    masked: tuple[int, ...]
    payload_store: str
    said: list[bytes] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    _making: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> State:
        """Run to the end; returns the last state."""
        settings = ServerSettings(
            rounds=2, min_clients=3, checkpoint_dir=self.directory / "server", payload_store=self.payload_store,
            aggregate=("<BatchNorm*>=local", "secure(fedavg, range=4, threshold=2)"),
        )  # fmt: skip
        threads = [threading.Thread(target=self._train, args=(rank,), daemon=True) for rank in (1, 2, 3)]
        with ExitStack() as stack:
            server = stack.enter_context(open_server(settings, EMBEDDED))
            for rank in (1, 2, 3):
                exchange = Exchange(self.directory / "exchange", rank)
                stack.enter_context(exchange.hold("client"))
                by_reference = self.payload_store != "none"
                relay = Relay(
                    exchange, trainer_wait_s=BOUND_S, use_store=by_reference, mask_here=rank in self.masked
                )  # fmt: skip
                stack.enter_context(connected(Local(relay, rank, self.said), server.client_manager()))
            serve(server, 2, threads)
        end(server, threads)
        assert not self.errors, self.errors
        assert [line["accepted"] for line in server.run.history.lines] == [3, 3]
        return dict(map_file(max((self.directory / "server" / "server").glob("round-*/state.safetensors"))))

    def _train(self, rank: int) -> None:
        try:
            with self._making:  # torch's generator is that of the process
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
            model[2].weight = model[0].weight
            data = torch.randn(8 + rank, 4, generator=torch.Generator().manual_seed(rank))
            places: Any = {"exchange_dir": self.directory / "exchange", "checkpoint_dir": self.directory / "own"}
            with Trainer(rank, model, **places) as trainer:
                for task in trainer:
                    task.load_into(model)
                    if task.kind == "evaluate":
                        task.reply(loss=0.5, num_examples=1)
                        continue
                    loss = (model.train()(data) - data).square().mean()
                    for weight, gradient in zip(
                        model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
                    ):
                        weight.data -= 0.1 * gradient
                    self.updates.append(payload({"w": model[0].weight})[-64:])
                    task.reply(model, num_examples=len(data))
        except BaseException as exc:  # noqa: BLE001  (for the main thread)
            self.errors.append(exc)


@pytest.mark.parametrize("payload_store", ["auto", pytest.param("none", marks=pytest.mark.slow)])
def test_a_run_comes_to_the_same_bits_wherever_the_masks_are_made(tmp_path: Path, payload_store: str) -> None:
    runs = [Federation(tmp_path / str(len(masked)), masked, payload_store) for masked in ((), (1, 2), (1, 2, 3))]
    expected, *others = (each.run() for each in runs)
    assert expected.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for found in others:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for each in runs:
        assert len(each.updates) == 6
        assert not any(update in said for update in each.updates for said in each.said)
    # What was kept of the rounds is gone with the run.
    assert not list((tmp_path / "3" / "exchange" / "masked").glob("*/*"))
