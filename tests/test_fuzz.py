"""Fuzz of everything that reads bytes of others: records, payload headers, payloads, manifests.

Seeded random mutation of valid bytes, and generation from a rough grammar of hostile JSON: some thousand cases, over
100,000 where all tests are asked for. The outcome must be a valid value or a FedSplitError, in bounded time and
memory. Not covered: torch's own reader of
``.pt`` files (`weights_only`), and Flower's decoding of messages.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.errors import FedSplitError
from fedsplit.exchange import records
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, ResultRecord, TaskRecord, parse, read
from fedsplit.states.header import parse_header
from fedsplit.states.state_dict import decode, encode
from tests.depth import EVERYTHING, scaled
from tests.test_records import FAILED, FINISHED, RESULT, TASK

TRACED_CASES = 200
CASES = {
    "records": scaled(2_000, 46_000), "headers": scaled(2_000, 47_000), "payloads": scaled(500, 6_000),
    "files": scaled(600, 2_000),
}  # fmt: skip

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0,
    1.5, 1e308, float("nan"), float("inf"),
    "", "a", "train", "ok", "error", "fedsplit/1", "fedsplit/2", "../../x", "\x00",
    "\ud800", "é",
    "task-1.safetensors", "result-7.safetensors", "0" * 64, [], [[]], [1], ["a", True], [0, 0], [0, 2**62, 2**62], {},
    {"a": 1}, {"": None}, "F32", "U8", "F99", [-1], [2**64], [1] * 70,
]  # fmt: skip
ODD_BYTES = [
    b"", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"\xff", b"\x00", b"9" * 30, b"-", b"1e999",
    b"NaN", b"null", b"\\ud800",
]  # fmt: skip
KEYS = [
    "schema", "version", "run_id", "kind", "server_round", "total_rounds", "config", "split", "payload", "cancelled",
    "status", "num_examples", "loss", "metrics", "error", "seconds", "outcome", "reason", "file", "bytes", "digest",
    "dtype", "shape", "data_offsets", "__metadata__", "a", "",
]  # fmt: skip


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Change bytes here and there: flip, insert, cut, repeat, truncate."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at, how = rng.randrange(len(found) + 1), rng.randrange(6)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(found):
            found[at] = rng.randrange(256)
        elif how == 2:
            found[at:at] = rng.choice(ODD_BYTES)
        elif how == 3:
            del found[at : at + rng.choice((1, 1, 2, 8, 64))]
        elif how == 4:
            found[at:at] = found[at : at + rng.choice((1, 4, 32))]
        elif how == 5 and rng.random() < 0.3:
            del found[at:]
    return bytes(found)


def mutate_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Change a JSON value somewhere: another value, another key, one key less."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        found = dict(value)
        key = rng.choice(list(found))
        how = rng.randrange(8)
        if how == 0:
            del found[key]
        elif how == 1:
            found[rng.choice(KEYS)] = rng.choice(ODD_VALUES)
        else:
            found[key] = mutate_value(rng, found[key], depth + 1)
        return found
    if isinstance(value, list) and value and rng.random() < 0.7:
        found_list = list(value)
        at = rng.randrange(len(found_list))
        found_list[at : at + rng.randrange(2)] = [mutate_value(rng, found_list[at], depth + 1)]
        return found_list
    return rng.choice(ODD_VALUES)


def survive(cases: int, make: Callable[[random.Random], bytes], read: Callable[[bytes], object]) -> tuple[int, int]:
    """Read that many made-up inputs; returns how many were valid, and how many were refused."""
    valid, refused, slowest = 0, 0, 0.0
    tracemalloc.start()
    try:
        for seed in range(cases):
            if seed == TRACED_CASES:  # tracing doubles the time
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            content = make(random.Random(seed))
            began = time.thread_time()
            try:
                read(content)
                valid += 1
            except FedSplitError as exc:
                refused += 1
                assert str(exc), content
            except Exception as exc:
                raise AssertionError(f"seed {seed}: {type(exc).__name__}: {exc}\n{content[:2000]!r}") from exc
            slowest = max(slowest, time.thread_time() - began)
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000, f"{peak:,} bytes were allocated"
    # A bound against cases that take for ever, in time of the processor: a busy machine may stop this process for long.
    assert slowest < 30.0, f"one case took {slowest:.1f} s"
    # Else the mutations never get past the first check, or never do any harm: a fuzz that cannot fail.
    assert valid > cases // 200 and refused > cases // 10, (valid, refused)
    return valid, refused


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_any_bytes_in_a_record_are_a_record_or_a_fedsplit_error():
    texts = [records.encode(record, "there") for record in (TASK, RESULT, FAILED, FINISHED)]
    originals = [json.loads(text) for text in texts]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate(rng, rng.choice(texts))
        value = rng.choice(originals)
        for _ in range(rng.choice((1, 1, 2, 3))):
            value = mutate_value(rng, value)
        return as_json(value)

    def believe(content: bytes) -> None:
        fields = parse(content, "here")
        errors = []
        for kind in (TaskRecord, ResultRecord, FinishedRecord):
            try:
                # What was believed can be written again, and is then the same record.
                text = records.encode(read(fields, kind, "here"), "there")
                assert records.encode(read(parse(text, "again"), kind, "again"), "there") == text
            except FedSplitError as exc:
                errors.append(exc)
        if len(errors) == 3:
            raise errors[0]

    survive(CASES["records"], make, believe)


def header_of(entries: Any, rng: random.Random) -> bytes:
    text = as_json(entries)
    length = len(text)
    if rng.random() < 0.03:
        length = rng.choice((0, length - 1, length + 1, 2**31, 2**60, 2**64 - 1))
    return length.to_bytes(8, "little") + text


def test_any_bytes_in_a_header_are_entries_that_tile_the_payload_or_a_fedsplit_error():
    def make(rng: random.Random) -> bytes:
        entries, position = {}, 0
        for name in range(rng.randrange(4)):
            shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
            size = 4
            for number in shape:
                size *= number
            entries[f"layer.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
            position += size
        value: Any = entries
        for _ in range(rng.choice((0, 1, 1, 2))):
            value = mutate_value(rng, value)
        content = header_of(value, rng) + bytes(position)
        return mutate(rng, content) if rng.random() < 0.3 else content

    def read(content: bytes) -> None:
        entries = parse_header(content, len(content), "here")
        covered = sum(entry.end - entry.begin for entry in entries.values())
        assert covered + 8 + int.from_bytes(content[:8], "little") == len(content)

    survive(CASES["headers"], make, read)


def test_any_bytes_in_a_payload_are_tensors_over_its_bytes_or_a_fedsplit_error():
    original = b"".join(encode({
        "w": torch.ones(2, 3), "n": torch.tensor(7), "h": torch.ones(3).bfloat16(), "b": torch.tensor([True, False]),
        "none": torch.empty(0, 2),
    }))  # fmt: skip
    begin = 8 + int.from_bytes(original[:8], "little")
    entries = json.loads(original[8:begin])

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate(rng, original)
        return header_of(mutate_value(rng, entries), rng) + original[begin:]

    def read(content: bytes) -> None:
        for tensor in decode(bytearray(content), "here").values():
            assert tensor.nbytes <= len(content)
            tensor.clone()

    survive(CASES["payloads"], make, read)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """Return a directory in memory where there is one: thousands of small files take long on a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="fedsplit-fuzz-", dir="/dev/shm") as directory:
        yield Path(directory)


