"""``--wire`` in a federation: who holds which state, what is carried over a kill, real programs to the same bits."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from fedsplit import Task, Trainer
from fedsplit.codecs.held import Held
from fedsplit.codecs.packed import describe, pack, unpack
from fedsplit.codecs.spec import check_installed, parse_wire
from fedsplit.disk.files import write_chunks
from fedsplit.errors import MissingPackageError, UsageError
from fedsplit.exchange.client_side import ClientSide, Source
from fedsplit.exchange.directory import Exchange
from fedsplit.exchange.records import Request, ResultRecord
from fedsplit.server.settings import ServerSettings
from fedsplit.split_learning.uppers import Uppers
from fedsplit.states.state_dict import StateDict, decode, encode, map_file
from fedsplit.workloads import WorkloadContext, create_workload
from tests.bounds import BOUND_S
from tests.chaos import run_chaos
from tests.programs import Programs, programs
from tests.reference import federated_averaging
from tests.test_five_programs import link_tests
from tests.test_house import loaded_with

torch.set_num_threads(1)
WIRE = ("delta+int8+zstd",)


def payload(state: StateDict) -> bytes:
    return b"".join(encode(state))


def digest(state: StateDict) -> str:
    return hashlib.sha256(payload(state)).hexdigest()


def state_of(number: float) -> StateDict:
    return {"weight": torch.full((300,), number), "count": torch.tensor(int(number))}


def short(new: StateDict, base: StateDict, wire: tuple[str, ...] = ("delta+zstd",), made: str | None = None) -> bytes:
    """Return what a server sends to a rank that holds the base."""
    packed = pack(new, parse_wire(wire), base=base, digest=digest(base), carried={})
    assert packed is not None
    return payload(packed.entries(made or digest(packed.state)))


def unpacked(entries: StateDict, base: StateDict) -> StateDict:
    """Return what an update says, or a part of it, as the server reads it."""
    description = describe(entries, "the update")
    assert description is not None
    return unpack(entries, description, base, extra_bytes=0, where="the update")


class Place:
    """A directory with what a trainer holds, and payloads of tasks as they come."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.again()

    def again(self) -> None:
        """Start as a new process does."""
        self.held = Held(self.directory / "held")

    def take(self, content: bytes) -> bool:
        path = self.directory / f"task-{hashlib.sha256(content).hexdigest()}.safetensors"
        write_chunks(path, [content])
        return self.held.take(path, hashlib.sha256(content).hexdigest())

    def files(self) -> list[str]:
        return [path.name for path in (self.directory / "held").iterdir()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_state_is_put_together_from_the_one_before_also_by_a_new_process(place: Place) -> None:
    first, second, third = map(state_of, (1.5, 2.5, 3.5))
    assert place.take(payload(first)) and place.held.digest == digest(first)
    assert place.take(short(second, first)) and place.held.digest == digest(second)
    place.again()
    # The task that has no answer yet, and then the next one.
    assert place.take(short(second, first)) and payload(place.held.state()) == payload(second)
    place.again()
    assert place.take(short(third, second)) and payload(place.held.state()) == payload(third)
    assert place.files() == [digest(third)], "one state is kept, not all of them"


def test_what_differs_from_a_state_that_is_not_held_is_not_taken_and_the_whole_is(place: Place) -> None:
    first, second, third = map(state_of, (1, 2, 3))
    assert not place.take(short(second, first)), "a fresh trainer"
    assert place.take(payload(first))
    assert not place.take(short(third, second)), "one that missed a round"
    assert place.held.digest is None
    assert place.take(payload(third)) and place.held.digest == digest(third)


def test_a_state_that_was_damaged_or_does_not_come_out_as_it_must_is_not_trained_from(place: Place) -> None:
    first, second = state_of(1), state_of(2)
    assert place.take(payload(first))
    assert not place.take(short(second, first, made="0" * 64))
    assert place.take(payload(first))
    place.again()
    kept = place.directory / "held" / digest(first)
    content = bytearray(kept.read_bytes())
    kept.unlink()
    content[-1] ^= 1
    kept.write_bytes(content)
    assert not place.take(short(second, first))


# -- a trainer, whose client is the test -------------------------------------------------------------------------------


class Federation:
    """The client and the server of one rank: asks, and reads what comes back as the server does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.exchange = Exchange(directory / "exchange", 1)
        self.side = ClientSide(self.exchange)
        self.state = {"weight": torch.zeros(4, 100), "bias": torch.zeros(4)}
        # Of an update that may come in parts: which one is asked for.
        self.step: int | None = None
        # The rounds that were trained.
        self.trainings: list[int] = []

    def ask(self, server_round: int, content: bytes | None = None, kind: str = "train") -> ResultRecord:
        content = content or payload(self.state)
        request = Request(
            run_id="run", kind=kind, server_round=server_round, total_rounds=9, wire=WIRE, step=self.step
        )  # fmt: skip
        source = Source(bytes=len(content), content=content)
        version = self.side.offer(request, hashlib.sha256(content).hexdigest(), lambda _: source)
        assert version is not None
        done = threading.Event()
        for _ in range(int(BOUND_S * 100)):
            if result := self.side.result(version):
                return result
            done.wait(0.01)
        raise AssertionError("no answer came")

    def update(self, result: ResultRecord) -> tuple[int, StateDict]:
        """Return the length of an update and what it says."""
        assert result.payload
        content = (self.exchange.directory / result.payload.file).read_bytes()
        return len(content), unpacked(decode(content), self.state)

    @contextmanager
    def trainer(self, state: str = "keep") -> Iterator[None]:
        """A process of the trainer's, as far as it is one: it ends with the block and leaves only its files."""
        failures: list[BaseException] = []

        def train() -> None:
            try:
                layer = torch.nn.Linear(100, 4)
                with Trainer(
                    1, layer, exchange_dir=self.directory / "exchange", checkpoint_dir=self.directory / "checkpoints",
                    state=state,  # type: ignore[arg-type]
                ) as trainer:  # fmt: skip
                    for task in trainer:
                        task.load_into(layer)
                        if task.kind == "evaluate":
                            task.reply(loss=0.5, num_examples=3)
                            continue
                        self.trainings.append(task.server_round)
                        generator = torch.Generator().manual_seed(task.server_round)
                        with torch.no_grad():
                            layer.weight += 0.01 * torch.randn(4, 100, generator=generator)
                        self.reply(task, layer)
            except BaseException as exc:  # noqa: BLE001  (raised again in the test's thread)
                failures.append(exc)

        thread = threading.Thread(target=train)
        thread.start()
        try:
            yield
        finally:
            self.side.finish("run", "stopped")
            thread.join(BOUND_S)
        assert not thread.is_alive() and not failures, failures

    def reply(self, task: Task, layer: torch.nn.Module) -> None:
        """Answer a training, as a script does."""
        task.reply(layer, num_examples=3)

    def next_rounds(self, rounds: range) -> None:
        for server_round in rounds:
            _, self.state = self.update(self.ask(server_round))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Callable[[str], Federation]]:
    with ExitStack() as stack:

        def make(name: str) -> Federation:
            federation = Federation(tmp_path / name)
            stack.enter_context(federation.exchange.hold("client"))
            return federation

        yield make


