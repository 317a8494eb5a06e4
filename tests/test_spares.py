"""Spare files: written over when nobody needs them any more, and never before."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsplit.disk import files, spares
from fedsplit.disk.payload_store import PayloadStore
from fedsplit.disk.spares import Spares, clear_spares
from fedsplit.errors import NoSpaceError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request, TaskRecord
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.states.state_dict import encode, map_file
from tests.bounds import BOUND_S
from tests.handoffs import ROOT, digest_of, names_in

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def on_a_file_system_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a container, on its layers: there all that is mapped here is open too, and so it is seen."""
    monkeypatch.setattr(spares, "_file_system", lambda _: "ext4")


@pytest.fixture
def pool(tmp_path: Path) -> Spares:
    return Spares(tmp_path, "result")


def write(path: Path, content: bytes, pool: Spares) -> int:
    """Write a file as payloads are written; returns its inode."""
    files.write_hashed(path, [content], mode=files.UNWRITABLE, spares=pool)
    assert path.read_bytes() == content and path.stat().st_mode & 0o777 == files.UNWRITABLE
    return path.stat().st_ino


def spare(path: Path, pool: Spares) -> int:
    """Write a file that nobody needs any more."""
    inode = write(path, b"1" * SIZE, pool)
    pool.give(path)
    assert not path.exists()
    return inode


