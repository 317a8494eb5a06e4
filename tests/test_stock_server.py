"""`fedsplit.Strategy` in Flower's own server, with Flower's own clients: it is a strategy like any other there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import flwr.client
import flwr.server
import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    GetParametersRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import Server, ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.app import start_grid
from flwr.server.strategy import FedAvg

import fedsplit
from fedsplit.errors import UsageError
from tests.bounds import BOUND_S
from tests.ports import free_port

KEYS = ["body.weight", "body.count", "head.bias"]
OK = Status(Code.OK, "")


def start() -> list[Any]:
    return [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(0, dtype=np.int64), np.zeros(3, dtype=np.float64)]


class Trained(NumPyClient):
    """Trains by adding its own number, over as many examples."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.configs: list[dict[str, Any]] = []

    def get_parameters(self, config: dict[str, Any]) -> list[Any]:
        return start()

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:
        self.configs.append(config)
        return [array + np.array(self.number, dtype=array.dtype) for array in parameters], self.number, {"loss": 0.5}

    def evaluate(self, parameters: list[Any], config: dict[str, Any]) -> tuple[float, int, dict[str, Any]]:
        return float(parameters[0].mean()), self.number, {"accuracy": float(self.number)}


class Local(ClientProxy):
    """Flower's client without a wire."""

    def __init__(self, cid: str, client: NumPyClient) -> None:
        super().__init__(cid)
        self._client = client.to_client()

    def get_properties(self, ins: Any, timeout: float | None, group_id: int | None) -> Any:
        return self._client.get_properties(ins)

    def get_parameters(self, ins: Any, timeout: float | None, group_id: int | None) -> GetParametersRes:
        return self._client.get_parameters(ins)

    def fit(self, ins: Any, timeout: float | None, group_id: int | None) -> FitRes:
        return self._client.fit(ins)

    def evaluate(self, ins: Any, timeout: float | None, group_id: int | None) -> EvaluateRes:
        return self._client.evaluate(ins)

    def reconnect(self, ins: Any, timeout: float | None, group_id: int | None) -> Any:
        return None


def run(strategy: Any, rounds: int = 3, clients: Iterable[NumPyClient] = ()) -> tuple[list[Any], Any]:
    """Run Flower's own server; returns the last parameters and the history."""
    manager = SimpleClientManager()
    for index, client in enumerate(clients or [Trained(1), Trained(3)]):
        manager.register(Local(f"{index}c{index}" * 4, client))
    server = Server(client_manager=manager, strategy=strategy)
    history, _ = server.fit(rounds, None)
    return parameters_to_ndarrays(server.parameters), history


def test_it_comes_to_the_numbers_of_flowers_own_fedavg() -> None:
    ours, our_history = run(fedsplit.Strategy(keys=KEYS, rounds=3))
    theirs, their_history = run(FedAvg())
    for mine, other in (ours[0], theirs[0]), (ours[2], theirs[2]):
        np.testing.assert_allclose(mine, other, rtol=1e-6)
    # Counters are not averaged: the greatest counts.
    assert (ours[1], ours[1].dtype) == (9, np.int64)
    assert [array.dtype for array in ours] == [array.dtype for array in start()]
    np.testing.assert_allclose(
        [loss for _, loss in our_history.losses_distributed], [loss for _, loss in their_history.losses_distributed],
        rtol=1e-6,
    )  # fmt: skip
    assert our_history.metrics_distributed["accuracy"] == [(number, 2.5) for number in (1, 2, 3)]
    assert our_history.metrics_distributed_fit["loss"] == [(number, 0.5) for number in (1, 2, 3)]


def test_every_part_has_its_rule_by_name_or_by_its_place() -> None:
    rules = ("body.*=max", "head.bias=frozen")
    named, _ = run(fedsplit.Strategy(rules, keys=KEYS), rounds=1)
    placed, _ = run(fedsplit.Strategy(("2=frozen", "max")), rounds=1)
    for arrays in (named, placed):
        np.testing.assert_array_equal(arrays[0], start()[0] + 3)
        np.testing.assert_array_equal(arrays[2], np.zeros(3))


def test_it_starts_from_given_parameters_and_tells_every_client_its_config() -> None:
    clients = [Trained(1), Trained(1)]
    initial = ndarrays_to_parameters([array + 10 for array in start()])
    strategy = fedsplit.Strategy(train_config={"lr": 0.1}, initial_parameters=initial, evaluate_every=0)
    arrays, history = run(strategy, rounds=1, clients=clients)
    np.testing.assert_array_equal(arrays[0], start()[0] + 11)
    assert [client.configs for client in clients] == [[{"lr": 0.1}]] * 2
    assert history.losses_distributed == []


