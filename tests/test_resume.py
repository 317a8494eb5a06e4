"""What a server that resumes cannot read is kept under another name, and the run goes on from what can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.engines.embedded import parse_address
from fedsplit.errors import UsageError
from fedsplit.run.directory import Run
from fedsplit.states.state_dict import encode


def begun(directory: Path, rounds: int = 3) -> str:
    """Leave a run of some rounds; returns its id."""
    with Run(directory) as run:
        for number in range(1, rounds + 1):
            payload = run.payloads.put(encode({"w": torch.full((3,), float(number))}))
            run.save(number, payload.digest, {"state.safetensors": payload.path}, {}, {"round": number}, None)
            run.history.append({"round": number, "evaluate": {"loss": 1.0 / number}})
        return run.run_id


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'{"run_id": 3}', b"[" * 100_000])
def test_a_run_whose_record_cannot_be_read_goes_on_from_its_checkpoints(
    tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = begun(tmp_path)
    record = tmp_path / "server" / "run.json"
    record.write_bytes(text)
    with Run(tmp_path, resume=True) as run:
        assert run.run_id == run_id
        assert run.resumed and run.resumed.server_round == 3
        assert [line["round"] for line in run.history.lines] == [1, 2, 3]
    assert record.with_name("run.json.unreadable-1").read_bytes() == text
    assert "run.json cannot be read; it is kept as" in caplog.text


def test_a_run_whose_checkpoints_cannot_be_read_is_put_aside_whole(tmp_path: Path) -> None:
    run_id = begun(tmp_path)
    server = tmp_path / "server"
    history = (server / "history.jsonl").read_bytes()
    for path in server.glob("round-*/state.safetensors"):
        path.write_bytes(b"x")
    with Run(tmp_path, resume=True) as run:
        assert run.run_id != run_id and run.resumed is None
        assert run.history.lines == []
    old = server / "old-runs" / run_id
    assert (old / "history.jsonl").read_bytes() == history
    assert len([*old.glob("round-*")]) == 3


def test_a_history_whose_checkpoints_were_removed_is_put_aside(tmp_path: Path) -> None:
    run_id = begun(tmp_path)
    server = tmp_path / "server"
    history = (server / "history.jsonl").read_bytes()
    for path in server.glob("round-*"):
        shutil.rmtree(path)
    with Run(tmp_path, resume=True) as run:
        assert run.run_id != run_id
    assert (server / "old-runs" / run_id / "history.jsonl").read_bytes() == history


def test_a_history_without_record_and_checkpoints_is_put_aside(tmp_path: Path) -> None:
    begun(tmp_path, rounds=0)
    server = tmp_path / "server"
    (server / "history.jsonl").write_text('{"round": 1}\n')
    (server / "run.json").write_bytes(b"{")
    with Run(tmp_path, resume=True) as run:
        assert run.history.lines == []
    assert (server / "old-runs/unknown/history.jsonl").read_text() == '{"round": 1}\n'


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe", b"[" * 100_000, b'{"round": 2, "evaluate": [1]}', b'{"round": "2"}', b"3"]
)
def test_lines_of_a_history_that_cannot_be_read_are_kept_in_a_copy(tmp_path: Path, bad: bytes) -> None:
    begun(tmp_path)
    path = tmp_path / "server" / "history.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = bad + b"\n"
    path.write_bytes(b"".join(lines))
    with Run(tmp_path, resume=True) as run:
        assert [line["round"] for line in run.history.lines] == [1, 3]
    assert path.with_name("history.jsonl.unreadable-1").read_bytes() == b"".join(lines)
    found: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["round"] for line in found] == [1, 3]


def test_a_port_is_written_in_the_digits_of_ascii() -> None:
    with pytest.raises(UsageError, match="is not an address"):
        parse_address("127.0.0.1:\u00b2")
