"""Waiting for records: woken by the kernel where it can, by looking where it cannot, and never missing a change."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fedsplit.disk.files import write_json
from fedsplit.exchange import waiting
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
