"""The checkpoint store: a round is there whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsplit.disk.checkpoints import BackgroundWriter, CheckpointStore
from fedsplit.disk.digest import file_digest
from fedsplit.errors import CheckpointError, FedSplitError
from tests.bounds import BOUND_S
from tests.handoffs import kill, names_in, running


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "server")


def save(
    store: CheckpointStore, server_round: int, run_id: str = "run", content: bytes | None = None, **options: Any
) -> None:
    content = b"state %d" % server_round if content is None else content
    store.save(
        run_id=run_id, server_round=server_round, files={"state": [content], "rules": [b"rule"]},
        metrics={"loss": 0.5}, info={"line": {"round": server_round}}, **options,
    )  # fmt: skip


def state_of(store: CheckpointStore, server_round: int) -> bytes:
    return store.read(server_round).path("state").read_bytes()


# -- writing and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [True, False])
def test_a_round_is_read_back_with_all_that_was_noted(store, durable):
    save(store, 3, durable=durable)
    store.flush(3)
    found = store.read(3)
    assert (found.run_id, found.server_round, found.files.keys()) == ("run", 3, {"state", "rules"})
    assert found.files["state"] == file_digest(found.path("state"))
    assert (found.metrics, found.info) == ({"loss": 0.5}, {"line": {"round": 3}})
    assert state_of(store, 3) == b"state 3" and found.directory.name == "round-000003"
    manifest = json.loads(found.path("manifest.json").read_text())
    assert manifest["files"]["state"].keys() == {"bytes", "sha256"}
    assert store.directory.stat().st_mode & 0o777 == 0o700


def test_the_manifest_is_written_last_and_everything_is_on_the_disk_before_the_round_appears(store, monkeypatch):
    import fedsplit.disk.files as module

    steps: list[str] = []
    for name in ("write_hashed", "write_json", "sync"):
        real = getattr(module, name)

        def noted(path: Path, *args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            steps.append(f"{_name} {path.name}")
            return _real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    real_rename = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.name == "round-000001":
            steps.append("appears")
        return real_rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(store, 1)
    appears = steps.index("appears")
    manifest = steps.index("write_json manifest.json")
    for name in ("state", "rules"):
        assert steps.index(f"write_hashed {name}") < steps.index(f"sync {name}") < manifest
    assert manifest < steps.index("sync .round-000001.tmp") < appears < steps.index("sync server")


def test_a_finished_file_is_linked_and_not_copied(store, tmp_path):
    source = tmp_path / "payload"
    source.write_bytes(b"content")
    store.save(run_id="run", server_round=1, files={"state": source})
    assert store.read(1).path("state").samefile(source)


def test_rounds_are_listed_in_order_and_only_with_a_manifest(store):
    assert store.rounds() == [] and store.newest() is None
    for server_round in (10, 2, 1_234_567):
        save(store, server_round)
    (store.directory / "round-000003").mkdir()
    (store.directory / "round-000003" / "state").write_bytes(b"half")
    (store.directory / "round-x").mkdir()
    (store.directory / "round-x" / "manifest.json").write_text("{}")
    assert store.rounds() == [2, 10, 1_234_567]
    assert store.newest().server_round == 1_234_567
    assert store.newest(before=10).server_round == 2 and store.newest(before=2) is None


def test_only_rounds_of_the_asked_run_are_found(store):
    save(store, 1, "old")
    save(store, 2, "new")
    assert store.newest(run_id="old").server_round == 1 and store.newest(run_id="other") is None


def test_a_round_that_is_done_again_replaces_the_one_before(store):
    save(store, 1, content=b"first")
    save(store, 1, content=b"second")
    assert state_of(store, 1) == b"second" and names_in(store.directory) == {"round-000001"}


def test_a_half_round_without_a_manifest_does_not_stand_in_the_way(store):
    save(store, 1)
    (store.round_directory(1) / "manifest.json").unlink()
    assert store.rounds() == []
    save(store, 1, content=b"again")
    assert state_of(store, 1) == b"again"


# -- what is not believed ------------------------------------------------------------------------------------------


def damage_flip(directory: Path) -> None:
    content = bytearray((directory / "state").read_bytes())
    content[0] ^= 1
    (directory / "state").write_bytes(content)


def damage_symlink(directory: Path) -> None:
    (directory / "state").rename(directory.parent / "elsewhere")
    (directory / "state").symlink_to(directory.parent / "elsewhere")


def rewrite(**changes: Any) -> Any:
    def damage(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DAMAGES: dict[str, tuple[Any, str]] = {
    "a flipped bit": (damage_flip, "state is corrupt"),
    "a truncated file": (lambda d: (d / "state").write_bytes(b"stat"), "state is corrupt"),
    "a missing file": (lambda d: (d / "rules").unlink(), "rules is missing"),
    "a symlink": (damage_symlink, "not the name of a file in it"),
    "a directory for a file": (lambda d: ((d / "state").unlink(), (d / "state").mkdir()), "state is missing"),
    "a torn manifest": (lambda d: (d / "manifest.json").write_text('{"schema"'), "no valid manifest"),
    "an empty manifest": (lambda d: (d / "manifest.json").write_text(""), "no valid manifest"),
    "a manifest that is a list": (lambda d: (d / "manifest.json").write_text("[]"), "no valid manifest"),
    "a deep manifest": (lambda d: (d / "manifest.json").write_text("[" * 100_000), "no valid manifest"),
    "a binary manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff\x00"), "no valid manifest"),
    "another schema": (rewrite(schema="fedsplit-checkpoint/2"), "schema 'fedsplit-checkpoint/2', expected"),
    "another round": (rewrite(round=7), "manifest of round 7"),
    "files that lead out": (rewrite(files={"../../x": {}}), "not the name of a file in it"),
    "files that are absolute": (rewrite(files={"/etc/passwd": {}}), "not the name of a file in it"),
    "files with a NUL": (rewrite(files={"a\x00": {}}), "no valid manifest|is missing"),
    "files that are a list": (rewrite(files=["state"]), "no valid manifest"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_corrupt_newest_round_is_named_and_the_one_before_is_used(store, caplog, damage, says):
    save(store, 1)
    save(store, 2)
    damage(store.round_directory(2))
    with pytest.raises(CheckpointError, match=says):
        store.read(2)
    with caplog.at_level(logging.WARNING, "fedsplit"):
        assert store.newest().server_round == 1
    assert "checkpoint passed over" in caplog.text and "round-000002" in caplog.text


def test_a_round_that_does_not_exist_is_an_error(store):
    with pytest.raises(CheckpointError, match="no valid manifest"):
        store.read(1)


def test_any_bytes_in_a_manifest_are_a_checkpoint_or_a_checkpoint_error(store):
    from tests.test_fuzz import mutate, mutate_value

    save(store, 1)
    path = store.round_directory(1) / "manifest.json"
    original = path.read_bytes()
    for seed in range(1_000):
        rng = random.Random(seed)
        value = mutate_value(rng, json.loads(original))
        content = mutate(rng, original) if seed % 2 else json.dumps(value).encode()
        path.unlink()  # a file that is cut and written anew is flushed at once by some disks: slow
        path.write_bytes(content)
        try:
            store.read(1)
        except CheckpointError:
            pass
        except Exception as exc:
            raise AssertionError(f"{content!r}: {exc!r}") from exc


# -- pruning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_fewer_than_two_are_not_kept(tmp_path, keep):
    with pytest.raises(CheckpointError, match="at least 2"):
        CheckpointStore(tmp_path, keep)


def test_the_newest_rounds_and_the_best_are_kept(store):
    for server_round in range(1, 8):
        save(store, server_round)
    store.prune(best=2)
    assert store.rounds() == [2, 5, 6, 7]
    store.prune()
    assert store.rounds() == [5, 6, 7]
    store.prune(best=6)
    assert names_in(store.directory) == {f"round-00000{n}" for n in (5, 6, 7)}


def test_a_removed_round_is_gone_and_removing_it_again_is_no_error(store):
    save(store, 1)
    store.remove(1)
    store.remove(1)
    assert names_in(store.directory) == set()
    store.flush(1)


# -- kills and full disks ------------------------------------------------------------------------------------------

SAVE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from fedsplit.disk.checkpoints import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
first = max(store.rounds(), default=0) + 1
store.begin_run("run")
print("saving", flush=True)
for number in itertools.count(first):
    for again in range(2):  # a round that is done again replaces the one before
        store.save(run_id="run", server_round=number, durable=number % 3 == 0,
                   files={"state": [b"%d" % number] * 50_000, "rules": [b"r" * 1000]})
    store.prune()
"""


