"""A large state in messages: piece by piece to the client, and from where it stopped on the next connection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.common import FitIns, GetParametersIns, Parameters

from fedsplit.client.relay import Relay
from fedsplit.disk.payload_store import PayloadStore
from fedsplit.errors import RecordError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.server.conversation import Conversation, RoundContext
from fedsplit.server.peer import PeerLostError, Reply
from fedsplit.wire.answers import ResultPayload
from fedsplit.wire.protocol import EMBEDDED, TENSOR_TYPE, ask_record, pack, unpack
from tests.handoffs import blob, digest_of, names_in, request

STATE = blob("a state", 100_000)
DIGEST = digest_of(STATE)
STEP = 40_000


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    exchange = Exchange(tmp_path, 1)
    with exchange.hold("client"):
        relay = Relay(exchange, trainer_wait_s=60.0)
        relay.begin_connection()
        yield relay


def push(relay: Relay, offset: int, content: bytes = STATE, digest: str = DIGEST) -> dict:
    record = pack({"op": "push", "digest": digest, "bytes": len(content), "offset": offset})
    piece = content[offset : offset + STEP]
    return unpack(relay.fit(FitIns(Parameters([piece], TENSOR_TYPE), record)).metrics, "the relay")


def ask(relay: Relay) -> dict:
    record = ask_record(request(), digest=DIGEST, payload_bytes=len(STATE), hold_s=0.0, cancel=False)
    return unpack(relay.fit(FitIns(Parameters([], TENSOR_TYPE), pack(record))).metrics, "the relay")


def test_a_state_that_came_in_pieces_is_what_the_trainer_gets(relay, tmp_path):
    have = 0
    while have < len(STATE):
        have = push(relay, have)["have"]
    assert ask(relay)["status"] == "working"
    task = TrainerSide(Exchange(tmp_path, 1)).next()
    assert (tmp_path / "rank-1" / task.payload.file).read_bytes() == STATE


def test_a_new_connection_goes_on_where_the_old_one_broke(relay):
    push(relay, 0)
    push(relay, STEP)
    relay.begin_connection()
    assert push(relay, 0)["have"] == 2 * STEP
    assert push(relay, 2 * STEP)["have"] == len(STATE)
    assert ask(relay)["status"] == "working"


def test_half_a_state_is_none(relay):
    push(relay, 0)
    assert ask(relay)["status"] == "need"


def test_a_state_with_another_digest_is_refused_and_can_be_sent_again(relay):
    wrong = b"x" * STEP
    assert "digest" in push(relay, 0, wrong)["error"]["message"]
    for offset in range(0, len(STATE), STEP):
        push(relay, offset)
    assert ask(relay)["status"] == "working"


def test_a_result_is_pulled_piece_by_piece(relay, tmp_path):
    for offset in range(0, len(STATE), STEP):
        push(relay, offset)
    ask(relay)
    exchange, result = Exchange(tmp_path, 1), blob("a result", 100_000)
    with exchange.hold("trainer"):
        side = TrainerSide(exchange)
        side.answer(side.next(), [result], num_examples=1)
        assert ask(relay)["payload"]["digest"] == digest_of(result)
    found = b""
    while len(found) < len(result):
        record = {"op": "pull", "digest": digest_of(result), "offset": len(found), "bytes": STEP}
        found += relay.get_parameters(GetParametersIns(pack(record))).parameters.tensors[0]
    assert found == result


class Pulled:
    """A connected client that delivers pieces of a result; a number of them is an error of the connection instead."""

    def __init__(self, *pieces: bytes | None) -> None:
        self._pieces = list(pieces)
        self.offsets: list[int] = []

    def pull(self, digest: str, offset: int, piece_bytes: int, *, most_s: float) -> bytes:
        self.offsets.append(offset)
        piece = self._pieces.pop(0)
        if piece is None:
            raise PeerLostError
        return piece

    def wait_for_rank(self, rank: int, timeout_s: float) -> Pulled:
        return self

    def drop(self, peer: Pulled) -> None:
        """As the roster does: what comes next is another connection."""


def fetch(tmp_path: Path, client: Pulled, size: int = len(STATE)) -> bytes:
    store = PayloadStore(tmp_path / "payloads")
    store.open()
    context = RoundContext(
        roster=client, store=store, remote=None, client_wait_s=1.0, stop=threading.Event(),
        engine=replace(EMBEDDED, piece_bytes=STEP),
    )  # fmt: skip
    try:
        conversation = Conversation(context=context, rank=1, request=request())
        payload = ResultPayload(digest=DIGEST, bytes=size, via="pull")
        return bytes(conversation.fetch(Reply(status="ok", payload=payload)))
    finally:
        assert names_in(store.root) == set()


def test_a_pull_goes_on_where_the_connection_broke(tmp_path):
    client = Pulled(STATE[:STEP], None, STATE[STEP : 2 * STEP], STATE[2 * STEP :])
    assert fetch(tmp_path, client) == STATE
    assert client.offsets == [0, STEP, STEP, 2 * STEP]


def test_a_result_with_another_digest_leaves_nothing_behind(tmp_path):
    with pytest.raises(RecordError, match="have digest"):
        fetch(tmp_path, Pulled(STATE[:STEP], b"x" * STEP, STATE[2 * STEP :]))


def test_a_piece_of_another_length_than_was_asked_for_is_refused(tmp_path):
    """A byte at a time would keep everybody for ever."""
    for piece in (b"x", b"x" * (STEP + 1)):
        with pytest.raises(RecordError, match="pieces of another length"):
            fetch(tmp_path, Pulled(piece))


def test_a_size_that_nothing_could_hold_is_a_fault_of_that_rank_alone(tmp_path):
    with pytest.raises(RecordError, match="too little space"):
        fetch(tmp_path, Pulled(), size=10**18)
