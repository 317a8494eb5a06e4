"""``python -m fedsplit status|checkpoints|export``, and what all commands have in common."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.__main__ import main, make_parser
from fedsplit.commands.status import read_status
from fedsplit.disk.checkpoints import CheckpointStore
from fedsplit.errors import CheckpointError, ExchangeError, UsageError
from fedsplit.exchange.client_side import ClientSide
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request, TaskRecord
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.run.events import format_seconds
from fedsplit.states.state_dict import encode

COMMANDS = (
    "demo", "run", "study", "server", "client", "trainer", "new", "status", "checkpoints", "export", "plot", "report",
    "compare",
)  # fmt: skip
STATE = {
    "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "seen": torch.tensor(2**53 + 1),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    """A checkpoint directory with rounds 1 to 3 of the server, told apart by an entry, and one of rank 2."""
    directory = tmp_path / "checkpoints"
    for server_round in (1, 2, 3):
        CheckpointStore(directory / "server").save(
            run_id="abc", server_round=server_round, metrics={"train": {"loss": 0.5}},
            files={"state.safetensors": encode(STATE | {"round": torch.tensor(server_round)})},
        )  # fmt: skip
    (directory / "server/history.jsonl").write_text('{"round": 2, "evaluate": {"accuracy": 0.25}}\n')
    CheckpointStore(directory / "rank-2").save(run_id="abc", server_round=3, files={"local_state.pt": [b"1234"]})
    return directory


def corrupt(path: Path) -> None:
    """Change one byte and keep the length."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def request(server_round: int, kind: str = "train") -> Request:
    return Request(run_id="abc", kind=kind, server_round=server_round, total_rounds=5)


def snapshot(directory: Path) -> set[tuple[str, int]]:
    return {(str(path), path.stat().st_mtime_ns) for path in directory.rglob("*")}


# -- all commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"    python -m fedsplit {command}" in capsys.readouterr().out


def test_help_lists_every_command() -> None:
    first_words = [line.split()[0] for line in make_parser().format_help().splitlines() if line.startswith("    ")]
    assert set(COMMANDS) <= set(first_words)


def test_help_shows_a_default_of_0_and_hides_an_empty_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "seed for the initial model, the partitioning and the server (default: 0)" in shown
    assert "(default: [])" not in shown


