"""The product: five programs, started by hand in any order, train a real model on real data."""

from __future__ import annotations

import importlib
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.states.state_dict import map_file
from fedsplit.workloads import WorkloadContext, create_workload
from tests.bounds import BOUND_S
from tests.in_process import Scripts
from tests.ports import free_port
from tests.programs import ROOT, programs
from tests.reference import federated_averaging

TESTS = Path(__file__).parent


def digits(rank: int) -> object:
    return create_workload("digits", WorkloadContext(rank=rank, num_partitions=2, seed=0))


@pytest.mark.parametrize(
    "seed",
    [pytest.param(1, marks=pytest.mark.smoke), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))],
)
def test_five_programs_in_any_order_learn_the_digits_to_the_bits_of_plain_loops(tmp_path: Path, seed: int) -> None:
    torch.set_num_threads(1)
    # The quick one starts them as a user does.
    with programs(tmp_path, server_flags=("--rounds", "5"), forked=seed > 1) as federation:
        order = federation.names
        random.Random(seed).shuffle(order)
        for name in order:
            federation.start(name)
            time.sleep(random.Random(seed).random() / 2)
        assert federation.wait() == dict.fromkeys(federation.names, 0), federation.tails()
        lines = federation.history()
        assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
        assert lines[-1]["evaluate"]["accuracy"] >= 0.93  # type: ignore[index]
        for rank in (1, 2):
            last = federation.log(f"client-{rank}").splitlines()[-1]
            assert last.endswith(f"client rank {rank}: the run is complete: 5 of 5 rounds")
        found = map_file(federation.final_state())
    expected = federated_averaging(digits, ranks=2, rounds=5)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_bytes_in_messages_give_the_same_bits_as_payloads_by_reference(tmp_path: Path) -> None:
    states = []
    for store in ("auto", "none"):
        directory = tmp_path / store
        directory.mkdir()
        with programs(directory, server_flags=("--rounds", "2", "--payload-store", store)) as federation:
            federation.start_all()
            assert set(federation.wait().values()) == {0}, federation.tails()
            way = "by reference" if store == "auto" else "in messages"
            assert f"payloads {way}" in federation.log("server")
            states.append(federation.final_state().read_bytes())
    assert states[0] == states[1]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["auto", "none"])
def test_every_dtype_comes_back_with_the_same_bits_when_trainers_change_nothing(tmp_path: Path, store: str) -> None:
    from tests.unchanged import entries

    flags = ("--threads", "1", "--workload", "tests.unchanged:unchanged")
    with programs(
        tmp_path,
        ranks=3,
        model_flags=flags,
        server_flags=("--rounds", "2", "--min-clients", "3", "--payload-store", store),
    ) as federation:
        link_tests(tmp_path)
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        found = map_file(federation.final_state())
    expected = entries()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.mark.slow
def test_large_states_travel_in_pieces_and_arrive_bit_for_bit(tmp_path: Path) -> None:
    flags = ("--threads", "1", "--workload", "tests.unchanged:large")
    server_flags = ("--rounds", "2", "--payload-store", "none")
    with programs(tmp_path, model_flags=flags, server_flags=server_flags) as federation:
        link_tests(tmp_path)
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert [line["accepted"] for line in federation.history()] == [2, 2]
        found = map_file(federation.final_state())
        assert torch.equal(found["a"], torch.arange(5_000_000, dtype=torch.float32))


@pytest.mark.slow
def test_no_program_sees_the_others_library(tmp_path: Path) -> None:
    everything = {"torch", "flwr", "grpc", "numpy", "lightning", "transformers"}
    for module, unwanted in (
        ("fedsplit.client.relay", {"torch"}),
        ("fedsplit.trainer.trainer", {"flwr", "grpc"}),
        ("fedsplit.workloads", {"torch", "flwr"}),
        ("fedsplit", everything),
    ):
        code = f"import sys, {module}; print(sorted({unwanted!r} & set(sys.modules)))"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert found.stdout.strip() == "[]", module


@pytest.mark.slow
def test_nothing_of_flower_calls_home_unless_the_environment_asks_for_it(tmp_path: Path) -> None:
    code = (
        "import fedsplit.client.relay, fedsplit.server.server, os; from flwr.supercore import telemetry as t;"
        "print(t.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    )
    for asked, expected in ((None, "0 1"), ("1", "1 1")):
        environment = {"FLWR_TELEMETRY_ENABLED": asked} if asked else {}
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                               env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment})  # fmt: skip
        assert found.stdout.strip() == expected, found.stderr


