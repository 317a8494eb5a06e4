"""Disks that fill or lose a directory in the middle of a run: nothing is lost, and all is said.

Each disk is a small file system in memory. Where the machine does not let a test mount one, the tests are skipped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.errors import CheckpointError, ExchangeError, NoSpaceError
from fedsplit.run.history import History, read_history
from fedsplit.states.state_dict import map_file
from tests.programs import Programs
from tests.test_five_programs import link_tests

ROUNDS, FIRST = 6, 3
TRAINERS, CLIENTS = ("model-1", "model-2"), ("client-1", "client-2")


@dataclass
class Disk:
    """A small file system."""

    path: Path

    def fill(self) -> None:
        """Leave not a byte."""
        with (self.path / "filler").open("wb") as file:
            try:
                while file.write(bytes(1 << 16)):
                    file.flush()
            except OSError:
                pass

    def free(self) -> None:
        (self.path / "filler").unlink()

    def protect(self) -> None:
        """Let whoever opens a file from now on find a read-only disk.

        It is mounted over itself. A plain ``remount,ro`` is refused while a program holds a lock file open.
        """
        for flags in (["--bind", str(self.path)], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *flags, str(self.path)], check=True)

    def release(self) -> None:
        """Make it writable again."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let the test mount a small file system")
    yield Disk(path)
    while path.is_mount():
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Programs]:
    """Two ranks whose state is one more in every round; after the first rounds they go on when the test lets them."""
    link_tests(tmp_path)
    flags = ("--threads", "1", "--workload", "tests.unchanged:counting", "--workload-option", "hold=yes")
    found = Programs(tmp_path, server_flags=("--rounds", str(ROUNDS)), model_flags=flags)
    found.allow(FIRST)
    yield found
    found.stop()


def test_a_line_that_does_not_fit_is_not_there_and_the_next_one_is_whole(disk: Disk, tmp_path: Path) -> None:
    history = History(disk.path / "history.jsonl")
    line: dict[str, Any] = {"evaluate": {}, "clients": {}, "note": "x" * 6_000}
    history.append({"round": 1, **line})
    disk.fill()
    with pytest.raises(NoSpaceError, match=r"no space left to write .*history\.jsonl"):
        for number in range(2, 10):
            history.append({"round": number, **line})
    kept = [found["round"] for found in read_history(history.path)]
    assert kept == [found["round"] for found in history.lines] == [*range(1, len(kept) + 1)]
    disk.free()
    history.append({"round": len(kept) + 1, **line})
    assert [found["round"] for found in read_history(history.path)] == [*range(1, len(kept) + 2)]
    assert history.path.read_bytes().count(b"\n") == len(kept) + 1


@pytest.mark.slow
@pytest.mark.parametrize("full", ["exchange", "trainers"])
def test_clients_and_trainers_wait_for_space_and_go_on(federation: Programs, disk: Disk, full: str) -> None:
    if full == "exchange":
        federation.exchange_dir = disk.path / "exchange"
    else:
        federation.model_flags = (
            *federation.model_flags,
            "--checkpoint-dir",
            str(disk.path),
            "--workload-option",
            "own=yes",
        )
        federation.server_flags = (*federation.server_flags, "--aggregate", "own=local", "--aggregate", "fedavg")
    federation.start_all()
    wait_for_rounds(federation, FIRST)
    disk.fill()
    federation.allow(ROUNDS)
    federation.wait_until(lambda: any("waiting for space" in federation.log(name) for name in TRAINERS + CLIENTS))
    time.sleep(1)
    assert all(process.poll() is None for process in federation.processes.values()), federation.tails()
    disk.free()
    end_undisturbed(federation)


@pytest.mark.slow
def test_the_server_stops_with_its_code_and_goes_on_from_what_is_there(federation: Programs, disk: Disk) -> None:
    federation.server_flags = (*federation.server_flags, "--checkpoint-dir", str(disk.path))
    federation.start_all()
    history = disk.path / "server" / "history.jsonl"
    federation.wait_until(lambda: len(read_history(history)) >= FIRST)
    disk.fill()
    federation.allow(ROUNDS)
    codes = federation.wait()
    assert codes.pop("server") == CheckpointError.exit_code, federation.tails()
    assert set(codes.values()) == {15}, federation.tails()
    assert_no_traceback(federation)
    before = read_history(history)
    assert [line["round"] for line in before] == [*range(1, len(before) + 1)]
    disk.free()
    federation.start("server", "--resume")
    for name in CLIENTS + TRAINERS:
        federation.start(name)
    end_undisturbed(federation, disk.path)
    assert read_history(history)[: len(before)] == before


