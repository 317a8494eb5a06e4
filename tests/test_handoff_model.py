"""The hand-off explored exhaustively: each interleaving of a client, a trainer, a server and kills, up to a depth.

The steps are the real `ClientSide` and `TrainerSide` on a real directory, not a drawing of them. A *world* is the
content of that directory, what each process has in memory, and which mishaps have happened; from each world every step
is taken, and equal worlds are visited once (breadth first). The steps:

===============  ===================================================================================================
``ask``          the client offers what the server wants (`ClientSide.offer`)
``look``         the client looks for the answer (`ClientSide.result`); with it the server goes on in its plan
``cancel``       the server's deadline passed (`ClientSide.cancel`)
``stop``         the server was stopped and is resumed (`ClientSide.finish`; the plan goes on where it was)
``back``         the server died and was resumed from the checkpoint before: it asks for the previous task again
``begin``        the trainer looks for work (`TrainerSide.next`), and leaves if the run is over (`TrainerSide.leave`)
``answer``       the trainer answers what it worked on (`TrainerSide.answer`)
``kill …``       a process loses its memory between two steps; its next step is that of a new process
``mangle …``     ``task.json`` or ``result.json`` turns to garbage
===============  ===================================================================================================

Within ``ask``, ``cancel``, ``stop``, ``begin`` and ``answer`` there is a *point* before every reading of a record, and
before every write, link, removal and taking of the lock. At each point the process may be killed, and at each point
outside the lock the other process may take one whole step.

Checked in every world: (1) no result is taken for the answer to another task, and no version names two tasks; (2) what
has an answer is not begun again, and not offered anew while its task is the newest; (3) the versions in the records
only grow; (4) nothing is lost: left in peace, the plan comes to its end (checked in a fixed share of the worlds).

Covered: all such worlds within the `REACHES` below: so many steps with so many mishaps (a kill, a meeting in the middle
of a step, ``back``, ``stop``, ``cancel``, ``mangle``; each kind once). Not covered: more than one step of the other
process between two points, kills inside a single write (see test_files.py and test_handoff_kill.py), the loss of more
than one record, two clients or two trainers (excluded by the role locks, see test_exchange.py). By default the reach is
shorter (see `tests.depth`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsplit.disk import files
from fedsplit.errors import RecordError
from fedsplit.exchange import client_side, trainer_side
from fedsplit.exchange import directory as exchange_directory
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import FinishedRecord, PayloadRecord, Request, ResultRecord, TaskRecord, decode, encode
from fedsplit.exchange.trainer_side import TrainerSide
from tests.depth import EVERYTHING
from tests.handoffs import blob, digest_of

PLAN = [
    Request(run_id="run", kind=kind, server_round=server_round, total_rounds=2)
    for kind, server_round in (("initialize", 0), ("train", 1), ("evaluate", 1), ("train", 2))
]
# (steps, mishaps): wide over the first task and the change to the next, narrow to the end of the plan.
REACHES = [(5, 3), (7, 2), (16, 1)] if EVERYTHING else [(3, 3), (5, 2), (12, 1)]
LEAST_WORLDS = 500 if EVERYTHING else 150
MISHAPS = ("kill", "meet", "back", "stop", "cancel", "mangle")
PROGRESS_SHARE = 12


def trained(request: Request, start: str | None) -> bytes:
    """Return what a training yields: it depends on what was asked and where it started, and on nothing else."""
    return blob(f"{request.kind} {request.server_round} from {start}")


def starts() -> list[bytes | None]:
    """Return the state that each task of the plan starts from."""
    found: list[bytes | None] = []
    state: bytes | None = None
    for request in PLAN:
        found.append(state)
        if request.kind != "evaluate":
            state = trained(request, state and digest_of(state))
    return found


STARTS = starts()


def label(request: Request, digest: str | None) -> str:
    return f"{request.kind} {request.server_round} from {digest}"


LABELS = [label(request, start and digest_of(start)) for request, start in zip(PLAN, STARTS, strict=True)]


class Killed(BaseException):
    """The process dies here: nothing of the code under test may catch it."""


class ViolationError(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class World:
    """All there is to know at one moment."""

    files: tuple[tuple[str, bytes], ...] = ()
    index: int = 0  # the server: which task of the plan it wants
    version: int | None = None  # the client: what it waits for
    highest: int = 0  # the client: ClientSide._highest
    work: bytes | None = None  # the trainer: the record of the task it works on
    left: int = 0  # how many mishaps may still happen
    spent: tuple[str, ...] = ()  # and which have: each at most once
    named: tuple[tuple[int, str], ...] = ()  # which task each version was given to

    def afford(self, mishap: str) -> World | None:
        if mishap in self.spent or not self.left:
            return None
        return replace(self, left=self.left - 1, spent=tuple(sorted((*self.spent, mishap))))


CLIENT_STEPS = ("ask", "look", "cancel", "stop")
TRAINER_STEPS = ("begin", "answer")
OTHER_STEPS = ("back", "kill client", "kill trainer", "mangle task", "mangle result")


@dataclass
class Machine:
    """Takes steps in a directory."""

    root: Path
    client_class: type[ClientSide] = ClientSide
    trainer_class: type[TrainerSide] = TrainerSide
    files: dict[str, bytes] = field(default_factory=dict)
    world: World = World()
    locked: bool = False
    points: int = 0
    stop_at: int | None = None
    event: Callable[[], None] | None = None
    transitions: int = 0

    def __post_init__(self) -> None:
        # Without identities: by them two worlds with the same files would differ.
        self.exchange = Exchange(self.root, 1, "always")
        self.exchange.directory.mkdir(parents=True, mode=0o700)

    # -- the directory ---------------------------------------------------------------------------------------------

    def restore(self, world: World) -> None:
        wanted = dict(world.files)
        for name in self.files.keys() | wanted.keys():
            if self.files.get(name) != wanted.get(name):
                path = self.exchange.directory / name
                path.unlink(missing_ok=True)
                if name in wanted:
                    path.write_bytes(wanted[name])
        self.files, self.world = wanted, world

    def snapshot(self) -> None:
        self.files = {path.name: path.read_bytes() for path in sorted(self.exchange.directory.iterdir())}
        self.world = replace(self.world, files=tuple(self.files.items()))

    # -- points ----------------------------------------------------------------------------------------------------

    def point(self) -> None:
        """Be a place where something may happen in between."""
        self.points += 1
        if self.points == self.stop_at and self.event:
            event, self.event = self.event, None
            event()

    @contextmanager
    def handoff(self, _: Exchange) -> Iterator[None]:
        self.point()
        self.locked = True
        try:
            yield
        finally:
            self.locked = False

    # -- steps -----------------------------------------------------------------------------------------------------

    def take(self, step: str) -> None:
        self.transitions += 1
        getattr(self, step.replace(" ", "_"))()

    def ask(self) -> None:
        client, index = self.client(), self.world.index
        start = STARTS[index]
        kept = self.answered_version(index)

        def fetch(digest: str) -> Source | None:
            return None if start is None else Source(bytes=len(start), content=start)

        version = client.offer(PLAN[index], start and digest_of(start), fetch)
        if version is None:
            raise ViolationError("a state that is to be had was not taken")
        if kept and version != kept:
            raise ViolationError(f"{LABELS[index]} was answered under version {kept} and is asked anew as {version}")
        self.world = replace(self.world, version=version, highest=client._highest)

    def look(self) -> None:
        world = self.world
        if world.version is None:
            return
        try:
            result = self.client().result(world.version)
        except RecordError:
            return
        if result is None or result.status != "ok":
            return
        if result.metrics["of"] != LABELS[world.index]:
            raise ViolationError(f"{result.metrics['of']} was taken for the answer to {LABELS[world.index]}")
        if result.payload:
            content = (self.exchange.directory / result.payload.file).read_bytes()
            if content != trained(PLAN[world.index], STARTS[world.index] and digest_of(STARTS[world.index])):
                raise ViolationError(f"the payload of {LABELS[world.index]} is that of another task")
        self.world = replace(world, index=world.index + 1, version=None)

    def cancel(self) -> None:
        if self.world.version is not None:
            self.client().cancel(self.world.version)
            self.world = replace(self.world, version=None)

    def stop(self) -> None:
        client = self.client()
        client.finish("run", "stopped")
        self.world = replace(self.world, version=None, highest=client._highest)

    def back(self) -> None:
        self.world = replace(self.world, index=max(0, self.world.index - 1), version=None)

    def begin(self) -> None:
        trainer = self.trainer()
        try:
            found = trainer.next()
        except RecordError:
            return
        if isinstance(found, FinishedRecord):
            trainer.leave(found)
        elif found is not None:
            self.check_begun(found)
            self.world = replace(self.world, work=encode(found, "work"))

    def answer(self) -> None:
        if self.world.work is None:
            return
        task = decode(self.world.work, TaskRecord, "work")
        chunks = None if task.kind == "evaluate" else [trained(task, task.digest)]
        self.trainer().answer(task, chunks, num_examples=1, metrics={"of": label(task, task.digest)})
        self.world = replace(self.world, work=None)

    def kill_client(self) -> None:
        self.world = replace(self.world, version=None, highest=0)

    def kill_trainer(self) -> None:
        self.world = replace(self.world, work=None)

    def mangle_task(self) -> None:
        # A version whose record and client are both gone may be given again if it left no payload (initialize):
        # rule (1) then rests on the trainer, which compares the whole request before it answers.
        lost = read_task(self.files)
        named = tuple(pair for pair in self.world.named if lost is None or pair[0] != lost.version)
        self.world = replace(self.world, named=named)
        self.exchange.task_path.write_text("{ torn")

    def mangle_result(self) -> None:
        self.exchange.result_path.write_text("{ torn")

    def client(self) -> ClientSide:
        client = self.client_class(self.exchange)
        client._highest = self.world.highest
        return client

    def trainer(self) -> TrainerSide:
        return self.trainer_class(self.exchange)

    # -- invariants ------------------------------------------------------------------------------------------------

    def answered_version(self, index: int) -> int | None:
        """Return the version under which a task of the plan has its answer, if its task is still the newest."""
        if self.event is not None:  # something is going to happen in between
            return None
        task, result = read_task(self.files), read_result(self.files)
        if task is None or result is None or task.cancelled or task.version != result.version:
            return None
        asked = label(task, task.digest)
        whole = result.payload is None or len(self.files.get(result.payload.file, b"")) == result.payload.bytes
        return task.version if asked == LABELS[index] and whole else None

    def check_begun(self, task: TaskRecord) -> None:
        result = read_result(self.files) if self.event is None else None
        if result and result.version == task.version and result.status == "ok":
            raise ViolationError(f"version {task.version} has an answer and is begun again")

    def check(self, before: World) -> None:
        """Check what must hold of any two worlds that follow each other."""
        named = dict(self.world.named)
        for read in (read_task, read_result):
            old, new = read(dict(before.files)), read(self.files)
            if old and new and new.version < old.version:
                raise ViolationError(f"the version went back from {old.version} to {new.version}")
        task = read_task(self.files)
        if task:
            asked = label(task, task.digest)
            if named.setdefault(task.version, asked) != asked:
                raise ViolationError(f"version {task.version} names {asked} and named {named[task.version]}")
        self.world = replace(self.world, named=tuple(sorted(named.items())))

    def check_progress(self, world: World) -> None:
        """Check that without further harm the plan comes to its end."""
        self.restore(world)
        for _ in range(4 * len(PLAN) + 8):
            if self.world.index == len(PLAN):
                return
            for step in ("ask", "begin", "answer", "look"):
                if self.world.index < len(PLAN):
                    self.snapshot()
                    self.take(step)
        raise ViolationError(f"the plan stands still at {LABELS[self.world.index]}")

    # -- one step, with what may happen in it ----------------------------------------------------------------------

    def successors(self, world: World) -> Iterator[tuple[str, World]]:
        for step in (*CLIENT_STEPS, *TRAINER_STEPS, *OTHER_STEPS):
            name = step.split()[0]
            base = world.afford(name) if name in MISHAPS else world
            if base is None or (world.index == len(PLAN) and step in ("ask", "look", "cancel", "stop", "back")):
                continue
            points, after = self.run(base, step, None, None)
            yield step, after
            if step not in (*CLIENT_STEPS, *TRAINER_STEPS) or step == "look":
                continue
            others = TRAINER_STEPS if step in CLIENT_STEPS else CLIENT_STEPS
            for at in range(1, points + 1):
                if killed := base.afford("kill"):
                    yield f"{step}, killed at {at}", self.run(killed, step, at, None)[1]
                if met := base.afford("meet"):
                    for other in others:
                        paid = met.afford(other) if other in MISHAPS else met
                        if paid and not (other in ("ask", "look") and world.index == len(PLAN)):
                            yield f"{step}, at {at} {other}", self.run(paid, step, at, other)[1]

    def run(self, world: World, step: str, at: int | None, other: str | None) -> tuple[int, World]:
        """Take a step from a world; at a point be killed, or let the other process take a step."""
        self.restore(world)
        self.points, self.stop_at, self.locked = 0, at, False

        def die() -> None:
            raise Killed

        def meet() -> None:
            if not self.locked:  # else it waits for the lock, and its step comes after this one: another path
                assert other is not None
                before, self.stop_at = self.points, None
                self.take(other)
                self.points = before

        self.event = None if at is None else (die if other is None else meet)
        try:
            self.take(step)
        except Killed:
            self.locked = False
            (self.kill_client if step in CLIENT_STEPS else self.kill_trainer)()
        self.event = None
        self.snapshot()
        self.check(world)
        return self.points, self.world


def read_task(files: dict[str, bytes]) -> TaskRecord | None:
    try:
        return decode(files["task.json"], TaskRecord, "task")
    except (KeyError, RecordError):
        return None


def read_result(files: dict[str, bytes]) -> ResultRecord | None:
    try:
        return decode(files["result.json"], ResultRecord, "result")
    except (KeyError, RecordError):
        return None


@pytest.fixture
def make_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    """Give machines whose code under test has a point before everything it does to the directory."""
    current: list[Machine] = []
    directories: list[str] = []

    def with_point(real: Callable[..., Any]) -> Callable[..., Any]:
        def pointed(*args: Any, **kwargs: Any) -> Any:
            current[-1].point()
            return real(*args, **kwargs)

        return pointed

    names = ("write_chunks", "write_hashed", "link_or_copy", "remove")
    pointed = {name: with_point(getattr(files, name)) for name in names} | {"check_space": lambda *_: None}
    for module in (client_side, trainer_side, exchange_directory):
        monkeypatch.setattr(module, "files", SimpleNamespace(**{**vars(files), **pointed}))
    monkeypatch.setattr(Exchange, "_read", staticmethod(with_point(Exchange._read)))
    monkeypatch.setattr(Exchange, "remove_payloads", with_point(Exchange.remove_payloads))
    monkeypatch.setattr(Exchange, "handoff", lambda exchange: current[-1].handoff(exchange))

    def make(**classes: Any) -> Machine:
        shm = Path("/dev/shm")
        directories.append(tempfile.mkdtemp(prefix="fedsplit-model-", dir=shm if os.access(shm, os.W_OK) else None))
        current.append(Machine(Path(directories[-1]), **classes))
        return current[-1]

    yield make
    for directory in directories:
        shutil.rmtree(directory)


def explore(machine: Machine, depth: int, mishaps: int) -> dict[World, int]:
    """Visit every world that is at most ``depth`` steps away; raises ViolationError with the way that leads there."""
    first = World(left=mishaps)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    frontier, visited = [first], {first: 0}
    for level in range(1, depth + 1):
        following = []
        for world in frontier:
            try:
                for step, after in machine.successors(world):
                    if after not in visited:
                        visited[after] = level
                        came_from[after] = (world, step)
                        following.append(after)
            except ViolationError as exc:
                raise ViolationError(f"{exc}; after {way_to(world, came_from)}") from None
        frontier = following
    for count, world in enumerate(visited):
        if count % PROGRESS_SHARE == 0:
            try:
                machine.check_progress(world)
            except ViolationError as exc:
                raise ViolationError(f"{exc}; after {way_to(world, came_from)}") from None
    return visited


def way_to(world: World, came_from: dict[World, tuple[World, str] | None]) -> list[str]:
    steps = []
    while (arrow := came_from[world]) is not None:
        world, step = arrow
        steps.append(step)
    return steps[::-1]


@pytest.mark.parametrize(("depth", "mishaps"), REACHES)
def test_every_interleaving_to_the_depth_keeps_the_invariants(make_machine, caplog, depth, mishaps):
    caplog.set_level("CRITICAL", "fedsplit")
    machine = make_machine()
    visited = explore(machine, depth, mishaps)
    print(f"{len(visited):,} worlds, {machine.transitions:,} steps, depth {depth}, {mishaps} mishaps")
    # So that a change which makes the exploration run dry is seen.
    assert len(visited) > LEAST_WORLDS
    assert {world.spent for world in visited if world.left == 0} >= {tuple(sorted(MISHAPS[:mishaps]))}
    assert any(world.index >= depth // 6 and world.left == 0 for world in visited)


def test_left_in_peace_the_plan_is_done_with_one_version_a_task(make_machine):
    machine = make_machine()
    machine.check_progress(World())
    assert [read_task(machine.files).version, machine.world.index] == [len(PLAN), len(PLAN)]


# -- the exploration finds what it is there to find ----------------------------------------------------------------


class BelievesAtOnce(ClientSide):
    def result(self, version: int) -> ResultRecord | None:
        record = self.exchange.read_result()
        return record if record and record.version == version else None


class RecordBeforePayload(TrainerSide):
    def answer(self, task: TaskRecord, chunks: Any = None, **fields: Any) -> bool:
        payload = None
        if chunks is not None:
            content = b"".join(chunks)
            name = self.exchange.payload_path("result", task.version).name
            payload = PayloadRecord(file=name, bytes=len(content), digest=digest_of(content))
        record = ResultRecord(
            version=task.version, run_id=task.run_id, kind=task.kind, server_round=task.server_round,
            status="ok", payload=payload, **fields,
        )  # fmt: skip
        self.exchange.write(self.exchange.result_path, record)
        if chunks is not None:
            trainer_side.files.write_hashed(self.exchange.payload_path("result", task.version), [content])
        return True


class CountsInMemory(ClientSide):
    def _next_version(self, *_: Any) -> int:
        return self._highest + 1


class TakesAnyVersion(ClientSide):
    def result(self, version: int) -> ResultRecord | None:
        record = self.exchange.read_result()
        return record and super().result(record.version)


class AlwaysAsksAnew(ClientSide):
    def offer(self, request: Request, digest: str | None, fetch: Any) -> int | None:
        self.exchange.task_path.unlink(missing_ok=True)
        return super().offer(request, digest, fetch)


class ForgetsTheEnd(ClientSide):
    def _read_finished(self) -> None:
        return None


class ForgetsItsAnswers(TrainerSide):
    def next(self) -> TaskRecord | FinishedRecord | None:
        return self.exchange.read_task()


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ({"client_class": BelievesAtOnce, "trainer_class": RecordBeforePayload}, "No such file"),
        ({"client_class": CountsInMemory}, "version went back|names .* and named|was taken for the answer to"),
        ({"client_class": TakesAnyVersion}, "was taken for the answer to"),
        ({"client_class": AlwaysAsksAnew}, "is asked anew|version went back"),
        ({"client_class": ForgetsTheEnd}, "stands still"),
        ({"trainer_class": ForgetsItsAnswers}, "has an answer and is begun again"),
    ],
    ids=lambda value: "-".join(kind.__name__ for kind in value.values()) if isinstance(value, dict) else "",
)
def test_a_fault_put_into_the_protocol_is_found(make_machine, caplog, classes, says):
    caplog.set_level("CRITICAL", "fedsplit")
    machine = make_machine(**classes)
    with pytest.raises((ViolationError, FileNotFoundError), match=says):
        for depth in range(3, 9):
            explore(machine, depth, mishaps=1)
