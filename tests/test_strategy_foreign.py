"""Any Flower strategy as the whole of the server's: it chooses, configures and merges, and everything else stays."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import Code, EvaluateIns, FitIns, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg

from fedsplit.aggregation import Update
from fedsplit.aggregation.flower_arrays import Attributes, decode, encode
from fedsplit.errors import AggregationError, UsageError
from fedsplit.run.history import PartRow
from fedsplit.server.foreign import ForeignStrategy
from fedsplit.server.peer import RankProxy
from fedsplit.server.roster import Roster
from fedsplit.server.settings import ServerSettings
from fedsplit.server.strategy import refusal
from fedsplit.states.state_dict import StateDict, map_file
from fedsplit.states.state_dict import encode as encode_state
from tests.programs import programs
from tests.test_five_programs import link_tests

STATE = {
    "w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "half": torch.tensor([0.5, 0.25]).bfloat16(),
    "count": torch.tensor(7),
    "on": torch.tensor(True),
    "z": torch.tensor([1 + 2j]),
}


def payload(state: StateDict = STATE) -> Parameters:
    return Parameters([b"".join(encode_state(state))], "safetensors")


class Ranks(Roster):
    """A roster whose ranks are simply there."""

    def __init__(self, *ranks: int) -> None:
        super().__init__("run", None)
        self._rank_proxies = {rank: RankProxy(rank) for rank in ranks}
        self._peers = dict.fromkeys(ranks)  # type: ignore[assignment]


class Inner(FedAvg):
    """A strategy whose methods a test replaces by what it is made with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[str]] = {}


def strategy(inner: type = Inner, **settings: Any) -> ForeignStrategy:
    inner.__module__ = __name__
    globals()[inner.__name__] = inner
    made = ForeignStrategy(ServerSettings(strategy=f"{__name__}:{inner.__name__}", **settings))
    assert made.begin_run(STATE, {}) == [PartRow("*", 5, 16 + 4 + 8 + 1 + 8, f"{__name__}:{inner.__name__}")]
    return made


def merge(made: ForeignStrategy, updates: Sequence[Update], failures: Any = ()) -> tuple[Any, dict[str, Any]]:
    made.configure_fit(1, payload(), Ranks(1, 2))
    under_way = made.start_fit(1)
    for update in updates:
        under_way.add(update)
    return made.end_fit(1, under_way, [*failures])


def updates(*factors: int) -> list[Update]:
    return [
        Update(
            rank=rank,
            state_dict={
                **{key: STATE[key] * factor for key in ("w", "half", "z")},
                "count": STATE["count"] + factor, "on": torch.tensor(True),
            },
            num_examples=1, metrics={"loss": 1.0},
        )
        for rank, factor in enumerate(factors, start=1)
    ]  # fmt: skip


# -- what it sees, and what becomes of what it gives ----------------------------------------------------------------


def test_it_sees_arrays_in_the_order_of_the_state_dict_and_the_result_has_the_states_dtypes() -> None:
    class Looking(Inner):
        def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            arrays = parameters_to_ndarrays(parameters)
            assert [(a.dtype.name, a.shape) for a in arrays] == [
                ("float32", (2, 2)), ("float32", (2,)), ("int64", ()), ("bool", ()), ("float32", (1, 2)),
            ]  # fmt: skip
            return super().configure_fit(server_round, parameters, client_manager)

    state, _ = merge(strategy(Looking), updates(1, 3))
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in state.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in STATE.items()
    }
    assert torch.equal(state["w"], 2 * STATE["w"]) and torch.equal(state["half"], 2 * STATE["half"])
    assert (state["count"].item(), state["on"].item(), state["z"].tolist()) == (9, True, [2 + 4j])


