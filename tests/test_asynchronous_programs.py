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

ROUNDS = 8


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
    flags = ("--rounds", str(ROUNDS), "--buffer", "1")
    with programs(tmp_path / "run", server_flags=flags) as federation:
        federation.start_all()
        federation.wait_until(lambda: len(federation.history()) >= 2)
        federation.kill("server")
        federation.kill("model-2")
        federation.start("server", "--resume")
        federation.start("model-2")
        assert set(federation.wait().values()) == {0}
        check_journal(federation, rounds=ROUNDS)
        original, expected = federation.checkpoints, federation.final_state().read_bytes()
    with programs(tmp_path / "again", kind=Again, original=original) as federation:
        federation.start_all()
        assert set(federation.wait(2 * BOUND_S).values()) == {0}, federation.tails()
        assert f"replayed {ROUNDS} merges" in federation.log("server")
        assert federation.final_state().read_bytes() == expected


@pytest.mark.slow
def test_a_run_that_was_not_asynchronous_cannot_be_replayed(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fedsplit", "replay", "nowhere", "--checkpoint-dir", "again"],
        cwd=tmp_path, capture_output=True, text=True, timeout=BOUND_S, check=False,
    )  # fmt: skip
    assert "does not have every merge of a run: is it that of an asynchronous run?" in ended.stderr
    assert ended.returncode == 13
