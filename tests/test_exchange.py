"""Roles, records and the directory of the exchange, with real processes that hold, probe and die."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from fedsplit.errors import (
    DirectoryLostError,
    ExchangeError,
    FedSplitError,
    RecordError,
    RoleTakenError,
    SchemaError,
    UsageError,
)
from fedsplit.exchange import directory
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import PayloadRecord
from tests.bounds import BOUND_S
from tests.handoffs import ROOT, blob, digest_of, kill, names_in, running, wait_until

HOLD = """
import sys, time
from fedsplit.exchange.directory import Exchange
with Exchange(sys.argv[1], 1).hold(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""

HOLD_AND_FORK = """
import os, sys, time
from fedsplit.exchange.directory import Exchange
with Exchange(sys.argv[1], 1).hold("trainer"):
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(600)
    print(child, flush=True)
    time.sleep(600)
"""

HOLD_AND_LOAD = """
import multiprocessing, os, sys, time
from fedsplit.exchange.directory import Exchange
def work(pipe):
    os.close(1)
    pipe.send(os.getpid())
    time.sleep(600)
with Exchange(sys.argv[1], 1).hold("trainer"):
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(target=work, args=(theirs,)).start()
    print(ours.recv(), flush=True)
    time.sleep(600)
"""

PROBE = """
import sys
from fedsplit.exchange.directory import Exchange
exchange = Exchange(sys.argv[1], 1)
print("probing", flush=True)
while True:
    exchange.is_held("trainer"), exchange.is_held("client")
"""

START_OFTEN = """
import os, sys
from fedsplit.exchange.directory import Exchange
for _ in range(int(sys.argv[2])):
    with Exchange(sys.argv[1], 1).hold("trainer"):
        pass
print("started", flush=True)
"""


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    exchange = Exchange(tmp_path, 1)
    exchange.directory.mkdir(mode=0o700)
    return exchange


# -- roles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, -1, True, "1", 1.0, None])
def test_a_rank_is_a_positive_integer(tmp_path, rank):
    with pytest.raises(UsageError, match="positive integer"):
        Exchange(tmp_path, rank)


def test_holding_a_role_makes_a_private_directory_and_says_who_holds_it(tmp_path):
    exchange = Exchange(tmp_path / "a" / "b", 3)
    assert not exchange.is_held("trainer")
    with exchange.hold("trainer"):
        assert stat.S_IMODE(exchange.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(exchange.lock_path("trainer").stat().st_mode) == 0o600
        assert exchange.owner("trainer").pid == os.getpid()
        assert exchange.is_held("trainer") and not exchange.is_held("client")
    assert not exchange.is_held("trainer")


def test_asking_who_is_there_makes_no_directory(tmp_path):
    exchange = Exchange(tmp_path / "nowhere", 1)
    assert not exchange.is_held("client") and exchange.owner("client") is None
    assert names_in(tmp_path) == set()


def test_a_role_that_a_live_process_holds_is_refused_and_its_process_is_named(tmp_path):
    with running(HOLD, tmp_path, "trainer") as holder:
        exchange = Exchange(tmp_path, 1)
        assert exchange.is_held("trainer")
        with pytest.raises(RoleTakenError, match=f"process {holder.pid} on .*trainer.lock"), exchange.hold("trainer"):
            pass
        with exchange.hold("client"), Exchange(tmp_path, 2).hold("trainer"):
            pass
        assert exchange.owner("trainer").pid == holder.pid


def test_a_role_can_be_taken_again_after_its_block_failed(exchange):
    with pytest.raises(ZeroDivisionError), exchange.hold("client"):
        raise ZeroDivisionError
    with exchange.hold("client"):
        pass


def test_the_death_of_a_holder_is_noticed_at_once(tmp_path):
    exchange = Exchange(tmp_path, 1)
    for _ in range(5):
        with running(HOLD, tmp_path, "trainer") as holder:
            assert exchange.is_held("trainer")
            holder.kill()
            holder.wait()
            assert not exchange.is_held("trainer")
    with exchange.hold("trainer"):
        pass


@pytest.mark.parametrize("code", [HOLD_AND_FORK, HOLD_AND_LOAD], ids=["os.fork", "multiprocessing"])
def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path, code):
    exchange = Exchange(tmp_path, 1)
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(holder.stdout.readline())
    try:
        assert exchange.is_held("trainer")
        kill(holder)
        wait_until(lambda: not exchange.is_held("trainer"))
        os.kill(child, 0)  # it is still alive
        with exchange.hold("trainer"):
            pass
    finally:
        kill(holder)
        os.kill(child, 9)


def test_the_end_of_a_forked_child_does_not_drop_the_lock_of_its_live_parent(exchange):
    with exchange.hold("trainer"):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert exchange.is_held("trainer")


@pytest.mark.slow
def test_probing_without_a_pause_never_makes_a_starting_peer_fail(tmp_path):
    Exchange(tmp_path, 1).directory.mkdir(mode=0o700)
    with (
        running(PROBE, tmp_path) as one,
        running(PROBE, tmp_path) as other,
        running(START_OFTEN, tmp_path, 200) as starter,
    ):
        assert starter.wait(timeout=BOUND_S) == 0
        assert one.poll() is None and other.poll() is None


def test_two_that_start_at_once_never_both_get_the_role(exchange):
    got, barrier, done = [], threading.Barrier(4), threading.Event()

    def take() -> None:
        barrier.wait()
        try:
            with Exchange(exchange.directory.parent, 1).hold("client"):
                got.append(True)
                done.wait(BOUND_S)
        except RoleTakenError:
            got.append(False)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(got) == 4)
    done.set()
    for thread in threads:
        thread.join(BOUND_S)
    assert sorted(got) == [False, False, False, True]