def test_a_reader_that_leaves_early_is_no_error(checkpoint_dir: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fedsplit", "checkpoints", str(checkpoint_dir)]
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("arguments", [[], ["nope"], ["status", "--nope"], ["export"], ["demo", "--clients", "0"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_the_command_line_starts_without_torch_flower_or_matplotlib() -> None:
    script = (
        "import sys, fedsplit.__main__ as m; m.make_parser(); "
        "print({'torch', 'flwr', 'grpc', 'matplotlib'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "set()"


# -- checkpoints -----------------------------------------------------------------------------------------


def test_checkpoints_lists_every_store_with_its_metrics(
    checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", str(checkpoint_dir)]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["server", "1"], ["server", "2"], ["server", "3"], ["rank-2", "3"]]
    size = (checkpoint_dir / "server/round-000002/state.safetensors").stat().st_size
    assert rows[1][2:] == ["abc", "1", str(size), "train loss 0.5000, test accuracy 0.2500", "valid"]
    assert rows[3][4] == "4"


def test_checkpoints_names_a_corrupt_one_and_fails(checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt(checkpoint_dir / "server/round-000002/state.safetensors")
    (checkpoint_dir / "rank-2/round-000003/manifest.json").write_text("{")
    assert main(["checkpoints", str(checkpoint_dir)]) == CheckpointError.exit_code
    printed = capsys.readouterr()
    rows = [line.split("\t") for line in printed.out.splitlines()[1:]]
    assert [row[6].split(":")[0] for row in rows] == ["valid", "corrupt", "valid", "corrupt"]
    assert "state.safetensors is corrupt" in rows[1][6]
    assert "2 of 4 checkpoints are corrupt (server round 2, rank-2 round 3)" in printed.err


def test_checkpoints_takes_one_store(checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(checkpoint_dir / "rank-2")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_round_that_is_pruned_while_it_is_listed_is_not_corrupt(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CheckpointStore, "rounds", lambda self: [3, 9] if self.directory.name == "server" else [])
    assert main(["checkpoints", str(checkpoint_dir)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_checkpoints_of_the_wrong_directory_is_an_error(tmp_path: Path, name: str) -> None:
    assert main(["checkpoints", str(tmp_path / name)]) == CheckpointError.exit_code


# -- export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_what_is_exported_loads_back_equal(checkpoint_dir: Path, tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"model{ending}"
    assert main(["export", "--checkpoint-dir", str(checkpoint_dir), "--output", str(output)]) == 0
    loaded = load_file(output) if ending == ".safetensors" else torch.load(output, weights_only=True)
    expected = STATE | {"round": torch.tensor(3)}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor)


def test_export_takes_a_round_and_passes_over_a_corrupt_newest_one(checkpoint_dir: Path, tmp_path: Path) -> None:
    corrupt(checkpoint_dir / "server/round-000003/state.safetensors")
    output = tmp_path / "model.safetensors"
    command = ["export", "--checkpoint-dir", str(checkpoint_dir), "--output", str(output)]
    assert main(command) == 0
    assert load_file(output)["round"] == 2
    assert main([*command, "--round", "1"]) == 0
    assert load_file(output)["round"] == 1
    assert main([*command, "--round", "3"]) == CheckpointError.exit_code
    assert load_file(output)["round"] == 1


def test_export_says_which_rounds_there_are(checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(checkpoint_dir / "model.pt")
    command = ["export", "--checkpoint-dir", str(checkpoint_dir), "--round", "9", "--output", output]
    assert main(command) == CheckpointError.exit_code
    assert "there are rounds 1, 2, 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.bin", "model", "nowhere/model.pt"])
def test_export_refuses_an_output_that_cannot_be_before_it_reads(
    checkpoint_dir: Path, tmp_path: Path, name: str
) -> None:
    command = ["export", "--checkpoint-dir", str(checkpoint_dir), "--output", str(tmp_path / name)]
    assert main(command) == UsageError.exit_code


def test_export_of_nothing_and_of_nothing_but_corrupt_rounds(checkpoint_dir: Path, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "model.pt")]
    assert main(["export", "--checkpoint-dir", str(tmp_path), *output]) == CheckpointError.exit_code
    for path in checkpoint_dir.glob("server/round-*/state.safetensors"):
        corrupt(path)
    assert main(["export", "--checkpoint-dir", str(checkpoint_dir), *output]) == CheckpointError.exit_code
    assert not (tmp_path / "model.pt").exists()


# -- status ----------------------------------------------------------------------------------------------


def test_status_follows_a_task_from_the_offer_to_the_end_of_the_run(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, 3)
    client, trainer = ClientSide(exchange), TrainerSide(exchange)
    with exchange.hold("client"):
        version = client.offer(request(1), None, lambda _: None)
        assert version is not None
        waiting = read_status(tmp_path, 3)
        assert f"process {os.getpid()} on " in waiting["client"]
        assert waiting["trainer"] == "nobody"
        assert waiting["newest task"] == f"version {version}: train, round 1 of 5"
        assert waiting["now"].startswith("waiting for a trainer, 0.")
        with exchange.hold("trainer"):
            assert read_status(tmp_path, 3)["now"].startswith("the trainer trains, for 0.")
            task = trainer.next()
            assert isinstance(task, TaskRecord)
            trainer.answer(task, num_examples=1, seconds=75.0)
        answered = read_status(tmp_path, 3)
        assert answered["last result"] == f"version {version}: train, round 1, ok, took 1 min 15 s"
        assert answered["now"].startswith("answered 0.")
        client.cancel(client.offer(request(2), None, lambda _: None) or 0)
        assert read_status(tmp_path, 3)["newest task"].endswith("round 2 of 5, cancelled")
        client.finish("abc", "stopped", "by SIGINT")
    assert read_status(tmp_path, 3)["now"] == "the run is over: stopped (by SIGINT)"


def test_status_shows_how_long_a_step_has_lasted(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, 1)
    with exchange.hold("trainer"):
        ClientSide(exchange).offer(request(1, "evaluate"), None, lambda _: None)
        before = exchange.task_path.stat().st_mtime - 2 * 3600
        os.utime(exchange.task_path, (before, before))
        assert read_status(tmp_path, 1)["now"] == "the trainer evaluates, for 2 h 0 min"


def test_status_shows_an_error_of_the_trainer(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, 1)
    with exchange.hold("trainer"):
        ClientSide(exchange).offer(request(1), None, lambda _: None)
        task = TrainerSide(exchange).next()
        assert isinstance(task, TaskRecord)
        TrainerSide(exchange).answer(task, error={"type": "ValueError", "message": "no data"})
    assert "error (ValueError: no data)" in read_status(tmp_path, 1)["last result"]


def test_status_makes_nothing_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-1").mkdir()
    (tmp_path / "rank-10").mkdir()
    with Exchange(tmp_path, 2).hold("trainer"):
        before = snapshot(tmp_path)
        assert main(["status", str(tmp_path)]) == 0
        assert snapshot(tmp_path) == before
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[::5]] == ["rank 1", "rank 2", "rank 10"]
    assert printed[0] == "rank 1: client: nobody"
    assert f"process {os.getpid()}" in printed[6]


def test_status_takes_the_directory_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Exchange(tmp_path, 1).hold("client"), Exchange(tmp_path, 2).hold("client"):
        pass
    monkeypatch.chdir(tmp_path / "rank-2")
    assert main(["status", "."]) == 0
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines()} == {"rank 2"}


@pytest.mark.parametrize("text", ["{", json.dumps({"schema": "fedsplit/99"}), "[]"])
def test_status_shows_what_it_cannot_read(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-1").mkdir()
    (tmp_path / "rank-1/task.json").write_text(text)
    assert main(["status", str(tmp_path)]) == 0
    assert "task.json" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_status_of_the_wrong_directory_is_an_error(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path / name)]) == ExchangeError.exit_code
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path / name) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.7, "1 min 0 s"), (83, "1 min 23 s"), (7384, "2 h 3 min")],
)
def test_lengths_of_time_are_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
