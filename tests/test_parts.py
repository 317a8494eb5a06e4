"""Updates in parts, under ``--wire``: the same bits as in one, whoever is started again, and nothing half merged."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit import Task
from fedsplit.client.relay import Relay
from fedsplit.codecs import held
from fedsplit.codecs.packed import DESCRIPTION, in_parts, pack
from fedsplit.codecs.spec import parse_wire
from fedsplit.disk.payload_store import PayloadStore
from fedsplit.errors import RecordError, UsageError
from fedsplit.exchange.records import Request
from fedsplit.server.compression import Compression
from fedsplit.server.conversation import RoundContext
from fedsplit.server.parts import read_parts
from fedsplit.server.peer import Peer, Reply
from fedsplit.server.round import Task as ServerTask
from fedsplit.server.state import GlobalState
from fedsplit.states.header import PREFIX
from fedsplit.states.state_dict import StateDict, decode, map_file
from fedsplit.trainer import channel
from fedsplit.wire.answers import ResultPayload
from tests.bounds import BOUND_S
from tests.test_wire import WIRE, Federation, finished, payload, unpacked
from tests.test_wire import held as held_digits

# -- how a state is divided --------------------------------------------------------------------------------------------


def test_a_state_is_divided_in_its_order_and_what_is_tied_stays_together() -> None:
    head = torch.ones(100)
    state = {
        "a": torch.ones(100),
        "b": torch.ones(1),
        "c": head,
        "d": torch.ones(300),
        "tied": head,
        "e": torch.ones(1),
    }
    assert [list(part) for part in in_parts(state, 500)] == [["a", "b", "c", "tied"], ["d"], ["e"]]
    assert in_parts(state, float("inf")) == [state] and in_parts({}, 500) == [{}]


# -- the trainer, whose client is the test -----------------------------------------------------------------------------


class Asking(Federation):
    """Asks for the parts of an update as a server does."""

    def part(self, server_round: int, step: int) -> tuple[str, StateDict]:
        """Return the status of a part, and what it says."""
        self.step = step
        result = self.ask(server_round)
        assert result.num_examples == 3 or result.status == "again"
        return result.status, self.update(result)[1] if result.payload else {}

    def whole(self, server_round: int) -> StateDict:
        """Ask for all parts; returns the update."""
        found, status, step = StateDict(), "step", 0
        while status == "step":
            status, part = self.part(server_round, step)
            found, step = found | part, step + 1
        assert status == "ok"
        return found


@pytest.fixture
def asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Asking]]:
    monkeypatch.setattr(channel, "PART_BYTES", 1)
    with ExitStack() as stack:

        def make(name: str) -> Asking:
            federation = Asking(tmp_path / name)
            stack.enter_context(federation.exchange.hold("client"))
            return federation

        yield make


def test_parts_come_to_the_bits_of_the_whole_and_carry_over_the_same(
    asking: Callable[[str], Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, steps = [], []
    for name, part_bytes in (("parts", 1), ("whole", 1 << 30)):
        monkeypatch.setattr(channel, "PART_BYTES", part_bytes)
        federation = asking(name)
        with federation.trainer():
            for server_round in range(1, 4):
                federation.state = federation.whole(server_round)
        ends.append(payload(federation.state))
        steps.append(federation.step)
    assert ends[0] == ends[1] and steps == [1, 0]


def test_a_server_that_was_started_again_gets_the_parts_again_and_nothing_is_trained_twice(
    asking: Callable[[str], Asking],
) -> None:
    federation = asking("server")
    with federation.trainer():
        status, first = federation.part(1, 0)
        # In the middle of it, and after all of it.
        for _ in range(2):
            again, second = federation.part(1, 0)
            end, rest = federation.part(1, 1)
            assert (status, again, end) == ("step", "step", "ok") and payload(first) == payload(second)
        federation.state = first | rest
        federation.state = federation.whole(2)
    assert federation.trainings == [1, 2]
    true = sum(0.01 * torch.randn(4, 100, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert (federation.state["weight"] - true).norm() < 0.06 * 0.01 * 20


def test_a_trainer_that_was_started_again_says_so_and_trains_again_to_the_same_bits(
    asking: Callable[[str], Asking],
) -> None:
    federation = asking("trainer")
    with federation.trainer():
        _, first = federation.part(1, 0)
    with federation.trainer():
        assert federation.part(1, 1) == ("again", {})
        whole = federation.whole(1)
    assert payload(first) == payload({name: whole[name] for name in first})
    assert federation.trainings == [1, 1]


def test_a_task_that_is_given_up_in_the_middle_is_followed_by_the_next_one(asking: Callable[[str], Asking]) -> None:
    federation = asking("given up")
    with federation.trainer():
        federation.part(1, 0)
        federation.state = federation.whole(2)
        federation.step = None
        assert federation.ask(3, kind="evaluate").status == "ok"
    assert federation.trainings == [1, 2]


def test_nothing_of_the_script_stays_in_memory_once_all_is_given(asking: Callable[[str], Asking]) -> None:
    federation, given = asking("memory"), []

    def reply(task: Task, layer: torch.nn.Module) -> None:
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        given.append(weakref.ref(state["weight"]))
        task.reply(state, num_examples=3)

    federation.reply = reply  # type: ignore[method-assign]
    with federation.trainer():
        federation.whole(1)
        # Its answer to the evaluation is there once it has left the training.
        federation.step = None
        federation.ask(1, kind="evaluate")
        gc.collect()
        assert given[0]() is None


# -- a relay and the server's side of a rank ---------------------------------------------------------------------------


class OneRank:
    """Flower's proxy and the roster of a server with this one client."""

    cid = "1"

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.peer = Peer(self)  # type: ignore[arg-type]
        self.peer.rank = 1

    def fit(self, ins: Any, *_: object) -> Any:
        return self.relay.fit(ins)

    def get_parameters(self, ins: Any, *_: object) -> Any:
        return self.relay.get_parameters(ins)

    def wait_for_rank(self, *_: object) -> Peer:
        return self.peer