def test_what_a_dead_predecessor_left_half_written_is_removed_and_the_peers_is_not(exchange):
    for name in ("task-3.safetensors.77", "finished.json.77", "result-3.safetensors.77", "left.json.7"):
        (exchange.directory / f".{name}.tmp").write_bytes(b"half")
    with exchange.hold("client"):
        left = {name for name in names_in(exchange.directory) if name.endswith(".tmp")}
        assert left == {".result-3.safetensors.77.tmp", ".left.json.7.tmp"}
    with exchange.hold("trainer"):
        assert not any(name.endswith(".tmp") for name in names_in(exchange.directory))


@pytest.mark.parametrize(
    "content", ["", "garbage", "[]", '{"pid": 1}', '{"pid": [], "host": "", "started": ""}', "[" * 9999]
)
def test_a_mangled_name_in_a_lock_is_nobodys(exchange, content):
    exchange.lock_path("client").write_text(content)
    assert exchange.owner("client") is None


def test_a_name_in_a_lock_may_have_more_to_it(exchange):
    exchange.lock_path("client").write_text('{"pid": 4, "host": "h", "started": "s", "newer": 1}')
    assert str(exchange.owner("client")) == "process 4 on h, started s"


@pytest.mark.parametrize("name", ["handoff.lock", "client.lock"])
@pytest.mark.parametrize("what", ["directory", "symlink"])
def test_what_is_no_lock_file_is_refused_with_its_name(exchange, tmp_path, name, what):
    path = exchange.directory / name
    if what == "directory":
        path.mkdir()
    else:
        (tmp_path / "elsewhere").write_text("kept")
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExchangeError, match=name), exchange.hold("client"):
        pass
    assert what == "directory" or (tmp_path / "elsewhere").read_text() == "kept"