@pytest.mark.slow
def test_metrics_may_be_called_as_the_entries_of_a_rounds_line(tmp_path: Path) -> None:
    link_tests(tmp_path)
    flags = ("--threads", "1", "--workload", "tests.unchanged:taken_names")
    with programs(tmp_path, model_flags=flags) as federation:
        federation.start_all()
        codes = federation.wait()
        assert codes == dict.fromkeys(codes, 0), federation.tails()
        lines: Any = federation.history()
        assert [line["accepted"] for line in lines] == [2, 2]
        assert lines[0]["clients"]["1"]["num_examples"] == 1
        assert isinstance(lines[0]["clients"]["1"]["stages"], dict)


@pytest.mark.slow
def test_ctrl_c_on_the_server_ends_all_five_and_says_so(tmp_path: Path) -> None:
    flags = ("--threads", "1", "--workload", "tests.unchanged:slow")
    with programs(tmp_path, server_flags=("--rounds", "1"), model_flags=flags) as federation:
        link_tests(tmp_path)
        federation.start_all()
        for rank in (1, 2):
            federation.wait_for(f"client-{rank}", "train, round 1")
        time.sleep(0.5)
        federation.kill("server", signal.SIGINT)
        codes = federation.wait()
        assert codes == dict.fromkeys(federation.names, 14), federation.tails()
        assert "stopped by SIGINT" in federation.log("server")
        assert "stopped by SIGINT" in federation.log("model-1")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_plot_is_drawn_ends_a_complete_run_with_one_line(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = tmp_path / "drawing"
    (tmp_path / "slow/matplotlib").mkdir(parents=True)
    # Short sleeps: Python runs no handler of a signal that came just before a long one until it is over.
    plot = f"import pathlib, time\npathlib.Path({str(drawing)!r}).touch()\nwhile True: time.sleep(0.05)\n"
    (tmp_path / "slow/matplotlib/__init__.py").write_text(plot)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "slow"))
    flags = ("--rounds", "1", "--min-clients", "1")
    with programs(tmp_path, ranks=1, server_flags=flags, forked=False) as federation:
        federation.start_all()
        federation.wait_until(drawing.exists)
        before = federation.log("server")
        federation.kill("server", number)
        assert federation.wait() == {"server": 128 + number, "client-1": 0, "model-1": 0}, federation.tails()
        (said,) = federation.log("server")[len(before) :].splitlines()
        assert f"server interrupted by {number.name}; the run is complete: 1 of 1 rounds, in {tmp_path}" in said
        assert list((tmp_path / "checkpoints/server/payloads").iterdir()) == []


def test_a_trainer_says_what_it_does_before_it_loads_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch is loaded')")
    ended = subprocess.run(
        [sys.executable, "-m", "fedsplit", "trainer", "--rank", "2"], capture_output=True, text=True, cwd=tmp_path,
        timeout=BOUND_S,
    )  # fmt: skip
    first, second = ended.stderr.splitlines()
    assert first.endswith("trainer rank 2: starting (loading torch and the workload digits)")
    assert second == "torch is loaded"


@pytest.mark.slow
def test_a_client_waits_for_its_server_and_exits_when_it_waited_too_long(tmp_path: Path) -> None:
    with programs(tmp_path, client_flags=("--max-wait", "1")) as federation:
        federation.start("client-1")
        assert federation.wait(names=["client-1"]) == {"client-1": 7}
        assert "waiting for the server" in federation.log("client-1")
        assert "no server at" in federation.log("client-1")


@pytest.mark.slow
def test_a_failing_trainer_reaches_the_server_with_its_traceback_and_the_round_goes_on(tmp_path: Path) -> None:
    flags = ("--threads", "1", "--workload", "tests.unchanged:failing_on_rank_2")
    with programs(tmp_path, model_flags=flags) as federation:
        link_tests(tmp_path)
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert "the loss of rank 2 is not what it should be" in federation.log("server")
        assert "in train" in federation.log("server")
        assert all("2" in line["refused"] for line in federation.history())  # type: ignore[operator]


@pytest.mark.slow
def test_two_trainers_with_different_models_are_told_the_first_differing_keys(tmp_path: Path) -> None:
    flags = ("--threads", "1", "--workload", "tests.unchanged:wider_on_rank_2")
    with programs(tmp_path, model_flags=flags, client_flags=("--trainer-wait", "1")) as federation:
        link_tests(tmp_path)
        # Trainers first: an absent one would be missed after a second.
        for name in ("model-1", "model-2"):
            federation.start(name)
        for name in ("model-1", "model-2"):
            federation.wait_for(name, "waiting for a client")
        for name in ("server", "client-1", "client-2"):
            federation.start(name)
        codes = federation.wait()
        assert codes["model-2"] == 6, federation.tails()
        assert codes["server"] == codes["model-1"] == 0, federation.tails()
        assert "'layer.weight'" in federation.log("model-2")
        assert "'layer.weight'" in federation.log("server")


