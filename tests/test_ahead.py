"""The next round's training asked for along with an evaluation, where each question of an engine costs seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common import Code, ConfigRecord, FitIns, FitRes, Parameters, Status

from fedsplit import Trainer
from fedsplit.client.relay import Relay
from fedsplit.disk.payload_store import PayloadStore, StoredPayload
from fedsplit.disk.remote_store import RemoteStore
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request
from fedsplit.server.conversation import Conversation, RoundContext
from fedsplit.server.peer import Peer
from fedsplit.states.state_dict import decode, encode
from fedsplit.wire.protocol import SUPERLINK, TENSOR_TYPE, ask_record, pack, unpack
from tests.bounds import BOUND_S
from tests.handoffs import digest_of, request

MODEL = {"weight": torch.zeros(3)}
STATE = b"".join(bytes(chunk) for chunk in encode(MODEL))
DIGEST = digest_of(STATE)
EVALUATE, TRAIN = request("evaluate", 1), request("train", 2)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    exchange = Exchange(tmp_path, 1)
    with exchange.hold("client"):
        yield greeted(exchange)


def greeted(exchange: Exchange) -> Relay:
    relay = Relay(exchange, trainer_wait_s=60.0, engine=SUPERLINK)
    relay.begin_connection()
    return relay


@contextmanager
def trainer(directory: Path, seen: list[Any], *, train_s: float = 0.0, fails: str = "") -> Iterator[None]:
    """Run a loop in a thread that counts its trainings in its local state and in the weights."""

    def loop() -> None:
        with Trainer(
            rank=1, exchange_dir=directory, checkpoint_dir=directory / "checkpoints", model=dict(MODEL)
        ) as trainer:
            for task in trainer:
                seen.append((task.kind, task.server_round))
                if task.kind == fails:
                    task.fail(ValueError("no such luck"))
                elif task.kind == "evaluate":
                    task.reply(loss=0.5, num_examples=4)
                else:
                    time.sleep(train_s)
                    count = (task.local_state or {"count": 0})["count"] + 1
                    weights = {"weight": task.state_dict["weight"] + count}
                    task.reply(weights, num_examples=8, local_state={"count": count})

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        greeted(Exchange(directory, 1))._side.finish("run-a", "complete")
        thread.join(BOUND_S)
        assert not thread.is_alive()


def ask(
    relay: Relay, what: Request, *, then: Request | None = None, hold_s: float = 20.0
) -> tuple[dict[str, Any], list[bytes]]:
    record = ask_record(what, digest=DIGEST, payload_bytes=len(STATE), hold_s=hold_s, cancel=False, then=then)
    reply = relay.fit(FitIns(Parameters([STATE], TENSOR_TYPE), pack(record)))
    return unpack(reply.metrics, "the relay"), reply.parameters.tensors


def weights(blobs: list[bytes]) -> list[float]:
    return decode(bytearray(blobs[0]))["weight"].tolist()


def test_one_question_brings_the_evaluation_and_the_next_update(relay: Relay, tmp_path: Path) -> None:
    seen: list[Any] = []
    with trainer(tmp_path, seen):
        reply, blobs = ask(relay, EVALUATE, then=TRAIN)
    assert seen == [("evaluate", 1), ("train", 2)]
    assert (reply["status"], reply["loss"], reply["num_examples"]) == ("ok", 0.5, 4)
    assert (reply["then"]["status"], reply["then"]["num_examples"]) == ("ok", 8)
    assert weights(blobs) == [1.0, 1.0, 1.0]


def test_a_training_that_outlasts_the_question_is_begun_and_done_once(relay: Relay, tmp_path: Path) -> None:
    seen: list[Any] = []
    with trainer(tmp_path, seen, train_s=1.5):
        reply, blobs = ask(relay, EVALUATE, then=TRAIN, hold_s=0.5)
        assert (reply["status"], reply["then"]["status"], blobs) == ("ok", "working", [])
        assert reply["then"]["held_s"] <= 0.6
        reply, blobs = ask(relay, TRAIN)
    assert (reply["status"], weights(blobs)) == ("ok", [1.0, 1.0, 1.0])
    assert seen == [("evaluate", 1), ("train", 2)]


def test_an_evaluation_that_is_not_done_in_time_begins_nothing(relay: Relay) -> None:
    reply, _ = ask(relay, EVALUATE, then=TRAIN, hold_s=0.1)
    assert reply["status"] == "working" and "then" not in reply


def test_a_reply_that_was_lost_is_made_again_from_the_same_local_state(relay: Relay, tmp_path: Path) -> None:
    seen: list[Any] = []
    with trainer(tmp_path, seen):
        ask(relay, request("train", 1))
        _, first = ask(relay, EVALUATE, then=TRAIN)
        _, again = ask(greeted(Exchange(tmp_path, 1)), EVALUATE, then=TRAIN)
    assert weights(first) == weights(again) == [2.0, 2.0, 2.0]
    assert seen == [("train", 1), ("evaluate", 1), ("train", 2), ("evaluate", 1), ("train", 2)]


def test_a_training_that_fails_costs_the_evaluation_nothing(relay: Relay, tmp_path: Path) -> None:
    with trainer(tmp_path, [], fails="train"):
        reply, blobs = ask(relay, EVALUATE, then=TRAIN)
    assert (reply["status"], reply["loss"], blobs) == ("ok", 0.5, [])
    assert reply["then"]["error"]["message"] == "no such luck"


def test_an_evaluation_that_fails_begins_nothing(relay: Relay, tmp_path: Path) -> None:
    seen: list[Any] = []
    with trainer(tmp_path, seen, fails="evaluate"):
        reply, _ = ask(relay, EVALUATE, then=TRAIN)
    assert reply["status"] == "error" and "then" not in reply
    assert seen == [("evaluate", 1)]


class Client:
    """A connection to a client that gives one reply, and the roster that knows it."""

    def __init__(self, reply: dict[str, Any], blob: bytes | None) -> None:
        self._reply = FitRes(Status(Code.OK, ""), Parameters([blob] if blob else [], TENSOR_TYPE), 0, pack(reply))
        self.asked: list[dict[str, Any]] = []
        proxy: Any = self
        self._peer = Peer(proxy)
        self._peer.held = DIGEST

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        self.asked.append(unpack(ins.config, "the server"))
        return self._reply

    def wait_for_rank(self, rank: int, timeout_s: float) -> Peer:
        return self._peer


PAYLOAD = {"digest": DIGEST, "bytes": len(STATE), "via": "inline"}


@pytest.mark.parametrize(("then", "failure", "has_blob"), [
    ({"status": "ok", "num_examples": 8, "payload": PAYLOAD, "held_s": 1.5}, None, True),
    ({"status": "error", "error": {"type": "ValueError", "message": "no"}, "held_s": 1.5}, "ValueError: no", False),
    ({"status": "working", "held_s": 1.5}, "none yet", False),
])  # fmt: skip
def test_the_server_keeps_what_came_along(
    tmp_path: Path, then: dict[str, Any], failure: str | None, has_blob: bool
) -> None:
    store = PayloadStore(tmp_path / "payloads")
    store.open()
    client = Client({"status": "ok", "loss": 0.5, "num_examples": 4, "then": then}, STATE if has_blob else None)
    roster: Any = client
    context = RoundContext(roster=roster, store=store, remote=None, client_wait_s=1.0,
                           stop=threading.Event(), engine=SUPERLINK)  # fmt: skip
    state = StoredPayload(digest=DIGEST, bytes=len(STATE), path=tmp_path / "state")
    conversation = Conversation(context=context, rank=1, request=EVALUATE, state=state, then=replace(TRAIN))
    answer = conversation.until_done()
    assert (answer.failure, answer.loss, answer.blob) == (None, 0.5, None)
    assert client.asked[0]["then"]["kind"] == "train"
    assert answer.then is not None and answer.then.held_s == 1.5
    if failure == "none yet":
        assert answer.ahead is None
    else:
        assert answer.ahead is not None
        assert answer.ahead.failure == failure
        assert answer.ahead.blob == (STATE if has_blob else None)


def test_the_relay_of_the_next_message_takes_up_what_the_one_before_left(tmp_path: Path) -> None:
    remote, local = RemoteStore("memory://payloads"), PayloadStore(tmp_path / "payloads")
    for store in (None, local, remote):
        before, after = (Relay(Exchange(tmp_path, 1), trainer_wait_s=60.0, remote=remote) for _ in range(2))
        before._store, before.long_poll.missing_since = store, 5.0
        after.take_up(ConfigRecord({**before.leave()}))
        found = after._store
        assert after.long_poll.missing_since == 5.0
        assert found is store if store is not local else found is not None and found.announced_root == str(local.root)


def test_a_client_that_gives_up_what_nobody_cancelled_fails_its_task_alone(tmp_path: Path) -> None:
    """Without a deadline the message could not be made once, and the run would have ended for everybody."""
    roster: Any = Client({"status": "cancelled"}, None)
    store = PayloadStore(tmp_path / "payloads")
    context = RoundContext(roster=roster, store=store, remote=None, client_wait_s=1.0, stop=threading.Event())
    answer = Conversation(context=context, rank=1, request=request("train", 1)).until_done()
    assert answer.failure == "its client gave up a task that nobody had cancelled"