@pytest.mark.parametrize("size", [SIZE, SIZE // 2, SIZE + 12_345, 2 * SIZE])
def test_a_file_that_nobody_needs_is_written_over_in_any_length_near_its_own(tmp_path, pool, size):
    inode = spare(tmp_path / "a", pool)
    assert write(tmp_path / "b", b"2" * size, pool) == inode
    assert names_in(tmp_path) == {"b"}


@pytest.mark.parametrize("size", [SIZE // 2 - 1, 2 * SIZE + 2])
def test_one_of_quite_another_length_is_not(tmp_path, pool, size):
    inode = spare(tmp_path / "a", pool)
    assert write(tmp_path / "b", b"2" * size, pool) != inode


def test_a_small_file_is_removed_and_no_spare_one_is_kept(tmp_path, pool):
    write(tmp_path / "a", b"small", pool)
    pool.give(tmp_path / "a")
    assert not names_in(tmp_path)


def test_what_is_mapped_keeps_its_bytes_until_it_is_let_go(tmp_path, pool):
    inode = write(tmp_path / "a", b"1" * SIZE, pool)
    mapped = files.map_regular(tmp_path / "a")
    pool.give(tmp_path / "a")
    assert write(tmp_path / "b", b"2" * SIZE, pool) != inode
    assert mapped[:] == b"1" * SIZE
    del mapped
    assert write(tmp_path / "c", b"3" * SIZE, pool) == inode


def test_what_is_open_keeps_its_bytes(tmp_path, pool):
    inode = write(tmp_path / "a", b"1" * SIZE, pool)
    with (tmp_path / "a").open("rb") as file:
        pool.give(tmp_path / "a")
        assert write(tmp_path / "b", b"2" * SIZE, pool) != inode
        assert file.read() == b"1" * SIZE


def test_what_has_another_name_keeps_its_bytes_until_that_is_gone(tmp_path, pool):
    inode = write(tmp_path / "a", b"1" * SIZE, pool)
    os.link(tmp_path / "a", tmp_path / "checkpoint")
    pool.give(tmp_path / "a")
    assert write(tmp_path / "b", b"2" * SIZE, pool) != inode
    assert (tmp_path / "checkpoint").read_bytes() == b"1" * SIZE
    (tmp_path / "checkpoint").unlink()
    assert write(tmp_path / "c", b"3" * SIZE, pool) == inode


def test_what_another_process_has_mapped_and_closed_keeps_its_bytes(tmp_path, pool):
    inode = write(tmp_path / "a", b"1" * SIZE, pool)
    reader = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'rb') as file: mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print('mapped', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(set(mapped[:]), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", reader, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "mapped\n"
        pool.give(tmp_path / "a")
        assert write(tmp_path / "b", b"2" * SIZE, pool) != inode
        assert process.communicate("\n", timeout=BOUND_S)[0] == "{49}\n"
    finally:
        process.kill()
        process.wait()
    assert write(tmp_path / "c", b"3" * SIZE, pool) == inode


def test_without_leases_files_are_removed(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(spares, "_LEASE", 0)
    spare(tmp_path / "a", pool)
    assert not names_in(tmp_path)


@pytest.mark.parametrize("kind", ["overlay", "nfs4", "fuse.sshfs", ""])
def test_where_not_all_readers_are_seen_files_are_removed(tmp_path, pool, monkeypatch, kind):
    monkeypatch.setattr(spares, "_file_system", lambda _: kind)
    spare(tmp_path / "a", pool)
    assert not names_in(tmp_path)


def test_the_file_system_is_that_of_the_longest_mount_point_and_the_last_there(tmp_path, monkeypatch):
    monkeypatch.undo()
    mounts = (
        "overlay / overlay rw 0 0", f"x {tmp_path} ext4 rw 0 0", f"y {tmp_path} tmpfs rw 0 0", "z /tm xfs rw 0 0",
        r"server:/all /a\040disk nfs4 rw 0 0",
    )  # fmt: skip
    monkeypatch.setattr(Path, "read_text", lambda _: "\n".join(mounts))
    assert spares._file_system(tmp_path / "deeper") == "tmpfs"
    assert spares._file_system(Path("/tmpx")) == "overlay"
    assert spares._file_system(Path("/a disk/checkpoints")) == "nfs4"


def test_who_opens_a_file_that_is_looked_at_ends_nobody(tmp_path):
    path = tmp_path / "spare"
    path.write_bytes(b"1" * SIZE)
    opens = "import os, sys\nwhile True: os.close(os.open(sys.argv[1], os.O_RDONLY))"
    looks = (
        "import sys, pathlib\nfrom fedsplit.disk.spares import _is_unused\n"
        "print({_is_unused(pathlib.Path(sys.argv[1])) for _ in range(20_000)})"
    )
    opener = subprocess.Popen([sys.executable, "-c", opens, str(path)])
    try:
        looked = subprocess.run(
            [sys.executable, "-c", looks, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=BOUND_S
        )
    finally:
        opener.kill()
        opener.wait()
    assert looked.returncode == 0 and "True" in looked.stdout, looked


def test_where_the_kernel_refuses_a_lease_a_new_file_is_written(tmp_path, pool, monkeypatch):
    inode = spare(tmp_path / "a", pool)
    monkeypatch.setattr(spares, "_LEASE", 99_999)
    assert write(tmp_path / "b", b"2" * SIZE, pool) != inode


def test_a_write_that_fails_leaves_nothing(tmp_path, pool):
    spare(tmp_path / "a", pool)
    with pytest.raises(ZeroDivisionError), files.atomic_file(tmp_path / "b", size=SIZE, spares=pool):
        1 / 0  # noqa: B018
    assert not names_in(tmp_path)


def test_how_much_is_kept_is_bounded(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(spares, "_MOST_BYTES", 6 * SIZE)
    for n in range(10):
        write(tmp_path / str(n), b"1" * SIZE, pool)
    for n in range(8):
        pool.give(tmp_path / str(n))
        assert len(names_in(tmp_path)) == 10 - n - 1 + min(n + 1, 6)
    monkeypatch.setattr(spares, "_MOST", 3)
    pool.give(tmp_path / "8")
    assert len(names_in(tmp_path)) == 1 + 3
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(spares.shutil, "disk_usage", lambda _: usage._replace(free=SIZE - 1))
    pool.give(tmp_path / "9")
    assert not names_in(tmp_path)


def test_a_busy_file_does_not_keep_others_from_being_used(tmp_path, pool):
    for n in range(10):
        write(tmp_path / str(n), b"1" * SIZE, pool)
        if n < 9:
            os.link(tmp_path / str(n), tmp_path / f"link-{n}")
    inode = (tmp_path / "9").stat().st_ino
    for n in range(10):
        pool.give(tmp_path / str(n))
    assert inode in {write(tmp_path / f"new-{n}", b"2" * SIZE, pool) for n in range(3)}
    assert all((tmp_path / f"link-{n}").read_bytes() == b"1" * SIZE for n in range(9))


def test_a_full_disk_takes_the_spare_files_first(tmp_path, pool, monkeypatch):
    spare(tmp_path / "a", pool)
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=SIZE - 1))
    with pytest.raises(NoSpaceError):
        files.check_space(tmp_path, SIZE)
    assert not names_in(tmp_path)


def test_a_directory_that_was_emptied_is_no_matter(tmp_path, pool):
    spare(tmp_path / "a", pool)
    for path in tmp_path.iterdir():
        path.unlink()
    write(tmp_path / "b", b"2" * SIZE, pool)
    pool.give(tmp_path / "missing")
    pool.give(tmp_path / "b")
    clear_spares()
    assert not names_in(tmp_path)


def test_a_store_writes_over_its_own_states_and_never_over_what_was_linked_into_it(tmp_path):
    store = PayloadStore(tmp_path / "store")
    store.open()
    first = store.put([b"1" * SIZE])
    inode = first.path.stat().st_ino
    result = tmp_path / "result"
    result.write_bytes(b"2" * SIZE)
    given = store.give(result, digest_of(b"2" * SIZE))
    store.drop(first.digest)
    store.drop(given.digest)
    second = store.put([b"3" * SIZE])
    assert second.path.stat().st_ino == inode and result.read_bytes() == b"2" * SIZE
    store.clear()
    assert not names_in(store.root)


def test_states_come_in_pieces_into_a_spare_file(tmp_path):
    store, content = PayloadStore(tmp_path), bytes(range(256)) * (SIZE // 256)
    inodes = []
    for number in range(2):
        whole = bytes([number]) + content
        incoming = store.receive(digest_of(whole), len(whole))
        for start in range(0, len(whole), 100_000):
            incoming.add(incoming.have, whole[start : start + 100_000])
        inodes.append(incoming.path.stat().st_ino)
        assert incoming.is_whole and incoming.map()[:] == whole
        incoming.discard()
    assert len(set(inodes)) == 1


def test_a_trainer_writes_results_over_old_ones_and_what_a_script_has_kept_stays(tmp_path):
    exchange = Exchange(tmp_path, 1)
    client, trainer = ClientSide(exchange), TrainerSide(exchange)
    kept: dict[int, torch.Tensor] = {}
    inodes = set()

    def ask(server_round: int) -> TaskRecord:
        request = Request(run_id="run", kind="train", server_round=server_round, total_rounds=9)
        client.offer(request, None, lambda _: Source(bytes=0, content=b""))
        found = trainer.next()
        assert isinstance(found, TaskRecord)
        return found

    with exchange.hold("client"), exchange.hold("trainer"):
        for server_round in range(1, 9):
            record = ask(server_round)
            state = {"w": torch.full((SIZE // 4,), float(server_round))}
            assert trainer.answer(record, encode(state), num_examples=1)
            path = exchange.payload_path("result", record.version)
            inodes.add(path.stat().st_ino)
            if server_round in (2, 3):
                kept[server_round] = map_file(path)["w"]
        assert all((tensor == server_round).all() for server_round, tensor in kept.items())
        # The two that are still mapped, and one in their place.
        assert len(inodes) == 3
        assert any("spare" in name for name in names_in(exchange.directory))
    assert not any("spare" in name for name in names_in(exchange.directory))


def test_a_mapping_in_this_process_counts_too(tmp_path, pool):
    path = tmp_path / "a"
    inode = write(path, b"1" * SIZE, pool)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pool.give(path)
    assert write(tmp_path / "b", b"2" * SIZE, pool) != inode
    mapped.close()
