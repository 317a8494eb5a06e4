"""`--verify`: whose bytes are read again for their digest. What nobody can have changed is not, everything else is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.common import FitIns, Parameters

from benchmarks.inside import Federation, InsideRank
from fedsplit import Trainer
from fedsplit.client.relay import Relay
from fedsplit.disk import files, identity
from fedsplit.disk.identity import identity_of
from fedsplit.disk.payload_store import Incoming, PayloadStore, StoredPayload
from fedsplit.disk.spares import Spares
from fedsplit.errors import RecordError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.trainer_side import TrainerSide
from fedsplit.server.peer import Reply
from fedsplit.server.settings import ServerSettings
from fedsplit.states.state_dict import encode
from fedsplit.wire.protocol import TENSOR_TYPE, ask_record, pack, unpack
from tests.handoffs import begin, blob, digest_of, never, overwrite, request

STATE, OTHER = blob("a state"), blob("b state")
DIGEST = digest_of(STATE)
pytestmark = pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="Linux names its boots")


@pytest.fixture
def store(tmp_path: Path) -> PayloadStore:
    store = PayloadStore(tmp_path / "payloads")
    store.open()
    return store


def sides(directory: Path, *, client: str = "auto", trainer: str = "auto") -> tuple[ClientSide, TrainerSide]:
    """Return the two sides of rank 1, each with its own --verify."""
    (directory / "rank-1").mkdir(mode=0o700, exist_ok=True)
    return ClientSide(Exchange(directory, 1, client)), TrainerSide(Exchange(directory, 1, trainer))


def given(stored: StoredPayload) -> Callable[[str], Source]:
    """Return a fetch function as a client has it that sees the server's store."""
    return lambda _: Source(bytes=stored.bytes, content=stored.path, identity=stored.identity)


