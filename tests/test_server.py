"""The server as Flower runs it: however a run ends, the clients are told and the port is given back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.common import Parameters

from fedsplit.engines.embedded import claim_port
from fedsplit.errors import AggregationError, ConnectionFailedError, RunFailedError
from fedsplit.run.directory import Run
from fedsplit.server.roster import Roster
from fedsplit.server.server import Server
from fedsplit.server.settings import ServerSettings
from fedsplit.server.strategy import Strategy
from tests.ports import free_port


@pytest.mark.parametrize(("raised", "failure", "says"), [
    (AggregationError("the rule"), AggregationError, "the rule"),
    (ZeroDivisionError("nobody thought of it"), RunFailedError, "ZeroDivisionError: nobody thought of it"),
])  # fmt: skip
def test_whatever_goes_wrong_ends_the_run_and_the_clients_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, failure: type[Exception], says: str
) -> None:
    told: list[Any] = []

    def fail(self: Server) -> None:
        raise raised

    monkeypatch.setattr(Server, "_run_rounds", fail)
    monkeypatch.setattr(Roster, "finish", lambda self, *details: told.append(details))
    with Run(tmp_path) as run:
        server = Server(run, ServerSettings())
        server.fit(3, None)
    assert type(server.failure) is failure and says in str(server.failure)
    ((outcome, reason, _),) = told
    assert (outcome, reason) == ("failed", str(server.failure))


def test_the_round_is_asked_of_our_strategy_through_flowers_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's server has the strategy that the rounds use, and not one of its own."""
    seen: list[Any] = []
    monkeypatch.setattr("fedsplit.server.round.Rounds.run_all", lambda self: seen.append(self.strategy))
    monkeypatch.setattr(Roster, "finish", lambda self, *details: None)
    with Run(tmp_path) as run:
        server = Server(run, ServerSettings(aggregate=("median",), min_clients=3, seed=5))
        server.fit(3, None)
    assert server.failure is None
    assert seen == [server.strategy] and isinstance(server.strategy, Strategy)
    assert server.strategy.settings == ServerSettings(aggregate=("median",), min_clients=3, seed=5)


def test_a_round_whose_line_was_saved_whole_is_only_noted(tmp_path: Path) -> None:
    """The server was killed after the checkpoint of a foreign strategy's round and before its line was written."""
    import threading

    import torch

    from fedsplit.disk.checkpoints import BackgroundWriter
    from fedsplit.server.observer import Observer
    from fedsplit.server.round import Rounds
    from fedsplit.states.state_dict import encode
    from fedsplit.wire.protocol import EMBEDDED

    line = {
        "round": 1, "seconds": 1.0, "train": {}, "evaluate": {"loss": 0.5}, "clients": {}, "asked": 0, "accepted": 0,
        "refused": {}, "stages": {},
    }  # fmt: skip
    settings = ServerSettings(rounds=1, strategy="FedAvg", min_clients=1)
    with Run(tmp_path) as run:
        payload = run.payloads.put(encode({"w": torch.zeros(1)}))
        run.save(1, payload.digest, {"state.safetensors": payload.path}, {}, line, None)
    with Run(tmp_path, resume=True) as run:
        roster: Any = Waiting(run.run_id, None)
        strategy: Any = Strategy()
        strategy.remembers_evaluations = True
        strategy.configure_fit = strategy.configure_evaluate = None
        Rounds(
            run=run, settings=settings, strategy=strategy, roster=roster, engine=EMBEDDED, remote=None,
            observer=Observer(), writer=BackgroundWriter(), stop=threading.Event(),
        ).run_all()  # fmt: skip
        assert run.history.lines == [line]


def test_a_metric_does_not_stand_in_for_what_the_line_has_a_name_for() -> None:
    """Seen before: a trainer's metric called stages ended the run for everybody."""
    from fedsplit.run.time_account import account, update_bytes
    from fedsplit.server.peer import Reply
    from fedsplit.server.round import _row
    from fedsplit.watch.rounds import metrics_of, value
    from fedsplit.watch.trackers import scalars_of
    from tests.unchanged import TAKEN

    reply = Reply(status="ok", num_examples=3, seconds=1.5, metrics=TAKEN)
    row = _row(reply) | {"bytes": 100, "stages": {"training": 1.0}}
    assert (row["num_examples"], row["seconds"]) == (3, 1.5)
    line: Any = {"round": 1, "seconds": 2.0, "stages": {"train": 1.0}, "train": {}, "clients": {"1": row}}
    assert update_bytes(line) == 100
    assert account(line)["training"] == 1.0
    assert metrics_of([line]) == []
    assert value(line, "evaluate", "loss", "1") != value(line, "evaluate", "loss", "1")
    assert scalars_of(line)["seconds/round"] == 2.0


class Waiting(Roster):
    """Whoever is waited for is there."""

    def wait_for(self, num_clients: int, timeout: float = 86400) -> bool:
        return True


def test_the_parameters_of_instructions_are_the_state_or_a_payload_of_their_own(tmp_path: Path) -> None:
    import torch

    from fedsplit.server.state import GlobalState
    from fedsplit.states.state_dict import encode

    with Run(tmp_path) as run:
        state = GlobalState(run.payloads, None)
        state.put(encode({"w": torch.zeros(2)}))
        assert state.payload_of(state.parameters) is state.payload
        other = state.payload_of(Parameters([b"".join(encode({"w": torch.ones(2)}))], "safetensors"))
        same = state.payload_of(Parameters([b"".join(encode({"w": torch.zeros(2)}))], "safetensors"))
        assert same.digest == state.payload.digest != other.digest
        state.drop([other.digest, same.digest])
        assert run.payloads.take(other.digest) is None
        assert run.payloads.take(same.digest), "what is the state's is kept"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that end with their process")
def test_of_two_servers_that_start_at_the_same_moment_one_has_the_port() -> None:
    address = f"127.0.0.1:{free_port()}"
    with claim_port(address), pytest.raises(ConnectionFailedError, match="another server has it"), claim_port(address):
        pass
    with claim_port(address):
        """Given back."""