def test_its_choice_of_clients_and_configuration_is_what_is_asked() -> None:
    class Half(Inner):
        def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            return [(client_manager.all()["2"], FitIns(parameters, {"lr": 0.5, "batch": 8}))]

        def configure_evaluate(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            return [(client_manager.all()["1"], EvaluateIns(parameters, {}))]

    made, parameters, roster = strategy(Half, train_config=(("lr", 0.1), ("epochs", 2))), payload(), Ranks(1, 2)
    ((client, ins),) = made.configure_fit(1, parameters, roster)
    assert (client.cid, ins.config) == ("2", {"lr": 0.5, "epochs": 2, "batch": 8})
    assert ins.parameters is parameters, "the state itself is not sent a second time"
    ((client, evaluate),) = made.configure_evaluate(1, parameters, roster)
    assert (client.cid, evaluate.config, evaluate.parameters is parameters) == ("1", {"lr": 0.1, "epochs": 2}, True)
    assert strategy(Half, evaluate_every=2).configure_evaluate(1, parameters, roster) == []


def test_parameters_of_its_own_become_a_payload_of_their_own() -> None:
    class Own(Inner):
        def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            own = ndarrays_to_parameters([np.ones_like(array) for array in parameters_to_ndarrays(parameters)])
            return [(client, FitIns(own, {})) for client in client_manager.all().values()]

    parameters = payload()
    (_, first), (_, second) = strategy(Own).configure_fit(1, parameters, Ranks(1, 2))
    assert first.parameters is second.parameters is not parameters
    expected = {key: torch.ones_like(STATE[key]) for key in ("w", "half", "count", "on")} | {
        "z": torch.tensor([1 + 1j])
    }
    assert first.parameters.tensors == payload({key: expected[key] for key in STATE}).tensors


def test_what_was_refused_is_among_its_failures_and_none_leaves_the_state() -> None:
    class Strict(Inner):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            assert [(client.cid, result.status.message) for client, result in failures] == [("2", "NaN")]
            return super().aggregate_fit(server_round, results, failures) if len(results) > 1 else (None, {"left": 1})

    failures = [(RankProxy(2), refusal("NaN"))]
    assert merge(strategy(Strict), updates(1), failures) == (None, {"left": 1})


@pytest.mark.parametrize(("arrays", "says"), [
    (lambda a: a[:-1], "aggregate_fit gave 4 arrays, expected 5"),
    (lambda a: [a[0][:1], *a[1:]], "aggregate_fit gave 'w' the shape (1, 2), expected (2, 2)"),
    (lambda a: [a[0] * np.nan, *a[1:]], "NaN or Inf in 'w'"),
    (lambda a: 1 / 0, "failed in aggregate_fit: ZeroDivisionError"),
])  # fmt: skip
def test_a_result_that_cannot_be_the_next_state_names_the_strategy(
    arrays: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Inner):
        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            return ndarrays_to_parameters(arrays(parameters_to_ndarrays(results[0][1].parameters))), {}

    with pytest.raises(AggregationError) as caught:
        merge(strategy(Broken), updates(1))
    assert "the strategy Broken" in str(caught.value) and says in str(caught.value)
    assert ("in aggregate_fit" in caplog.text) == ("failed" in says), "the traceback of the user's own code is shown"


@pytest.mark.parametrize(("instruction", "says"), [
    (lambda p, c: [(c["1"], FitIns(p, {"key": b"bytes"}))], "rank 1 the configuration 'key' of type bytes"),
    (lambda p, c: [(c["1"], FitIns(p, {}))] * 2, "each at most once; it chose 1, 1"),
    (lambda p, c: c["1"].fit(FitIns(p, {}), None, None), "the strategy asked rank 1 itself"),
])  # fmt: skip
def test_an_instruction_that_cannot_be_carried_out_is_refused(instruction: Any, says: str) -> None:
    class Odd(Inner):
        def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> Any:
            return instruction(parameters, client_manager.all())

    with pytest.raises(AggregationError, match=says):
        strategy(Odd).configure_fit(1, payload(), Ranks(1, 2))


def test_initial_values_come_from_the_strategy_and_names_and_dtypes_from_a_trainer() -> None:
    class Starting(Inner):
        def initialize_parameters(self, client_manager: Any) -> Parameters:
            shapes: list[tuple[int, ...]] = [(2, 2), (2,), (), (), (1, 2)]
            return ndarrays_to_parameters([np.full(shape, 3.0) for shape in shapes])

    given = strategy(Starting).initialize_parameters(Ranks(1))
    assert given is not None
    expected = {key: torch.full_like(STATE[key], 3) for key in STATE} | {"z": torch.tensor([3 + 3j])}
    assert given.tensors == payload(expected).tensors
    assert strategy().initialize_parameters(Ranks(1)) is None


# -- finding and making it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "says"), [
    ("FedNothing", "flwr.server.strategy has no class 'FedNothing'"),
    ("Strategy", "has no class 'Strategy' that implements"),
    ("no_such_module:Mine", "cannot import 'no_such_module'"),
    ("json:JSONDecoder", "json has no class 'JSONDecoder' that implements"),
    ("FedAvg(fraction_fitt=0.5)", "FedAvg refuses its parameters"),
    ("FedAdam(etta=0.5)", "FedAdam refuses its parameters"),
    ("DifferentialPrivacyServerSideFixedClipping(noise_multiplier=1.0)", "refuses its parameters"),
    ("FedAvg(fraction_fit=dp(fedavg))", "expected"),
])  # fmt: skip
def test_a_strategy_that_cannot_be_made_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        ForeignStrategy(ServerSettings(strategy=text))
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["FedAdam(eta=0.05)", "FedAvgM(server_momentum=0.9)", "FedYogi", "FedMedian"])
def test_flowers_own_are_made_with_the_state_that_a_trainer_gave(text: str) -> None:
    state = {"w": STATE["w"]}
    made = ForeignStrategy(ServerSettings(strategy=text, min_clients=2))
    made.begin_run(state, {})
    assert made.initialize_parameters(Ranks(1)) is None, "it is what the trainer gave"
    made.configure_fit(1, payload(state), Ranks(1, 2))
    under_way = made.start_fit(1)
    under_way.add(Update(rank=1, state_dict={"w": STATE["w"] * 2}, num_examples=1))
    merged, _ = made.end_fit(1, under_way, [])
    assert merged is not None and merged["w"].shape == (2, 2)