MISTAKES = [
    (["client_main.py", "--rank", "0"], 2, "positive integer"),
    (["client_main.py", "--rank", "one"], 2, "positive integer"),
    (["client_main.py", "--server-address", "localhost"], 2, "expected HOST:PORT"),
    (["client_main.py", "--server-address", "no-such-host.invalid:8080"], 2, "cannot resolve"),
    (["client_main.py", "--nonsense"], 2, "unrecognized"),
    (["server_main.py", "--address", "here"], 2, "expected HOST:PORT"),
    (["server_main.py", "--aggregate", "fedagv"], 2, "fedavg"),
    (["server_main.py", "--keep-checkpoints", "1"], 2, "at least 2"),
    (["server_main.py", "--fraction-train", "0"], 2, "above 0"),
    (["server_main.py", "--initial-checkpoint", "missing.pt"], 2, "missing.pt"),
    (["server_main.py", "--ssl-certfile", "missing.pem"], 2, "missing.pem"),
    (["model_main.py", "--workload", "digit"], 11, "digits"),
    (["model_main.py", "--workload", "tests.unchanged:without_evaluate"], 11, "evaluate"),
    (["model_main.py", "--workload-option", "epochs=many"], 2, "epochs"),
    (["model_main.py", "--rank", "3"], 2, "--num-partitions"),
    (["model_main.py", "--device", "quantum"], 2, "quantum"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "code", "said"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_a_mistake_gets_one_clear_line_and_its_exit_code(
    scripts: Scripts, command: list[str], code: int, said: str
) -> None:
    ended = scripts.run(*command)
    assert ended.code == code, ended.errors
    assert said in ended.errors
    assert "Traceback" not in ended.errors


@pytest.mark.slow
@pytest.mark.parametrize("script", ["server_main.py", "client_main.py", "model_main.py"])
def test_a_script_ends_with_the_code_and_the_line_of_its_mistake(tmp_path: Path, script: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / script), "--nonsense"], capture_output=True, text=True, cwd=tmp_path,
        timeout=BOUND_S, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "unrecognized" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_told(scripts: Scripts) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = scripts.run("server_main.py", "--address", address)
    assert ended.code == 7
    assert f"cannot listen at {address}" in ended.errors


@pytest.mark.slow
def test_a_taken_rank_names_the_process_that_holds_it(tmp_path: Path) -> None:
    with programs(tmp_path) as federation:
        first = federation.start("client-1")
        federation.wait_for("client-1", "waiting for the server")
        second = subprocess.run(
            federation.command("client-1"), capture_output=True, text=True, timeout=BOUND_S, cwd=tmp_path
        )
        assert second.returncode == 4
        assert f"process {first.pid}" in second.stderr


def test_an_exchange_directory_that_cannot_be_used_is_told(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    open_to_all = tmp_path / "shared" / "rank-1"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    address = f"127.0.0.1:{free_port()}"
    for directory, said in (("file", "cannot make the directory"), ("shared", "chmod go-w")):
        ended = scripts.run("client_main.py", "--exchange-dir", directory, "--server-address", address)
        assert ended.code == 3, ended.errors
        assert said in ended.errors


@pytest.mark.parametrize("script", ["server_main.py", "client_main.py", "model_main.py"])
def test_help_names_every_flag_of_the_design(script: str) -> None:
    shown = importlib.import_module(script.removesuffix(".py")).make_parser().format_help()
    for flag in CONTRACT[script].split():
        assert flag in shown, flag


CONTRACT = {
    "server_main.py": "--address --rounds --min-clients --min-results --fraction-train --evaluate-every --aggregate "
    "--checkpoint-dir --keep-checkpoints --resume --initial-checkpoint --round-timeout --train-config --payload-store "
    "--engine --seed --ssl-ca-certfile --ssl-certfile --ssl-keyfile --verbose -r -v",
    "client_main.py": "--rank --server-address --exchange-dir --root-certificates --max-wait --trainer-wait "
    "--payload-store --engine --verbose",
    "model_main.py": "--rank --exchange-dir --checkpoint-dir --workload --workload-option --num-partitions --data-dir "
    "--seed --device --state --client-wait --verbose",
}


def link_tests(directory: Path) -> None:
    """Make `tests` importable from where the programs are started, as a user's own package would be."""
    (directory / "tests").symlink_to(TESTS)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