def served(federation: Asking, timeout_s: float) -> tuple[ServerTask, Callable[[Any, str], StateDict]]:
    """Return a server's training of the rank, and what reads its update."""
    store = PayloadStore(federation.directory / "store")
    store.open()
    state = GlobalState(store, None)
    state.put([payload(federation.state)])
    rank = OneRank(Relay(federation.exchange, trainer_wait_s=BOUND_S, use_store=False))
    context = RoundContext(
        roster=rank, store=store, remote=None, client_wait_s=BOUND_S, stop=threading.Event(), timeout_s=timeout_s,  # type: ignore[arg-type]
    )  # fmt: skip
    request = Request(run_id="run", kind="train", server_round=1, total_rounds=9, wire=WIRE, step=0)
    task = ServerTask(
        context=context, rank=1, request=request, state=state.payload, client=rank, base=state.entries, base_round=0,  # type: ignore[arg-type]
    )  # fmt: skip
    return task, Compression(WIRE, state, store).reader(task)


def test_who_trained_in_time_counts_though_its_turn_comes_after_the_deadline(asking: Callable[[str], Asking]) -> None:
    federation = asking("late")
    task, read = served(federation, BOUND_S)
    with federation.trainer():
        task.reply = task.until_done()
        task.context = replace(task.context, began=-BOUND_S)
        assert task.reply.status == "step" and not task.context.left_s
        assert read_parts(task, read, lambda: None).keys() == federation.state.keys()
    assert federation.trainings == [1]


