"""A hostile client costs itself its part in the round, and nobody else anything: a live server, two honest ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch

from fedsplit.disk.digest import bytes_digest, file_digest
from fedsplit.errors import RecordError
from fedsplit.exchange.records import parse, read
from fedsplit.states.state_dict import encode
from fedsplit.wire.answers import Answer, Greeted, Joined, Taken
from fedsplit.wire.join import read_token
from tests.bounds import BOUND_S
from tests.depth import scaled
from tests.hostile import ESCAPES, Grammar, HostileClient, attacking
from tests.programs import Programs
from tests.test_five_programs import link_tests

SHOWN_NOWHERE = ("\x1b", "\x07", "\x00", "\u202e")


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Programs]:
    """Two honest ranks whose state is one more in every round."""
    link_tests(tmp_path)
    flags = ("--threads", "1", "--workload", "tests.unchanged:counting", "--workload-option", "hold=yes")
    found = Programs(tmp_path, model_flags=flags)
    yield found
    found.stop()


def attack(
    found: Programs, clients: Sequence[HostileClient], rounds: int, is_enough: Callable[[], bool]
) -> tuple[int, int]:
    """Run a federation under attack to its end; returns the most threads and bytes of memory that the server had.

    The last round ends once it was enough.
    """
    threads = memory = 0
    found.allow(rounds - 1)
    found.start_all()
    for rank in (1, 2):
        found.wait_for("server", f"rank {rank}: client")
    server = psutil.Process(found.processes["server"].pid)
    with attacking(*clients):
        deadline = time.monotonic() + BOUND_S
        while found.processes["server"].poll() is None and time.monotonic() < deadline:
            try:
                threads, memory = max(threads, server.num_threads()), max(memory, server.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            if is_enough():
                found.allow(rounds)
            time.sleep(0.1)
    codes = found.wait()
    assert codes == dict.fromkeys(codes, 0), f"{codes}\n{found.tails()}"
    return threads, memory


def assert_undisturbed(found: Programs, rounds: int) -> None:
    """The honest ranks finished every round, and the state is what it is without an attack."""
    state = b"".join(encode({"count": torch.full((8,), float(rounds))}))
    assert file_digest(found.final_state()) == bytes_digest(state)
    lines: Any = found.history()
    assert [line["round"] for line in lines] == [*range(1, rounds + 1)]
    assert [line["accepted"] for line in lines] == [2] * rounds
    assert not {"1", "2"} & {rank for line in lines for rank in line["refused"]}


def assert_harmless(found: Programs) -> None:
    """Nothing that a terminal or a browser obeys reaches a log, the history or the report."""
    for path in [found.log_path("server"), *found.checkpoints.glob("server/*.[hj]*")]:
        text = path.read_text(errors="replace")
        assert not [sequence for sequence in SHOWN_NOWHERE if sequence in text], path
        assert path.suffix not in (".html", ".svg") or "<script>alert" not in text, path


@pytest.mark.slow
@pytest.mark.parametrize("how", ["open", "join token", "asynchronous"])
def test_the_honest_finish_every_round_with_the_same_bits(federation: Programs, how: str) -> None:
    """Wrong answers of every kind, in greetings, rounds and evaluations, of ten clients at once.

    Some 2,000; with ``FEDSPLIT_DEPTH=10``, 20,000.
    """
    rounds, key = scaled(50, 140), None
    flags = ["--rounds", str(rounds), "--min-clients", "2", "--keep-checkpoints", "2"]
    with_token = how == "join token"
    if how == "asynchronous":
        # Nobody waits for the hostile ones, and whatever they say they are at work on, it is never merged.
        flags += ["--buffer", "2"]
    if with_token:
        token = federation.directory / "token"
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        federation.client_flags = ("--join-token-file", str(token))
        flags, key = [*flags, "--join-token-file", str(token)], read_token(token)
    federation.server_flags = flags
    clients = [
        HostileClient(f"127.0.0.1:{federation.port}", rank=rank, seed=rank, join_key=key, spoils=0.8)
        for rank in range(3, 13)
    ]
    threads, memory = attack(
        federation, clients, rounds, lambda: sum(client.spoiled for client in clients) >= scaled(100, 2_000)
    )
    assert_undisturbed(federation, rounds)
    assert_harmless(federation)
    assert "not counted" in federation.log("server")
    assert with_token or "turned away" in federation.log("server")
    # Flower serves a connection with a few threads and keeps some for the next ones.
    assert threads < 200
    assert memory < 1_500_000_000


class Stalling(HostileClient):
    """Would rather not be done: answers in one way for ever once it is asked for a task."""

    how = ""

    def honest(self, record: dict[str, Any]) -> dict[str, Any] | None:
        if record["op"] == "pull" and self.how == "byte by byte":
            return {}
        if record["op"] != "ask":
            return super().honest(record)
        match self.how:
            case "working":
                return {"status": "working", "waiting_for": None}
            case "never":
                self.stop.wait(BOUND_S)
            case "leaves":
                return None
            case "need":
                return {"status": "need"}
            case "byte by byte":
                payload = {"digest": "0" * 64, "bytes": 100_000_000, "via": "pull"}
                return {"status": "ok", "num_examples": 3, "payload": payload}
        return None

    def _piece(self, record: dict[str, Any], wrong: bool) -> bytes:
        return b"x"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["working", "never", "leaves", "byte by byte", "need"])
def test_what_is_late_is_over_whatever_the_client_says(federation: Programs, how: str) -> None:
    """It is always working, says nothing, leaves and comes back, sends a byte at a time, or wants the state again."""
    rounds = 2
    federation.server_flags = ("--rounds", str(rounds), "--min-clients", "2", "--round-timeout", "2")
    client = Stalling(f"127.0.0.1:{federation.port}", rank=3, spoils=0.0)
    client.how = how
    federation.allow(rounds)
    for name in ("server", "client-1", "client-2"):
        federation.start(name)
    for rank in (1, 2):
        federation.wait_for("server", f"rank {rank}: client")
    with attacking(client):
        federation.wait_for("server", "rank 3: client")
        # Only now can anybody give the initial state: a round begins when all are there.
        federation.start("model-2")
        federation.wait_for("model-2", "waiting for")
        federation.start("model-1")
        codes = federation.wait()
    assert codes == dict.fromkeys(codes, 0), f"{codes}\n{federation.tails()}"
    assert_undisturbed(federation, rounds)
    assert "3" in federation.history()[0]["refused"], federation.log("server")  # type: ignore[operator]


class First(HostileClient):
    """Is the lowest rank, so it is asked for the initial state, and names what nothing can be made of."""

    lie: ClassVar[dict[str, Any]] = {}

    def honest(self, record: dict[str, Any]) -> dict[str, Any] | None:
        answer = super().honest(record)
        if record["op"] == "ask" and record["kind"] == "initialize" and answer:
            answer |= self.lie
        return answer


@pytest.mark.slow
@pytest.mark.parametrize("lie", [
    {"payload": {"digest": "0" * 64, "bytes": 100, "via": "inline"}},
    {"payload": {"digest": "0" * 64, "bytes": 100, "via": "store"}},
    {"local_entries": {"own": ["int999", [3]]}},
    {"local_entries": {"own": ["float32", [2**40] * 60]}},
    {"local_entries": {"own": ["float32", [3]]}},
], ids=["digest", "store", "dtype", "size", "local by no rule"])  # fmt: skip
def test_an_initial_state_of_which_nothing_can_be_made_is_asked_of_another_rank(
    federation: Programs, lie: dict[str, Any]
) -> None:
    federation.ranks, federation.server_flags = 2, ("--rounds", "1", "--min-clients", "2")
    First.lie = lie
    # The honest one is rank 2: a single client and trainer.
    names = ("server", "client-2", "model-2")
    client = First(f"127.0.0.1:{federation.port}", rank=1, spoils=0.0)
    federation.start("server")
    federation.wait_for("server", "waiting for clients")
    federation.allow(1)
    with attacking(client):
        federation.wait_for("server", "rank 1: client")
        for name in names[1:]:
            federation.start(name)
        codes = federation.wait(names=names)
    assert codes == dict.fromkeys(names, 0), "\n".join(federation.log(name) for name in names)
    assert "no initial state from rank 1" in federation.log("server")
    assert "rank 2: gave the initial state" in federation.log("server")


def test_nothing_passes_the_gate_but_what_has_the_form_of_an_answer() -> None:
    grammar = Grammar(seed=1)
    honest = {
        "schema": "fedsplit/1", "status": "ok", "num_examples": 3, "loss": 0.5, "metrics": {"a": 1, "b": "text"},
        "seconds": 0.1, "payload": {"digest": "0" * 64, "bytes": 100, "via": "pull"}, "rank": 3, "have": 3,
        "exchange_id": "0" * 32, "nonce": "0" * 64, "proof": "0" * 64, "error": {"type": "a", "message": "b"},
    }  # fmt: skip
    passed = 0
    for _ in range(scaled(1_000, 10_000)):
        text = grammar.text(honest)
        for kind in (Answer, Greeted, Joined, Taken):
            try:
                answer = read(parse(str(text).encode(errors="surrogatepass"), "it"), kind, "it")
            except RecordError as exc:
                assert len(str(exc)) < 1_000
                assert str(exc).isprintable()
                continue
            passed += 1
            assert_typed(answer)
    assert passed, "what has one wrong field too many is refused, and one that nobody reads is not"


def assert_typed(answer: Any) -> None:
    if isinstance(answer, Answer):
        assert isinstance(answer.num_examples, int) and 0 <= answer.num_examples <= 2**53
        assert 0 <= answer.seconds < 1e10
        assert len(answer.metrics) <= 1_000
        for name, value in answer.metrics.items():
            assert len(name) <= 200 and isinstance(value, bool | int | float | str)
            assert not isinstance(value, str) or len(value) <= 10_000
    if isinstance(answer, Greeted | Joined):
        assert answer.rank >= 1
    for text in (answer.failure or "", answer.traceback.replace("\n", "")):
        assert text.isprintable() and len(text) < 60_000


def test_what_a_client_calls_its_error_is_shown_escaped_and_cut() -> None:
    answer = Answer(status="error", error={"type": ESCAPES, "message": "x" * 10_000, "traceback": f"a\n{ESCAPES}"})
    assert answer.failure.startswith(r"\x1b[2J\x1b]0;owned\x07<script>alert(1)</script>\x00\r\u202e: xxx")
    assert len(answer.failure) < 2_100
    assert answer.traceback.startswith("a\n\\x1b[2J")