def test_what_an_update_lacks_goes_on_in_the_next_one_also_in_a_new_process(
    client: Callable[[str], Federation],
) -> None:
    ends = []
    for name, sessions in (("one", (range(1, 6),)), ("three", (range(1, 2), range(2, 5), range(5, 6)))):
        federation = client(name)
        for rounds in sessions:
            with federation.trainer():
                federation.next_rounds(rounds)
        ends.append(payload(federation.state))
    assert ends[0] == ends[1]
    true = sum(0.01 * torch.randn(4, 100, generator=torch.Generator().manual_seed(seed)) for seed in range(1, 6))
    lacking = (federation.state["weight"] - true).norm() / (0.01 * 20)
    assert 0 < lacking < 0.06, "what five rounds lack is what one loses"


def test_with_state_reset_nothing_is_carried_over(client: Callable[[str], Federation]) -> None:
    ends = {}
    for state in ("keep", "reset"):
        federation = client(state)
        with federation.trainer(state):
            federation.next_rounds(range(1, 4))
        ends[state] = payload(federation.state)
    expected = Federation(Path()).state
    for server_round in range(1, 4):
        step = 0.01 * torch.randn(4, 100, generator=torch.Generator().manual_seed(server_round))
        goal = {**expected, "weight": expected["weight"] + step}
        packed = pack(goal, parse_wire(WIRE), base=expected, digest="", carried={})
        assert packed
        expected = packed.state
    assert ends["reset"] == payload(expected) != ends["keep"]


