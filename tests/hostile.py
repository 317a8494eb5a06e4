"""A client, a trainer and a server that are wrong or hostile: they keep to the protocol up to a point, and then do not.

What they say comes from `Grammar`: records in which a field is missing, of another type, huge, negative, not a number,
nested, or text that a terminal or a browser would obey; and texts that are no records. It is drawn from a seed, so a
run that fails can be run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from flwr.common import serde
from flwr.common.typing import (
    Code,
    EvaluateRes,
    FitRes,
    GetParametersRes,
    GetPropertiesRes,
    Parameters,
    Status,
)
from flwr.proto.transport_pb2 import ClientMessage, ServerMessage
from flwr.proto.transport_pb2_grpc import FlowerServiceStub

from fedsplit.exchange.records import SCHEMA
from fedsplit.wire.join import Transcript
from fedsplit.wire.protocol import KEY, TENSOR_TYPE

OK = Status(Code.OK, "")
# What a terminal and a browser would obey. No program may show it as it is.
ESCAPES = "\x1b[2J\x1b]0;owned\x07<script>alert(1)</script>\x00\r\u202e"
_VALUES: list[Callable[[random.Random], Any]] = [
    lambda _: None,
    lambda _: True,
    lambda _: False,
    lambda _: 0,
    lambda _: -1,
    lambda _: -5,
    lambda _: 2**31,
    lambda _: 2**63,
    lambda _: -(2**64),
    lambda _: 10**400,
    lambda _: 1.5,
    lambda _: float("nan"),
    lambda _: float("inf"),
    lambda _: -float("inf"),
    lambda _: 1e308,
    lambda _: "",
    lambda _: "abc",
    lambda _: "../../x",
    lambda _: "/etc/passwd",
    lambda _: ESCAPES,
    lambda _: "\ud800",
    lambda _: "0" * 64,
    lambda _: "0" * 63 + "\n",
    lambda rng: "x" * rng.choice([300, 20_000, 200_000]),
    lambda _: [],
    lambda _: {},
    lambda _: [1, [2, [3]]],
    lambda _: {"a": {"b": {"c": 1}}},
    lambda rng: {str(number): number for number in range(rng.choice([5, 5_000]))},
    lambda _: json.loads("[" * 200 + "]" * 200),
]


class Grammar:
    """Draws what no honest program would say."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self) -> Any:
        """Return anything that JSON can say, and some things that it cannot."""
        return self.random.choice(_VALUES)(self.random)

    def record(self, honest: dict[str, Any]) -> Any:
        """Return a record with one to three of its fields made wrong, or something else altogether."""
        if self.random.random() < 0.03:
            return self.value()
        wrong = json.loads(json.dumps(honest))
        for _ in range(self.random.randint(1, 3)):
            self._spoil(wrong)
        return wrong

    def text(self, honest: dict[str, Any]) -> Any:
        """Return the text of such a record, or a text that is none; now and then something that is no text."""
        chance = self.random.random()
        if chance < 0.02:
            return self.random.choice([b"\xff\xfe", 1, 2.5, True])
        text = json.dumps(self.record(honest))
        if chance < 0.06:
            return text[: self.random.randrange(len(text))]
        if chance < 0.07:
            return "[" * 100_000
        if chance < 0.075:
            return json.dumps({"schema": SCHEMA, "text": "x" * 6_000_000})
        return text

    def _spoil(self, record: dict[str, Any]) -> None:
        where = record
        while (inner := [each for each in where.values() if isinstance(each, dict)]) and self.random.random() < 0.4:
            where = self.random.choice(inner)
        keys = [*where]
        chance = self.random.random()
        if keys and chance < 0.2:
            del where[self.random.choice(keys)]
        elif keys and chance < 0.8:
            where[self.random.choice(keys)] = self.value()
        else:
            where[self.random.choice(["schema", "x", ESCAPES, "metrics", "then", "error", "k" * 5_000])] = self.value()


