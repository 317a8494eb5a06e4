"""Nothing is lost: programs are killed, stopped, doubled and cut off, and the run comes to the same end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.states.state_dict import map_file
from tests.bounds import BOUND_S
from tests.chaos import run_chaos
from tests.handoffs import overwrite
from tests.programs import Programs, programs
from tests.test_five_programs import link_tests


def counting(directory: Path, *options: str, **settings: Any) -> Any:
    """A federation of a workload that notes each training."""
    link_tests(directory)
    flags = ["--threads", "1", "--workload", "tests.unchanged:counting"]
    for option in options:
        flags += ["--workload-option", option]
    return programs(directory, model_flags=flags, **settings)


def trainings(directory: Path) -> list[str]:
    path = directory / "trained.log"
    return path.read_text().splitlines() if path.exists() else []


def start_trainers_first(federation: Programs) -> None:
    """Start all programs such that no client misses its trainer, however short it waits for it."""
    for name in ("model-1", "model-2"):
        federation.start(name)
    for name in ("model-1", "model-2"):
        federation.wait_for(name, "waiting for a client")
    for name in ("server", "client-1", "client-2"):
        federation.start(name)


@pytest.fixture
def ram() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="fedsplit-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
def test_ten_kills_change_nothing_with_the_exchange_on_disk(tmp_path: Path) -> None:
    run_chaos(tmp_path, faults=10, seed=1, rounds=40, longest_pause_s=3.0)


@pytest.mark.slow
def test_ten_kills_change_nothing_with_the_exchange_in_memory(tmp_path: Path, ram: Path) -> None:
    run_chaos(tmp_path, faults=10, seed=2, rounds=40, longest_pause_s=3.0, exchange_dir=ram)


@pytest.mark.smoke
def test_a_finished_result_is_not_trained_again_when_its_client_dies(tmp_path: Path) -> None:
    with counting(tmp_path, "hold=yes", server_flags=("--rounds", "1")) as federation:
        federation.start_all()
        federation.wait_until(lambda: "rank 2 begins 1" in trainings(tmp_path))
        federation.kill("client-2")
        federation.allow(1)
        federation.wait_until(lambda: "round 1: trained" in federation.log("model-2"))
        federation.start("client-2")
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert "rank 2: client is back" in federation.log("server")
        assert federation.history()[0]["accepted"] == 2
    assert trainings(tmp_path).count("rank 2 begins 1") == 1


@pytest.mark.smoke
def test_a_finished_result_is_not_trained_again_when_the_server_dies(tmp_path: Path) -> None:
    with counting(tmp_path, "hold=yes", server_flags=("--rounds", "2")) as federation:
        federation.allow(1)
        federation.start_all()
        federation.wait_until(lambda: {"rank 1 begins 2", "rank 2 begins 2"} <= set(trainings(tmp_path)))
        run_id = run_record(federation)["run_id"]
        federation.kill("server")
        federation.allow(2)
        federation.wait_until(lambda: {"rank 1 trained 2", "rank 2 trained 2"} <= set(trainings(tmp_path)))
        federation.start("server", "--resume")
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert run_record(federation)["run_id"] == run_id
        assert [line["round"] for line in federation.history()] == [1, 2]
        assert torch.equal(map_file(federation.final_state())["count"], torch.full((8,), 2.0))
    assert [line for line in trainings(tmp_path) if "begins" in line].count("rank 1 begins 2") == 1


@pytest.mark.smoke
def test_an_unfinished_training_is_done_again_from_the_same_state(tmp_path: Path) -> None:
    with counting(tmp_path, "hold=yes", server_flags=("--rounds", "2")) as federation:
        federation.allow(1)
        federation.start_all()
        federation.wait_until(lambda: "rank 1 begins 2" in trainings(tmp_path))
        federation.kill("model-1")
        federation.start("model-1")
        federation.allow(2)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert torch.equal(map_file(federation.final_state())["count"], torch.full((8,), 2.0))
    assert trainings(tmp_path).count("rank 1 begins 2") == 2


@pytest.mark.slow
def test_a_dead_trainer_is_noticed_although_its_child_lives_and_the_round_ends_with_the_others(tmp_path: Path) -> None:
    flags = ("--trainer-wait", "1")
    server_flags = ("--rounds", "2", "--evaluate-every", "0")
    with counting(tmp_path, "hold=yes", "fork=yes", client_flags=flags, server_flags=server_flags) as federation:
        start_trainers_first(federation)
        federation.wait_until(lambda: "rank 2 begins 1" in trainings(tmp_path))
        federation.kill("model-2")
        # Its child lives on until the end of the block, and still has the lock open.
        federation.wait_for("client-2", "no trainer holds")
        federation.allow(2)
        codes = federation.wait(names=["server", "client-1", "client-2", "model-1"])
        assert set(codes.values()) == {0}, federation.tails()
        lines = federation.history()
        assert [line["accepted"] for line in lines] == [1, 1]
        assert "no trainer of rank 2" in lines[0]["refused"]["2"]  # type: ignore[index]


@pytest.mark.slow
def test_a_busy_trainer_is_never_taken_for_dead(tmp_path: Path) -> None:
    with counting(
        tmp_path, "sleep=2", client_flags=("--trainer-wait", "0.25"), server_flags=("--rounds", "1")
    ) as federation:
        start_trainers_first(federation)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert federation.history()[0]["accepted"] == 2


@pytest.mark.slow
def test_a_round_that_takes_too_long_is_cancelled_and_the_trainer_told(tmp_path: Path) -> None:
    server_flags = ("--rounds", "1", "--round-timeout", "2", "--evaluate-every", "0")
    with counting(tmp_path, "hold=yes", server_flags=server_flags) as federation:
        start_trainers_first(federation)
        # Nothing was merged in any round, so the run is a failed one.
        assert set(federation.wait().values()) == {15}, federation.tails()
        line = federation.history()[0]
        assert line["accepted"] == 0
        assert line["refused"] == dict.fromkeys("12", "not completed within 2 s")
        assert "the global state stays as it was" in federation.log("server")
    assert {"rank 1 stops 1", "rank 2 stops 1"} <= set(trainings(tmp_path))
    assert "came too late" in federation.log("model-1")


@pytest.mark.slow
def test_a_second_live_client_of_a_rank_is_refused_and_told_why(tmp_path: Path) -> None:
    with counting(tmp_path, "hold=yes", server_flags=("--rounds", "1")) as federation:
        federation.start_all()
        federation.wait_until(lambda: "rank 1 begins 1" in trainings(tmp_path))
        second = subprocess.run([*federation.command("client-1"), "--exchange-dir", str(tmp_path / "elsewhere")],
                                capture_output=True, text=True, timeout=BOUND_S, cwd=tmp_path)  # fmt: skip
        assert second.returncode == 8, second.stderr
        assert "rank 1 is taken by a live client" in second.stderr
        federation.allow(1)
        assert set(federation.wait().values()) == {0}, federation.tails()


@pytest.mark.slow
def test_sigterm_on_the_server_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    with counting(tmp_path, "hold=yes", server_flags=("--rounds", "3")) as federation:
        federation.allow(1)
        federation.start_all()
        federation.wait_until(lambda: "rank 1 begins 2" in trainings(tmp_path))
        federation.kill("server", signal.SIGTERM)
        assert federation.wait() == dict.fromkeys(federation.names, 14), federation.tails()
        federation.allow(3)
        for name in federation.names:
            federation.start(name, *(["--resume"] if name == "server" else []))
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert [line["round"] for line in federation.history()] == [1, 2, 3]
        assert torch.equal(map_file(federation.final_state())["count"], torch.full((8,), 3.0))


@pytest.mark.slow
def test_resume_passes_over_a_corrupt_checkpoint_and_keeps_what_the_rules_remember(tmp_path: Path) -> None:
    """FedAdam's moments, the run's id and the history go on; undisturbed and resumed runs end with the same bits."""
    rules = ("--aggregate", "flower.FedAdam(eta=0.05)")
    ends = []
    for name, stops in (("whole", False), ("resumed", True)):
        directory = tmp_path / name
        directory.mkdir()
        with programs(directory, server_flags=("--rounds", "3" if stops else "5", *rules)) as federation:
            federation.start_all()
            assert set(federation.wait().values()) == {0}, federation.tails()
            if stops:
                newest = federation.final_state()
                overwrite(newest, newest.read_bytes()[:-1] + b"\0")
                federation.server_flags = ("--rounds", "5", *rules, "--resume")
                federation.start_all()
                assert set(federation.wait().values()) == {0}, federation.tails()
                assert "round-000003/state.safetensors is corrupt" in federation.log("server")
                assert "goes on after round 2 of 5" in federation.log("server")
            assert [line["round"] for line in federation.history()] == [1, 2, 3, 4, 5]
            ends.append(federation.final_state().read_bytes())
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_run_starts_from_an_initial_checkpoint(tmp_path: Path, ending: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"start{ending}"
    state = {"count": torch.full((8,), 40.0)}
    state["own"] = torch.ones(3)
    torch.save(state, path) if ending == ".pt" else save_file(state, path)
    rules = ("--aggregate", "own=local", "--aggregate", "fedavg")
    server_flags = ("--rounds", "2", "--initial-checkpoint", str(path), *rules)
    with counting(tmp_path, "own=yes", server_flags=server_flags) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        found = map_file(federation.final_state())
        assert list(found) == ["count"]
        assert torch.equal(found["count"], torch.full((8,), 42.0))


@pytest.mark.slow
def test_a_pickle_is_no_initial_checkpoint(tmp_path: Path) -> None:
    torch.save({"count": torch.zeros(8), "code": Counter()}, tmp_path / "start.pt")
    server_flags = ("--rounds", "1", "--initial-checkpoint", str(tmp_path / "start.pt"))
    with counting(tmp_path, server_flags=server_flags) as federation:
        federation.start("server")
        assert federation.wait(names=["server"]) == {"server": 2}
        assert "holds no plain state_dict" in federation.log("server")


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    small = tmp_path / "checkpoints" / "server"
    small.mkdir(parents=True, mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m,mode=700", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("this machine does not let the test mount a small file system")
    link_tests(tmp_path)
    flags = ("--threads", "1", "--workload", "tests.unchanged:growing")
    try:
        with programs(tmp_path, server_flags=("--rounds", "9"), model_flags=flags) as federation:
            federation.start_all()
            codes = federation.wait()
            assert codes["server"] in (3, 13), federation.tails()
            assert "no space left" in federation.log("server")
            assert set(codes.values()) - {codes["server"]} == {15}, federation.tails()
            rounds = sorted(small.glob("round-*/manifest.json"))
            assert rounds
            assert not list(small.glob(".round-*.tmp"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def run_record(federation: Programs) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((federation.checkpoints / "server" / "run.json").read_bytes())
    return record


class Counter:
    """Code that a pickle would run."""