def test_a_trainer_says_what_it_holds_and_asks_for_the_whole_where_it_lacks_the_state_before(
    client: Callable[[str], Federation],
) -> None:
    federation = client("asks")
    with federation.trainer():
        result = federation.ask(1)
        assert result.holds == digest(federation.state)
        before, (size, federation.state) = federation.state, federation.update(result)
        assert size < 0.5 * len(payload(before))
        content = short(federation.state, before)
        result = federation.ask(2, content)
        assert (result.status, result.holds) == ("ok", digest(federation.state))
        federation.update(result)
        result = federation.ask(3, short(before, {name: tensor + 1 for name, tensor in before.items()}))
        assert (result.status, result.holds, result.payload) == ("again", None, None)
        result = federation.ask(3)
        assert (result.status, result.holds) == ("ok", digest(federation.state))


def test_an_evaluation_says_what_is_held_too_and_sends_no_state(client: Callable[[str], Federation]) -> None:
    federation = client("evaluates")
    with federation.trainer():
        result = federation.ask(1, kind="evaluate")
        assert (result.holds, result.payload) == (digest(federation.state), None)


# -- what is refused at the start --------------------------------------------------------------------------------------


def test_split_learning_and_secure_sums_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--split-learning cannot go with --wire"):
        Uppers(ServerSettings(wire=("zstd",)), "sfl-v1", tmp_path)
    with pytest.raises(UsageError, match="--wire cannot go with secure"):
        ServerSettings(wire=("zstd",), aggregate=("secure(fedavg, range=1.0)",))


def test_a_relay_loads_nothing_that_packs() -> None:
    loaded = loaded_with("fedsplit.client.relay")
    assert "fedsplit.exchange.client_side" in loaded
    assert not any(name.startswith("fedsplit.codecs") or name in ("torch", "zstandard") for name in loaded)


def test_where_the_package_that_packs_is_missing_a_server_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.codecs.spec.find_spec", lambda name: None)
    check_installed(("delta+int8",))
    with pytest.raises(MissingPackageError, match=r"--wire zstd needs zstandard.*pip install 'fedsplit\[wire\]'"):
        check_installed(("delta+int8+zstd",))


def test_a_value_of_the_flag_is_checked_with_the_flags_and_survives_a_run_config() -> None:
    with pytest.raises(UsageError, match="--wire gzip: unknown codec"):
        ServerSettings(wire=("gzip",))
    settings = ServerSettings(wire=("body.*=delta+top-k(fraction=0.01)+int8", "zstd"))
    assert ServerSettings.from_run_config(settings.to_run_config()).wire == settings.wire


# -- real programs -----------------------------------------------------------------------------------------------------


def digits(rank: int) -> object:
    return create_workload("digits", WorkloadContext(rank=rank, num_partitions=2, seed=0))


def flags(rounds: int, *wire: str) -> tuple[str, ...]:
    return ("--rounds", str(rounds), "--payload-store", "none", *(f"--wire={each}" for each in wire))


def held(
    directory: Path, rounds: int, *wire: str, workload: str = "tests.held:digits"
) -> AbstractContextManager[Programs]:
    """A federation on the digits whose trainings the test lets end; see `tests.held`."""
    directory.mkdir(exist_ok=True)
    link_tests(directory)
    model_flags = ("--threads", "1", "--workload", workload)
    return programs(directory, server_flags=flags(rounds, *wire), model_flags=model_flags)


def finished(federation: Programs) -> bytes:
    assert set(federation.wait().values()) == {0}, federation.tails()
    return federation.final_state().read_bytes()


def wire_of(federation: Programs) -> list[dict[str, int]]:
    return [line["wire"] for line in federation.history()]  # type: ignore[misc]