def test_an_error_while_a_later_part_is_packed_is_told_and_nothing_is_trained_again(
    asking: Callable[[str], Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = asking("fails")
    task, read = served(federation, BOUND_S)
    pack_as_ever = held.pack

    def pack_or_fail(state: StateDict, *rest: Any, **named: Any) -> Any:
        if "bias" in state:
            raise MemoryError("no memory for the bias")
        return pack_as_ever(state, *rest, **named)

    def reply(task: Task, layer: torch.nn.Module) -> None:
        try:
            task.reply(layer, num_examples=3)
        except MemoryError as exc:
            task.fail(exc)

    monkeypatch.setattr(held, "pack", pack_or_fail)
    federation.reply = reply  # type: ignore[method-assign]
    with federation.trainer():
        task.reply = task.until_done()
        with pytest.raises(RecordError, match="no memory for the bias"):
            read_parts(task, read, lambda: None)
    assert federation.trainings == [1] and "MemoryError" in task.reply.traceback


@pytest.mark.parametrize("entry", [torch.ones(4).to_sparse(), torch.ones(4, device="meta"), "text"])
def test_what_cannot_travel_is_refused_by_name_before_any_part_is_given(
    asking: Callable[[str], Asking], entry: Any
) -> None:
    federation, said = asking("sparse"), []

    def reply(task: Task, layer: torch.nn.Module) -> None:
        try:
            task.reply({**layer.state_dict(), "bias": entry}, num_examples=3)
        except UsageError as exc:
            said.append(str(exc))
            task.fail(exc)

    federation.reply = reply  # type: ignore[method-assign]
    with federation.trainer():
        federation.step = 0
        assert federation.ask(1).status == "error"
    assert said and "'bias'" in said[0]


# -- the server --------------------------------------------------------------------------------------------------------

BASE = {f"w{n}": torch.full((100,), float(n)) for n in range(4)}
UPDATE = {name: tensor + 1 for name, tensor in BASE.items()}


@dataclass
class Asked:
    """A rank, as far as `read_parts` knows it, that gives prepared answers; None stands for a lost trainer."""

    answers: list[StateDict | str | None]
    rank: int = 1
    extra_bytes: int = 0
    base: StateDict = field(default_factory=lambda: BASE)
    update_bytes: int = 0
    plain_bytes: int = 0
    request: Request = field(default_factory=lambda: Request(
        run_id="run", kind="train", server_round=1, total_rounds=1, step=0, wire=WIRE
    ))  # fmt: skip
    payloads: list[str] = field(default_factory=list)
    asked: list[int | None] = field(default_factory=list)
    most_bytes: int = 10_000

    def __post_init__(self) -> None:
        self.reply = self.until_done()

    def until_done(self) -> Reply:
        self.asked.append(self.request.step)
        answer = self.answers.pop(0)
        if answer is None:
            return Reply(status="again")
        if isinstance(answer, str):
            return Reply(status="error", error={"message": answer})
        content = payload(answer)
        digest = f"{len(self.asked):064}"
        return Reply(
            status="step" if self.answers else "ok",
            payload=ResultPayload(digest=digest, bytes=len(content), via="inline"), blob=content,
        )  # fmt: skip

    def fetch(self, reply: Reply) -> bytes:
        if reply.failure or reply.blob is None:
            raise RecordError(str(reply.failure))
        return reply.blob

    def begin_transfer(self) -> None:
        """Go on: here no deadline is over."""

    def check_size(self, found: int) -> None:
        if found > self.most_bytes:
            raise RecordError("too large")


def packed_parts(count: int = 4) -> list[StateDict | str | None]:
    parts = []
    for part in in_parts(UPDATE, 400 * (4 // count)):
        found = pack(part, parse_wire(("zstd",)), base={n: BASE[n] for n in part}, digest="0" * 64, carried={})
        assert found
        parts.append(found.entries())
    return parts  # type: ignore[return-value]


def read(content: Any, where: str) -> StateDict:
    return unpacked(decode(content), BASE)


def gathered(task: Asked) -> StateDict:
    return read_parts(task, read, lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_are_put_together(count: int) -> None:
    task = Asked(packed_parts(count))
    found = gathered(task)
    assert payload(found) == payload(UPDATE) and task.reply.status == "ok"
    assert task.asked == list(range(count)) and len(task.payloads) == count
    assert task.update_bytes == sum(len(payload(part)) for part in packed_parts(count))  # type: ignore[arg-type]


def test_an_update_begins_anew_with_its_trainer_and_not_for_ever() -> None:
    task = Asked([*packed_parts()[:2], None, *packed_parts()])
    assert payload(gathered(task)) == payload(UPDATE)
    assert task.asked == [0, 1, 2, 0, 1, 2, 3]
    with pytest.raises(RecordError, match="began anew 10 times"):
        gathered(Asked([*[part for _ in range(11) for part in (*packed_parts()[:1], None)], {}]))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([*packed_parts()[:2], packed_parts()[0], *packed_parts()[2:]], "'w0' in two parts"),
        (
            [packed_parts()[0], {**packed_parts(1)[0], "fedsplit:packed": packed_parts()[1]["fedsplit:packed"]}, {}],
            "w1|stream",
        ),  # type: ignore[dict-item, index]
        ([*packed_parts()[:3], "out of memory"], "out of memory"),
        ([*packed_parts() * 20], "too large|two parts"),
    ],
    ids=["twice", "does not fit", "fails", "endless"],
)
def test_what_is_no_update_is_refused_and_no_thread_goes_on(answers: list[Any], says: str) -> None:
    threads = threading.active_count()
    with pytest.raises(RecordError, match=says):
        gathered(Asked(answers))
    assert threading.active_count() == threads


def test_entries_that_the_model_has_not_are_refused_at_once_and_extra_tensors_only_in_bounds() -> None:
    many: list[Any] = [packed_parts()[0], {"w9": torch.ones(1)}, *packed_parts()]
    with pytest.raises(RecordError, match="'w9', which the state that it starts from lacks"):
        read_parts(Asked(many), lambda content, _: decode_or_read(content), lambda: None)  # type: ignore[arg-type]
    for extra, says in (
        ({f"{PREFIX}{n}": torch.ones(1) for n in range(1_100)}, "1,100 entries"),
        ({f"{PREFIX}x": torch.ones(2_000_000)}, "8,000,000 bytes beside the model"),
    ):
        task = Asked([packed_parts()[0], extra, {}])
        task.most_bytes = 10**9
        with pytest.raises(RecordError, match=says):
            read_parts(task, lambda content, _: decode_or_read(content), lambda: None)  # type: ignore[arg-type]


def decode_or_read(content: bytes) -> StateDict:
    entries = decode(content)
    return read(content, "") if DESCRIPTION in entries else entries


def test_an_empty_part_is_refused() -> None:
    empty = pack({}, parse_wire(("zstd",)), base={}, digest="0" * 64, carried={})
    assert empty
    with pytest.raises(RecordError, match="has 0 entries"):
        gathered(Asked([packed_parts()[0], empty.entries(), packed_parts()[1]]))


# -- real programs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["delta+zstd", "delta+int8+zstd"])
def test_five_programs_with_small_parts_come_to_the_bits_of_those_with_whole_updates(tmp_path: Path, wire: str) -> None:
    ends, tasks = [], []
    for name in ("in_parts", "held"):
        with held_digits(tmp_path / name, 4, wire, workload=f"tests.{name}:digits") as federation:
            federation.allow(4)
            federation.start_all()
            finished(federation)
            ends.append(map_file(federation.final_state()))
            tasks.append(max(int(path.stem.split("-")[1]) for path in federation.exchange.glob("rank-1/task-*")))
    # Four rounds, in each at least two parts more.
    assert tasks[0] >= tasks[1] + 8
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
