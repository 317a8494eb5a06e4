"""``python -m fedsplit demo``: real runs, real signals; whatever happens, nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedsplit.__main__ import main
from fedsplit.commands import run
from fedsplit.commands.status import find_ranks, read_status
from fedsplit.engines import together
from fedsplit.engines.processes import Child
from fedsplit.errors import RoleTakenError, RunFailedError
from fedsplit.exchange.directory import Exchange
from fedsplit.run.directory import Places
from fedsplit.run.history import read_history
from tests.bounds import BOUND_S
from tests.programs import programs_of, still_runs

COMMAND = [sys.executable, "-m", "fedsplit", "demo"]
LINE = {
    "round": 1, "seconds": 0.5, "train": {"loss": 1.25}, "evaluate": {"loss": 0.5, "accuracy": 0.75},
    "clients": {}, "asked": 2, "accepted": 2, "refused": {},
}  # fmt: skip


@dataclass
class Demo:
    """A demo that was started, and the children that it was seen to have."""

    process: subprocess.Popen[str]
    children: list[psutil.Process]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = BOUND_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "it did not come to it in time"
            time.sleep(0.02)

    def wait_for_children(self) -> None:
        self.wait_until(lambda: len(programs_of(self.process.pid)) == 5)
        self.children = programs_of(self.process.pid)

    def still_running(self) -> list[psutil.Process]:
        return [child for child in self.children if still_runs(child)]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Demo]:
    """A demo with more rounds than anybody waits for."""
    process = subprocess.Popen(
        [*COMMAND, "--rounds", "100000"], cwd=tmp_path, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    run = Demo(process, [])
    try:
        yield run
    finally:
        process.kill()
        process.wait()
        for child in run.still_running():
            child.kill()


@pytest.mark.slow
def test_a_run_ends_with_the_accuracy_the_checkpoints_and_the_plot(tmp_path: Path) -> None:
    finished = subprocess.run(
        [*COMMAND, "--rounds", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=BOUND_S
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    last = read_history(tmp_path / "checkpoints/server/history.jsonl")[-1]
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("starting a server, 2 clients and 2 trainers")
    rounds = re.findall(r"server round (./. \| ./.) updates", finished.stderr)
    assert rounds == ["1/2 | 2/2", "2/2 | 2/2"], "the server's own lines, as there is no terminal"
    assert f"final accuracy {last['evaluate']['accuracy']:.4f} after 2 rounds" in lines
    assert "checkpoints: checkpoints/server" in lines
    assert "plot:        checkpoints/server/plot.png" in lines
    assert "logs:        checkpoints/logs" in lines
    said = finished.stdout + finished.stderr
    assert [said.count(f"{fact} ") for fact in ("final accuracy", "checkpoints:", "plot:", "report:", "logs:")] == [
        1
    ] * 5
    logs = {path.name for path in (tmp_path / "checkpoints/logs").iterdir()}
    assert logs == {"client-1.log", "client-2.log", "trainer-1.log", "trainer-2.log"}
    for place in find_ranks(tmp_path / "exchange"):
        status = read_status(*place)
        assert status["client"] == status["trainer"] == "nobody"
        assert status["now"] == "the run is over: complete"


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_run_leaves_nothing_running(started: Demo, tmp_path: Path) -> None:
    history = tmp_path / "checkpoints/server/history.jsonl"
    started.wait_until(lambda: len(read_history(history)) >= 2)
    started.wait_for_children()
    # What status tells while the run is on: the processes that hold the roles are the demo's children.
    ids = {child.pid for child in started.children}
    for place in find_ranks(tmp_path / "exchange"):
        status = read_status(*place)
        assert {int(status[role].split()[1]) for role in ("client", "trainer")} <= ids, status
        assert status["newest task"].startswith("version ")
        assert "the run is over" not in status["now"]
    os.kill(started.process.pid, signal.SIGINT)
    output, errors = started.process.communicate(timeout=BOUND_S)
    assert started.process.returncode == 128 + signal.SIGINT, errors
    assert "interrupted by SIGINT: all 5 programs have ended" in output
    assert started.still_running() == []
    assert "Traceback" not in errors
    logs = {path.name: path.read_text() for path in (tmp_path / "checkpoints/logs").iterdir()}
    assert "stopped by SIGINT after" in errors
    # Each ended by itself: nobody had to be killed.
    assert all(text.splitlines()[-1].endswith(": interrupted") for text in logs.values()), logs


@pytest.mark.slow
def test_sigterm_while_the_programs_start_leaves_nothing_running(started: Demo) -> None:
    started.wait_for_children()
    os.kill(started.process.pid, signal.SIGTERM)
    started.process.communicate(timeout=BOUND_S)
    assert started.process.returncode == 128 + signal.SIGTERM
    assert started.still_running() == []


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of a parent's death")
def test_a_demo_that_is_killed_outright_takes_its_programs_along(started: Demo) -> None:
    started.wait_for_children()
    started.process.kill()
    deadline = time.monotonic() + BOUND_S
    while started.still_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started.still_running() == []


@pytest.mark.slow
def test_a_trainer_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    finished = subprocess.run(
        [*COMMAND, "--workload-option", "epochs=abc"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
    )
    assert finished.returncode == RunFailedError.exit_code
    # Both fail; on a busy machine one of them much sooner.
    assert re.search("error: the trainer of rank [12] ended with exit code 2", finished.stderr)
    assert "--workload-option epochs: expected a whole number of at least 1, found 'abc'" in finished.stderr
    assert re.search("checkpoints/logs/trainer-[12].log", finished.stderr)


def test_a_rank_in_use_is_refused_before_its_logs_are_touched(tmp_path: Path) -> None:
    log = tmp_path / "checkpoints/logs/client-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("of the run that is on")
    places = ["--checkpoint-dir", str(tmp_path / "checkpoints"), "--exchange-dir", str(tmp_path / "exchange")]
    with Exchange(tmp_path / "exchange", 2).hold("trainer"):
        assert main(["demo", *places]) == RoleTakenError.exit_code
    assert log.read_text() == "of the run that is on"


class Pretended(Child):
    """A child without a process: it runs from its start until it is asked to end."""

    def start(self, environment: Mapping[str, str]) -> None:
        if self.log is not None and not self.log.parent.is_dir():
            raise FileNotFoundError(self.log)
        self.began = True

    @property
    def is_running(self) -> bool:
        return hasattr(self, "began") and self.exit_code is None

    def send(self, number: signal.Signals) -> None:
        self.exit_code = -number

    def kill(self) -> None:
        assert not self.is_running, "it was killed without being asked to end"


def test_when_one_cannot_be_started_the_others_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = [Pretended(name, [], tmp_path / name / "log") for name in ("first", "second", "nowhere", "last")]
    for name in ("first", "second", "last"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(run, "plan", lambda *_: children)
    places = ["--checkpoint-dir", str(tmp_path / "checkpoints"), "--exchange-dir", str(tmp_path / "exchange")]
    with pytest.raises(FileNotFoundError):
        main(["demo", *places])
    assert [child.exit_code for child in children] == [-signal.SIGINT, -signal.SIGINT, None, None]


def test_a_run_in_which_no_update_was_accepted_is_a_failure(tmp_path: Path) -> None:
    refused = {**LINE, "accepted": 0, "refused": {"1": "its loss is NaN"}}
    with pytest.raises(RunFailedError, match=r"no update of any trainer was accepted .*rank 1: its loss is NaN"):
        run._conclude([refused], Places(tmp_path))


# -- child processes, small ones ---------------------------------------------------------------------------------------

STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(600)"
)


def started_child(name: str, script: str, log: Path) -> Child:
    child = Child(name, [sys.executable, "-u", "-c", script], log)
    child.start(os.environ)
    return child


def test_a_program_that_ignores_sigint_is_killed(tmp_path: Path) -> None:
    stubborn = started_child("stubborn", STUBBORN, tmp_path / "log")
    try:
        while stubborn.tail() != "ready":
            assert stubborn.is_running
            time.sleep(0.01)
    finally:
        together.end([stubborn], [], 0.3)
    assert stubborn.describe_end() == "the stubborn was killed by SIGKILL"


def test_the_cause_is_named_before_those_that_followed(tmp_path: Path) -> None:
    children = [
        started_child(f"program {code}", f"import sys; print('because'); sys.exit({code})", tmp_path / f"{code}.log")
        for code in (15, 0, 7)
    ]
    try:
        while any(child.is_running for child in children):
            time.sleep(0.01)
    finally:
        together.end(children, [])
    failed = together.watch(children, [], lambda _: False, lambda _: False)
    assert together.explain(failed).splitlines() == [
        f"the program 7 ended with exit code 7; the last lines of its log, {tmp_path}/7.log:",
        "    because",
        "also the program 15 ended with exit code 15",
    ]
