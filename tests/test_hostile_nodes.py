"""A hostile SuperNode under a ServerApp: the same promises as on the embedded engine, without a wire between.

The ServerApp, the nodes and the trainers are threads of the test. So wrong answers come as fast as the server asks.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.client import Client
from flwr.clientapp import ClientApp
from flwr.common import serde
from flwr.proto.transport_pb2 import ServerMessage
from flwr.supercore.task_identity import TaskIdentity

from fedsplit import Trainer
from fedsplit.engines.superlink import apps
from fedsplit.run.history import read_history
from fedsplit.states.state_dict import map_file
from tests.bounds import BOUND_S
from tests.depth import scaled
from tests.hostile import HostileClient

HONEST, HOSTILE = (1, 2), range(3, 13)


class HostileNode(Client):
    """Lets a `HostileClient` answer what comes to a SuperNode."""

    def __init__(self, hostile: HostileClient) -> None:
        self._hostile = hostile

    def _answer(self, **question: Any) -> Any:
        reply = self._hostile._reply(ServerMessage(**question))
        if reply is None:
            raise ConnectionError("it left in the middle of a question")
        return reply

    def get_properties(self, ins: Any) -> Any:
        reply = self._answer(get_properties_ins=serde.get_properties_ins_to_proto(ins))
        return serde.get_properties_res_from_proto(reply.get_properties_res)

    def get_parameters(self, ins: Any) -> Any:
        reply = self._answer(get_parameters_ins=serde.get_parameters_ins_to_proto(ins))
        return serde.get_parameters_res_from_proto(reply.get_parameters_res)

    def fit(self, ins: Any) -> Any:
        return serde.fit_res_from_proto(self._answer(fit_ins=serde.fit_ins_to_proto(ins)).fit_res)

    def evaluate(self, ins: Any) -> Any:
        return serde.evaluate_res_from_proto(self._answer(evaluate_ins=serde.evaluate_ins_to_proto(ins)).evaluate_res)


class Nodes:
    """A grid whose nodes are ClientApps of this process; the number of a node is its rank.

    The hostile ones come once the honest ones were greeted and asked for the initial state.
    """

    def __init__(self, nodes: dict[int, tuple[ClientApp, Context]]) -> None:
        self.run = SimpleNamespace(run_id=7)
        self._nodes = nodes
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count()
        self._asked = 0
        self.most_threads = 0

    def get_node_ids(self) -> list[int]:
        return [*self._nodes] if self._asked > len(HONEST) else [*HONEST]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            names.append(str(next(self._numbers)))
            self._asked += 1
            app, context = self._nodes[message.metadata.dst_node_id]
            try:
                self._replies[names[-1]] = app(message, context)
            except Exception as exc:  # noqa: BLE001  (as a SuperNode does)
                self._replies[names[-1]] = Message(Error(0, f"{type(exc).__name__}: {exc}"), reply_to=message)
        self.most_threads = max(self.most_threads, threading.active_count())
        return names

    def pull_messages(self, names: Iterable[str]) -> list[Message]:
        return [self._replies.pop(name) for name in names]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a node that was turned away come back at once, and leave the log of the tests as it was."""
    monkeypatch.setattr("fedsplit.server.peer._REFUSED_S", 0.0)
    monkeypatch.setattr(apps, "_LOST_PAUSE_S", 0.0)
    monkeypatch.setattr(apps, "_NODES_S", 0.02)
    monkeypatch.setattr(apps, "_begin", lambda program, config: None)
    # Who a message is from, which Flower's process of a ServerApp sets.
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)
    # Thousands of lines, each of which is right.
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def count(rank: int, directory: Path) -> None:
    """Train: one more in every round."""
    state = {"count": torch.zeros(8)}
    with Trainer(rank, state, exchange_dir=directory / "exchange", checkpoint_dir=directory / "trainers") as trainer:
        for task in trainer:
            if task.kind == "evaluate":
                task.reply(loss=0.5, num_examples=3)
            else:
                task.reply({"count": task.state_dict["count"] + 1}, num_examples=3)


def context(rank: int, directory: Path) -> Context:
    config: dict[str, Any] = {"rank": rank, "exchange-dir": str(directory / "exchange")}
    return Context(run_id=7, node_id=rank, node_config=config, state=RecordDict(), run_config={})


def hostile_app(client: HostileClient) -> ClientApp:
    return ClientApp(client_fn=lambda _: HostileNode(client).to_client())


def test_the_honest_nodes_of_a_server_app_finish_every_round_with_the_same_bits(
    quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some 2,000 wrong answers; with ``FEDSPLIT_DEPTH=10``, 20,000."""
    rounds = scaled(10, 120)
    clients = [HostileClient("", rank=rank, seed=rank, spoils=0.8) for rank in HOSTILE]
    nodes = {rank: (apps.client_app, context(rank, tmp_path)) for rank in HONEST}
    nodes |= {client.rank: (hostile_app(client), context(client.rank, tmp_path)) for client in clients}
    grid = Nodes(nodes)
    config: dict[str, Any] = {
        "rounds": rounds, "min-clients": 2, "client-wait": 0.2, "checkpoint-dir": str(tmp_path / "checkpoints"),
    }  # fmt: skip
    trainers = [threading.Thread(target=count, args=(rank, tmp_path), daemon=True) for rank in HONEST]
    server = in_thread(lambda: apps.server_app(grid, context_of_run(config)))  # type: ignore[arg-type]
    for thread in trainers:
        thread.start()
    assert server() is None
    for thread in trainers:
        thread.join(BOUND_S)
    assert not [thread for thread in trainers if thread.is_alive()]
    directory = tmp_path / "checkpoints" / "server"
    lines: Any = read_history(directory / "history.jsonl")
    assert [line["round"] for line in lines] == [*range(1, rounds + 1)]
    assert [line["accepted"] for line in lines] == [2] * rounds
    assert not {"1", "2"} & {rank for line in lines for rank in line["refused"]}
    state = map_file(max(directory.glob("round-*/state.safetensors")))
    assert torch.equal(state["count"], torch.full((8,), float(rounds)))
    assert sum(client.spoiled for client in clients) >= scaled(100, 2_000)
    assert "rank 3: train not counted" in caplog.text and "turned away" in caplog.text
    assert grid.most_threads < 200


def context_of_run(config: dict[str, Any]) -> Context:
    return Context(run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=config)


def in_thread(job: Callable[[], Any]) -> Callable[[], BaseException | None]:
    """Start a job beside the test, whose signals it must not change; returns what waits for its end."""
    raised: list[BaseException | None] = []

    def run() -> None:
        try:
            job()
        except BaseException as exc:  # noqa: BLE001  (looked at by the test)
            raised.append(exc)
        else:
            raised.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> BaseException | None:
        thread.join(BOUND_S)
        assert raised, "it never ended"
        return raised[0]

    return wait
