"""The hand-off between two real processes that are killed at random moments, with payloads of some size.

A driver process plays server and client, a worker process plays the trainer; both are killed with SIGKILL again and
again while they hand over, and started anew. Whatever is answered must be the answer to what was asked.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsplit.exchange.client_side import ClientSide
from fedsplit.exchange.directory import Exchange
from tests.bounds import BOUND_S
from tests.handoffs import ROOT, kill, names_in

KILLS = 20
ROUNDS = 60
PAYLOAD_BYTES = 300_000

DRIVER = """
import os, sys, time
from pathlib import Path
from fedsplit.errors import RecordError
from fedsplit.exchange.directory import Exchange
from fedsplit.disk.files import write_chunks
from fedsplit.exchange.client_side import ClientSide
from tests.handoffs import blob, digest_of, request, source_of, text_of

directory, rounds, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
exchange, log = Exchange(directory, 1), directory / "accepted"
with exchange.hold("client"):
    client = ClientSide(exchange)
    print("ready", flush=True)
    done = len(log.read_bytes().splitlines()) if log.exists() else 0
    # At least so many, and for as long as the test goes on killing.
    while done < rounds or not (directory / "enough").exists():
        kind = "train" if done % 3 else "evaluate"
        state = blob(f"state {done}", size)
        version = None
        while True:
            # Asked again and again, as a relay is by the server.
            version = client.offer(request(kind, done), digest_of(state), source_of(state))
            try:
                if result := client.result(version):
                    break
            except RecordError:
                pass
            time.sleep(0.001)
        assert result.status == "ok" and result.kind == kind and result.server_round == done, result
        assert result.metrics["of"] == f"{kind} {done} from state {done}", (result, kind, done)
        content = (exchange.directory / result.payload.file).read_bytes()
        assert digest_of(content) == result.payload.digest and text_of(content) == f"trained {done}", done
        with log.open("ab", buffering=0) as file:
            file.write(f"{version}\\n".encode())
        done += 1
    client.finish("run-a", "complete")
"""

WORKER = """
import sys, time
from pathlib import Path
from fedsplit.errors import RecordError
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.exchange.records import FinishedRecord
from tests.handoffs import blob, text_of

directory, size = Path(sys.argv[1]), int(sys.argv[2])
exchange = Exchange(directory, 1)
with exchange.hold("trainer"):
    trainer = TrainerSide(exchange)
    print("ready", flush=True)
    while True:
        try:
            task = trainer.next()
        except RecordError:
            task = None
        if isinstance(task, FinishedRecord):
            trainer.leave(task)
            break
        if task is None:
            time.sleep(0.001)
            continue
        at, kind = task.server_round, task.kind
        state = text_of((exchange.directory / task.payload.file).read_bytes())
        assert state == f"state {at}", (state, at)
        content = blob(f"trained {at}", size)
        trainer.answer(task, [content[i : i + 50_000] for i in range(0, len(content), 50_000)],
                       num_examples=1, metrics={"of": f"{kind} {at} from {state}"})
"""


@pytest.fixture(params=["disk", "/dev/shm"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm here")
    path = Path(tempfile.mkdtemp(prefix="fedsplit-kill-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def launch(code: str, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise AssertionError(f"it did not start: {process.communicate(timeout=BOUND_S)[1]}")
    return process


def accepted(directory: Path) -> list[int]:
    path = directory / "accepted"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing_and_mix_nothing_up(directory):
    rng = random.Random(20)
    commands = {"driver": (DRIVER, directory, ROUNDS, PAYLOAD_BYTES), "worker": (WORKER, directory, PAYLOAD_BYTES)}
    processes = {name: launch(*command) for name, command in commands.items()}
    kills = 0
    try:
        while kills < KILLS:
            time.sleep(rng.uniform(0.0, 0.06))
            for name in rng.choice((["driver"], ["worker"], ["driver", "worker"])):
                process = processes[name]
                assert process.poll() is None, process.communicate()[1]
                kills += 1
                kill(process)
            for name, process in processes.items():
                if process.poll() is not None:
                    processes[name] = launch(*commands[name])
        (directory / "enough").touch()
        for process in processes.values():
            _, errors = process.communicate(timeout=BOUND_S)
            assert process.returncode == 0, errors
    finally:
        for process in processes.values():
            kill(process)
    versions = accepted(directory)
    assert len(versions) >= ROUNDS
    assert versions == sorted(set(versions))
    exchange = Exchange(directory, 1)
    assert json.loads(exchange.finished_path.read_text())["version"] > versions[-1]
    # Nothing piles up: at most the newest payload of each side, and no half-written file of the dead.
    left = {name for name in names_in(exchange.directory) if "safetensors" in name}
    assert len(left) <= 3, left
    assert ClientSide(exchange).held_digest() is not None


@pytest.mark.slow
def test_a_reader_never_sees_a_half_written_answer(tmp_path):
    """Without any kill: the record appears last, so what it names is always whole."""
    (tmp_path / "enough").touch()
    driver = launch(DRIVER, tmp_path, 60, 2_000_000)
    worker = launch(WORKER, tmp_path, 2_000_000)
    try:
        for process in (driver, worker):
            _, errors = process.communicate(timeout=BOUND_S)
            assert process.returncode == 0, errors
            assert "doing it again" not in errors
    finally:
        kill(driver)
        kill(worker)
    assert accepted(tmp_path) == list(range(1, 61))