def test_any_bytes_in_any_file_of_an_exchange_are_believed_or_refused(memory_path):
    """Through the files, both sides: what one reads the other must also survive."""
    from fedsplit.exchange.client_side import ClientSide
    from fedsplit.exchange.trainer_side import TrainerSide
    from tests.handoffs import blob, digest_of, request, source_of

    state = blob("state")
    client, trainer = ClientSide(Exchange(memory_path, 1)), TrainerSide(Exchange(memory_path, 1))
    directory = client.exchange.directory
    directory.mkdir(mode=0o700)
    version = client.offer(request(), digest_of(state), source_of(state))
    trainer.answer(trainer.next(), [blob("trained")])
    client.finish("run-a", "stopped")
    trainer.leave(trainer.next())
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}
    assert len(files) == 6
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(CASES["files"] // 4):
        name = rng.choice(sorted(files))
        damaged = mutate(rng, files[name])
        for step in (
            trainer.next,
            lambda: client.result(version),
            client.held_digest,
            lambda: client.offer(request(server_round=2), digest_of(state), source_of(state)),
        ):
            for path in directory.iterdir():
                if path.suffix != ".lock":
                    path.unlink()
            for other, content in files.items():
                (directory / other).write_bytes(damaged if other == name else content)
            try:
                step()
                outcomes[True] += 1
            except FedSplitError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.skipif(not EVERYTHING, reason="fewer by default")
def test_the_cases_are_as_many_as_were_promised():
    assert sum(CASES.values()) >= 100_000