class Wrong(Trained):
    """Sends a NaN."""

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, dict[str, Any]]:
        return [parameters[0] * np.float32("nan"), *parameters[1:]], 1, {}


def test_what_must_not_be_merged_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    clients = [Trained(1), Wrong(1)]
    arrays, _ = run(fedsplit.Strategy(keys=KEYS), rounds=1, clients=clients)
    np.testing.assert_array_equal(arrays[0], start()[0] + 1)
    assert "NaN or Inf in 'body.weight'" in caplog.text
    arrays, _ = run(fedsplit.Strategy(keys=KEYS, min_results=2), rounds=1, clients=clients)
    np.testing.assert_array_equal(arrays[0], start()[0])


@pytest.mark.parametrize(("strategy", "says"), [
    (lambda: fedsplit.Strategy(("head.*=local", "fedavg"), keys=KEYS), "head.*=local: a client of Flower's own sends"),
    (lambda: fedsplit.Strategy(keys=KEYS[:2]), "keys names 2 arrays, the parameters have 3"),
    (lambda: fedsplit.Strategy(("tail.*=max", "fedavg"), keys=KEYS), "matches no entry"),
    (lambda: fedsplit.Strategy("krum(byzantine=1)"), "at least 5 updates"),
])  # fmt: skip
def test_what_cannot_work_there_is_said(strategy: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(strategy())
    assert says in str(caught.value)


def test_safetensors_payloads_are_merged_as_payloads() -> None:
    import torch

    from fedsplit.states.state_dict import decode, encode

    def blob(value: float) -> Parameters:
        return Parameters([b"".join(encode({"w": torch.full((2,), value).bfloat16()}))], "safetensors")

    strategy, manager = fedsplit.Strategy(), SimpleClientManager()
    clients: list[Any] = [Local(cid, Trained(1)) for cid in ("a", "b")]
    for client in clients:
        manager.register(client)
    strategy.configure_fit(1, blob(0.0), manager)
    results = [(client, FitRes(OK, blob(value), 1, {})) for client, value in zip(clients, (1.0, 3.0), strict=True)]
    parameters, _ = strategy.aggregate_fit(1, results, [])
    assert parameters is not None and parameters.tensor_type == "safetensors"
    assert decode(parameters.tensors[0])["w"].tolist() == [2.0, 2.0]


@pytest.mark.slow
def test_flowers_server_and_clients_run_it_over_a_real_connection() -> None:
    address, found = f"127.0.0.1:{free_port()}", []

    def serve() -> None:
        found.append(
            flwr.server.start_server(
                server_address=address, config=ServerConfig(num_rounds=2),
                strategy=fedsplit.Strategy("median", rounds=2, train_config={"lr": 0.1}),
            )
        )  # fmt: skip

    def join(number: int) -> None:
        while True:
            try:
                flwr.client.start_client(server_address=address, client=Trained(number).to_client(), insecure=True)
                return
            except Exception as exc:  # the server may not listen yet
                if found or "UNAVAILABLE" not in str(exc):
                    raise

    threads = [threading.Thread(target=join, args=(number,), daemon=True) for number in (1, 3)]
    for thread in threads:
        thread.start()
    serve()
    for thread in threads:
        thread.join(BOUND_S)
    (history,) = found
    # The median of two is their mean: each round adds 2 to a mean of 2.5.
    assert history.losses_distributed == [(1, 4.5), (2, 6.5)]


class InProcess:
    """A grid whose nodes are a ClientApp in this process."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.run = SimpleNamespace(run_id=7)
        self._nodes = {100 + number: number for number in numbers}

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        app = ClientApp(client_fn=lambda context: Trained(self._nodes[node]).to_client())
        context = Context(run_id=7, node_id=node, node_config={}, state=RecordDict(), run_config={})
        return app(message, context)


def test_it_is_the_strategy_of_a_server_app() -> None:
    """What ``ServerApp(server_fn=...)`` does with its components, over a grid without processes."""
    grid: Any = InProcess([1, 3])
    strategy = fedsplit.Strategy(keys=KEYS, rounds=2)
    history = start_grid(grid=grid, config=ServerConfig(num_rounds=2), strategy=strategy)
    assert [loss for _, loss in history.losses_distributed] == [2.5 + 2.5, 2.5 + 5.0]
