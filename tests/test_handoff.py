"""The hand-off between a client and a trainer, both sides in one process on a real directory.

Kills in the middle of a step are in test_handoff_kill.py, all interleavings in test_handoff_model.py.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from pathlib import Path

import pytest

from fedsplit.disk.payload_store import PayloadStore
from fedsplit.errors import RecordError, SchemaError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import TaskRecord
from fedsplit.exchange.trainer_side import TrainerSide
from tests.handoffs import (
    begin,
    blob,
    digest_of,
    end,
    names_in,
    never,
    nothing,
    offer,
    overwrite,
    pair,
    request,
    request_of,
    source_of,
    text_of,
)  # fmt: skip

STATE = blob("state of round 0")


@pytest.fixture
def sides(tmp_path: Path) -> tuple[ClientSide, TrainerSide]:
    return pair(tmp_path)


def flip_last_byte(path: Path) -> None:
    """Damage a payload in a way that neither its length nor its header shows, as a new file."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


# -- asking and answering ------------------------------------------------------------------------------------------


def test_a_task_reaches_the_trainer_and_its_answer_comes_back(sides):
    client, trainer = sides
    asked = request(config={"lr": 0.1}, split=(("head.*", True),))
    version = offer(client, asked, STATE)
    task = begin(trainer)
    assert (task.version, request_of(task)) == (version, asked)
    assert (trainer.exchange.directory / task.payload.file).read_bytes() == STATE
    assert client.result(version) is None
    answer = blob("trained")
    assert trainer.answer(task, [answer[:9], answer[9:]], num_examples=7, metrics={"loss": 0.5}, seconds=1.5)
    result = client.result(version)
    assert (result.status, result.num_examples, result.metrics, result.seconds) == ("ok", 7, {"loss": 0.5}, 1.5)
    assert (result.payload.digest, result.payload.bytes) == (digest_of(answer), len(answer))
    assert (client.exchange.directory / result.payload.file).read_bytes() == answer
    assert trainer.next() is None


def test_a_request_without_a_state_needs_none(sides):
    client, trainer = sides
    version = client.offer(request("initialize", 0), None, never)
    assert begin(trainer).payload is None
    assert version == 1


def test_a_request_in_work_keeps_its_version_and_is_not_fetched_again(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    before = names_in(client.exchange.directory)
    assert client.offer(request(), digest_of(STATE), never) == version
    begin(trainer)
    assert ClientSide(client.exchange).offer(request(), digest_of(STATE), never) == version
    assert names_in(client.exchange.directory) == before


def test_an_answered_request_keeps_its_version_and_its_result(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")], num_examples=1)
    again = ClientSide(client.exchange)
    assert again.offer(request(), digest_of(STATE), never) == version
    assert again.result(version).num_examples == 1
    assert trainer.next() is None


def test_a_request_that_failed_is_asked_anew(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), error={"type": "ValueError", "message": "no", "traceback": "…"})
    assert client.result(version).error["message"] == "no"
    assert client.offer(request(), digest_of(STATE), never) == version + 1
    assert begin(trainer).version == version + 1


def test_an_error_that_comes_between_two_looks_is_told_before_it_is_asked_for_anew(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), error={"type": "ValueError", "message": "no", "traceback": "…"})
    assert client.offer(request(), digest_of(STATE), never) == version
    assert client.result(version).error["message"] == "no"
    assert client.offer(request(), digest_of(STATE), never) == version + 1


@pytest.mark.parametrize(
    "other",
    [
        request(server_round=2), request("evaluate"), request(run_id="run-b"), request(split=(("a", True),)),
    ],
    ids=["round", "kind", "run", "split"],
)  # fmt: skip
def test_another_request_is_another_version_also_from_the_same_state(sides, other):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    assert client.offer(other, digest_of(STATE), never) == version + 1
    assert request_of(begin(trainer)) == other