@pytest.mark.slow
def test_kills_while_saving_and_pruning_leave_no_half_round_that_counts(store):
    rng, half, newest, kills = random.Random(5), 0, 0, 0
    # On a busy machine few rounds are saved between two kills: go on until enough kills hit a save.
    while kills < 8 or ((newest < 4 or half < 2) and kills < 50):
        kills += 1
        with running(SAVE_FOR_EVER, store.directory) as writer:
            time.sleep(rng.uniform(0.0, 0.02 * kills))
            kill(writer)
        rounds = store.rounds()
        for server_round in rounds:
            assert state_of(store, server_round) == b"%d" % server_round * 50_000
        # A round that was being replaced may be gone for a moment, never the ones before it.
        assert max(rounds, default=0) >= newest - 1
        newest = max([newest, *rounds])
        whole = {store.round_directory(server_round).name for server_round in rounds}
        left = names_in(store.directory) - whole
        assert all(name.startswith(".") for name in left), left
        half += bool(left)
    assert newest >= 4 and half >= 2, (newest, half, kills)
    store.begin_run("run")
    assert not any(name.startswith(".") for name in names_in(store.directory))


@pytest.mark.parametrize("at", range(1, 7))
def test_a_full_disk_is_an_error_that_names_the_last_good_round_which_is_intact(store, monkeypatch, at):
    save(store, 1)
    before = {path: path.read_bytes() for path in store.round_directory(1).iterdir()}
    calls = 0
    import fedsplit.disk.files

    real = fedsplit.disk.files.write_all

    def full(file: Any, chunk: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            real(file, memoryview(chunk)[: len(chunk) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, chunk)

    monkeypatch.setattr(fedsplit.disk.files, "write_all", full)
    if at <= 3:
        with pytest.raises(CheckpointError, match=r"round 2: no space left .*; the last good one is .*round-000001"):
            save(store, 2)
        assert store.rounds() == [1]
    else:
        save(store, 2)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in store.round_directory(1).iterdir()} == before
    assert not any(name.startswith(".") for name in names_in(store.directory))
    save(store, 2)
    assert state_of(store, 2) == b"state 2"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount:
        pytest.skip("only root can mount")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(path)], capture_output=True, timeout=BOUND_S
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True, timeout=BOUND_S)


