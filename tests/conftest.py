"""What holds for every test: one thread each, few random cases unless all are asked for, no process left behind."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch, and for every program that a test starts: several of them share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell starts what it runs in the background with SIGINT ignored. Programs that a test ends by it would inherit that,
# and be killed only after the ten seconds that each has.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import psutil
import pytest
from hypothesis import settings

from tests.depth import DEPTH, IS_ASKED_FOR
from tests.in_process import Scripts

RUN = "FEDSPLIT_TEST_RUN"
# All of their tests are slow, and importing their libraries takes each worker half a minute.
ONLY_SLOW = ("test_integrations_lightning.py", "test_integrations_transformers.py")
GRACE_S = 20.0

# Without a database of earlier failures, and with the same cases each time: what fails here fails everywhere.
settings.register_profile("quick", max_examples=10, derandomize=True, deadline=None, database=None)
settings.register_profile("all", parent=settings.get_profile("quick"), max_examples=100)
# Where a depth is asked for, somebody is looking for what nobody has found yet: other cases each time.
settings.register_profile("deep", max_examples=100 * max(1, DEPTH), deadline=None, print_blob=True)
settings.load_profile("deep" if IS_ASKED_FOR else "all" if DEPTH else "quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files that have nothing for `make test`."""
    return True if config.option.markexpr == "not slow" and collection_path.name in ONLY_SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what is forked: so the first worker does it all, and no other one makes a process to fork from."""
    items.sort(key=lambda item: item.get_closest_marker("smoke") is None)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """See that the tests of this process have ended every process that they started."""
    os.environ[RUN] = uuid.uuid4().hex
    yield
    left = [process for process in started_here(os.environ[RUN]) if not is_of_python_itself(process)]
    _, left = psutil.wait_procs(left, GRACE_S)
    said = [describe(process) for process in left]
    for process in left:
        process.kill()
    psutil.wait_procs(left, GRACE_S)
    assert not said, f"left running by tests: {said}"


@pytest.fixture(autouse=True)
def log_is_put_back() -> Iterator[None]:
    """Let no test write into the captured output of an earlier one, in which a command has set up logging."""
    log = logging.getLogger("fedsplit")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = handlers, level, propagate


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Scripts]:
    """Return the three scripts, to be called in the test's directory and process."""
    found = Scripts(tmp_path, monkeypatch, capsys)
    yield found
    found.put_back()


def started_here(run: str) -> list[psutil.Process]:
    """Return what was started below this process, also by a parent that has ended since."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN) == run and process.pid != os.getpid():
                found[process.pid] = process
        except psutil.Error:
            continue
    return list(found.values())


def is_of_python_itself(process: psutil.Process) -> bool:
    """Say whether `multiprocessing` keeps the process until this one ends."""
    try:
        command = " ".join(process.cmdline())
        # What is forked from it has the same command, and a session of its own: see `Forked`.
        is_server = "multiprocessing.forkserver" in command and os.getsid(process.pid) != process.pid
        return is_server or "multiprocessing.resource_tracker" in command
    except (psutil.Error, ProcessLookupError):
        return False


def describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())[:300]}"
    except psutil.Error:
        return f"{process.pid}: gone since"
