"""The same server, relay and trainers under Flower's deployment engine: `flwr run`, SuperLink, SuperNodes, keys."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch

from examples.make_certificates import make_certificates
from fedsplit.engines.processes import Child
from fedsplit.engines.superlink import node
from fedsplit.engines.superlink.node import _watch
from fedsplit.engines.superlink.serve import let_in, only
from fedsplit.errors import RefusedError, UsageError
from fedsplit.exchange.directory import Exchange
from fedsplit.run.history import read_history
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import map_file
from fedsplit.workloads import WorkloadContext, create_workload
from tests.bounds import BOUND_S
from tests.deployed import deployed, make_node_key
from tests.programs import programs
from tests.reference import federated_averaging


@pytest.mark.slow
def test_flwr_run_with_tls_and_node_keys_comes_to_the_bits_of_the_embedded_engine(tmp_path: Path) -> None:
    with programs(tmp_path, server_flags=("--rounds", "3")) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        expected = federation.final_state().read_bytes()
    directory = tmp_path / "deployed"
    directory.mkdir()
    checkpoints = directory / "server-checkpoints"
    with deployed(directory) as deployment:
        for rank in (1, 2):
            deployment.start_trainer(rank, 2)
        deployment.start_superlink()
        for rank in (1, 2):
            key = make_node_key(directory / f"key-{rank}")
            deployment.register(key)
            deployment.start_supernode(f"node-{rank}", rank, key)
        # Who does not belong.
        deployment.start_supernode("node-keyless", 3, None)
        deployment.run(rounds=3, checkpoint_dir=str(checkpoints))
        for rank in (1, 2):
            assert deployment.processes[f"model-{rank}"].wait(BOUND_S) == 0, deployment.tails()
        assert deployment.processes["node-keyless"].wait(BOUND_S) != 0
        assert "SuperNode ID" not in deployment.log("node-keyless")
        assert deployment.wait_for_run(BOUND_S) == "finished:completed"
    lines = read_history(checkpoints / "server" / "history.jsonl")
    assert [(line["round"], line["accepted"], line["refused"]) for line in lines] == [(n, 2, {}) for n in (1, 2, 3)]
    # One message a round: the next training came along with the evaluation.
    assert ["train ahead" in line["stages"] for line in lines] == [True, True, False]  # type: ignore[operator]
    assert set().union(*(line["clients"] for line in lines)) == {"1", "2"}  # type: ignore[call-overload]
    assert max((checkpoints / "server").glob("round-*/state.safetensors")).read_bytes() == expected


@pytest.mark.slow
def test_the_same_five_terminals_work_on_a_superlink_and_nobody_else_gets_in(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make_certificates(tmp_path / "c", ["127.0.0.1"])
    keys = {rank: make_node_key(tmp_path / f"key-{rank}") for rank in (1, 2, 3)}
    server_flags = [
        "--engine", "superlink", "--rounds", "2", "--ssl-ca-certfile", "c/ca.pem", "--ssl-certfile", "c/server.pem",
        "--ssl-keyfile", "c/server-key.pem", "--supernode-public-key", "key-1.pub",
        "--supernode-public-key", "key-2.pub",
    ]  # fmt: skip
    client_flags = ["--engine", "superlink", "--root-certificates", "c/ca.pem"]
    with programs(tmp_path, ranks=4, server_flags=server_flags, client_flags=client_flags) as federation:
        federation.start("client-1", "--supernode-private-key", str(keys[1]))
        for rank in (1, 2):
            federation.start(f"model-{rank}")
        federation.start("server")
        federation.wait_for("server", "waiting for clients")
        control_api_is_closed(federation.port, tmp_path / "c" / "ca.pem")
        inner_port_is_closed(psutil.Process(federation.processes["server"].pid), federation.port)
        federation.start("client-3", "--supernode-private-key", str(keys[3]))
        federation.start("client-4")
        assert federation.wait(names=["client-3", "client-4"]) == {"client-3": 8, "client-4": 8}, federation.tails()
        assert "does not let this SuperNode in" in federation.log("client-3")
        federation.start("client-2", "--supernode-private-key", str(keys[2]))
        # Killed, the server leaves no SuperLink behind, and goes on where it was.
        federation.wait_for("server", "round 1/2")
        federation.kill("server")
        federation.start("server", "--resume")
        names = ["server", "client-1", "client-2", "model-1", "model-2"]
        assert federation.wait(names=names) == dict.fromkeys(names, 0), federation.tails()
        assert [line["accepted"] for line in federation.history()] == [2, 2]
        found = map_file(federation.final_state())
        assert "round 2/2" in federation.log("server")
        assert "train, round 2 of 2" in federation.log("client-1")
    nothing_is_left(tmp_path)
    expected = federated_averaging(
        lambda rank: create_workload("digits", WorkloadContext(rank=rank, num_partitions=4, seed=0)), ranks=2, rounds=2
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_without_the_deprecated_functions_the_scripts_take_the_superlink_and_ctrl_c_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import os\nos.environ.setdefault('FLWR_TELEMETRY_ENABLED', '0')\n"
        "import flwr.server, flwr.client\ndel flwr.server.start_server, flwr.client.start_client\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hooks))
    flags = ("--threads", "1", "--workload", "tests.unchanged:slow")
    with programs(tmp_path, server_flags=("--rounds", "1"), model_flags=flags, forked=False) as federation:
        (tmp_path / "tests").symlink_to(Path(__file__).parent)
        federation.start_all()
        for rank in (1, 2):
            federation.wait_for(f"client-{rank}", "train, round 1")
        assert "has no start_server and start_client any more: using --engine superlink" in federation.log("server")
        federation.kill("server", signal.SIGINT)
        codes = federation.wait()
        assert codes == dict.fromkeys(federation.names, 14), federation.tails()
        assert "stopped by SIGINT" in federation.log("server")
        assert "stopped by SIGINT" in federation.log("model-1")
    nothing_is_left(tmp_path)


def control_api_is_closed(port: int, ca: Path) -> None:
    """What would let anybody run code on the server is not there for others; what SuperNodes need is."""
    context = ssl.create_default_context(cafile=str(ca))
    for path, expected in (
        ("/v1/control/list-runs", 404), ("/v1/control/start-run", 404), ("/v1/runtime/acquire-task", 404),
        ("/docs", 404),
        ("/v1/fleet/../control/list-runs", 404), ("/v1/fleet/%2e%2e/control/list-runs", 404), ("/v1/fleet/x?y=1", 404),
        ("//v1/control/list-runs", 404), ("/v1/fleet/pull-messages", 401),
    ):  # fmt: skip
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=BOUND_S)
        connection.request("POST", path, body=b"", headers={"content-type": "application/protobuf"})
        found = connection.getresponse().status
        # Unsigned, a message of a SuperNode is turned away by the SuperLink itself, one way or another.
        assert found == expected or (expected == 401 and 400 <= found < 500 and found != 404), (path, found)
        connection.close()


def inner_port_is_closed(server: psutil.Process, outer_port: int) -> None:
    """What else the server listens at is on loopback, and answers nobody without the run's token."""
    listening = [each.laddr for each in server.net_connections() if each.status == psutil.CONN_LISTEN]
    inner = [port for host, port in listening if port != outer_port]
    assert len(inner) == 1 and {host for host, port in listening} == {"127.0.0.1"}, listening
    for path, expected in (
        ("/v1/control/list-runs", 404), ("/v1/fleet/pull-messages", 404), ("/health", 404),
        ("/v1/runtime/acquire-task", 401), ("/v1/runtime/get-nodes", 401),
    ):  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", inner[0], timeout=BOUND_S)
        connection.request("POST", path, body=b"", headers={"content-type": "application/protobuf"})
        found = connection.getresponse().status
        assert found == expected, (path, found)
        connection.close()


