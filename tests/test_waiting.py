"""Waiting for records: woken by the kernel where it can, by looking where it cannot, and never missing a change."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedsplit.disk.files import overwrite_in_place, write_json
from fedsplit.exchange import waiting
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.waiting import Watch
from tests.bounds import BOUND_S


@pytest.fixture(params=["events", "looks"])
def watch(request, tmp_path: Path, monkeypatch) -> Watch:
    if request.param == "looks":
        monkeypatch.setattr(waiting, "INotify", None)
    elif waiting.INotify is None:
        pytest.skip("no inotify on this system")
    return Watch(tmp_path / "task.json", tmp_path / "finished.json")


def test_the_first_look_finds_a_change_and_the_next_one_none(watch):
    assert watch.has_changed()
    assert not watch.has_changed()
    watch.begin()
    assert watch.has_changed()


@pytest.mark.parametrize("name", ["task.json", "finished.json"])
def test_a_record_that_is_written_or_replaced_is_a_change(watch, tmp_path, name):
    watch.has_changed()
    for number in range(3):
        write_json(tmp_path / name, {"number": number})
        assert watch.has_changed()
        assert not watch.has_changed()


def test_who_sleeps_sees_each_record_that_is_written_meanwhile(watch, tmp_path):
    path, seen = tmp_path / "task.json", threading.Semaphore(0)

    def write() -> None:
        for number in range(20):
            write_json(path, {"number": number})
            assert seen.acquire(timeout=BOUND_S)

    writer = threading.Thread(target=write)
    writer.start()
    found, deadline = -1, time.monotonic() + BOUND_S
    while found < 19 and time.monotonic() < deadline:
        if watch.has_changed() and path.exists() and f": {found + 1}}}" in path.read_text():
            found += 1
            seen.release()
            continue
        watch.sleep()
    writer.join(BOUND_S)
    assert found == 19


def test_without_any_watch_left_it_looks_for_itself(tmp_path, monkeypatch):
    def refuse() -> None:
        raise OSError(24, "too many")

    monkeypatch.setattr(waiting, "INotify", refuse)
    watch = Watch(tmp_path / "task.json")
    watch.has_changed()
    watch.sleep()
    write_json(tmp_path / "task.json", {})
    assert watch.has_changed()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Exchange:
    if waiting.INotify is None:
        pytest.skip("no inotify on this system")
    # So seldom that only an event can be what makes anybody look.
    monkeypatch.setattr(waiting, "_QUIET_LOOK_S", 2 * BOUND_S)
    exchange = Exchange(tmp_path, 1)
    exchange.directory.mkdir(mode=0o700)
    return exchange


def quiet(place: Exchange) -> Watch:
    """Return a watch that has found the trainer there, and nothing since."""
    watch = Watch(place.result_path, lock=place.lock_path("trainer"))
    assert watch.is_look_due() and place.is_held("trainer")
    watch.looked(0.001, is_near=place.is_near("trainer"))
    return watch


def test_while_a_lock_is_quiet_nobody_looks_and_who_looks_wakes_nobody(place):
    with place.hold("trainer"):
        watch = quiet(place)
        for _ in range(5):
            assert Exchange(place.directory.parent, 1).is_held("trainer")
            watch.sleep(0.002)
            assert not watch.is_look_due()


@pytest.mark.parametrize("how", ["leaves", "is killed"])
def test_who_sleeps_is_told_when_the_trainer_is_gone(place, how, monkeypatch):
    trainer = Thread(place) if how == "leaves" else Process(place)
    watch = quiet(place)
    # However late this test gets to its next line.
    monkeypatch.setattr(waiting, "_CLOSED_S", BOUND_S)
    trainer.end()
    deadline = time.monotonic() + BOUND_S
    while place.is_held("trainer"):
        time.sleep(0.001)
    while not watch.is_look_due() and time.monotonic() < deadline:
        watch.sleep()
    assert time.monotonic() < deadline
    # The lock may be free only after the event: the next looks are not far.
    watch.looked(0.001, is_near=True)
    watch.sleep(0.01)
    assert watch.is_look_due()


def test_a_trainer_of_another_machine_is_looked_for_as_often_as_ever(place):
    with place.hold("trainer"):
        owner = json.loads(place.lock_path("trainer").read_text())
        overwrite_in_place(place.lock_path("trainer"), json.dumps(owner | {"host": "elsewhere"}))
        watch = quiet(place)
        for _ in range(3):
            watch.sleep(0.01)
            assert watch.is_look_due()
            watch.looked(0.001, is_near=place.is_near("trainer"))


class Thread:
    """A trainer whose process lives on when it leaves."""

    def __init__(self, place: Exchange) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(place.hold("trainer"))

    def end(self) -> None:
        self._stack.close()


HOLD = """
import sys, time
from fedsplit.exchange.directory import Exchange
with Exchange(sys.argv[1], 1).hold("trainer"):
    print("here", flush=True)
    time.sleep(600)
"""


class Process:
    """A trainer that is killed."""

    def __init__(self, place: Exchange) -> None:
        command = [sys.executable, "-c", HOLD, str(place.directory.parent)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout and self._process.stdout.readline() == "here\n"

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
