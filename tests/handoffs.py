"""What the tests of the hand-off share: small payloads without torch, requests, and processes that play a role."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, Request, TaskRecord
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.states.header import build_header
from tests.bounds import BOUND_S

ROOT = Path(__file__).parents[1]


def blob(text: str, size: int = 0) -> bytes:
    """Return a safetensors payload of one U8 entry that holds a text, padded to a size."""
    content = text.encode().ljust(size, b"\0")
    header, _ = build_header({"text": ("U8", (len(content),))})
    return header + content


def text_of(payload: bytes) -> str:
    """Return the text of such a payload."""
    begin = 8 + int.from_bytes(payload[:8], "little")
    return payload[begin:].rstrip(b"\0").decode()


def digest_of(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def overwrite(path: Path, content: bytes) -> None:
    """Write into a finished file, as its own user can."""
    path.chmod(0o600)
    path.write_bytes(content)


def request(kind: str = "train", server_round: int = 1, run_id: str = "run-a", **others: Any) -> Request:
    return Request(run_id=run_id, kind=kind, server_round=server_round, total_rounds=9, **others)


def source_of(payload: bytes | Path) -> Callable[[str], Source]:
    """Return a fetch function that delivers this payload."""
    content = payload if isinstance(payload, bytes) else payload.read_bytes()
    return lambda digest: Source(bytes=len(content), content=payload)


def nothing(digest: str) -> None:
    """Be a fetch function that has nothing."""


def never(digest: str) -> Source:
    """Be a fetch function that must not be called."""
    raise AssertionError(f"fetch was called for {digest}")


def request_of(task: TaskRecord) -> Request:
    """Return what a task asks, without its version and its payload."""
    return Request(**{field.name: getattr(task, field.name) for field in fields(Request)})


def offer(client: ClientSide, asked: Request, payload: bytes | None) -> int:
    digest = None if payload is None else digest_of(payload)
    version = client.offer(asked, digest, nothing if payload is None else source_of(payload))
    assert version is not None
    return version


def begin(trainer: TrainerSide) -> TaskRecord:
    task = trainer.next()
    assert isinstance(task, TaskRecord)
    return task


def end(trainer: TrainerSide) -> FinishedRecord:
    finished = trainer.next()
    assert isinstance(finished, FinishedRecord)
    return finished


def pair(directory: Path) -> tuple[ClientSide, TrainerSide]:
    """Return the two sides of rank 1, each with its own view of the directory, as two processes have."""
    client, trainer = Exchange(directory, 1), Exchange(directory, 1)
    client.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return ClientSide(client), TrainerSide(trainer)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python program given as text; the caller ends it by its handle."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start such a program, wait until it prints a line, and kill it at the end of the block."""
    process = start(code, *arguments)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(f"the program ended before it was ready: {process.communicate(timeout=BOUND_S)[1]}")
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a program with SIGKILL and reap it."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait(timeout=BOUND_S)
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = BOUND_S) -> float:
    """Wait for a condition and return the seconds it took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s")
        time.sleep(0.0005)
    return time.monotonic() - began


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}