@pytest.mark.parametrize(("raw_path", "method", "status"), [
    (b"/v1/fleet/pull-messages", "POST", 200), (b"/v1/fleet/pull-messages", "GET", 404),
    (b"/v1/fleet/x/../../control/start-run", "POST", 404), (b"/v1/fleet/%2e%2e/control/start-run", "POST", 404),
    (b"/v1/fleet/", "POST", 404), (b"/v1/fleet/pull-messages/", "POST", 404), (b"/v1/control/start-run", "POST", 404),
    (b"/v1/runtime/acquire-task", "POST", 404), (b"", "POST", 404),
])  # fmt: skip
def test_a_port_answers_one_interface(raw_path: bytes, method: str, status: int) -> None:
    found: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        found.append(200)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    scope = {"type": "http", "method": method, "raw_path": raw_path, "path": "/v1/fleet/pull-messages"}
    asyncio.run(only(cast(Any, application), "fleet")(scope, cast(Any, None), send))
    assert found == [status]


@pytest.mark.parametrize(("content", "said"), [(b"no key", "no public key"), (None, "No such file")])
def test_a_public_key_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "node.pub"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        let_in(cast(Any, None), path)


@pytest.mark.parametrize(("end", "refused"), [
    ("signal.raise_signal(signal.SIGINT)", False), ("sys.exit(0)", False), ("sys.exit('no')", True),
])  # fmt: skip
def test_a_supernode_that_a_restarted_server_does_not_know_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, refused: bool
) -> None:
    monkeypatch.setattr(node, "_CONNECTION_LOOK_S", 0.2)
    ended = Child("SuperNode", [sys.executable, "-c", f"import signal, sys; {end}"], tmp_path / "supernode.log")
    with socket.create_server(("127.0.0.1", 0)) as server, (tmp_path / "relay.log").open("w+") as lines:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        ended.start(os.environ)
        try:
            finished = _watch(ended, Exchange(tmp_path, 1), 0, tmp_path / "refusal", lines, address)
        except RefusedError as exc:
            assert refused and "no" in str(exc)
        else:
            assert finished is None and not refused
        finally:
            ended.kill()


