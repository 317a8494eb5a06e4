"""Atomic writes, links and private directories, on real disks and with real kills."""

from __future__ import annotations

import errno
import io
import os
import random
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedsplit.disk.files import (
    append_line,
    atomic_file,
    check_space,
    explained,
    link_or_copy,
    make_private_directory,
    open_regular,
    overwrite_in_place,
    remove,
    remove_leftovers,
    write_all,
    write_chunks,
    write_json,
)  # fmt: skip
from fedsplit.errors import CheckpointError, ExchangeError, NoSpaceError
from tests.bounds import BOUND_S
from tests.handoffs import kill, names_in, running, wait_until

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and drop to another user")


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a directory on another file system than ``tmp_path``."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(prefix="fedsplit-files-", dir=shm) as directory:
        yield Path(directory)


# -- atomic writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_that_succeeds_replaces_the_old_content_and_leaves_nothing_else(tmp_path, durable):
    path = tmp_path / "a"
    for content in (b"old", b"new"):
        write_chunks(path, [content[:1], bytearray(content[1:2]), memoryview(content)[2:]], durable=durable)
        assert path.read_bytes() == content
    assert names_in(tmp_path) == {"a"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_write_that_is_aborted_leaves_the_old_content_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(failure), atomic_file(path) as file:
        file.write(b"half of the n")
        raise failure
    assert path.read_bytes() == b"old" and names_in(tmp_path) == {"a"}


def test_the_new_content_is_not_seen_before_the_block_ends(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"


def test_one_file_written_twice_at_once_is_an_error_and_never_a_mixture(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(ExchangeError), atomic_file(path) as outer:
        outer.write(b"outer")
        with atomic_file(path) as inner:
            inner.write(b"inner")
        assert path.read_bytes() == b"inner"
    assert path.read_bytes() == b"inner" and names_in(tmp_path) == {"a"}


def test_a_temporary_file_of_a_dead_process_of_the_same_id_is_not_written_into(tmp_path):
    """It may be a link that was to become something else: writing into it would change a finished file."""
    finished, path = tmp_path / "finished", tmp_path / "a"
    finished.write_bytes(b"finished")
    os.link(finished, tmp_path / f".a.{os.getpid()}.tmp")
    write_chunks(path, [b"new"])
    assert (path.read_bytes(), finished.read_bytes()) == (b"new", b"finished")


def test_a_symlink_in_place_of_the_target_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"kept")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    write_chunks(tmp_path / "a", [b"new"])
    assert (tmp_path / "elsewhere").read_bytes() == b"kept" and not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize(
    "chunk", [b"", bytearray(b"ab"), memoryview(b"abcdef").cast("H"), memoryview(bytes(12)).cast("B", (3, 4))]
)
def test_any_buffer_is_written_whole(tmp_path, chunk):
    write_chunks(tmp_path / "a", [chunk])
    assert (tmp_path / "a").read_bytes() == bytes(memoryview(chunk).tobytes())


def test_a_write_that_stops_early_is_continued():
    class Slow(io.BytesIO):
        def write(self, content: memoryview) -> int:  # type: ignore[override]
            return super().write(content[:3])

    file = Slow()
    write_all(file, b"0123456789")
    assert file.getvalue() == b"0123456789"


@pytest.mark.parametrize("where", ["missing directory", "directory in place of the file"])
def test_what_cannot_be_written_is_an_error_that_names_the_path(tmp_path, where):
    path = tmp_path / "nowhere" / "a" if where == "missing directory" else tmp_path / "a"
    if where != "missing directory":
        path.mkdir()
    with pytest.raises(ExchangeError, match=f"cannot write {path}"):
        write_json(path, {"a": 1})
    assert not any(name.endswith(".tmp") for name in names_in(tmp_path))


def test_a_full_disk_is_named_and_leaves_the_old_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ExchangeError, match=f"no space left to write {path}"), atomic_file(path) as file:
        file.write(b"n")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"old" and names_in(tmp_path) == {"a"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_the_kernels_own_word_for_a_full_disk_is_understood():
    path = Path("/dev/full")
    with path.open("wb", buffering=0) as file, pytest.raises(NoSpaceError, match="no space left"), explained(path):
        write_all(file, b"x")


WRITE_FOR_EVER = """
import itertools, sys, time
from pathlib import Path
from fedsplit.disk.files import write_chunks
path, durable, pause_s = Path(sys.argv[1]), sys.argv[2] == "durable", float(sys.argv[3])
def chunks(text):
    yield text.ljust(8)
    for _ in range(40):
        time.sleep(pause_s)
        yield text[-1:] * 20_000
for number in itertools.count():
    write_chunks(path, chunks(str(number).encode()), durable=durable)
    if number == 0:
        print("writing", flush=True)
"""


@pytest.mark.parametrize("durable", ["durable", "not durable"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_content_before_whole(tmp_path, durable):
    rng, path, torn = random.Random(3), tmp_path / "a", 0
    for _ in range(6):
        with running(WRITE_FOR_EVER, path, durable, 0.0005) as writer:
            time.sleep(rng.uniform(0.0, 0.05))
            kill(writer)
        content = path.read_bytes()
        number = content[:8].rstrip()
        assert len(content) == 8 + 800_000 and set(content[8:]) == {number[-1]}
        torn += len(names_in(tmp_path)) - 1
        remove_leftovers(tmp_path, "a")
        assert names_in(tmp_path) == {"a"}
    assert torn > 0  # at least one kill hit the middle of a write, else this has shown nothing


def test_a_reader_beside_a_writer_sees_only_whole_files(tmp_path):
    path = tmp_path / "a"
    with running(WRITE_FOR_EVER, path, "not durable", 0):
        end, seen = time.monotonic() + 0.5, set()
        while time.monotonic() < end or (len(seen) < 2 and time.monotonic() < end + BOUND_S):
            content = path.read_bytes()
            assert len(content) == 800_008 and len(set(content[8:])) == 1
            seen.add(content[:8])
    assert len(seen) > 1


def test_leftovers_are_removed_by_their_prefix_only(tmp_path):
    for name in (".task-1.safetensors.7.tmp", ".task.json.7.tmp", ".result.json.7.tmp", "task.tmp", ".task-1"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path, "task")
    assert names_in(tmp_path) == {".result.json.7.tmp", "task.tmp", ".task-1"}
    remove_leftovers(tmp_path, "")
    assert names_in(tmp_path) == {"task.tmp", ".task-1"}


# -- other ways to write -------------------------------------------------------------------------------------------


def test_lines_that_are_appended_by_many_at_once_are_never_mixed(tmp_path):
    path = tmp_path / "history"
    lines = [str(number) * 500 for number in range(8)]
    threads = [
        threading.Thread(target=lambda line=line: [append_line(path, line) for _ in range(20)]) for line in lines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = path.read_text().splitlines()
    assert len(found) == 160 and set(found) == set(lines)


def test_overwriting_in_place_keeps_the_inode_and_leaves_no_tail(tmp_path):
    path = tmp_path / "lock"
    path.write_text("a long content of before")
    inode = path.stat().st_ino
    overwrite_in_place(path, "short")
    assert path.read_text() == "short" and path.stat().st_ino == inode


def test_overwriting_does_not_follow_a_symlink(tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExchangeError):
        overwrite_in_place(tmp_path / "lock", "x")
    assert (tmp_path / "elsewhere").read_text() == "kept"


# -- links ---------------------------------------------------------------------------------------------------------


def test_a_file_gets_a_second_name_without_a_copy(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    link_or_copy(source, target)
    assert target.samefile(source)
    link_or_copy(source, target)  # the name it has already
    assert target.samefile(source) and names_in(tmp_path) == {"source", "target"}


def test_a_link_replaces_what_was_there_and_leaves_its_other_names_alone(tmp_path):
    source, target, other = tmp_path / "source", tmp_path / "target", tmp_path / "other"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    os.link(target, other)
    link_or_copy(source, target)
    assert (target.read_bytes(), other.read_bytes()) == (b"new", b"old")


def test_between_two_disks_a_file_is_copied(tmp_path, other_disk):
    source, target = tmp_path / "source", other_disk / "target"
    content = random.Random(0).randbytes(3_000_000)
    source.write_bytes(content)
    with pytest.raises(OSError) as caught:
        os.link(source, target)
    assert caught.value.errno == errno.EXDEV  # else this tests nothing
    link_or_copy(source, target)
    assert target.read_bytes() == content and names_in(other_disk) == {"target"}
    link_or_copy(target, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_where_links_are_not_possible_a_file_is_copied(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"content")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"content"
    assert not (tmp_path / "target").samefile(tmp_path / "source")


@pytest.mark.parametrize("disk", ["same", "other"])
def test_a_link_to_what_is_not_there_is_an_error_that_names_both(tmp_path, other_disk, disk):
    source = tmp_path / "gone"
    target = (tmp_path if disk == "same" else other_disk) / "target"
    with pytest.raises(ExchangeError, match=f"cannot link {source} to {target}"):
        link_or_copy(source, target)
    assert not target.exists()


def test_a_name_that_always_has_a_file_can_always_be_linked(tmp_path):
    source, is_over = tmp_path / "source", threading.Event()
    source.write_bytes(b"content")

    def write_again() -> None:
        while not is_over.is_set():
            write_chunks(source, [b"content"])

    with ThreadPoolExecutor(1) as others:
        others.submit(write_again)
        try:
            for number in range(1000):
                link_or_copy(source, tmp_path / str(number))
        finally:
            is_over.set()


def test_a_link_into_a_directory_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "source").write_bytes(b"")
    with pytest.raises(ExchangeError, match="cannot link"):
        link_or_copy(tmp_path / "source", tmp_path / "gone" / "target")


# -- reading -------------------------------------------------------------------------------------------------------


def test_only_a_regular_file_is_opened_for_reading(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    with open_regular(path) as file:
        assert file.read() == b"content"
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "directory", "pipe", "gone"):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    for _ in range(5):
        with pytest.raises(OSError):
            open_regular(tmp_path / "directory")
    assert not before or len(list(descriptors.iterdir())) == before


def test_removing_what_is_not_there_is_no_error_and_what_cannot_be_removed_is_named(tmp_path):
    remove(tmp_path / "gone")
    with pytest.raises(ExchangeError, match=f"cannot remove {tmp_path}"):
        remove(tmp_path)


# -- private directories -------------------------------------------------------------------------------------------


def test_a_private_directory_is_made_with_its_parents(tmp_path):
    path = tmp_path / "a" / "b" / "c"
    make_private_directory(path)
    make_private_directory(path)
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o700 for p in (path, path.parent, path.parent.parent))


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_can_write_is_refused(tmp_path, mode):
    path = tmp_path / "a"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ExchangeError, match=f"can be written by others .*chmod go-w {path}"):
        make_private_directory(path)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750])
def test_a_directory_that_others_can_only_read_is_taken(tmp_path, mode):
    path = tmp_path / "a"
    path.mkdir()
    path.chmod(mode)
    make_private_directory(path)


@ROOT_ONLY
def test_a_directory_of_another_user_is_refused(tmp_path):
    path = tmp_path / "a"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)
    with pytest.raises(ExchangeError, match="belongs to user id 12345"):
        make_private_directory(path)


@pytest.mark.parametrize("what", ["symlink", "dangling symlink", "file", "below a file"])
def test_what_is_no_directory_is_refused_with_the_error_of_the_callers_choice(tmp_path, what):
    path = tmp_path / "a"
    if what == "symlink":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "dangling symlink":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text("")
    with pytest.raises(CheckpointError, match=str(path)):
        make_private_directory(path / "b" if what == "below a file" else path, CheckpointError)
    assert not (tmp_path / "nowhere").exists()


AS_NOBODY = """
import os, sys
from pathlib import Path
from fedsplit.errors import ExchangeError
from fedsplit.disk.files import make_private_directory
os.setgid(65534); os.setuid(65534)
try:
    make_private_directory(Path(sys.argv[1]))
except ExchangeError as exc:
    print(exc)
"""


@ROOT_ONLY
@pytest.mark.parametrize("what", ["own but not writable", "in a directory of another user"])
def test_a_directory_that_one_cannot_write_is_refused(tmp_path, what):
    with tempfile.TemporaryDirectory(prefix="fedsplit-nobody-", dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o755)
        path = base / "a"
        if what == "own but not writable":
            path.mkdir()
            os.chown(path, 65534, 65534)
            path.chmod(0o500)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(path)], capture_output=True, text=True, timeout=BOUND_S
        )
    assert done.returncode == 0, done.stderr
    assert (
        "is not writable (mode 0500)" if what == "own but not writable" else "cannot make the directory"
    ) in done.stdout


def test_too_little_space_is_named_with_both_numbers(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(
        ExchangeError, match=r"too little space in .*: 1,152,921,504,606,846,976 bytes are needed, [0-9,]+ are free"
    ):
        check_space(tmp_path, 1 << 60)


def test_the_wait_of_the_tests_itself_does_not_wait_for_ever():
    with pytest.raises(AssertionError, match="not within"):
        wait_until(lambda: False, 0.01)
