"""The join token: who lacks it is told so and gets nothing, who has it takes part, and it is nowhere to be read."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.common import FitIns, GetPropertiesIns, GetPropertiesRes, Parameters

from fedsplit.client.relay import Relay
from fedsplit.errors import RecordError, RefusedError, UsageError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import read
from fedsplit.server.roster import Roster
from fedsplit.wire.join import Transcript, new_nonce, read_token
from fedsplit.wire.protocol import Message, pack, unpack
from tests.bounds import BOUND_S
from tests.programs import programs

TOKEN = "correct-horse-battery-staple"
KEY, OTHER = b"k" * 32, b"o" * 32


def token_file(path: Path, token: str = TOKEN, mode: int = 0o600) -> Path:
    path.write_text(token + "\n")
    path.chmod(mode)
    return path


# -- the file ------------------------------------------------------------------------------------------------------


def test_the_same_token_gives_the_same_key_whatever_white_space_ends_it(tmp_path: Path) -> None:
    first = read_token(token_file(tmp_path / "a"))
    (tmp_path / "b").write_text(TOKEN)
    (tmp_path / "b").chmod(0o600)
    assert first == read_token(tmp_path / "b")
    assert first != read_token(token_file(tmp_path / "c", TOKEN + "!"))
    assert TOKEN.encode() not in (first or b"")
    assert read_token(None) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o602])
def test_a_token_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(UsageError, match=f"chmod 600 {tmp_path}") as raised:
        read_token(token_file(tmp_path / "token", mode=mode))
    assert TOKEN not in str(raised.value)


def test_a_credential_of_systemd_is_this_users_alone_although_its_mode_shows_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = token_file(tmp_path / "token", mode=0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_token(token)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path, mode in ((tmp_path / "all", 0o444), (elsewhere / "token", 0o440)):
        with pytest.raises(UsageError, match="can be opened by others"):
            read_token(token_file(path, mode=mode))


def test_a_token_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_token(tmp_path / "missing")
    with pytest.raises(UsageError, match="at least 16 characters"):
        read_token(token_file(tmp_path / "short", "123456789012345"))
    (tmp_path / "directory").mkdir(mode=0o700)
    with pytest.raises(UsageError, match=r"not a regular file|Is a directory"):
        read_token(tmp_path / "directory")


# -- the proofs ----------------------------------------------------------------------------------------------------


def transcript(**changes: Any) -> Transcript:
    fields = {"run_id": "r", "rank": 1, "exchange_id": "e", "server_nonce": "1" * 64, "client_nonce": "2" * 64}
    return Transcript(**(fields | changes))


@pytest.mark.parametrize("change", [
    {"run_id": "other"}, {"rank": 2}, {"exchange_id": "other"}, {"server_nonce": "3" * 64}, {"client_nonce": "3" * 64},
    {"run_id": "r1", "rank": 1}, {"run_id": "r1", "exchange_id": "e"},
])  # fmt: skip
def test_a_proof_holds_for_nothing_but_its_own_connection_rank_and_run(change: dict[str, Any]) -> None:
    proof = transcript().proof(KEY, "client")
    assert transcript().is_proof(KEY, "client", proof)
    assert not transcript(**change).is_proof(KEY, "client", proof)
    assert not transcript().is_proof(OTHER, "client", proof)


def test_one_sides_proof_is_not_the_others(tmp_path: Path) -> None:
    assert not transcript().is_proof(KEY, "server", transcript().proof(KEY, "client"))
    assert not transcript().is_proof(KEY, "client", None)
    assert not transcript().is_proof(KEY, "client", "")
    # "1" of the rank moved to the end of the run's id must not come to the same bytes.
    assert transcript(run_id="r1", rank=2).proof(KEY, "client") != transcript(run_id="r", rank=12).proof(KEY, "client")


def test_a_nonce_is_fresh_and_nothing_else_is_one() -> None:
    assert new_nonce() != new_nonce()
    challenge = {"op": "join", "nonce": new_nonce()}
    assert read(challenge, Message, "the server").nonce == challenge["nonce"]
    for value in ("", "a" * 63, "g" * 64, "A" * 64, 1):
        with pytest.raises(RecordError, match="nonce"):
            read({**challenge, "nonce": value}, Message, "the server")


# -- the greeting --------------------------------------------------------------------------------------------------


class FakeProxy:
    """A connection to a relay in the same process that keeps what went over it."""

    def __init__(self, relay: Any, cid: str = "1") -> None:
        self.cid = cid
        self.relay = relay
        self.asked: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []

    def get_properties(self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        self.asked.append(unpack(ins.config, "the server"))
        reply = self.relay.get_properties(ins)
        self.answered.append(unpack(reply.properties, "a client"))
        return reply

    def reconnect(self, *_: Any) -> None:
        """The end of the connection."""


def relay_of(directory: Path, rank: int = 1, join_key: bytes | None = None) -> Relay:
    exchange = Exchange(directory, rank)
    exchange.directory.mkdir(parents=True, exist_ok=True)
    relay = Relay(exchange, trainer_wait_s=1.0, join_key=join_key)
    relay.begin_connection()
    return relay


def greet(roster: Roster, proxy: Any) -> None:
    # Threads of other tests' rosters may be there, and ping for as long as this process lives.
    before = set(threading.enumerate())
    roster.register(proxy)
    for thread in set(threading.enumerate()) - before:
        if thread.name == f"greet-{proxy.cid[:8]}":
            thread.join(BOUND_S)
            assert not thread.is_alive(), "it is still greeted"


def test_who_knows_the_token_is_let_in_and_the_server_proves_it_too(tmp_path: Path) -> None:
    roster, proxy = Roster("run", None, join_key=KEY), FakeProxy(relay_of(tmp_path, join_key=KEY))
    greet(roster, proxy)
    assert roster.ranks() == [1]
    assert [record["op"] for record in proxy.asked] == ["join", "hello"]
    assert proxy.relay.refused is None


@pytest.mark.parametrize(("server", "client", "said_to_client", "said_by_server"), [
    (KEY, OTHER, "wrong join token", "another join token"),
    (KEY, None, "asks for a join token", "no join token"),
    (None, KEY, "asks for no join token", "turned this server down"),
])  # fmt: skip
def test_both_sides_are_told_why_a_client_does_not_take_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, server: bytes | None, client: bytes | None, said_to_client: str,
    said_by_server: str,
) -> None:  # fmt: skip
    roster, proxy = Roster("run", None, join_key=server), FakeProxy(relay_of(tmp_path, join_key=client))
    logging.getLogger("fedsplit").propagate = True
    with caplog.at_level(logging.DEBUG, "fedsplit"):
        greet(roster, proxy)
    assert roster.ranks() == []
    assert said_to_client in str(proxy.relay.refused)
    assert said_by_server in caplog.text
    # Of the run it learns the id, of the server's disk nothing.
    before_proof = [record for record in proxy.asked if record["op"] in ("join", "refuse")]
    assert all(set(record) <= {"schema", "op", "run_id", "nonce", "reason"} for record in before_proof)
    if server is not None:
        assert len(before_proof) == len(proxy.asked)


def test_a_recorded_proof_is_worth_nothing_in_the_next_connection(tmp_path: Path) -> None:
    honest = FakeProxy(relay_of(tmp_path, join_key=KEY))
    greet(Roster("run", None, join_key=KEY), honest)
    recorded = iter(honest.answered)
    replaying = SimpleNamespace(
        cid="2", reconnect=lambda *_: None, refusals=[],
        get_properties=lambda ins, *_: GetPropertiesRes(honest.relay and _ok(), pack(next(recorded, {}))),
    )  # fmt: skip
    roster = Roster("run", None, join_key=KEY)
    greet(roster, replaying)
    assert roster.ranks() == []


def test_a_proof_lets_only_its_own_rank_in(tmp_path: Path) -> None:
    class Other(FakeProxy):
        def get_properties(
            self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
        ) -> GetPropertiesRes:
            reply = super().get_properties(ins, timeout, group_id)
            if self.asked[-1]["op"] == "hello":
                reply.properties = pack({**self.answered[-1], "rank": 7})
            return reply

    roster = Roster("run", None, join_key=KEY)
    greet(roster, Other(relay_of(tmp_path, join_key=KEY)))
    assert roster.ranks() == []


def test_a_server_that_has_proved_nothing_gets_no_work_done(tmp_path: Path) -> None:
    relay = relay_of(tmp_path, join_key=KEY)
    with pytest.raises(RefusedError, match="not proved"):
        relay.fit(FitIns(Parameters([], ""), pack({"op": "ask", "kind": "train"})))
    with pytest.raises(RefusedError, match="not proved"):
        relay.get_properties(GetPropertiesIns(pack({"op": "finish", "run_id": "r", "outcome": "complete"})))
    assert not relay._exchange.finished_path.exists()
    # A proof of the connection before counts for nothing in the next one.
    greet(Roster("run", None, join_key=KEY), FakeProxy(relay))
    assert relay._knows_server
    relay.begin_connection()
    assert not relay._knows_server


def _ok() -> Any:
    from flwr.common import Code, Status

    return Status(Code.OK, "")


# -- the programs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_run_of_those_with_the_token_completes_and_the_others_are_told(tmp_path: Path) -> None:
    right, wrong = token_file(tmp_path / "token"), token_file(tmp_path / "wrong", "another-secret-of-many-letters")
    flags = ("--rounds", "2", "--join-token-file", str(right), "--verbose")
    with programs(tmp_path, ranks=4, server_flags=flags, model_flags=("--threads", "1")) as federation:
        federation.start("server")
        federation.start("client-3", "--join-token-file", str(wrong), "--verbose")
        federation.start("client-4")
        assert federation.wait(names=["client-3", "client-4"]) == {"client-3": 8, "client-4": 8}, federation.tails()
        for rank in (1, 2):
            federation.start(f"client-{rank}", "--join-token-file", str(right), "--verbose")
            federation.start(f"model-{rank}")
        names = ["server", "client-1", "client-2", "model-1", "model-2"]
        assert set(federation.wait(names=names).values()) == {0}, federation.tails()
        logs = "".join(federation.log(name) for name in federation.names)
        assert "wrong join token" in federation.log("client-3")
        assert "asks for a join token" in federation.log("client-4")
        assert "rank 3: turned away" in federation.log("server")
        assert "rank 4: turned away" in federation.log("server")
        assert all(set(line["clients"]) == {"1", "2"} for line in federation.history())  # type: ignore[call-overload]
    for secret in (TOKEN, "another-secret-of-many-letters", str((read_token(right) or b"").hex())):
        assert secret not in logs
        assert secret not in (federation.checkpoints / "server" / "run.json").read_text()