def test_the_same_request_from_another_state_is_another_version(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    assert offer(client, request(), blob("another state")) == version + 1


def test_a_state_that_is_nowhere_to_be_had_is_asked_for(sides):
    client, trainer = sides
    assert client.offer(request(), digest_of(STATE), nothing) is None
    assert trainer.next() is None


def test_an_answer_to_an_older_task_is_dropped_and_logged(sides, caplog):
    client, trainer = sides
    offer(client, request(), STATE)
    old = begin(trainer)
    newer = offer(client, request(server_round=2), blob("state of round 1"))
    assert not trainer.is_wanted(old)
    with caplog.at_level(logging.WARNING, "fedsplit"):
        assert not trainer.answer(old, [blob("trained too late")])
    assert "round 1 (version 1) came too late" in caplog.text
    assert client.result(newer) is None and client.result(old.version) is None
    assert client.exchange.payload_versions("result") == []
    assert begin(trainer).version == newer


def test_an_answer_never_changes_under_its_version_nor_does_its_payload(sides, caplog):
    client, trainer = sides
    version = offer(client, request(), STATE)
    task = begin(trainer)
    trainer.answer(task, [blob("first")], num_examples=1)
    with caplog.at_level(logging.WARNING, "fedsplit"):
        assert not trainer.answer(task, [blob("second")], num_examples=2)
        assert not trainer.answer(task, error={"type": "OSError", "message": "", "traceback": ""})
    assert "version 1 has an answer" in caplog.text
    result = client.result(version)
    assert (result.status, result.num_examples) == ("ok", 1)
    assert text_of(client.exchange.payload_path("result", version).read_bytes()) == "first"


def test_a_task_that_gets_old_while_the_answer_is_written_leaves_no_payload(sides):
    client, trainer = sides
    offer(client, request(), STATE)
    task = begin(trainer)

    def chunks():
        yield blob("trained")
        offer(client, request(server_round=2), STATE)

    assert not trainer.answer(task, chunks())
    assert client.exchange.payload_versions("result") == []


def test_a_directory_emptied_under_a_live_trainer_never_gets_its_old_answer(sides):
    client, trainer = sides
    offer(client, request(run_id="old"), STATE)
    old = begin(trainer)
    for path in client.exchange.directory.iterdir():
        path.unlink()
    version = offer(ClientSide(client.exchange), request(run_id="new"), STATE)
    assert version == old.version
    assert not trainer.answer(old, [blob("trained for the old run")])
    assert client.result(version) is None


# -- versions ------------------------------------------------------------------------------------------------------


def test_versions_grow_across_restarts_of_both_sides(tmp_path):
    seen = []
    for server_round in range(1, 6):
        client, trainer = pair(tmp_path)
        seen.append(offer(client, request(server_round=server_round), blob(f"state {server_round}")))
        client, trainer = pair(tmp_path)
        trainer.answer(begin(trainer), [blob("trained")])
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", ["lost", "garbage", "empty", "a directory"])
@pytest.mark.parametrize("name", ["task.json", "result.json"])
def test_a_lost_or_mangled_record_does_not_make_the_counter_go_back(tmp_path, name, damage):
    client, trainer = pair(tmp_path)
    for server_round in range(1, 4):
        offer(client, request(server_round=server_round), blob(f"state {server_round}"))
        trainer.answer(begin(trainer), [blob("trained")])
    last = offer(client, request(server_round=4), blob("state 4"))
    path = client.exchange.directory / name
    path.unlink()
    if damage != "lost":
        path.mkdir() if damage == "a directory" else path.write_text("{" if damage == "garbage" else "")
    client, trainer = pair(tmp_path)
    if damage == "a directory":  # nobody of us makes one: it is named, not worked around
        path.rmdir()
    version = offer(client, request(server_round=5), blob("state 5"))
    assert version > last
    task = begin(trainer)
    assert task.version == version and trainer.answer(task, [blob("trained 5")])
    assert client.result(version).payload.file == f"result-{version}.safetensors"


def test_a_lost_record_without_a_payload_does_not_make_a_live_client_go_back(sides):
    client, _ = sides
    version = offer(client, request("initialize", 0), None)
    client.exchange.task_path.unlink()
    assert offer(client, request("initialize", 0), None) == version + 1


def test_the_task_of_a_lost_record_is_done_again(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    client.exchange.task_path.write_text("{ torn")
    with pytest.raises(RecordError, match="is not JSON"):
        trainer.next()
    assert offer(client, request(), STATE) == version + 1
    assert begin(trainer).version == version + 1


def test_a_result_whose_record_was_torn_is_made_again_under_its_version(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    client.exchange.result_path.write_bytes(client.exchange.result_path.read_bytes()[:40])
    with pytest.raises(RecordError):
        client.result(version)
    assert trainer.answer(begin(trainer), [blob("trained again")])
    assert client.result(version).version == version


def test_misleading_time_stamps_change_nothing(sides):
    client, trainer = sides
    for server_round in range(1, 4):
        offer(client, request(server_round=server_round), blob(f"state {server_round}"))
        if server_round < 3:
            trainer.answer(begin(trainer), [blob(f"trained {server_round}")])
    directory = client.exchange.directory
    (directory / "task-1.safetensors").write_bytes(blob("an old state, written last"))
    for age, name in enumerate(sorted(names_in(directory))):
        os.utime(directory / name, (2e9 - 1e6 * age, 2e9 - 1e6 * age))
    os.utime(directory / "task-1.safetensors", (4e9, 4e9))
    task = begin(trainer)
    assert task.server_round == 3
    assert text_of((directory / task.payload.file).read_bytes()) == "state 3"


# -- cancel, finish, leave -----------------------------------------------------------------------------------------


def test_a_cancelled_task_is_not_begun_not_wanted_and_asked_anew_when_asked_again(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    task = begin(trainer)
    assert trainer.is_wanted(task)
    client.cancel(version)
    assert not trainer.is_wanted(task)
    assert trainer.next() is None
    assert not trainer.answer(task, [blob("too late")])
    assert client.offer(request(), digest_of(STATE), never) == version + 1
    assert begin(trainer).version == version + 1


def test_cancelling_an_older_version_leaves_the_newest_alone(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    offer(client, request(server_round=2), STATE)
    client.cancel(version)
    assert begin(trainer).server_round == 2


def test_an_answer_that_was_quicker_than_the_cancelling_is_not_lost(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    client.cancel(version)
    assert client.offer(request(), digest_of(STATE), never) == version
    assert client.result(version).status == "ok"


def test_a_trainer_that_was_dead_at_the_finish_sees_it_once(sides):
    client, trainer = sides
    offer(client, request(), STATE)
    client.finish("run-a", "complete")
    finished = end(trainer)
    assert (finished.run_id, finished.outcome) == ("run-a", "complete")
    trainer.leave(finished)
    assert TrainerSide(trainer.exchange).next() is None


def test_a_task_of_a_finished_run_is_never_begun(sides):
    client, trainer = sides
    offer(client, request(), STATE)
    task = begin(trainer)
    client.finish("run-a", "stopped", "Ctrl-C")
    assert not trainer.is_wanted(task)
    assert not trainer.answer(task, [blob("for nobody")])
    trainer.leave(end(trainer))
    assert TrainerSide(trainer.exchange).next() is None


def test_a_finish_that_is_told_twice_is_the_same_end(sides):
    client, trainer = sides
    offer(client, request(), STATE)
    client.finish("run-a", "complete")
    trainer.leave(end(trainer))
    ClientSide(client.exchange).finish("run-a", "complete")
    assert TrainerSide(trainer.exchange).next() is None


def test_a_trainer_that_follows_one_killed_on_its_way_out_is_told_by_the_next_client(sides):
    client, trainer = sides
    offer(client, request(), STATE)
    client.finish("run-a", "complete")
    trainer.leave(end(trainer))
    follower = TrainerSide(Exchange(client.exchange.directory.parent, 1))
    assert follower.next() is None
    with follower.exchange.hold("trainer"):
        # The one that was told already: the trainer that is here may still be on its way out.
        client.finish("run-a", "complete")
        assert follower.next() is None
        ClientSide(client.exchange).finish("run-a", "complete")
        finished = end(follower)
        assert (finished.run_id, finished.outcome) == ("run-a", "complete")
        follower.leave(finished)
        assert follower.next() is None


def test_the_next_run_is_not_affected_by_the_end_of_the_one_before(sides):
    client, trainer = sides
    first = offer(client, request(), STATE)
    client.finish("run-a", "complete")
    version = offer(client, request(run_id="run-b"), STATE)
    assert version > first + 1
    task = begin(trainer)
    assert task.run_id == "run-b" and trainer.is_wanted(task)
    trainer.answer(task, [blob("trained")])
    client.finish("run-b", "complete")
    assert end(trainer).run_id == "run-b"


def test_a_run_that_is_resumed_after_it_was_stopped_gets_its_unanswered_task_done(sides):
    """The same run, round and state as before the stop: under the old version no trainer would ever begin it."""
    client, trainer = sides
    version = offer(client, request(), STATE)
    begin(trainer)
    client.finish("run-a", "stopped")
    trainer.leave(end(trainer))
    again = client.offer(request(), digest_of(STATE), never)
    assert again > version + 1
    task = begin(TrainerSide(trainer.exchange))
    assert task.version == again and trainer.answer(task, [blob("trained")])
    assert client.result(again).status == "ok"


def test_a_run_that_is_resumed_after_it_was_stopped_gets_the_answer_that_was_there(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    client.finish("run-a", "stopped")
    assert client.offer(request(), digest_of(STATE), never) == version


def test_a_mangled_note_of_an_end_does_not_stop_the_next_run(sides):
    client, trainer = sides
    client.finish("run-a", "complete")
    client.exchange.finished_path.write_text("{ torn")
    version = offer(client, request(run_id="run-b"), STATE)
    assert begin(trainer).version == version


# -- payloads ------------------------------------------------------------------------------------------------------


def test_a_state_that_the_exchange_holds_is_linked_not_written_again(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    inode = client.exchange.payload_path("task", version).stat().st_ino
    trainer.answer(begin(trainer), [blob("trained")])
    assert client.held_digest() == digest_of(STATE)
    again = client.offer(request("evaluate"), digest_of(STATE), never)
    assert client.exchange.payload_path("task", again).stat().st_ino == inode
    assert client.exchange.payload_versions("task") == [again]


def test_a_stored_state_is_linked_into_the_exchange(sides, tmp_path):
    client, trainer = sides
    stored = tmp_path / "stored"
    stored.write_bytes(STATE)
    version = client.offer(request(), digest_of(STATE), source_of(stored))
    assert client.exchange.payload_path("task", version).samefile(stored)
    assert begin(trainer).version == version


def test_payloads_are_removed_only_once_the_other_side_has_moved_on(sides):
    client, trainer = sides
    offer(client, request(), STATE)
    begin(trainer)
    offer(client, request(server_round=2), blob("state 1"))
    offer(client, request(server_round=3), blob("state 2"))
    assert client.exchange.payload_versions("task") == [1, 2, 3]
    task = begin(trainer)
    trainer.answer(task, [blob("trained 3")])
    assert client.exchange.payload_versions("result") == [3]
    offer(client, request(server_round=4), blob("state 3"))
    assert client.exchange.payload_versions("task") == [4]
    trainer.answer(begin(trainer), [blob("trained 4")])
    assert client.exchange.payload_versions("result") == [4]


def test_a_mapped_payload_stays_readable_and_unchanged_when_it_is_removed_or_made_again(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    task = begin(trainer)
    with (trainer.exchange.directory / task.payload.file).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    trainer.answer(task, [blob("trained")])
    with client.exchange.payload_path("result", version).open("rb") as file:
        answer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    client.exchange.result_path.unlink()
    trainer.answer(begin(trainer), [blob("trained again, and longer")])
    offer(client, request(server_round=2), blob("state 1"))
    assert not (trainer.exchange.directory / task.payload.file).exists()
    assert mapped[:] == STATE and text_of(answer[:]) == "trained"


@pytest.mark.parametrize("kept", [0, 7, 8, 40, -1])
def test_a_torn_state_is_not_believed_and_put_there_again(sides, kept):
    client, trainer = sides
    version = offer(client, request(), STATE)
    overwrite(client.exchange.payload_path("task", version), STATE[:kept])
    with pytest.raises(RecordError, match=r"bytes, its record says"):
        trainer.next()
    assert offer(client, request(), STATE) == version + 1
    assert begin(trainer).version == version + 1


def test_a_missing_state_is_not_believed_and_put_there_again(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    client.exchange.payload_path("task", version).unlink()
    with pytest.raises(RecordError, match="cannot read the payload"):
        trainer.next()
    assert client.held_digest() is None
    assert offer(client, request(), STATE) == version + 1
    assert begin(trainer).version == version + 1


@pytest.mark.parametrize("kept", [0, 8, 40, -1])
def test_a_torn_answer_is_not_believed_and_the_task_done_again(sides, kept):
    client, trainer = sides
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    overwrite(client.exchange.payload_path("result", version), blob("trained")[:kept])
    with pytest.raises(RecordError):
        client.result(version)
    assert trainer.next() is None
    again = client.offer(request(), digest_of(STATE), never)
    assert again == version + 1
    trainer.answer(begin(trainer), [blob("trained again")])
    assert client.result(again).status == "ok"


def test_a_state_whose_digest_differs_is_refused_and_fetched_again(sides):
    """Only the trainer looks at all bytes: without its help the client would offer the damaged file for ever."""
    client, trainer = sides
    version = offer(client, request(), STATE)
    flip_last_byte(client.exchange.payload_path("task", version))
    assert client.offer(request(), digest_of(STATE), never) == version
    with pytest.raises(RecordError, match="has digest"):
        trainer.next()
    assert offer(client, request(), STATE) == version + 1
    task = begin(trainer)
    assert (trainer.exchange.directory / task.payload.file).read_bytes() == STATE


def test_a_state_that_was_verified_before_is_verified_again_when_it_is_another_file(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    assert begin(trainer).version == version
    flip_last_byte(client.exchange.payload_path("task", version))
    with pytest.raises(RecordError, match="has digest"):
        trainer.next()


def test_a_state_that_serves_several_tasks_is_read_for_its_digest_once(sides, monkeypatch):
    client, trainer = sides
    offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    offer(client, request("evaluate"), STATE)
    monkeypatch.setattr("fedsplit.exchange.directory.file_digest", never)
    assert begin(trainer).kind == "evaluate"


def test_a_damaged_file_in_the_store_is_named_instead_of_placed_for_ever(sides, tmp_path):
    client, trainer = sides
    stored = tmp_path / "stored"
    stored.write_bytes(STATE)
    flip_last_byte(stored)
    client.offer(request(), digest_of(STATE), source_of(stored))
    with pytest.raises(RecordError, match="has digest"):
        trainer.next()
    with pytest.raises(RecordError, match="has digest"):
        client.offer(request(), digest_of(STATE), source_of(stored))


def test_what_is_fetched_and_is_no_payload_is_refused_and_leaves_nothing(sides):
    client, _ = sides
    bad = b"\x80\x04 a pickle"
    with pytest.raises(RecordError, match="not a safetensors payload"):
        client.offer(request(), digest_of(bad), source_of(bad))
    assert client.exchange.payload_versions("task") == []


def test_what_is_fetched_with_the_wrong_length_is_refused(sides):
    client, _ = sides
    with pytest.raises(RecordError, match="bytes, its record says"):
        client.offer(request(), digest_of(STATE), lambda d: Source(bytes=len(STATE) + 1, content=STATE))


def test_a_symlink_in_place_of_a_payload_is_refused(sides, tmp_path):
    client, trainer = sides
    version = offer(client, request(), STATE)
    path = client.exchange.payload_path("task", version)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="symbolic link"):
        trainer.next()


def test_a_newer_schema_is_refused_by_either_side(sides):
    client, trainer = sides
    offer(client, request(), STATE)
    record = json.loads(client.exchange.task_path.read_text()) | {"schema": "fedsplit/2"}
    client.exchange.task_path.write_text(json.dumps(record))
    for step in (trainer.next, lambda: offer(client, request(), STATE)):
        with pytest.raises(SchemaError, match=r"'fedsplit/2'.*'fedsplit/1'"):
            step()


def test_a_result_under_the_right_version_for_another_task_is_not_taken_for_its_answer(sides):
    client, trainer = sides
    version = offer(client, request(), STATE)
    task = begin(trainer)
    trainer.answer(task, [blob("trained")])
    record = json.loads(client.exchange.result_path.read_text()) | {"server_round": 7}
    client.exchange.result_path.write_text(json.dumps(record))
    assert client.offer(request(), digest_of(STATE), never) == version + 1


# -- the directory's own name --------------------------------------------------------------------------------------


def test_the_exchange_keeps_its_id_and_a_mangled_one_is_made_anew(sides, tmp_path):
    client, _ = sides
    first = client.exchange.exchange_id()
    assert Exchange(tmp_path, 1).exchange_id() == first
    client.exchange.exchange_id_path.write_bytes(b"\xff not an id")
    second = client.exchange.exchange_id()
    assert second != first and client.exchange.exchange_id() == second
    assert Exchange(tmp_path, 1).exchange_id() == second


def test_a_result_is_linked_into_the_store_and_outlives_the_exchange(sides, tmp_path):
    from fedsplit.disk.files import link_or_copy

    client, trainer = sides
    store = PayloadStore(tmp_path / "store")
    store.open()
    version = offer(client, request(), STATE)
    trainer.answer(begin(trainer), [blob("trained")])
    payload = client.result(version).payload
    link_or_copy(client.exchange.directory / payload.file, store.path(payload.digest))
    (client.exchange.directory / payload.file).unlink()
    assert text_of(store.map(payload.digest)[:]) == "trained"


def test_a_task_record_is_read_back_as_it_was_written(sides):
    client, _ = sides
    asked = request(config={"a": True, "b": 2, "c": 0.5, "d": "x"}, split=(("a.*", True), ("*", False)))
    offer(client, asked, STATE)
    task = client.exchange.read_task()
    assert isinstance(task, TaskRecord) and request_of(task) == asked