@dataclass
class HostileClient:
    """Speaks Flower's protocol and ours, as a client of a rank that has no trainer.

    Left alone it answers as an honest client would, with an update of another shape than the model's. So not one of
    its updates may ever count.

    Parameters
    ----------
    spoils
        How often an answer is made wrong, from 0 to 1.
    join_key
        With it, what comes before the proof is honest, or nothing would be let in.
    """

    address: str
    rank: int
    seed: int = 0
    spoils: float = 0.5
    join_key: bytes | None = None
    drops: float = 0.05
    answered: int = 0
    spoiled: int = 0
    connections: int = 0
    asked: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    answer: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None

    def __post_init__(self) -> None:
        self.grammar = Grammar(self.seed)
        self._blob = _blob()
        self._transcript: Transcript | None = None

    def run(self) -> None:
        """Connect again and again until stopped or until no server is there any more."""
        away = 0
        while not self.stop.is_set() and away < 50:
            try:
                with grpc.insecure_channel(self.address, options=_UNLIMITED) as channel:
                    self.converse(channel)
                away = 0
            except grpc.RpcError as exc:
                # Dropped is what it deserves; not there at all is the end.
                away = away + 1 if exc.code() == grpc.StatusCode.UNAVAILABLE else 0  # type: ignore[attr-defined]
                self.stop.wait(0.05 if away else 0)

    def converse(self, channel: grpc.Channel) -> None:
        """Answer in one connection until either side ends it."""
        answers: list[ClientMessage] = []
        ready = threading.Condition()
        over = False
        self.connections += 1

        def say() -> Iterator[ClientMessage]:
            while True:
                with ready:
                    ready.wait_for(lambda: answers or over)
                    if not answers:
                        return
                    message = answers.pop(0)
                yield message

        stream = FlowerServiceStub(channel).Join(say())
        try:
            for question in stream:
                reply = self._reply(question)
                if reply is None or self.stop.is_set():
                    return
                with ready:
                    answers.append(reply)
                    ready.notify()
        finally:
            with ready:
                over = True
                ready.notify()
            stream.cancel()

    def _reply(self, question: ServerMessage) -> ClientMessage | None:
        verb = question.WhichOneof("msg")
        if verb == "reconnect_ins" or verb is None:
            return None
        config = serde.scalar_from_proto
        ins = getattr(question, verb)
        record = json.loads(str({name: config(value) for name, value in ins.config.items()}[KEY]))
        operation = record.get("op")
        self.asked.append(operation)
        self.answered += 1
        honest = self.answer(record) if self.answer else self.honest(record)
        if honest is None:
            return None
        honest = {"schema": SCHEMA, **honest}
        proving = self.join_key is not None and operation in ("join", "hello")
        wrong = not proving and self.grammar.random.random() < self.spoils
        if wrong:
            self.spoiled += 1
            if self.grammar.random.random() < self.drops:
                return None
        text = self.grammar.text(honest) if wrong else json.dumps(honest)
        fields = {KEY: text}
        if wrong and self.grammar.random.random() < 0.02:
            fields = {}
        blobs = [] if operation != "ask" or "payload" not in honest else [self._blob]
        if operation == "pull":
            blobs = [self._piece(record, wrong)]
        if wrong and self.grammar.random.random() < 0.05:
            blobs = self.grammar.random.choice([[], [b""], [b"x" * 100], [self._blob[:-1]], [self._blob] * 3])
        parameters = Parameters(blobs, TENSOR_TYPE)
        match verb:
            case "get_properties_ins":
                message = serde.get_properties_res_to_proto(GetPropertiesRes(OK, fields))
                return ClientMessage(get_properties_res=message)
            case "get_parameters_ins":
                message = serde.get_parameters_res_to_proto(GetParametersRes(OK, parameters))
                return ClientMessage(get_parameters_res=message)
            case "fit_ins":
                return ClientMessage(fit_res=serde.fit_res_to_proto(FitRes(OK, parameters, 1, fields)))
            case _:
                return ClientMessage(evaluate_res=serde.evaluate_res_to_proto(EvaluateRes(OK, 0.5, 1, fields)))

    def honest(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """Return what an honest client would answer."""
        match record.get("op"):
            case "join" if self.join_key is not None:
                transcript = self._transcript = Transcript(
                    run_id=record["run_id"], rank=self.rank, exchange_id=self._exchange_id, server_nonce=record["nonce"]
                )
                return {
                    "rank": self.rank, "exchange_id": self._exchange_id, "nonce": transcript.client_nonce,
                    "proof": transcript.proof(self.join_key, "client"),
                }  # fmt: skip
            case "hello":
                return {"rank": self.rank, "exchange_id": self._exchange_id, "held": None, "nonce": None}
            case "ask":
                evaluates = record["kind"] == "evaluate"
                digest = hashlib.sha256(self._blob).hexdigest()
                reply = {
                    "status": "ok", "num_examples": 3, "loss": 0.25, "metrics": {"accuracy": 0.5}, "seconds": 0.1,
                }  # fmt: skip
                payload = {"digest": digest, "bytes": len(self._blob), "via": "inline"}
                return reply if evaluates else {**reply, "payload": payload}
            case "push":
                return {"have": record["bytes"]}
            case _:
                return {}

    @property
    def _exchange_id(self) -> str:
        return f"{self.seed:032x}"

    def _piece(self, record: dict[str, Any], wrong: bool) -> bytes:
        piece = self._blob[record["offset"] : record["offset"] + record["bytes"]]
        return self.grammar.random.choice([b"", piece[:1], piece * 2, b"x" * 9_000_000]) if wrong else piece


_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def _blob() -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


@contextlib.contextmanager
def attacking(*clients: HostileClient) -> Iterator[None]:
    """Let hostile clients run beside the block."""
    threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for client in clients:
            client.stop.set()
        deadline = time.monotonic() + 30
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
