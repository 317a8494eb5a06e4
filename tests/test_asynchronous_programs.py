"""Asynchronous rounds with real programs: the server is killed, a trainer too, and the run is done again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bounds import BOUND_S
from tests.chaos import check_journal
from tests.programs import Programs, programs
from tests.test_five_programs import link_tests

ROUNDS = 8
# Each training ends when the test lets it.
HELD = ("--threads", "1", "--workload", "tests.held:digits")


@dataclass
class Again(Programs):
    """The same programs, with a replay in the place of the server."""

    original: Path = Path()

    def command(self, name: str) -> list[str]:
        command = super().command(name)
        if name != "server":
            return command
        address = f"127.0.0.1:{self.port}"
        return [command[0], "-m", "fedsplit", "replay", str(self.original), "--address", address,
                "--checkpoint-dir", str(self.checkpoints)]  # fmt: skip


@pytest.mark.slow
def test_a_killed_server_goes_on_by_its_journal_and_the_run_is_done_again_bit_for_bit(tmp_path: Path) -> None:
    for name in ("run", "again"):
        (tmp_path / name).mkdir()
    link_tests(tmp_path / "run")
    flags = ("--rounds", str(ROUNDS), "--buffer", "1")
    with programs(tmp_path / "run", server_flags=flags, model_flags=HELD) as federation:
        federation.allow(3)
        federation.start_all()
        federation.wait_until(lambda: len(federation.history()) >= 2)
        federation.kill("server")
        federation.kill("model-2")
        federation.start("server", "--resume")
        federation.start("model-2")
        federation.allow(ROUNDS)
        assert set(federation.wait().values()) == {0}
        check_journal(federation, rounds=ROUNDS)
        original, expected = federation.checkpoints, federation.final_state().read_bytes()
    with programs(tmp_path / "again", kind=Again, original=original) as federation:
        federation.start_all()
        assert set(federation.wait(2 * BOUND_S).values()) == {0}, federation.tails()
        assert f"replayed {ROUNDS} merges" in federation.log("server")
        assert federation.final_state().read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("where", ["superlink", "store"])
def test_a_killed_server_goes_on_by_its_journal_on_a_superlink_and_with_a_store_at_a_url(
    tmp_path: Path, where: str
) -> None:
    shared = tmp_path / "shared"
    flags = ("--engine", "superlink") if where == "superlink" else ("--payload-store", f"file://{shared}")
    rounds = 4 if where == "superlink" else ROUNDS
    server_flags = ("--rounds", str(rounds), "--buffer", "1", *flags)
    link_tests(tmp_path)
    with programs(tmp_path, server_flags=server_flags, client_flags=flags, model_flags=HELD) as federation:
        federation.allow(2)
        federation.start_all()
        federation.wait_until(lambda: len(federation.history()) >= 2)
        federation.kill("server")
        federation.start("server", "--resume")
        federation.allow(rounds)
        assert set(federation.wait(2 * BOUND_S).values()) == {0}, federation.tails()
        check_journal(federation, rounds=rounds)
        # Along with an evaluation, the next training would hold it up.
        assert not any("train ahead" in line["stages"] for line in federation.history())  # type: ignore[operator]
        if where == "store":
            assert "payloads by reference" in federation.log("server")
            # The last state is still there for whoever asks, and what the killed server was about to take.
            assert len(list(shared.iterdir())) <= 1 + federation.ranks


@pytest.mark.slow
def test_a_rank_that_leaves_for_good_and_one_that_comes_late_block_nobody(tmp_path: Path) -> None:
    link_tests(tmp_path)
    model_flags = ("--threads", "1", "--workload", "tests.unchanged:gated")
    flags = ("--rounds", "6", "--buffer", "2", "--evaluate-every", "0")
    with programs(tmp_path, ranks=3, server_flags=flags, model_flags=model_flags) as federation:
        for name in ("server", "client-1", "client-2", "model-1", "model-2"):
            federation.start(name)
        federation.wait_for("client-2", "train, round 3 of 6")
        for name in ("client-2", "model-2"):
            federation.kill(name)
        federation.start("model-3")
        federation.wait_for("model-3", "waiting for a client")
        federation.start("client-3")
        federation.wait_for("server", "rank 3: client")
        (tmp_path / "opened").touch()
        names = ["server", "client-1", "model-1", "client-3", "model-3"]
        assert set(federation.wait(names=names).values()) == {0}, federation.tails()
        ranks = [sorted(line["clients"]) for line in federation.history()]  # type: ignore[call-overload]
        assert ranks == [["1", "2"], ["1", "2"], ["1"], ["1", "3"], ["1", "3"], ["1", "3"]]


@pytest.mark.slow
def test_a_run_that_was_not_asynchronous_cannot_be_replayed(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fedsplit", "replay", "nowhere", "--checkpoint-dir", "again"],
        cwd=tmp_path, capture_output=True, text=True, timeout=BOUND_S, check=False,
    )  # fmt: skip
    assert "does not have every merge of a run: is it that of an asynchronous run?" in ended.stderr
    assert ended.returncode == 13
