"""A hostile trainer in the exchange, and a hostile server: what the client between them says, and that it lives on.

Some 2,000 wrong answers and as many wrong questions; with ``FEDSPLIT_DEPTH=10``, 20,000.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common import EvaluateIns, FitIns, GetParametersIns, GetPropertiesIns, Parameters

from fedsplit.client.long_poll import LongPoll
from fedsplit.client.relay import Relay
from fedsplit.errors import FedSplitError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import SCHEMA, Request, read
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.states.state_dict import encode
from fedsplit.wire.answers import Answer, Greeted
from fedsplit.wire.protocol import KEY, TENSOR_TYPE, ask_record, pack, unpack
from tests.depth import scaled
from tests.hostile import Grammar

STATE = b"".join(encode({"weight": torch.ones(3)}))
DIGEST = hashlib.sha256(STATE).hexdigest()


class Shown(logging.Handler):
    """Looks at each line that is shown, and keeps none: some hold what they tell of, which may be megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.harmful = 0, ""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self.lines += 1
        try:
            text.encode()
        except UnicodeEncodeError:
            self.harmful = self.harmful or repr(text)
        if set(text) & set("\x1b\x00\x07"):
            self.harmful = self.harmful or repr(text)


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    """See that what is shown is text that a terminal can show."""
    logger, found = logging.getLogger("fedsplit"), Shown()
    # Else pytest would keep every record.
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(found)
    yield found
    logger.removeHandler(found)
    assert not found.harmful


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    return Exchange(tmp_path, 1)


@pytest.fixture
def relay(exchange: Exchange) -> Iterator[Relay]:
    """A client whose trainer is alive."""
    with exchange.hold("client"), exchange.hold("trainer"):
        yield Relay(exchange, trainer_wait_s=1e9)


def question(server_round: int, kind: str = "train", hold_s: float = 0.0) -> dict[str, Any]:
    request = Request(run_id="run", kind=kind, server_round=server_round, total_rounds=9)
    return ask_record(request, digest=DIGEST, payload_bytes=len(STATE), hold_s=hold_s, cancel=False)


def ask(relay: Relay, record: dict[str, Any], blob: bytes | None = STATE) -> Answer:
    blobs = [] if blob is None else [blob]
    reply = relay.fit(FitIns(Parameters(blobs, TENSOR_TYPE), pack(record)))
    return read(unpack(reply.metrics, "the client"), Answer, "the client")


def test_whatever_a_trainer_writes_the_client_says_what_the_server_takes(relay: Relay, exchange: Exchange) -> None:
    """Records and payloads of every wrong kind; then an honest answer still arrives."""
    grammar = Grammar(seed=2)
    for number in range(scaled(200, 2_000)):
        asked = ask(relay, question(number))
        assert asked.status in ("working", "error"), asked
        task = exchange.read_task()
        assert task is not None
        honest = {
            "schema": SCHEMA, "version": task.version, "run_id": "run", "kind": "train", "server_round": number,
            "status": "ok", "num_examples": 3, "loss": 0.5, "metrics": {"a": 1}, "seconds": 0.1,
            "error": {"type": "a", "message": "b", "traceback": "c"},
            "payload": {"file": f"result-{task.version}.safetensors", "bytes": len(STATE), "digest": DIGEST},
        }  # fmt: skip
        text = grammar.text(honest)
        exchange.result_path.write_bytes(text if isinstance(text, bytes) else str(text).encode(errors="replace"))
        if grammar.random.random() < 0.5:
            payload = grammar.random.choice([STATE, STATE[:-1], b"", b"x" * len(STATE), STATE * 2])
            exchange.payload_path("result", task.version).write_bytes(payload)
        # What it cannot believe it waits for; what it can is an answer of the right form.
        ask(relay, question(number), None)
        # As its trainer does; else each look at the directory would take longer than the one before.
        exchange.remove_payloads("result", below=task.version)
    # The last one may be a record of another version of fedsplit, which is an error until it is gone.
    exchange.result_path.unlink()
    answer = ask(relay, question(10**6))
    assert answer.status == "working"
    task = exchange.read_task()
    assert task is not None
    TrainerSide(exchange).answer(task, encode({"weight": torch.zeros(3)}), num_examples=5)
    answer = ask(relay, question(10**6), None)
    assert (answer.status, answer.num_examples) == ("ok", 5)


def test_whatever_a_server_says_the_client_does_it_or_ends_with_an_error_of_ours(
    relay: Relay, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Questions of every wrong kind, to every verb; then an honest server's are answered."""
    # A server may ask it to be held for a minute; not here, thousands of times.
    monkeypatch.setattr("fedsplit.client.relay.time.sleep", lambda seconds: None)
    monkeypatch.setattr(LongPoll, "wait", wait_no_time)
    grammar = Grammar(seed=3)
    honest = [
        {"op": "join", "run_id": "run", "nonce": "0" * 64},
        {"op": "hello", "run_id": "run", "nonce_name": "a", "store_root": "/nowhere", "proof": "0" * 64},
        question(1),
        {**question(2), "then": {**question(2, "evaluate"), "config": {"lr": 0.1}}, "split": [["a", True]]},
        {"op": "push", "digest": DIGEST, "bytes": len(STATE), "offset": 0},
        {"op": "pull", "digest": DIGEST, "bytes": len(STATE), "offset": 0},
        {"op": "finish", "run_id": "run", "outcome": "complete", "reason": ""},
        {"op": "refuse", "reason": "no"},
        {"op": "ping"},
    ]
    for _ in range(scaled(200, 2_000)):
        record = {"schema": SCHEMA, **grammar.random.choice(honest)}
        config: dict[str, Any] = {KEY: grammar.text(record)}
        blobs = grammar.random.choice([[], [b""], [STATE], [STATE[:-1]], [b"x" * 100, STATE]])
        parameters = Parameters(blobs, TENSOR_TYPE)
        with contextlib.suppress(FedSplitError):
            match grammar.random.randrange(4):
                case 0:
                    relay.get_properties(GetPropertiesIns(config))
                case 1:
                    relay.fit(FitIns(parameters, config))
                case 2:
                    relay.evaluate(EvaluateIns(parameters, config))
                case _:
                    relay.get_parameters(GetParametersIns(config))
        assert {path.parent for path in exchange.directory.rglob("*")} <= {exchange.directory}
    relay.begin_connection()
    hello = relay.get_properties(GetPropertiesIns(pack({"op": "hello", "run_id": "other", "nonce_name": ""})))
    assert read(unpack(hello.properties, "it"), Greeted, "it").rank == 1
    answer = ask(relay, {**question(1), "run_id": "other"})
    assert answer.status == "working"
    task = exchange.read_task()
    assert task is not None and task.run_id == "other"
    TrainerSide(exchange).answer(task, encode({"weight": torch.zeros(3)}), num_examples=5)
    assert ask(relay, {**question(1), "run_id": "other"}, None).num_examples == 5


def wait_no_time(self: LongPoll, version: int, hold_s: float, wait: Any = LongPoll.wait) -> Any:
    return wait(self, version, 0.0)


def test_the_grammar_is_the_same_for_the_same_seed() -> None:
    record = {"a": 1, "b": {"c": 2}}
    first, second = ([json.dumps(Grammar(7).record(record)) for _ in range(50)] for _ in range(2))
    assert first == second
