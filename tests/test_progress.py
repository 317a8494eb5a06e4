"""The trainer's bar: epochs, batches and loss on a terminal, nothing without one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from fedsplit.engines.forked import Forked
from tests.bounds import BOUND_S
from tests.programs import programs
from tests.terminal import on_a_terminal, script_on_a_terminal

LOOP = """
from types import SimpleNamespace
from fedsplit import Progress

progress = Progress(2)
with progress.task(SimpleNamespace(kind="train", server_round=3, total_rounds=10)):
    for done in range(1, 7):
        progress.update(done, 6, 1 / done, epochs=3)
        # As it is ten times a second.
        progress._bar and progress._bar.refresh()
"""


@pytest.mark.smoke
def test_a_loop_of_ones_own_shows_its_epochs_batches_and_loss(tmp_path: Path) -> None:
    code, screens = script_on_a_terminal(LOOP, tmp_path)
    shown = "\n".join(line for screen in screens for line in screen)
    assert code == 0, shown
    assert "rank 2 train 3/10" in shown
    assert re.search(r"[345]/6 .*epoch [23]/3, loss 0\.\d{4}", shown)


@pytest.mark.smoke
def test_without_a_terminal_there_is_no_bar(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(LOOP)
    assert Forked([sys.executable, str(script)], os.environ, log, tmp_path).wait(BOUND_S) == 0
    assert log.read_text() == ""


TALKATIVE = """
import contextlib, logging, sys
from types import SimpleNamespace
from fedsplit import Progress
from fedsplit.cli import set_up_logging

set_up_logging("trainer", verbose=False) if sys.argv[1] == "fedsplit" else logging.basicConfig(level=logging.INFO)
log, progress = logging.getLogger(sys.argv[1]), Progress(2)
def draw():  # as it is ten times a second
    progress._bar and progress._bar.refresh()
for number in (1, 2, 3):
    task = SimpleNamespace(kind="train", server_round=number, total_rounds=3)
    with contextlib.suppress(ValueError), progress.task(task):
        for done in range(1, 4):
            if sys.argv[2] == "batches":
                progress.update(done, 3, 1 / done)
            draw()
        log.info("logged %d", number)
        print("printed", number)
        draw()
        if number == 2:
            raise ValueError
    log.info("after %d", number)
"""


@pytest.mark.smoke
@pytest.mark.parametrize("logger", ["fedsplit", "script"])
def test_what_is_logged_stands_above_the_bar_and_the_bar_goes_with_its_task(tmp_path: Path, logger: str) -> None:
    code, screens = script_on_a_terminal(TALKATIVE, tmp_path, logger, "batches")
    assert code == 0, screens[-1]
    # Never on one line, never two bars, and none below a line that came while it was shown.
    for screen in screens:
        bars = [number for number, line in enumerate(screen) if "rank 2 train" in line]
        assert bars in ([], [len(screen) - 1]), screen
        assert not re.search(r"rank 2.*(logged|after|printed)|(logged|after|printed).*rank 2", "\n".join(screen)), (
            screen
        )
    shown = ["\n".join(screen) for screen in screens]
    assert any(re.search(r"logged 1\nprinted 1\nrank 2 train 1/3 .* 3/3 .*loss 0\.3333$", each) for each in shown)
    last = [" ".join(line.split()[-2:]) for line in screens[-1]]
    expected = [f"{word} {number}" for number in (1, 2, 3) for word in ("logged", "printed", "after")]
    assert [re.sub(r".*:", "", line) for line in last] == expected


@pytest.mark.smoke
def test_a_workload_that_reports_no_batches_gets_no_count_of_them(tmp_path: Path) -> None:
    code, screens = script_on_a_terminal(TALKATIVE, tmp_path, "fedsplit", "none")
    assert code == 0, screens[-1]
    bars = [line for screen in screens for line in screen if "rank 2 train" in line]
    assert any(re.fullmatch(r"rank 2 train 1/3 \S+ +0:00:00", line) for line in bars), bars
    assert not any("?" in line for line in bars)


@pytest.mark.smoke
def test_what_is_printed_into_a_file_goes_there_also_beside_a_bar(tmp_path: Path) -> None:
    assert script_on_a_terminal(TALKATIVE, tmp_path, "fedsplit", "batches", output=tmp_path / "printed")[0] == 0
    assert (tmp_path / "printed").read_text() == "printed 1\nprinted 2\nprinted 3\n"


STANDALONE = """
from fedsplit import Progress, Trainer, WorkloadContext
from fedsplit.cli import set_up_logging
from fedsplit.commands.template.workload import make_workload
from fedsplit.workloads.runner import run_workload

set_up_logging("trainer", verbose=False)
workload = make_workload(WorkloadContext(rank=1, options={"epochs": "400"}))
with Trainer(1, workload.model, standalone=True, standalone_rounds=2) as trainer:
    run_workload(trainer, workload, Progress(1))
"""


@pytest.mark.smoke
def test_a_new_project_shows_its_epochs_and_leaves_nothing_but_its_log(tmp_path: Path) -> None:
    code, screens = script_on_a_terminal(STANDALONE, tmp_path)
    assert code == 0, screens[-1]
    bars = [line for screen in screens for line in screen if "rank 1 train" in line]
    assert any(re.search(r" \d+/400 .*epoch \d+/400, loss \d\.\d{4}", line) for line in bars), bars
    assert not any("trained" in line for line in bars), "a line of the log and the bar are glued together"
    assert [line for line in screens[-1] if not re.match(r"\d\d:\d\d:\d\d trainer ", line)] == []
    assert [line.split(" trainer ")[1].split(",")[0] for line in screens[-1] if "standalone" not in line] == [
        "round 1: trained", "round 1: evaluated", "round 2: trained", "round 2: evaluated",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_shipped_workloads_show_it(tmp_path: Path) -> None:
    with programs(tmp_path, ranks=1, server_flags=("--rounds", "2", "--min-clients", "1")) as federation:
        federation.start("server")
        federation.start("client-1")
        # Long enough for rich's ten pictures a second.
        code, shown = on_a_terminal([*federation.command("model-1"), "--workload-option", "epochs=40"], tmp_path)
        assert code == 0, shown
        assert federation.wait(names=["server", "client-1"]) == {"server": 0, "client-1": 0}, federation.tails()
    assert re.search(r"rank 1 train 1/2 .*epoch \d+/40, loss \d\.\d{4}", shown), shown[-2000:]