@pytest.mark.slow
def test_an_exchange_that_is_removed_ends_its_two_programs_and_the_next_ones_go_on(federation: Programs) -> None:
    federation.start_all()
    wait_for_rounds(federation, FIRST)
    # At once: the programs that live there make and remove files all the time.
    (federation.exchange / "rank-2").rename(federation.directory / "gone")
    federation.allow(ROUNDS)
    names = ("client-2", "model-2")
    codes = federation.wait(names=names)
    assert set(codes.values()) == {3}, federation.tails()
    assert_no_traceback(federation)
    for name in names:
        federation.start(name)
    end_undisturbed(federation)


@pytest.mark.slow
def test_a_checkpoint_directory_that_is_removed_ends_the_server_with_its_code(federation: Programs) -> None:
    federation.start_all()
    wait_for_rounds(federation, FIRST)
    (federation.checkpoints / "server").rename(federation.directory / "gone")
    federation.allow(ROUNDS)
    codes = federation.wait()
    assert codes.pop("server") == CheckpointError.exit_code, federation.tails()
    assert set(codes.values()) == {15}, federation.tails()
    assert_no_traceback(federation)


def end_undisturbed(federation: Programs, checkpoints: Path | None = None) -> None:
    """See that the run ends as one that nobody disturbed."""
    codes = federation.wait()
    assert codes == dict.fromkeys(codes, 0), f"{codes}\n{federation.tails()}"
    assert_no_traceback(federation)
    server = (checkpoints or federation.checkpoints) / "server"
    state = map_file(max(server.glob("round-*/state.safetensors")))
    assert torch.equal(state["count"], torch.full((8,), float(ROUNDS)))
    lines = [json.loads(line) for line in (server / "history.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [*range(1, ROUNDS + 1)]


def assert_no_traceback(federation: Programs) -> None:
    assert not [name for name in federation.names if "Traceback" in federation.log(name)], federation.tails()


def wait_for_rounds(federation: Programs, number: int) -> None:
    federation.wait_until(lambda: len(federation.history()) >= number)


def test_on_a_disk_that_is_read_only_nothing_is_changed_and_its_path_is_named(disk: Disk) -> None:
    history = History(disk.path / "history.jsonl")
    history.append({"round": 1})
    before = history.path.read_bytes()
    disk.protect()
    with pytest.raises(ExchangeError, match=r"history\.jsonl") as caught:
        history.append({"round": 2})
    assert not isinstance(caught.value, NoSpaceError), "nobody would wait for space there"
    assert history.path.read_bytes() == before and len(history.lines) == 1
    disk.release()
    history.append({"round": 2})
    assert [line["round"] for line in read_history(history.path)] == [1, 2]


@pytest.mark.slow
def test_a_server_whose_disk_becomes_read_only_ends_with_its_code_and_goes_on_later(
    federation: Programs, disk: Disk
) -> None:
    federation.server_flags = (*federation.server_flags, "--checkpoint-dir", str(disk.path), "--payload-store", "none")
    federation.start_all()
    history = disk.path / "server" / "history.jsonl"
    federation.wait_until(lambda: len(read_history(history)) >= FIRST)
    disk.protect()
    federation.allow(ROUNDS)
    codes = federation.wait()
    assert codes.pop("server") == CheckpointError.exit_code, federation.tails()
    assert set(codes.values()) == {15}, federation.tails()
    assert_no_traceback(federation)
    before = read_history(history)
    disk.release()
    federation.start("server", "--resume")
    for name in CLIENTS + TRAINERS:
        federation.start(name)
    end_undisturbed(federation, disk.path)
    assert read_history(history)[: len(before)] == before


@pytest.mark.slow
def test_programs_whose_exchange_becomes_read_only_end_with_their_code_and_the_next_ones_go_on(
    federation: Programs, disk: Disk
) -> None:
    federation.exchange_dir = disk.path / "exchange"
    federation.start_all()
    wait_for_rounds(federation, FIRST)
    disk.protect()
    federation.allow(FIRST + 1)
    federation.wait_until(lambda: any(federation.processes[name].poll() == 3 for name in TRAINERS))
    disk.release()

    def is_over() -> bool:
        """Start again what has ended with the code, which takes some of them longer than others."""
        for name in (*CLIENTS, *TRAINERS):
            if federation.processes[name].poll() == 3:
                federation.start(name)
        return federation.rounds_finished() > FIRST

    federation.wait_until(is_over)
    federation.allow(ROUNDS)
    end_undisturbed(federation)


@pytest.mark.slow
def test_a_trainers_checkpoint_directory_that_is_removed_costs_nothing_that_travels(federation: Programs) -> None:
    federation.start_all()
    wait_for_rounds(federation, FIRST)
    (federation.checkpoints / "rank-2").rename(federation.directory / "gone")
    federation.allow(ROUNDS)
    end_undisturbed(federation)
