"""``python -m fedsplit demo``: real runs, real signals; whatever happens, nothing is left running."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from PIL import Image

from fedsplit.__main__ import main
from fedsplit.commands import demo, programs
from fedsplit.commands.demo_follower import Follower
from fedsplit.commands.demo_view import LiveView, PlainView
from fedsplit.commands.programs import Program, Programs
from fedsplit.commands.status import read_statuses
from fedsplit.errors import RoleTakenError, RunFailedError
from fedsplit.exchange.directory import Exchange
from fedsplit.run.history import History, read_history
from fedsplit.run.paths import Places
from fedsplit.watch.console import cells

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

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "it did not come to it in time"
            time.sleep(0.02)

    def wait_for_children(self) -> None:
        self.wait_until(lambda: len(psutil.Process(self.process.pid).children()) == 5)
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def still_running(self) -> list[psutil.Process]:
        # psutil compares start times: an id that was given to another process since is not taken for it.
        return [child for child in self.children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


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
    finished = subprocess.run([*COMMAND, "--rounds", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    last = read_history(tmp_path / "checkpoints/server/history.jsonl")[-1]
    lines = finished.stdout.splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith("round ") and "|" in line] == [
        ["round 1", "clients 2/2"],
        ["round 2", "clients 2/2"],
    ]
    assert f"final accuracy {last['evaluate']['accuracy']:.4f} after 2 rounds" in lines
    assert "checkpoints: checkpoints/server" in lines
    with Image.open(tmp_path / "checkpoints/plot.png") as picture:
        assert picture.format == "PNG"
    logs = {path.name for path in (tmp_path / "checkpoints/logs").iterdir()}
    assert logs == {"server.log", "client-1.log", "client-2.log", "trainer-1.log", "trainer-2.log"}
    for status in read_statuses(tmp_path / "exchange"):
        assert status.describe_role("client") == status.describe_role("trainer") == "nobody"
        assert status.describe_now() == "the run is over: complete"


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_run_leaves_nothing_running(started: Demo, tmp_path: Path) -> None:
    history = tmp_path / "checkpoints/server/history.jsonl"
    started.wait_until(lambda: len(read_history(history)) >= 2)
    started.wait_for_children()
    # What status tells while the run is on: the processes that hold the roles are the demo's children.
    ids = {child.pid for child in started.children}
    for status in read_statuses(tmp_path / "exchange"):
        holders = {role: status.holders[role] for role in ("client", "trainer")}
        assert all(getattr(holder, "pid", None) in ids for holder in holders.values()), holders
        assert status.task is not None
        assert not status.is_over
    os.kill(started.process.pid, signal.SIGINT)
    output, errors = started.process.communicate(timeout=30)
    assert started.process.returncode == 128 + signal.SIGINT, errors
    assert "interrupted by SIGINT: all 5 programs have ended" in output
    assert started.still_running() == []
    assert "Traceback" not in errors
    logs = {path.name: path.read_text() for path in (tmp_path / "checkpoints/logs").iterdir()}
    assert "stopped by SIGINT after" in logs.pop("server.log")
    # Each ended by itself: nobody had to be killed.
    assert all(text.splitlines()[-1].endswith(": interrupted") for text in logs.values()), logs


@pytest.mark.slow
def test_sigterm_while_the_programs_start_leaves_nothing_running(started: Demo) -> None:
    started.wait_for_children()
    os.kill(started.process.pid, signal.SIGTERM)
    started.process.communicate(timeout=30)
    assert started.process.returncode == 128 + signal.SIGTERM
    assert started.still_running() == []


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of a parent's death")
def test_a_demo_that_is_killed_outright_takes_its_programs_along(started: Demo) -> None:
    started.wait_for_children()
    started.process.kill()
    deadline = time.monotonic() + 30
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
        timeout=120,
    )
    assert finished.returncode == RunFailedError.exit_code
    assert "error: the trainer of rank 1 ended with exit code 2" in finished.stderr
    assert "--workload-option epochs: expected a whole number of at least 1, found 'abc'" in finished.stderr
    assert "checkpoints/logs/trainer-1.log" in finished.stderr


def test_a_rank_in_use_is_refused_before_its_logs_are_touched(tmp_path: Path) -> None:
    log = tmp_path / "checkpoints/logs/server.log"
    log.parent.mkdir(parents=True)
    log.write_text("of the run that is on")
    places = ["--directory", str(tmp_path / "checkpoints"), "--exchange-dir", str(tmp_path / "exchange")]
    with Exchange(tmp_path / "exchange", 2).hold("trainer"):
        assert main(["demo", *places]) == RoleTakenError.exit_code
    assert log.read_text() == "of the run that is on"


def test_a_run_in_which_no_update_was_accepted_is_a_failure(tmp_path: Path) -> None:
    places = Places(tmp_path)
    places.server.mkdir()
    follower = Follower(places, tmp_path / "exchange", 2)
    places.run.write_text('{"run_id": "abc"}')
    History(places.history).append({**LINE, "accepted": 0, "refused": {"1": "its loss is NaN"}})
    with pytest.raises(RunFailedError, match=r"no update of any trainer was accepted: .*its loss is NaN"):
        demo._conclude(follower, places)


def test_the_history_of_an_earlier_run_is_not_shown(tmp_path: Path) -> None:
    places = Places(tmp_path)
    places.server.mkdir()
    places.run.write_text('{"run_id": "old"}')
    History(places.history).append(LINE)
    follower = Follower(places, tmp_path / "exchange", 1)
    assert follower.update() == "starting: waiting for the server, client 1, trainer 1"
    assert follower.lines == []


def test_plain_lines_say_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    refused = {**LINE, "round": 2, "accepted": 1, "refused": {"2": "NaN in fc.weight"}}
    with PlainView("title") as view:
        for lines in ([], [LINE], [LINE, refused], [LINE, refused]):
            view.show("going on", lines)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["title", "going on"]
    assert printed[2].startswith("round 1 | clients 2/2 | train loss 1.2500 | test loss 0.5000 | accuracy 0.7500")
    assert printed[3].startswith("round 2 | clients 1/2")
    assert printed[4:] == ["round 2: rank 2 was not counted: NaN in fc.weight"]


def test_the_live_table_shows_the_newest_rounds_and_what_was_refused() -> None:
    from rich.console import Console

    screen = io.StringIO()
    view = LiveView(Console(file=screen, force_terminal=True, width=80, height=16, color_system=None), "title")
    with view:
        view.show("round 9 of 9: training", [{**LINE, "round": number} for number in range(1, 9)])
        screen.truncate(0)
        view.show("", [{**LINE, "round": number, "refused": {"2": "NaN"}} for number in range(1, 10)])
    shown = screen.getvalue()
    assert "title" in shown
    assert [f"│     {number} │" in shown for number in (5, 6, 9)] == [False, True, True]
    assert "round 9: rank 2 was not counted: NaN" in shown
    assert "round 9 of 9" not in shown


def test_a_round_without_evaluation_or_with_nan_has_dashes() -> None:
    line = {"round": 7, "train": {"loss": None}, "evaluate": {}, "asked": 1, "accepted": 1}
    assert cells(line) == ["7", "1/1", "–", "–", "–", "–", "–"]


# -- Programs, with small ones ---------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "stubborn.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    (tmp_path / "failing.py").write_text("import sys\nprint('because', flush=True)\nsys.exit(int(sys.argv[1]))")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_a_program_that_ignores_sigint_is_killed(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "STOP_S", 0.3)
    stubborn = Program("stubborn", "stubborn", [], tmp_path / "stubborn.log")
    with Programs([stubborn], environment) as group:
        while stubborn.tail() != "ready":
            time.sleep(0.01)
        assert group.running == [stubborn]
    assert stubborn.describe_end() == "the stubborn was killed by SIGKILL"
    assert group.failed == []


def test_the_cause_is_named_before_those_that_followed(tmp_path: Path, environment: dict[str, str]) -> None:
    group = Programs(
        [Program(f"program {code}", "failing", [code], tmp_path / f"{code}.log") for code in ("15", "0", "7")],
        environment,
    )
    with group:
        group.settle(30)
    assert [program.describe_end() for program in group.failed] == [
        "the program 7 ended with exit code 7",
        "the program 15 ended with exit code 15",
    ]
    assert group.failed[0].tail() == "because"


def test_when_one_cannot_be_started_the_others_are_ended(tmp_path: Path, environment: dict[str, str]) -> None:
    stubborn = Program("stubborn", "stubborn", [], tmp_path / "stubborn.log")
    nowhere = Program("nowhere", "failing", [], tmp_path / "missing" / "nowhere.log")
    with pytest.raises(FileNotFoundError), Programs([stubborn, nowhere], environment, lambda: True):
        pass
    assert not stubborn.is_running
    assert stubborn.exit_code is not None


def test_a_long_log_is_shown_by_its_end(tmp_path: Path) -> None:
    program = Program("talker", "talker", [], tmp_path / "talker.log")
    program.log.write_bytes(b"x" * 100_000 + b"\n" + "\n".join(map(str, range(100))).encode() + b"\xff")
    assert program.tail().splitlines()[0] == "88"
    assert len(io.StringIO(program.tail()).readlines()) == 12
