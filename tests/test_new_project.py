"""`new` writes a project that can be installed and run as its README says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedsplit.__main__ import main
from fedsplit.commands.new import check_name, render
from fedsplit.errors import UsageError
from fedsplit.run.history import read_history
from tests.bounds import BOUND_S
from tests.ports import free_port


def commands_of(readme: str) -> list[str]:
    """Return every command of the README's blocks."""
    blocks = re.findall(r"```sh\n(.+?)```", readme, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.parametrize("name", ["my-project", "2nd", "class", "träume", "a b"])
def test_a_name_that_no_package_can_have_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a Python package"):
        check_name(name)


def test_a_name_that_would_hide_a_package_is_refused() -> None:
    with pytest.raises(UsageError, match="would hide"):
        check_name("torch")


def test_what_exists_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_now").mkdir()
    assert main(["new", "mine_now"]) == UsageError.exit_code
    assert list(Path("mine_now").iterdir()) == []


def test_the_project_bears_its_name_everywhere() -> None:
    texts = render("spirals_here")
    assert sorted(texts) == [
        "README.md", "pyproject.toml", "spirals_here/__init__.py", "spirals_here/rules.py", "spirals_here/workload.py",
    ]  # fmt: skip
    assert not [path for path, text in texts.items() if "PROJECT" in text]


@pytest.mark.slow
def test_a_project_is_generated_installed_and_run_by_its_five_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project, site = tmp_path / "my_spirals", tmp_path / "site"
    assert main(["new", str(project)]) == 0
    assert str(project / "my_spirals/workload.py") in capsys.readouterr().out
    # With what is installed here, so without a network; into a directory of its own, so that nothing stays.
    install = [sys.executable, "-m", "uv", "--offline", "--no-cache", "--quiet", "pip", "install", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", "--target", str(site), str(project)], check=True, timeout=BOUND_S)
    five = [
        line
        for line in commands_of((project / "README.md").read_text())
        if re.search(r"-m fedsplit (server|client|trainer)\b", line)
    ]
    assert len(five) == 5
    address = f"127.0.0.1:{free_port()}"
    extra = {
        "server": ["--address", address], "client": ["--server-address", address],
        "trainer": ["--threads", "1"],
    }  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    started = {}
    for command in five:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "fedsplit"]
        log = (elsewhere / f"{len(started)}.log").open("wb")
        started[command] = subprocess.Popen(
            [sys.executable, *words[1:], *extra[words[3]]], cwd=elsewhere, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        log.close()
    try:
        codes = {command: process.wait(BOUND_S) for command, process in started.items()}
    finally:
        for process in started.values():
            if process.poll() is None:
                process.kill()
    logs = "\n".join(path.read_text() for path in sorted(elsewhere.glob("*.log")))
    assert set(codes.values()) == {0}, logs
    assert "rule my_spirals.rules:by_loss" in logs
    history = read_history(elsewhere / "checkpoints/server/history.jsonl")
    assert len(history) == 5
    assert history[-1]["evaluate"]["accuracy"] > 0.75 > history[0]["evaluate"]["accuracy"]