@pytest.mark.smoke
def test_five_programs_that_lose_nothing_come_to_the_bits_of_plain_loops_with_fewer_bytes(tmp_path: Path) -> None:
    with programs(tmp_path, server_flags=flags(3, "delta+zstd")) as federation:
        federation.start_all()
        finished(federation)
        found = map_file(federation.final_state())
        first, *others = wire_of(federation)
        assert "wire: *: 8 entries" in federation.log("server") and "nothing is lost" in federation.log("server")
    expected = federated_averaging(digits, ranks=2, rounds=3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # At first the whole, then what has changed.
    for line in (first, *others):
        assert 0 < line["received"] < 0.95 * line["received_plain"]
    for line in others:
        assert 0 < line["sent"] < 0.95 * line["sent_plain"]


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["tests.held:digits", "tests.in_parts:digits"])
@pytest.mark.parametrize("wire", ["delta+zstd", "delta+int8+zstd"])
def test_killed_programs_change_no_bit(tmp_path: Path, wire: str, workload: str) -> None:
    ends = []
    for name in ("undisturbed", "killed"):
        with held(tmp_path / name, 5, wire, workload=workload) as federation:
            federation.allow(5 if name == "undisturbed" else 2)
            federation.start_all()
            if name == "killed":
                federation.wait_until(lambda: federation.rounds_finished() >= 2)
                federation.kill("model-1")
                federation.start("model-1")
                federation.allow(3)
                federation.wait_until(lambda: federation.rounds_finished() >= 3)
                for program, *flags_again in (("server", "--resume"), ("client-1",), ("model-2",)):
                    federation.kill(program)
                    federation.start(program, *flags_again)
                federation.allow(5)
            ends.append(finished(federation))
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_ten_kills_change_nothing_where_states_travel_as_differences(tmp_path: Path) -> None:
    run_chaos(
        tmp_path,
        faults=10,
        seed=3,
        rounds=40,
        longest_pause_s=3.0,
        more_flags=("--payload-store=none", "--wire=delta+zstd"),
    )


@pytest.mark.slow
def test_a_rank_that_lost_its_directory_gets_the_whole_and_goes_on(tmp_path: Path) -> None:
    with held(tmp_path, 5, "delta+zstd") as federation:
        federation.allow(2)
        federation.start_all()
        federation.wait_until(lambda: federation.rounds_finished() >= 2)
        federation.kill("model-2")
        shutil.rmtree(federation.checkpoints / "rank-2")
        federation.start("model-2")
        federation.allow(5)
        finished(federation)
        assert [line["accepted"] for line in federation.history()] == [2] * 5


@pytest.mark.slow
def test_payloads_by_reference_are_as_they_are_and_lose_nothing(tmp_path: Path) -> None:
    ends = []
    for name, wire in (("plain", ()), ("wire", ("--wire=delta+int8",))):
        (tmp_path / name).mkdir()
        with programs(tmp_path / name, server_flags=("--rounds", "3", *wire)) as federation:
            federation.start_all()
            ends.append(finished(federation))
            if wire:
                assert "which no codec changes" in federation.log("server")
                assert all(line["sent"] == 0 for line in wire_of(federation))
    assert ends[0] == ends[1]


COMBINED = {
    "a local part and a rule of its own": ("--aggregate=*.0.*=local", "--aggregate=median"),
    "differential privacy": ("--aggregate=dp(fedavg, clip=1.0, noise=0.1)",),
    "a Flower strategy": ("--strategy=FedAdam(eta=0.01)",),
    "a buffer": ("--buffer=1",),
    "the first of a round": ("--merge-after=1",),
    "some of the ranks": ("--fraction-train=0.5",),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", COMBINED)
@pytest.mark.parametrize("wire", ["delta+zstd", "delta+int8+zstd"])
def test_codecs_go_with(tmp_path: Path, what: str, wire: str) -> None:
    with programs(tmp_path, server_flags=(*flags(4, wire), *COMBINED[what])) as federation:
        federation.start_all()
        finished(federation)
        lines = federation.history()
        assert all(not line["refused"] for line in lines), lines
        assert all(line["accepted"] for line in lines)
        assert sum(line["received"] for line in wire_of(federation)) < sum(
            line["received_plain"] for line in wire_of(federation)
        )


@pytest.mark.smoke
def test_a_pattern_without_entries_ends_the_run_before_its_first_round(tmp_path: Path) -> None:
    with programs(tmp_path, ranks=2, server_flags=flags(2, "nothing.*=int8")) as federation:
        federation.start_all()
        assert federation.wait(names=["server"]) == {"server": 2}
        assert "--wire nothing.*=int8: no entry of the state is left for 'nothing.*'" in federation.log("server")
