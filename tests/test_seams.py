"""An exception that nobody thought of, at every seam of every program: one last line, the right code, nobody left.

It is planted into one of the five programs by `tests.planted`, in each thread that the program has. What is not looked
at here: the threads of a tracker and of the live table (tests/test_trackers.py, tests/test_console.py).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from flwr.common import Code, GetPropertiesRes, Status
from flwr.server.client_proxy import ClientProxy

from fedsplit.errors import RunFailedError
from fedsplit.run.directory import Run
from fedsplit.server.peer import Peer
from fedsplit.server.roster import Roster
from fedsplit.server.server import Server
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import map_file
from fedsplit.wire.protocol import pack, unpack
from tests.planted import PlantedError
from tests.programs import ROOT, Programs
from tests.test_five_programs import link_tests

ROUNDS = 3


@dataclass
class Planted(Programs):
    """Five programs, in some of which an exception is planted: (place, from which call on)."""

    faults: dict[str, tuple[str, int]] = field(default_factory=dict)

    def command(self, name: str) -> list[str]:
        python, script, *flags = super().command(name)
        if name not in self.faults:
            return [python, script, *flags]
        place, call = self.faults[name]
        return [python, str(ROOT / "tests" / "planted.py"), Path(script).stem, place, str(call), *flags]

    def last_line(self, name: str) -> str:
        return self.log(name).rstrip().rpartition("\n")[2]


def counting(*, sleep_s: float) -> tuple[str, ...]:
    return ("--threads", "1", "--workload", "tests.unchanged:counting", "--workload-option", f"sleep={sleep_s}")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Planted]:
    """Two ranks whose state is one more in every round."""
    link_tests(tmp_path)
    found = Planted(tmp_path, server_flags=("--rounds", str(ROUNDS)), model_flags=counting(sleep_s=0.1))
    yield found
    found.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("place", "call"), [
    ("fedsplit.server.round:Rounds._ask_for_initial_state", 1),
    ("fedsplit.server.round:Rounds.round", 2),
    ("fedsplit.server.conversation:Conversation.until_done", 3),
    ("fedsplit.server.conversation:Conversation.fetch", 2),
    ("fedsplit.server.round:read_update", 3),
    ("fedsplit.run.directory:Run.save", 2),
    ("fedsplit.run.history:History.append", 2),
    ("fedsplit.disk.checkpoints:BackgroundWriter.close", 1),
], ids=lambda value: str(value).rpartition(":")[2])  # fmt: skip
def test_in_any_thread_of_the_server_it_ends_the_run_and_everybody_is_told(
    federation: Planted, place: str, call: int
) -> None:
    """In Flower's main thread, in those of the ranks, in that of the checkpoints."""
    federation.faults["server"] = (place, call)
    federation.start_all()
    codes = federation.wait()
    assert codes == dict.fromkeys(federation.names, 15), federation.tails()
    assert not is_open(federation.port)
    assert federation.last_line("server").startswith("server: error: the server failed: PlantedError: nobody thought")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place", "call"), [
    ("client-2", "fedsplit.client.relay:Relay.get_properties", 1),
    ("client-2", "fedsplit.client.relay:Relay.fit", 2),
    ("client-2", "fedsplit.client.relay:Relay.evaluate", 1),
    ("client-2", "fedsplit.client.relay:Relay.silence_s", 1),
    ("client-2", "fedsplit.exchange.client_side:ClientSide.offer", 3),
    ("client-2", "fedsplit.client.long_poll:LongPoll.wait", 3),
    ("model-2", "fedsplit.exchange.trainer_side:TrainerSide.next", 2),
    ("model-2", "fedsplit.exchange.trainer_side:TrainerSide.answer", 2),
    ("model-2", "fedsplit.trainer.local_state:LocalStates.begin", 2),
], ids=lambda value: str(value).rpartition(":")[2])  # fmt: skip
def test_in_a_client_or_a_trainer_it_ends_that_program_alone_and_the_next_one_goes_on(
    federation: Planted, name: str, place: str, call: int
) -> None:
    federation.faults[name] = (place, call)
    if "silence" in place:
        # It is looked at once a second.
        federation.model_flags = counting(sleep_s=1)
    federation.start_all()
    codes = federation.wait(names=[name])
    assert codes == {name: 1}, federation.tails()
    assert "PlantedError: nobody thought of this" in federation.last_line(name)
    del federation.faults[name]
    federation.start(name)
    codes = federation.wait()
    assert codes == dict.fromkeys(federation.names, 0), federation.tails()
    state = map_file(federation.final_state())
    assert [line["round"] for line in federation.history()] == [*range(1, ROUNDS + 1)]
    # A task that failed is that rank's loss in that round, and nothing else.
    assert torch.equal(state["count"], torch.full((8,), float(ROUNDS)))


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Flowers(ClientProxy):
    """A connection as Flower has it, and what it was asked."""

    def __init__(self) -> None:
        super().__init__("c" * 32)
        self.asked: list[str] = []

    def get_properties(self, ins: Any, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        operation = unpack(ins.config, "the server")["op"]
        self.asked.append(operation)
        answer = {"rank": 1, "exchange_id": "0" * 32} if operation == "hello" else {}
        return GetPropertiesRes(Status(Code.OK, ""), pack(answer))

    def reconnect(self, ins: Any, timeout: float | None, group_id: int | None) -> Any:
        self.asked.append("reconnect")

    def _none(self, *_: object) -> Any:
        raise NotImplementedError

    get_parameters = fit = evaluate = _none


def raising(*_: object, **__: object) -> NoReturn:
    raise PlantedError("nobody thought of this")


@pytest.mark.parametrize("place", ["peer.Peer.greet", "roster.Roster._admit"])
def test_in_the_thread_of_a_greeting_it_is_said_and_the_client_is_sent_away(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Left without an answer, a client would hang for as long as its server lives, and nobody would know why."""
    monkeypatch.setattr(f"fedsplit.server.{place}", raising)
    flowers = Flowers()
    Roster("run", None)._greet(Peer(flowers))
    assert flowers.asked[-2:] == ["refuse", "reconnect"]
    assert "PlantedError: nobody thought of this" in caplog.text


def test_once_the_rounds_are_over_it_does_not_keep_the_port_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower closes the port after both: what they raised would leave a process that holds it and does nothing."""
    monkeypatch.setattr("fedsplit.server.server.reconnect_clients", raising)
    monkeypatch.setattr(Server, "_run_rounds", raising)
    monkeypatch.setattr(Roster, "finish", raising)
    with Run(tmp_path) as run:
        server = Server(run, ServerSettings())
        server.fit(1, None)
        server.disconnect_all_clients(None)
    assert isinstance(server.failure, RunFailedError)
