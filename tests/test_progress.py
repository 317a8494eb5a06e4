"""The trainer's bar: epochs, batches and loss on a terminal, nothing without one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bounds import BOUND_S
from tests.programs import programs
from tests.terminal import on_a_terminal

LOOP = """
import time
from types import SimpleNamespace
from fedsplit import Progress

progress = Progress(2)
with progress.task(SimpleNamespace(kind="train", server_round=3, total_rounds=10)):
    for done in range(1, 7):
        progress.update(done, 6, 1 / done, epochs=3)
        time.sleep(0.15)
"""


def test_a_loop_of_ones_own_shows_its_epochs_batches_and_loss(tmp_path: Path) -> None:
    code, shown = on_a_terminal([sys.executable, "-c", LOOP], tmp_path)
    assert code == 0, shown
    assert "rank 2 train 3/10" in shown
    assert re.search(r"[345]/6 .*epoch [23]/3, loss 0\.\d{4}", shown)


def test_without_a_terminal_there_is_no_bar(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, timeout=BOUND_S, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")


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
