"""Some hundred quick rounds leave nothing behind: no file, thread or memory more than some dozen rounds do."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.bounds import BOUND_S
from tests.depth import scaled
from tests.programs import Programs, programs
from tests.test_five_programs import link_tests

WARM = 60
# What one look may differ from another by: a connection that is being made, a checkpoint that is being written.
MORE_FILES, MORE_THREADS, MORE_BYTES = 8, 8, 20_000_000


class Held(NamedTuple):
    """What a program holds."""

    files: int
    threads: int
    memory: int


def held_by(federation: Programs) -> dict[str, Held]:
    found = {}
    for name, process in federation.processes.items():
        program = psutil.Process(process.pid)
        found[name] = Held(program.num_fds(), program.num_threads(), program.memory_info().rss)
    return found


def files_of(*directories: Path) -> int:
    return sum(len([*directory.rglob("*")]) for directory in directories)


def wait_for_round(federation: Programs, number: int) -> None:
    federation.wait_until(lambda: f"round {number}/" in federation.log("server"), BOUND_S)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["auto", "none"])
def test_hundreds_of_rounds_leave_nothing_behind(tmp_path: Path, store: str) -> None:
    """With payloads by reference and with payloads in messages."""
    link_tests(tmp_path)
    rounds = scaled(300, 300)
    flags = ("--rounds", str(rounds), "--payload-store", store)
    model_flags = ("--threads", "1", "--workload", "tests.unchanged:counting", "--workload-option", "hold=yes")
    with programs(tmp_path, server_flags=flags, model_flags=model_flags) as federation:
        federation.allow(WARM)
        federation.start_all()
        wait_for_round(federation, WARM)
        before, files = held_by(federation), files_of(federation.exchange, federation.checkpoints)
        federation.allow(rounds - 1)
        wait_for_round(federation, rounds - 1)
        after, files_after = held_by(federation), files_of(federation.exchange, federation.checkpoints)
        federation.allow(rounds)
        codes = federation.wait()
        assert codes == dict.fromkeys(federation.names, 0), federation.tails()
    for name in federation.names:
        assert after[name].files <= before[name].files + MORE_FILES, (name, before[name], after[name])
        assert after[name].threads <= before[name].threads + MORE_THREADS, (name, before[name], after[name])
        assert after[name].memory <= before[name].memory + MORE_BYTES, (name, before[name], after[name])
    assert files_after <= files + MORE_FILES