def forge(path: Path, content: bytes) -> None:
    """Change a file and set back what can be set back, as only somebody who wants to deceive does."""
    before = path.stat()
    overwrite(path, content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(0o400)


def touch(path: Path) -> None:
    """Change a file as an accident does: it was made writable, and stays so."""
    overwrite(path, OTHER)


def touch_and_close(path: Path) -> None:
    """Change a file and make it unwritable again."""
    touch(path)
    path.chmod(0o400)


def exchange_for_another(path: Path) -> None:
    """Put another file in its place, with the same mode and time."""
    before = path.stat()
    path.unlink()
    files.write_chunks(path, [OTHER], mode=files.UNWRITABLE)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def give_away(path: Path) -> None:
    """Change a file and set all back, but for whose it is."""
    forge(path, OTHER)
    path.chmod(0o444)
    os.chown(path, 12345, -1)


FOUND = [
    touch,
    touch_and_close,
    exchange_for_another,
    pytest.param(give_away, marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")),
]


# -- what a file is known by -------------------------------------------------------------------------------------------


def test_further_names_of_a_file_have_its_identity_and_a_copy_has_none(tmp_path, store, monkeypatch):
    stored = store.put([STATE])
    assert stored.identity == identity_of(stored.path.lstat())
    files.link_or_copy(stored.path, tmp_path / "linked")
    assert identity_of((tmp_path / "linked").lstat()) == stored.identity

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    files.link_or_copy(stored.path, tmp_path / "copied")
    assert identity_of((tmp_path / "copied").lstat()) is None


def test_a_file_that_can_be_written_or_a_link_has_no_identity(tmp_path, store):
    path = store.put([STATE]).path
    (tmp_path / "link").symlink_to(path)
    assert identity_of((tmp_path / "link").lstat()) is None
    for mode in (0o600, 0o420, 0o402):
        path.chmod(mode)
        assert identity_of(path.lstat()) is None


def test_what_was_written_before_this_boot_or_where_boots_have_no_name_is_not_known(store, monkeypatch):
    stored = store.put([STATE])
    monkeypatch.setattr(identity, "_boot", lambda: "another boot")
    assert stored.identity != identity_of(stored.path.lstat())
    monkeypatch.setattr(identity, "_boot", lambda: "")
    assert identity_of(stored.path.lstat()) is None


# -- a state, on its way to the trainer --------------------------------------------------------------------------------


def test_a_state_that_the_server_wrote_is_digested_by_nobody_else(tmp_path, store, monkeypatch):
    stored = store.put([STATE])
    client, trainer = sides(tmp_path)
    monkeypatch.setattr("fedsplit.exchange.directory.file_digest", never)
    client.offer(request(), DIGEST, given(stored))
    trainer.answer(begin(trainer), [OTHER])
    # Now from the file that is there.
    client.offer(request("evaluate"), DIGEST, never)
    assert begin(trainer).kind == "evaluate"


@pytest.mark.parametrize("harm", FOUND)
def test_a_state_that_may_have_been_changed_is_digested_by_its_trainer(tmp_path, store, harm):
    stored = store.put([STATE])
    client, trainer = sides(tmp_path)
    version = client.offer(request(), DIGEST, given(stored))
    harm(client.exchange.payload_path("task", version))
    with pytest.raises(RecordError, match="has digest"):
        trainer.next()


def test_a_state_that_looks_changed_and_is_not_is_taken(tmp_path, store):
    stored = store.put([STATE])
    client, trainer = sides(tmp_path)
    client.offer(request(), DIGEST, given(stored))
    stored.path.touch()
    assert begin(trainer).digest == DIGEST


@pytest.mark.parametrize("who", ["client", "trainer"])
def test_with_always_each_side_has_the_trainer_digest_every_state(tmp_path, store, who):
    stored = store.put([STATE])
    client, trainer = sides(tmp_path, **{who: "always"})
    version = client.offer(request(), DIGEST, given(stored))
    forge(client.exchange.payload_path("task", version), OTHER)
    with pytest.raises(RecordError, match="has digest"):
        trainer.next()


def test_with_auto_somebody_who_sets_out_to_deceive_is_believed(tmp_path, store):
    """SECURITY.md says so: that is what --verify always is for."""
    stored = store.put([STATE])
    client, trainer = sides(tmp_path)
    version = client.offer(request(), DIGEST, given(stored))
    forge(client.exchange.payload_path("task", version), OTHER)
    assert begin(trainer).version == version


def test_a_record_of_an_older_version_has_no_identity_and_its_payload_is_digested(tmp_path, store):
    stored = store.put([STATE])
    client, trainer = sides(tmp_path)
    version = client.offer(request(), DIGEST, given(replace(stored, identity=None)))
    forge(client.exchange.payload_path("task", version), OTHER)
    with pytest.raises(RecordError, match="has digest"):
        trainer.next()


# -- a state in messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [True, False])
def test_what_came_in_messages_is_digested_as_it_comes_and_not_again_by_the_trainer(tmp_path, monkeypatch, pieces):
    exchange = Exchange(tmp_path, 1)
    monkeypatch.setattr("fedsplit.exchange.directory.file_digest", never)
    with exchange.hold("client"):
        relay, blobs = Relay(exchange, trainer_wait_s=60.0), [STATE]
        if pieces:
            record = pack({"op": "push", "digest": DIGEST, "bytes": len(STATE), "offset": 0})
            relay.fit(FitIns(Parameters(blobs, TENSOR_TYPE), record))
            blobs = []
        record = ask_record(request(), digest=DIGEST, payload_bytes=len(STATE), hold_s=0.0, cancel=False)
        answer = relay.fit(FitIns(Parameters(blobs, TENSOR_TYPE), pack(record)))
        assert unpack(answer.metrics, "the relay")["status"] == "working"
        task = begin(TrainerSide(Exchange(tmp_path, 1)))
    assert (exchange.directory / task.payload.file).read_bytes() == STATE


def test_the_first_piece_does_not_write_into_a_finished_file_of_which_that_name_is_a_second_one(tmp_path):
    """A client may be killed between the two: a trainer has mapped what the pieces before came to."""
    spares = Spares(tmp_path, "fetched")
    first = Incoming(tmp_path / "fetched", DIGEST, len(STATE), spares)
    first.add(0, STATE)
    files.link_or_copy(tmp_path / "fetched", tmp_path / "task")
    mapped = files.map_regular(tmp_path / "task")
    Incoming(tmp_path / "fetched", digest_of(OTHER), len(OTHER), spares).add(0, OTHER)
    assert mapped[:] == STATE == (tmp_path / "task").read_bytes()


# -- a result, on its way to the server --------------------------------------------------------------------------------


def answered(directory: Path, store: PayloadStore, *, client: str = "auto", trainer: str = "auto") -> dict:
    """Have a task done by reference; returns what the client says of the payload."""
    exchange = Exchange(directory, 1, client)
    with exchange.hold("client"):
        relay = Relay(exchange, trainer_wait_s=60.0)
        relay._store = store
        record = pack(ask_record(request(), digest=None, payload_bytes=0, hold_s=0.0, cancel=False))
        relay.fit(FitIns(Parameters([], TENSOR_TYPE), record))
        side = TrainerSide(Exchange(directory, 1, trainer))
        side.answer(begin(side), [STATE], num_examples=1)
        return unpack(relay.fit(FitIns(Parameters([], TENSOR_TYPE), record)).metrics, "the relay")["payload"]


def test_a_result_that_its_trainer_wrote_is_digested_by_nobody_else(tmp_path, store, monkeypatch):
    said = answered(tmp_path, store)
    assert (said["via"], said["digest"]) == ("store", DIGEST)
    monkeypatch.setattr("fedsplit.disk.payload_store.bytes_digest", never)
    assert store.map(DIGEST, identity=said["identity"])[:] == STATE


@pytest.mark.parametrize("harm", FOUND)
def test_a_result_that_may_have_been_changed_is_digested_by_the_server(tmp_path, store, harm):
    said = answered(tmp_path, store)
    harm(store.path(DIGEST))
    with pytest.raises(RecordError, match="it was changed after it was written"):
        store.map(DIGEST, identity=said["identity"])


@pytest.mark.parametrize("who", ["client", "trainer", "server"])
def test_with_always_each_side_has_the_server_digest_every_result(tmp_path, store, who):
    said = answered(tmp_path, store, **({} if who == "server" else {who: "always"}))
    store.trusts = who != "server"
    forge(store.path(DIGEST), OTHER)
    with pytest.raises(RecordError, match="it was changed after it was written"):
        store.map(DIGEST, identity=said["identity"])


def test_a_client_that_names_another_ranks_file_or_invents_an_identity_has_its_bytes_digested(tmp_path, store):
    said = answered(tmp_path, store)
    mine = store.root / digest_of(OTHER)
    files.write_chunks(mine, [STATE], mode=files.UNWRITABLE)
    for invented in (said["identity"], "", "x", None):
        with pytest.raises(RecordError, match="it was changed after it was written"):
            store.map(digest_of(OTHER), identity=invented)


class Liar(InsideRank):
    """Says of its result that it has another digest, and which file it is."""

    lie = "0" * 64

    def _answer(self, task: Any, began: float) -> Reply:
        reply = super()._answer(task, began)
        assert self.store is not None and reply.payload is not None
        files.link_or_copy(self.store.path(reply.payload.digest), self.store.path(self.lie))
        said = replace(reply.payload, digest=self.lie, identity=identity_of(self.store.path(self.lie).lstat()))
        return replace(reply, payload=said)


def train(task: Any) -> tuple[dict[str, torch.Tensor], int]:
    return {"w": task.state_dict["w"] + task.server_round}, 1


@pytest.mark.parametrize(
    ("flags", "is_read"), [({}, False), ({"verify": "always"}, True), ({"buffer": 2}, True)],
    ids=["a name only", "always", "the journal keeps it"],
)  # fmt: skip
def test_a_digest_that_a_client_claims_is_written_down_nowhere_before_it_was_read(tmp_path, flags, is_read):
    settings = ServerSettings(rounds=1, min_clients=2, evaluate_every=0, checkpoint_dir=tmp_path, **flags)
    ranks = [InsideRank(1, train), Liar(2, train)]
    federation = Federation(tmp_path, settings, {"w": torch.zeros(3)}, ranks)
    run = federation.run()
    (line,) = run.history.lines
    assert ("2" in line["refused"]) == is_read, line
    assert ("2" in line["clients"]) != is_read
    newest = run.checkpoints.newest()
    assert newest is not None and newest.files["state.safetensors"] == digest_of(
        b"".join(encode(federation.final_state()))
    )
    assert all(Liar.lie not in str(entry) for entry in run.journal.entries)


def test_a_trainer_of_ones_own_says_always_too(tmp_path):
    assert Trainer(1, exchange_dir=tmp_path).exchange.trusts
    assert not Trainer(1, exchange_dir=tmp_path, verify="always").exchange.trusts