# -- the directory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o702])
def test_a_directory_that_others_can_write_is_refused(exchange, mode):
    exchange.directory.chmod(mode)
    with (
        pytest.raises(ExchangeError, match=rf"can be written by others \(mode {mode:04o}\); chmod"),
        exchange.hold("client"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(exchange):
    os.chown(exchange.directory, 12345, -1)
    with pytest.raises(ExchangeError, match="belongs to user id 12345"), exchange.hold("client"):
        pass


def test_a_symlink_in_place_of_the_directory_is_refused(exchange, tmp_path):
    exchange.directory.rename(tmp_path / "elsewhere")
    exchange.directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExchangeError, match="is not a directory"), exchange.hold("client"):
        pass


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "rank-1").write_text("")
    with pytest.raises(ExchangeError, match="is not a directory"), Exchange(tmp_path, 1).hold("client"):
        pass


def test_too_little_space_is_told_at_the_start(exchange, monkeypatch):
    monkeypatch.setattr("fedsplit.exchange.directory._LEAST_SPACE_BYTES", 1 << 60)
    with pytest.raises(ExchangeError, match="too little space"), exchange.hold("client"):
        pass


# -- records -------------------------------------------------------------------------------------------------------

READERS = ["task", "result", "finished", "left"]


def read(exchange: Exchange, of: str) -> object:
    return getattr(exchange, f"read_{of}")()


def path_of(exchange: Exchange, of: str) -> Path:
    return getattr(exchange, f"{of}_path")


def record(of: str, **fields: object) -> dict[str, object]:
    common = {"schema": "fedsplit/1", "version": 3, "run_id": "r"}
    asked = {"kind": "train", "server_round": 1, "total_rounds": 2}
    own = {"result": {"status": "ok"}, "finished": {"outcome": "complete"}, "left": {"outcome": "complete"}}
    return {**common, **asked, **own.get(of, {}), **fields}


@pytest.mark.parametrize("of", READERS)
def test_a_record_that_is_not_there_is_none(exchange, of):
    assert read(exchange, of) is None


@pytest.mark.parametrize("of", READERS)
def test_keys_that_are_not_known_are_ignored(exchange, of):
    path_of(exchange, of).write_text(json.dumps(record(of, newer={"deep": [1]})))
    assert read(exchange, of).version == 3


@pytest.mark.parametrize("of", READERS)
def test_a_newer_schema_is_refused_naming_both(exchange, of):
    path_of(exchange, of).write_text(json.dumps(record(of, schema="fedsplit/2")))
    with pytest.raises(SchemaError, match=f"{of}.json has schema 'fedsplit/2'.*reads 'fedsplit/1'"):
        read(exchange, of)


@pytest.mark.parametrize("of", READERS)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{\x00", b"[]", b"null", b'"x"', b"{}", b"[" * 100_000, b'{"schema": ' + b"9" * 5000 + b"}"],
    ids=["empty", "torn", "utf-16", "list", "null", "string", "no schema", "deep", "long number"],
)  # fmt: skip
def test_garbage_is_a_record_error(exchange, of, content):
    path_of(exchange, of).write_bytes(content)
    with pytest.raises(RecordError, match=f"{of}.json"):
        read(exchange, of)


@pytest.mark.parametrize("of", READERS)
def test_a_record_of_four_megabytes_is_refused_unread(exchange, of):
    with path_of(exchange, of).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(RecordError, match="is over 4,000,000 bytes"):
        read(exchange, of)


@pytest.mark.parametrize("of", READERS)
@pytest.mark.parametrize("what", ["symlink", "directory", "pipe", "dangling symlink"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(exchange, tmp_path, of, what):
    path = path_of(exchange, of)
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        target = tmp_path / "elsewhere.json"
        if what == "symlink":
            target.write_text(json.dumps(record(of)))
        path.symlink_to(target)
    with pytest.raises(RecordError, match=f"cannot read the record .*{of}.json"):
        read(exchange, of)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "/etc/passwd", "task-3.safetensors/../../x", "task-2.safetensors", "result-3.safetensors",
        "task-03.safetensors", "task-3.safetensors\n", "task-3.safetensors\x00", "", ".", "task-٣.safetensors",
    ],
)  # fmt: skip
def test_a_name_in_a_record_never_leads_out_of_the_directory_or_to_another_version(exchange, name):
    payload = {"file": name, "bytes": 100, "digest": "0" * 64}
    exchange.task_path.write_text(json.dumps(record("task", payload=payload)))
    with pytest.raises(RecordError, match="the payload is called"):
        exchange.read_task()


