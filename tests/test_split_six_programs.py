"""A model that is cut, in six processes: the whole model's result, whoever is killed; `tests.chaos` does more of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples.make_certificates import make_certificates
from tests.chaos import check
from tests.programs import programs
from tests.six_programs import TAIL, SixPrograms
from tests.test_five_programs import link_tests

pytestmark = pytest.mark.slow


def secured(directory: Path) -> tuple[list[str], list[str]]:
    """Return the flags of server and clients with TLS and a join token."""
    make_certificates(directory / "c", ["127.0.0.1"])
    (directory / "token").write_text("0123456789abcdef" * 4)
    (directory / "token").chmod(0o600)
    token = ["--join-token-file", "token"]
    files = ["--ssl-ca-certfile", "c/ca.pem", "--ssl-certfile", "c/server.pem", "--ssl-keyfile", "c/server-key.pem"]
    return [*files, *token], ["--root-certificates", "c/ca.pem", *token]


@pytest.mark.parametrize(("mode", "tail", "is_secured"), [
    ("sfl-v2", None, True), ("sequential", None, False), ("sfl-v1", TAIL, False),
])  # fmt: skip
def test_killed_in_the_middle_of_a_round_it_comes_to_what_the_whole_model_does(
    mode: str, tail: str | None, is_secured: bool, tmp_path: Path
) -> None:
    """The trainer of the upper part, the server, which is resumed, and a rank's trainer and client at once."""
    rounds = 4
    server_flags, client_flags = secured(tmp_path) if is_secured else ([], [])
    link_tests(tmp_path)
    with programs(
        tmp_path, SixPrograms, mode=mode, tail=tail, server_flags=("--rounds", str(rounds), *server_flags),
        client_flags=client_flags, model_flags=("--threads", "1", "--workload", "tests.held:cut_digits"),
    ) as federation:  # fmt: skip
        federation.start_all(["upper", "model-2", "client-1", "server", "client-2", "model-1"])
        for number, victims in enumerate((["upper"], ["server"], ["model-1", "client-2"]), start=1):
            # Rank 1 is some steps into the training.
            federation.wait_until((tmp_path / f"held-{number}").exists)
            for victim in victims:
                federation.kill(victim)
                federation.start(victim, *(["--resume"] if victim == "server" else []))
            federation.allow(number)
        federation.allow(rounds)
        codes = federation.wait()
        assert codes == dict.fromkeys(codes, 0), f"{codes}\n{federation.tails()}"
        assert "the trainer of the upper part is new: it is given" in federation.log("server")
        assert federation.history()[-1]["evaluate"]["accuracy"] > 0.9  # type: ignore[index]
        check(federation, rounds=rounds)


def test_on_a_superlink_it_says_what_a_batch_costs_there(tmp_path: Path) -> None:
    server_flags = ["--rounds", "1", "--min-clients", "1", "--evaluate-every", "0", "--engine", "superlink"]
    with programs(
        tmp_path, SixPrograms, ranks=1, options={"epochs": "1", "batch-size": "2000"}, server_flags=server_flags,
        client_flags=["--engine", "superlink"],
    ) as federation:  # fmt: skip
        federation.start_all()
        codes = federation.wait()
        assert codes == dict.fromkeys(codes, 0), f"{codes}\n{federation.tails()}"
        assert re.search(r"on a superlink a step takes \d+\.\d s for its messages", federation.log("server"))
        assert federation.history()[0]["split"]["steps"] == 1  # type: ignore[index]
        check(federation, rounds=1)
