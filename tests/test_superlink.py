"""The same server, relay and trainers under Flower's deployment engine: `flwr run`, SuperLink, SuperNodes, TLS, keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsplit.errors import UsageError
from fedsplit.history import read_history
from fedsplit.options import ServerOptions
from fedsplit.reports import Reports
from tests.deployed import deployed
from tests.programs import programs


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_flwr_run_with_tls_and_node_keys_comes_to_the_bits_of_the_embedded_engine(tmp_path: Path) -> None:
    with programs(tmp_path, server_flags=("--rounds", "3")) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        expected = federation.final_state().read_bytes()
    directory = tmp_path / "deployed"
    directory.mkdir()
    checkpoints, report = directory / "server-checkpoints", directory / "report.jsonl"
    with deployed(directory) as deployment:
        for rank in (1, 2):
            deployment.start_trainer(rank, 2)
        deployment.start_superlink()
        for rank in (1, 2):
            key = deployment.make_key(f"key-{rank}")
            deployment.register(key)
            deployment.start_supernode(f"node-{rank}", rank, key)
        # Who does not belong: one without a key, one with a key that nobody registered.
        deployment.start_supernode("node-keyless", 3, None)
        deployment.start_supernode("node-unregistered", 4, deployment.make_key("key-4"))
        deployment.run(rounds=3, checkpoint_dir=str(checkpoints), report_file=str(report))
        for rank in (1, 2):
            assert deployment.processes[f"model-{rank}"].wait(240) == 0, deployment.tails()
        for name in ("node-keyless", "node-unregistered"):
            assert deployment.processes[name].wait(10) != 0
            assert "SuperNode ID" not in deployment.log(name)
        assert deployment.wait_for_run(60) == "finished:completed"
    reports = Reports(report)
    reports.close()
    assert reports.ended and reports.error is None
    lines = read_history(checkpoints / "server" / "history.jsonl")
    assert [(line["round"], line["accepted"], line["refused"]) for line in lines] == [(n, 2, {}) for n in (1, 2, 3)]
    assert set().union(*(line["clients"] for line in lines)) == {"1", "2"}  # type: ignore[call-overload]
    assert max((checkpoints / "server").glob("round-*/state.safetensors")).read_bytes() == expected


def test_a_run_config_says_what_the_flags_say(tmp_path: Path) -> None:
    initial = tmp_path / "initial.pt"
    initial.touch()
    options = ServerOptions(
        rounds=7, min_clients=3, fraction_train=0.5, aggregate=("bn*=local", "trimmed-mean(fraction=0.2)"),
        checkpoint_dir=tmp_path, initial_checkpoint=initial, round_timeout=2.5, resume=True,
        train_config=(("lr", 0.1), ("name", "a b")),
    )  # fmt: skip
    config = options.to_run_config()
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert ServerOptions.from_run_config(config) == options
    assert ServerOptions.from_run_config(ServerOptions().to_run_config()).settings() == ServerOptions().settings()


@pytest.mark.parametrize(("key", "value"), [
    ("rounds", "three"), ("rounds", 0), ("rounds", True), ("resume", "yes"), ("aggregate", 1), ("train-config", "lr"),
    ("keep-checkpoints", 1), ("checkpoint-dir", 3), ("round-timeout", "soon"),
])  # fmt: skip
def test_a_mistake_in_a_run_config_is_named(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=key):
        ServerOptions.from_run_config({key: value})


def test_the_project_offers_every_option_as_run_config() -> None:
    import tomllib

    from tests.programs import ROOT

    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    defaults = ServerOptions().to_run_config() | {"checkpoint-dir": "checkpoints", "report-file": "", "verbose": False}
    assert app["config"] == defaults