def test_a_really_full_disk_is_the_same_error(small_disk):
    store = CheckpointStore(small_disk / "server")
    save(store, 1, content=b"x" * 400_000)
    with pytest.raises(CheckpointError, match=r"no space left .*; the last good one is .*round-000001"):
        save(store, 2, content=b"y" * 900_000)
    assert store.newest().server_round == 1 and names_in(store.directory) == {"round-000001"}
    save(store, 2, content=b"y" * 100_000)
    assert store.newest().server_round == 2


def test_a_directory_of_others_is_refused(store):
    store.directory.mkdir()
    store.directory.chmod(0o777)
    with pytest.raises(CheckpointError, match="can be written by others"):
        save(store, 1)


# -- runs ----------------------------------------------------------------------------------------------------------


def test_what_another_run_left_is_put_aside_and_not_deleted(store):
    save(store, 1, "old")
    save(store, 2, "old")
    save(store, 3, "new")
    (store.directory / ".round-000004.tmp").mkdir()
    (store.directory / ".run.json.77.tmp").write_text("half")
    store.begin_run("new")
    assert store.rounds() == [3]
    aside = store.directory / "old-runs" / "old"
    assert names_in(aside) == {"round-000001", "round-000002"}
    assert (aside / "round-000002" / "state").read_bytes() == b"state 2"
    assert names_in(store.directory) == {"round-000003", "old-runs"}


def test_a_run_that_is_put_aside_twice_is_there_twice(store):
    for content in (b"first", b"second"):
        save(store, 1, "old", content)
        store.begin_run("new")
    found = {path.read_bytes() for path in (store.directory / "old-runs" / "old").glob("round-*/state")}
    assert found == {b"first", b"second"}


@pytest.mark.parametrize("run_id", ["../../elsewhere", "/etc", "", "a/b", "a\x00b", 7, None])
def test_the_name_of_a_run_never_leads_out_of_the_directory(store, tmp_path, run_id):
    save(store, 1)
    rewrite(run_id=run_id)(store.round_directory(1))
    store.begin_run("new")
    assert store.rounds() == []
    assert [path.name for path in (store.directory / "old-runs").glob("*/round-*")] == ["round-000001"]
    assert names_in(tmp_path) == {"server"}


def test_a_round_with_a_mangled_manifest_is_put_aside_too(store):
    save(store, 1)
    (store.round_directory(1) / "manifest.json").write_text("[" * 100_000)
    store.begin_run("new")
    assert names_in(store.directory / "old-runs") == {"unknown"}


def test_files_that_are_not_there_are_not_put_aside(store, tmp_path):
    store.begin_run("new")
    store.put_aside("old", store.directory / "run.json")
    assert names_in(store.directory / "old-runs" / "old") == set()


# -- the writer beside the rounds ----------------------------------------------------------------------------------


def test_jobs_run_one_after_the_other_beside_the_caller():
    writer, order, go = BackgroundWriter(), [], threading.Event()

    def first() -> None:
        assert go.wait(BOUND_S)
        order.append("first")

    writer.submit(first)
    assert order == []
    go.set()
    writer.submit(lambda: order.append("second"))
    writer.close()
    assert order == ["first", "second"]


@pytest.mark.parametrize("notice", ["submit", "wait", "close"])
def test_a_job_that_failed_is_told_at_the_next_occasion_and_once(notice):
    writer = BackgroundWriter()

    def fail() -> None:
        raise CheckpointError("the disk is full")

    writer.submit(fail)
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.submit(lambda: None) if notice == "submit" else getattr(writer, notice)()
    writer.close()


def test_a_check_tells_of_a_failure_and_does_not_wait_for_a_running_job():
    writer, go = BackgroundWriter(), threading.Event()

    def slow() -> None:
        assert go.wait(BOUND_S)
        raise CheckpointError("too late")

    writer.check()
    writer.submit(slow)
    writer.check()
    go.set()
    with pytest.raises(CheckpointError, match="too late"):
        for _ in range(2_000):
            writer.check()
            time.sleep(0.005)
    writer.close()


def test_a_round_that_does_not_reach_the_disk_is_a_checkpoint_error(store, monkeypatch):
    save(store, 1, durable=False)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(FedSplitError, match="did not reach the disk") as caught:
        store.flush(1)
    assert isinstance(caught.value, CheckpointError)
