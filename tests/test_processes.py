"""Child processes: how they end, with whom they end, and what is shown of their output."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedsplit.engines import processes
from fedsplit.engines.forked import Forked
from fedsplit.engines.processes import Child
from tests.bounds import BOUND_S
from tests.programs import still_runs


def start(code: str, log: Path) -> Child:
    child = Child("child", [sys.executable, "-c", code], log)
    child.start(os.environ)
    return child


def wait_for_output(child: Child) -> None:
    while child.tail() == "(empty)":
        time.sleep(0.01)


def wait_for_end(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process, deadline = psutil.Process(pid), time.monotonic() + BOUND_S
        while still_runs(process):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def run(command: list[str], environment: dict[str, str], log: Path, directory: Path) -> int:
    process = Forked(command, environment, log, directory)
    assert process.poll() is None and process.pid != os.getpid()
    return process.wait(BOUND_S)


@pytest.mark.smoke
def test_a_script_that_is_forked_has_its_own_arguments_environment_and_end(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("")
    script = "import helper, os, sys, atexit; atexit.register(print, 'over'); print(sys.argv[1:], os.environ['WHO']); "
    (tmp_path / "script.py").write_text(script + "print('no', file=sys.stderr); sys.exit(7)")
    log, command = tmp_path / "log", [sys.executable, str(tmp_path / "script.py"), "--rank", "1"]
    assert run(command, {**os.environ, "WHO": "me"}, log, tmp_path) == 7
    assert log.read_text().splitlines() == ["['--rank', '1'] me", "no", "over"] and "WHO" not in os.environ
    assert run(command, {**os.environ, "WHO": "you"}, log, tmp_path) == 7
    assert log.read_text().splitlines()[3] == "['--rank', '1'] you"


def test_the_exit_code_and_the_signal_of_a_child_are_named(tmp_path: Path) -> None:
    child = Child("child", [sys.executable, "-c", "import sys; print('because'); sys.exit(7)"], tmp_path / "log")
    assert not child.is_running and child.describe_end() == "the child did not end"
    child.start(os.environ)
    while child.is_running:
        time.sleep(0.01)
    assert child.describe_end() == "the child ended with exit code 7"
    assert child.tail() == "because"
    child.send(signal.SIGINT)  # to nobody: it has ended
    child.stop()


def test_a_child_that_ignores_sigterm_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_STOP_S", 0.3)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True); "
        "time.sleep(600)"
    )
    child = start(code, tmp_path / "log")
    wait_for_output(child)
    grandchild = int(child.tail())
    child.stop()
    child.kill()
    assert child.describe_end() == "the child was killed by SIGKILL"
    # It may be left to init as a zombie for a moment.
    wait_for_end(grandchild)


@pytest.mark.parametrize(
    "words", [["-c", "import time; time.sleep(600)"], ["-m", "fedsplit", "client"]], ids=["started", "forked"]
)
def test_a_killed_parent_takes_its_children_along(tmp_path: Path, words: list[str]) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from fedsplit.engines import forked; "
        "from fedsplit.engines.processes import Child; forked.FORKS.set_forkserver_preload([]); "
        f"child = Child('c', [sys.executable, *{words}], Path(sys.argv[1])); "  # a client waits for its server
        "child.start(os.environ); print(child._process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    wait_for_end(child)


def test_a_long_log_is_shown_by_its_end(tmp_path: Path) -> None:
    child = Child("talker", ["talker"], tmp_path / "talker.log")
    assert child.log is not None
    child.log.write_bytes(b"x" * 100_000 + b"\n" + "\n".join(map(str, range(100))).encode() + b"\xff")
    assert child.tail().splitlines()[0] == "88"
    assert len(child.tail().splitlines()) == 12