def nothing_is_left(directory: Path) -> None:
    """No process of Flower's that these programs started is left: all of them stand in the directory."""
    deadline = time.monotonic() + BOUND_S
    while left := [
        process for process in psutil.process_iter(["pid", "name", "cmdline"]) if is_ours(process, directory)
    ]:
        assert time.monotonic() < deadline, [process.info for process in left]
        time.sleep(0.2)


def is_ours(process: psutil.Process, directory: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.status() != "zombie" and process.cwd() == str(directory)
    except psutil.Error:
        return False


def test_a_run_config_says_what_the_flags_say(tmp_path: Path) -> None:
    initial = tmp_path / "initial.pt"
    initial.touch()
    options = ServerSettings(
        rounds=7, min_clients=3, fraction_train=0.5, aggregate=("bn*=local", "trimmed-mean(fraction=0.2)"),
        checkpoint_dir=tmp_path, initial_checkpoint=initial, round_timeout=2.5, resume=True,
        train_config=(("lr", 0.1), ("name", "a b")),
    )  # fmt: skip
    config = options.to_run_config()
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert ServerSettings.from_run_config(config) == options
    assert ServerSettings.from_run_config(ServerSettings().to_run_config()).rules == ServerSettings().rules


@pytest.mark.parametrize(("key", "value"), [
    ("rounds", "three"), ("rounds", 0), ("rounds", True), ("resume", "yes"), ("aggregate", 1), ("train-config", "lr"),
    ("keep-checkpoints", 1), ("checkpoint-dir", 3), ("round-timeout", "soon"),
])  # fmt: skip
def test_a_mistake_in_a_run_config_is_named(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=key):
        ServerSettings.from_run_config({key: value})


def test_the_project_offers_every_option_as_run_config() -> None:
    import tomllib

    from tests.programs import ROOT

    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    defaults = ServerSettings().to_run_config() | {"checkpoint-dir": "checkpoints", "verbose": False}
    assert app["config"] == defaults