# -- what it remembers ------------------------------------------------------------------------------------------------


class Remembering(FedAvg):
    """Has attributes of every kind, and changes some of them in place."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate
        self.seen: dict[str, list[int]] = {"1": []}
        self.best: float | None = None
        self.moment = np.zeros(2, dtype=np.float64)
        self.kept: tuple[Any, ...] = ()
        self.rng = np.random.default_rng(0)


def test_attributes_survive_the_checkpoint_and_what_cannot_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = strategy(Remembering)
    assert "Remembering keeps what no checkpoint can hold: rng (Generator). After --resume" in caplog.text
    assert made.dump_memory() is None
    inner: Any = made.inner
    inner.seen["1"].append(3)
    inner.moment += 0.1
    inner.best, inner.kept = np.float64(0.3), (1, "two", torch.ones(2).bfloat16())
    inner.late = ndarrays_to_parameters([np.arange(3.0)])
    (tmp_path / "strategy.pt").write_bytes(made.dump_memory() or b"")
    other: Any = strategy(Remembering)
    other.load_memory(tmp_path / "strategy.pt")
    found = other.inner
    assert (found.seen, found.best, type(found.best)) == ({"1": [3]}, 0.3, np.float64)
    assert found.kept[:2] == (1, "two") and torch.equal(found.kept[2], torch.ones(2).bfloat16())
    assert np.array_equal(found.moment, inner.moment) and found.moment.dtype == np.float64
    assert parameters_to_ndarrays(found.late)[0].tolist() == [0.0, 1.0, 2.0]
    assert other.dump_memory() == made.dump_memory(), "a second resume finds the same"
    assert caplog.text.count("cannot") + caplog.text.count("no checkpoint") == 2, "once for each strategy"


def test_parameters_changed_on_resuming_take_effect_and_another_strategy_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = strategy(Remembering)
    made.inner.best = 1.0  # type: ignore[attr-defined]
    (tmp_path / "strategy.pt").write_bytes(made.dump_memory() or b"")
    resumed = ForeignStrategy(ServerSettings(strategy=f"{__name__}:Remembering(rate=0.25)"))
    resumed.begin_run(STATE, {})
    resumed.load_memory(tmp_path / "strategy.pt")
    assert (resumed.inner.rate, resumed.inner.best) == (0.25, 1.0)  # type: ignore[attr-defined]
    strategy(Inner).load_memory(tmp_path / "strategy.pt")
    assert "the run went on with strategy Remembering" in caplog.text


@pytest.mark.parametrize("value", [
    None, True, 3, 0.5, "text", [1, [2.0, None]], {"a": {1: (2,)}}, (), [], {}, np.int64(3), np.arange(4).reshape(2, 2),
])  # fmt: skip
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    found = decode(encode(value))
    assert type(found) is type(value)
    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array(["text"]), [lambda: None], Code.OK])
def test_a_value_that_cannot_be_kept_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        encode(value)


def test_a_list_that_refers_to_itself_is_none_to_keep() -> None:
    holder: Any = Inner()
    holder.loop = []
    holder.loop.append(holder.loop)
    assert Attributes(holder).changed() == ({}, {"loop": "list"})


# -- the client manager -----------------------------------------------------------------------------------------------


def test_the_client_manager_draws_the_same_clients_in_a_resumed_round_and_others_in_another() -> None:
    roster = Ranks(*range(1, 11))

    def drawn(server_round: int) -> list[str]:
        roster.begin_round(3, server_round)
        return [client.cid for client in roster.sample(4)]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(number)) for number in range(1, 10)}) > 5
    assert roster.sample(11, min_num_clients=1) == []
    assert roster.num_available() == 10
    assert all(cid == client.cid and client is roster.all()[cid] for cid, client in roster.all().items())

    class Odd:
        def select(self, client: Any) -> bool:
            return int(client.cid) % 2 == 1

    criterion: Any = Odd()
    assert {client.cid for client in roster.sample(5, criterion=criterion)} == {"1", "3", "5", "7", "9"}


# -- the programs -----------------------------------------------------------------------------------------------------


def note_flags(workload: str = "tests.strategies:noting") -> tuple[str, ...]:
    return ("--threads", "1", "--workload", workload)


@pytest.mark.slow
def test_a_strategy_of_ones_own_chooses_configures_and_merges_over_real_relays(tmp_path: Path) -> None:
    link_tests(tmp_path)
    flags = ("--rounds", "3", "--min-clients", "3", "--strategy", "tests.strategies:Choosing(step=0.5)")
    with programs(tmp_path, ranks=3, server_flags=flags, model_flags=note_flags()) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        lines: list[Any] = federation.history()
    told = {line for line in (tmp_path / "trained.log").read_text().splitlines() if " round " in line}
    assert told == {
        'rank 1 round 1 {"lr": 0.5} from 0', 'rank 2 round 1 {"lr": 1.0} from 0', 'rank 3 round 1 {"lr": 1.5} from 0',
        'rank 2 round 2 {"lr": 1.0} from 1', 'rank 3 round 2 {"lr": 1.5} from 1',
        'rank 1 round 3 {"lr": 0.5} from 2', 'rank 2 round 3 {"lr": 1.0} from 2', 'rank 3 round 3 {"lr": 1.5} from 2',
    }  # fmt: skip
    assert [(line["asked"], line["accepted"]) for line in lines] == [(3, 2), (2, 1), (3, 2)]
    assert [line["train"]["merged"] for line in lines] == [2, 1, 2]
    assert [line["central"] for line in lines] == [{"loss": 8.0 * n, "round": n} for n in (1, 2, 3)]
    assert [line["evaluate"] for line in lines] == [{"loss": 0.5, "evaluations": n} for n in (1, 2, 3)]
    asked, failed, _ = json.loads((tmp_path / "strategy.json").read_text())
    assert asked == {"1": [1, 3], "2": [1, 2, 3], "3": [1, 2, 3]}
    assert failed == ["3: ArithmeticError: rank 3 never can"] * 3


@pytest.mark.slow
def test_every_rank_can_be_given_parameters_of_its_own(tmp_path: Path) -> None:
    link_tests(tmp_path)
    flags = ("--rounds", "2", "--strategy", "tests.strategies:Personal", "--payload-store", "none")
    with programs(tmp_path, server_flags=flags, model_flags=note_flags()) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert torch.equal(map_file(federation.final_state())["count"], torch.full((8,), 16.0))
    told = {line.split(" from ")[1] for line in (tmp_path / "trained.log").read_text().splitlines() if " from " in line}
    assert told == {"10", "20"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedAdam(eta=0.05)", "tests.strategies:Choosing"])
def test_what_it_remembers_goes_on_after_the_server_was_killed(tmp_path: Path, name: str) -> None:
    ends = []
    for stops in (False, True):
        directory = tmp_path / f"stops-{stops}"
        directory.mkdir()
        link_tests(directory)
        model_flags = ("--threads", "1", "--workload", "tests.held:digits")
        server_flags = ("--rounds", "4", "--strategy", name)
        with programs(directory, server_flags=server_flags, model_flags=model_flags) as federation:
            federation.allow(2 if stops else 4)
            federation.start_all()
            if stops:
                federation.wait_until(lambda: len(federation.history()) >= 2)
                federation.kill("server", signal.SIGKILL)
                federation.start("server", "--resume")
                federation.allow(4)
            assert set(federation.wait().values()) == {0}, federation.tails()
            lines: list[Any] = federation.history()
            assert [line["round"] for line in lines] == [1, 2, 3, 4]
            ends.append((federation.final_state().read_bytes(), [line["evaluate"] for line in lines]))
    assert ends[0] == ends[1]
