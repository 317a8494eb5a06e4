"""The payload store: digests for names, verified when read, used only where both sides see one private directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsplit.disk.files import link_or_copy
from fedsplit.disk.payload_store import Incoming, PayloadStore
from fedsplit.disk.spares import Spares
from fedsplit.errors import CheckpointError, ExchangeError, RecordError
from tests.bounds import BOUND_S
from tests.handoffs import ROOT, blob, digest_of, names_in, overwrite

CONTENT = blob("a state")
NINES = "9" * 63
NOT_DIGESTS = [
    "",
    ".",
    "..",
    "../" + NINES[3:],
    "/etc/passwd",
    "A" * 64,
    NINES,
    NINES + "99",
    NINES + "\n",
    NINES + "/",
]


@pytest.fixture
def store(tmp_path: Path) -> PayloadStore:
    store = PayloadStore(tmp_path / "payloads")
    store.open()
    return store


def test_a_payload_is_stored_under_its_digest_and_read_back(store):
    stored = store.put([CONTENT[:5], memoryview(CONTENT)[5:]])
    assert (stored.digest, stored.bytes) == (digest_of(CONTENT), len(CONTENT))
    assert stored.path == store.root / stored.digest
    assert stored.path.read_bytes() == CONTENT and store.map(stored.digest)[:] == CONTENT
    assert names_in(store.root) == {stored.digest}


def test_the_same_payload_twice_is_one_file(store):
    assert store.put([CONTENT]) == store.put([CONTENT])
    assert len(names_in(store.root)) == 1


def test_what_has_to_wait_stays_when_the_same_bytes_are_dropped_and_leaves_no_file(store):
    stored = store.put([CONTENT])
    parked = store.park(CONTENT)
    store.drop(stored.digest)
    assert parked[:] == CONTENT and not names_in(store.root)


@pytest.mark.parametrize("name", NOT_DIGESTS)
def test_no_name_but_a_digest_is_ever_opened_or_removed(store, name):
    for use in (store.path, store.take, store.map, store.drop):
        with pytest.raises(RecordError, match="is not a SHA-256 digest"):
            use(name)


def test_a_payload_that_was_changed_is_refused(store):
    stored = store.put([CONTENT])
    overwrite(stored.path, CONTENT[:-1] + b"!")
    with pytest.raises(RecordError, match="it was changed after it was written"):
        store.map(stored.digest)


@pytest.mark.parametrize("what", ["nothing", "an empty file", "a directory", "a symlink to the right content"])
def test_what_is_no_payload_is_refused(store, tmp_path, what):
    digest = digest_of(CONTENT)
    path = store.path(digest)
    if what == "an empty file":
        path.write_bytes(b"")
    elif what == "a directory":
        path.mkdir()
    elif what.startswith("a symlink"):
        (tmp_path / "elsewhere").write_bytes(CONTENT)
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="cannot read the payload"):
        store.map(digest)
    assert store.take(digest) is None or what == "an empty file"


def test_a_pipe_under_a_digest_is_not_waited_for(store):
    os.mkfifo(store.path(digest_of(CONTENT)))
    assert store.take(digest_of(CONTENT)) is None
    with pytest.raises(RecordError, match="not a regular file"):
        store.map(digest_of(CONTENT))


def test_writing_to_a_map_does_not_reach_the_file(store):
    stored = store.put([CONTENT])
    store.map(stored.digest)[:] = bytes(len(CONTENT))
    assert stored.path.read_bytes() == CONTENT


def test_who_mapped_or_linked_a_payload_keeps_it_when_it_is_dropped(store, tmp_path):
    stored = store.put([CONTENT])
    mapped = store.map(stored.digest)
    link_or_copy(stored.path, tmp_path / "linked")
    store.drop(stored.digest)
    store.drop(stored.digest)
    assert store.take(stored.digest) is None
    assert mapped[:] == CONTENT and (tmp_path / "linked").read_bytes() == CONTENT


def test_all_payloads_are_removed_and_half_made_links_are_left(store):
    """A client may be linking its result while the server clears: its temporary name must not vanish under it."""
    store.put([CONTENT])
    store.put([blob("another")])
    half = store.root / f".{'0' * 64}.77.tmp"
    half.write_bytes(b"")
    store.clear()
    assert names_in(store.root) == {half.name}


def test_a_server_that_opens_the_store_clears_what_an_earlier_one_left(store):
    store.put([CONTENT])
    store.put_nonce()
    (store.root / "writing-0123").write_bytes(b"half")
    (store.root / f".{'0' * 64}.77.tmp").write_bytes(b"half")
    PayloadStore(store.root).open()
    assert names_in(store.root) == set()


def test_a_write_that_fails_leaves_nothing(store):
    def chunks():
        yield CONTENT
        raise ValueError

    with pytest.raises(ValueError):
        store.put(chunks())
    assert names_in(store.root) == set()


# -- the proof that both sides see the same directory --------------------------------------------------------------


def test_a_nonce_is_read_back_by_another_process(store):
    name, content = store.put_nonce()
    code = (
        "import sys, pathlib; from fedsplit.disk.payload_store import PayloadStore;"
        "print(PayloadStore(pathlib.Path(sys.argv[1])).read_nonce(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.root), name], capture_output=True, text=True, timeout=BOUND_S, cwd=ROOT
    )
    assert done.stdout.strip() == content


def test_nonces_differ(store):
    first, second = store.put_nonce(), store.put_nonce()
    assert len({*first, *second}) == 4


@pytest.mark.parametrize("name", NOT_DIGESTS)
def test_a_nonce_is_read_under_no_other_name_than_a_digest(store, name):
    (store.root.parent / "secret").write_text("secret")
    assert store.read_nonce(name) is None
    assert store.read_nonce("../secret") is None


@pytest.mark.parametrize("what", ["gone", "a symlink", "long", "not text", "a directory"])
def test_what_is_no_nonce_proves_nothing(store, tmp_path, what):
    name, content = store.put_nonce()
    path = store.path(name)
    path.unlink()
    if what == "a symlink":
        (tmp_path / "elsewhere").write_text(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "long":
        path.write_text("x" * 10_000)
    elif what == "not text":
        path.write_bytes(b"\xff\xfe")
    elif what == "a directory":
        path.mkdir()
    assert store.read_nonce(name) is None


def test_a_root_that_is_not_there_is_not_made(tmp_path):
    assert PayloadStore(tmp_path / "nowhere").read_nonce("0" * 64) is None
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("what", ["a symlink", "writable by others", "of another user"])
def test_a_directory_that_is_not_ones_own_is_not_used(store, tmp_path, what):
    name, content = store.put_nonce()
    assert store.read_nonce(name) == content
    root = store.root
    if what == "a symlink":
        root = tmp_path / "link"
        root.symlink_to(store.root)
    elif what == "writable by others":
        root.chmod(0o777)
    else:
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        os.chown(root, 12345, -1)
    assert PayloadStore(root).read_nonce(name) is None
    with pytest.raises(CheckpointError):
        PayloadStore(root).open()


def test_a_store_whose_directory_vanished_is_an_error_that_names_it(store):
    store.root.rmdir()
    with pytest.raises(ExchangeError, match="cannot write"):
        store.put([CONTENT])


def test_a_payload_that_comes_in_pieces_is_whole_with_the_last_one(store):
    incoming = store.receive(digest_of(CONTENT), len(CONTENT))
    incoming.add(0, CONTENT[:4])
    assert not incoming.is_whole
    incoming.add(4, CONTENT[4:])
    assert incoming.is_whole
    content = incoming.map()
    incoming.discard()
    assert names_in(store.root) == set()
    assert content[:] == CONTENT


def test_a_piece_that_does_not_begin_where_the_file_ends_changes_nothing(store):
    incoming = store.receive(digest_of(CONTENT), len(CONTENT))
    incoming.add(3, CONTENT[3:])
    assert incoming.have == 0
    incoming.add(0, CONTENT[:4])
    incoming.add(0, CONTENT[:4])
    assert incoming.have == 4


def test_pieces_with_another_digest_are_refused_and_removed(store):
    incoming = store.receive(digest_of(b"other"), len(CONTENT))
    with pytest.raises(RecordError, match="have digest"):
        incoming.add(0, CONTENT)
    assert names_in(store.root) == set()


def test_a_file_that_vanished_between_two_pieces_is_not_made_anew_with_a_hole(store):
    incoming = store.receive(digest_of(CONTENT), len(CONTENT))
    incoming.add(0, CONTENT[:4])
    incoming.discard()
    with pytest.raises(ExchangeError, match="cannot write"):
        incoming.add(4, CONTENT[4:])


def test_more_pieces_than_were_announced_are_refused(store):
    incoming = store.receive(digest_of(CONTENT), len(CONTENT))
    with pytest.raises(RecordError, match="more came"):
        incoming.add(0, CONTENT + b"x")


def test_the_first_piece_begins_a_file_anew_that_a_dead_process_left(tmp_path):
    path = tmp_path / "fetched"
    path.write_bytes(b"left behind, and longer than what comes now" * 9)
    incoming = Incoming(path, digest_of(CONTENT), len(CONTENT), Spares(path.parent, "incoming"))
    incoming.add(0, CONTENT)
    assert path.read_bytes() == CONTENT