# -- payloads ------------------------------------------------------------------------------------------------------


def test_a_payload_is_believed_when_its_length_and_its_header_are_right(exchange):
    content = blob("state")
    path = exchange.payload_path("task", 1)
    path.write_bytes(content)
    payload = PayloadRecord(file=path.name, bytes=len(content), digest=digest_of(content))
    assert exchange.check_payload(payload) == path
    path.write_bytes(content[:-1])
    with pytest.raises(RecordError, match=f"{path} has {len(content) - 1} bytes, its record says {len(content)}"):
        exchange.check_payload(payload)


@pytest.mark.parametrize("what", ["symlink", "directory", "pipe"])
def test_what_is_no_regular_file_is_no_payload(exchange, tmp_path, what):
    content, path = blob("state"), exchange.payload_path("task", 1)
    if what == "symlink":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(RecordError, match="cannot read the payload"):
        exchange.check_payload(PayloadRecord(file=path.name, bytes=len(content), digest=digest_of(content)))


def test_only_names_of_payloads_count_and_only_lower_versions_are_removed(exchange):
    for name in ("task-2", "task-10", "task-x", "task-02", f"task-{10**30}", "result-9", "xtask-1"):
        (exchange.directory / f"{name}.safetensors").write_bytes(b"")
    (exchange.directory / "task-1.safetensors.tmp").write_bytes(b"")
    assert exchange.payload_versions("task") == [2, 10]
    exchange.remove_payloads("task", below=10)
    assert exchange.payload_versions("task") == [10] and exchange.payload_versions("result") == [9]


def test_every_error_of_the_exchange_is_one_that_a_program_reports_in_one_line(exchange):
    exchange.task_path.write_text("{")
    with pytest.raises(FedSplitError) as caught:
        exchange.read_task()
    assert "\n" not in str(caught.value)


HOLD_BOTH = """
import sys, time
from fedsplit.exchange.directory import Exchange

exchange = Exchange(sys.argv[1], 1)
with exchange.hold("trainer"), exchange.handoff():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says who is stopped")
def test_a_process_that_is_stopped_with_the_hand_off_lock_is_named_within_seconds(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(directory, "_HANDOFF_SAY_S", 0.2)
    with running(HOLD_BOTH, tmp_path) as holder:
        holder.send_signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(holder.pid).status() == psutil.STATUS_STOPPED)
        waiting = threading.Thread(target=Exchange(tmp_path, 1).is_held, args=("client",))
        waiting.start()
        wait_until(lambda: "has been held for" in caplog.text)
        holder.send_signal(signal.SIGCONT)
        kill(holder)
        waiting.join(BOUND_S)
    said = rf"handoff\.lock has been held for 0 s, by the trainer \(process {holder.pid} on .*, stopped by a signal"
    assert re.search(said, caplog.text)


def test_a_directory_that_was_replaced_is_not_taken_for_the_one_that_is_held(tmp_path):
    exchange = Exchange(tmp_path, 1)
    with exchange.hold("client"):
        exchange.directory.rename(tmp_path / "away")
        with pytest.raises(DirectoryLostError, match="was removed or replaced"):
            exchange.is_held("trainer")
        with pytest.raises(DirectoryLostError), exchange.handoff():
            pass
        Path(exchange.directory).mkdir(mode=0o700)
        with pytest.raises(DirectoryLostError):
            exchange.is_held("trainer")
