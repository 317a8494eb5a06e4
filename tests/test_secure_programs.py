"""Secure sums through the real programs: their result, who may die where, and what the server has of it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.secure.messages import MASKED
from fedsplit.states.extra import PREFIX
from fedsplit.states.state_dict import map_file
from tests.programs import Programs, programs
from tests.test_five_programs import link_tests
from tests.test_secure_protocol import uniformity
from tests.training import TORCHRUN, Federation

MODEL = ("--threads", "1", "--workload", "tests.secure_digits:dying")


def federation_of(directory: Path, rule: str, *more: str, ranks: int = 3, rounds: int = 3, **settings: Any) -> Any:
    """The digits under a rule, with more of the server's flags."""
    directory.mkdir(exist_ok=True)
    link_tests(directory)
    flags = ("--rounds", str(rounds), "--min-clients", str(ranks), "--aggregate", rule, *more)
    settings.setdefault("model_flags", MODEL)
    return programs(directory, ranks=ranks, server_flags=flags, **settings)


def start_all(federation: Programs, options: dict[str, Sequence[str]]) -> None:
    for name in federation.names:
        federation.start(name, *options.get(name, ()))


def run(directory: Path, rule: str, *more: str, **settings: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Run to the end; returns the final state and the history."""
    with federation_of(directory, rule, *more, **settings) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        return dict(map_file(federation.final_state())), federation.history()


def assert_same(found: Path, expected: dict[str, torch.Tensor]) -> None:
    state = map_file(found)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What three rounds of three ranks come to."""
    return run(tmp_path_factory.mktemp("undisturbed") / "run", "secure(fedavg, threshold=2, range=4)")[0]


@pytest.mark.smoke
def test_the_five_programs_sum_securely_what_plain_averaging_comes_to(tmp_path: Path) -> None:
    rules = ("--aggregate", "features.*=median", "--aggregate", "classifier.3.*=local")
    settings: dict[str, Any] = {"ranks": 2, "rounds": 2}
    secure, lines = run(tmp_path / "secure", "classifier.1.*=secure(fedavg, range=4)", *rules, **settings)
    plain, plain_lines = run(tmp_path / "plain", "classifier.1.*=fedavg", *rules, **settings)
    assert secure.keys() == plain.keys() == {name for name in plain if not name.startswith("classifier.3")}
    # Medians of two are means; the sum has steps of 4 / 2^30.
    assert max(float((secure[name] - plain[name]).abs().max()) for name in plain) < 1e-4
    assert [line["accepted"] for line in lines] == [2, 2]
    assert lines[-1]["secure"] == lines[-1]["secure"] | {"keys": 2, "shares": 2, "masked": 2, "unmasked": 2}
    accuracies = [found[-1]["evaluate"]["accuracy"] for found in (lines, plain_lines)]
    assert abs(accuracies[0] - accuracies[1]) < 0.01


@pytest.mark.slow
def test_five_ranks_reach_the_accuracy_of_plain_averaging(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ranks": 5, "rounds": 4}
    secure, lines = run(tmp_path / "secure", "secure(fedavg, range=4)", "--payload-store", "none", **settings)
    plain, plain_lines = run(tmp_path / "plain", "fedavg", **settings)
    assert max(float((secure[name] - plain[name]).abs().max()) for name in plain) < 1e-3
    assert abs(lines[-1]["evaluate"]["accuracy"] - plain_lines[-1]["evaluate"]["accuracy"]) <= 0.005
    assert lines[-1]["evaluate"]["accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("when", ["1", "after-1", "2", "after-2", "3", "after-3"])
def test_a_trainer_that_is_killed_in_a_stage_and_started_again_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], when: str
) -> None:
    with federation_of(tmp_path, "secure(fedavg, threshold=2, range=4)") as federation:
        start_all(federation, {"model-3": ("--workload-option", f"die={when}")})
        federation.wait_until(lambda: (tmp_path / "died-3").exists())
        federation.wait(names=["model-3"])
        federation.start("model-3")
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert [line["accepted"] for line in federation.history()] == [3, 3, 3]
        assert_same(federation.final_state(), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("when", "accepted"), [("1", [3, 2, 2]), ("2", [3, 2, 2]), ("3", [3, 3, 2])])
def test_a_trainer_that_is_gone_for_good_costs_the_others_nothing(
    tmp_path: Path, when: str, accepted: list[int]
) -> None:
    rule = "secure(fedavg, threshold=2, range=4)"
    with federation_of(tmp_path, rule, client_flags=("--trainer-wait", "2")) as federation:
        others = [name for name in federation.names if name.startswith("model")]
        for name in others:
            federation.start(name, *(("--workload-option", f"die={when}") if name == "model-3" else ()))
        for name in others:
            federation.wait_for(name, "waiting for a client")
        for name in federation.names:
            if name not in others:
                federation.start(name)
        codes = federation.wait(names=[name for name in federation.names if name != "model-3"])
        assert set(codes.values()) == {0}, federation.tails()
        lines = federation.history()
    assert [line["accepted"] for line in lines] == accepted
    assert all(line["merged"] for line in lines)
    if when != "3":
        assert "did not come" in lines[1]["refused"]["3"]


@pytest.mark.slow
def test_below_the_threshold_the_state_stays_as_it_was_and_the_history_says_why(tmp_path: Path) -> None:
    rule = "secure(fedavg, threshold=3, range=4)"
    with federation_of(tmp_path, rule, rounds=2, client_flags=("--trainer-wait", "2")) as federation:
        others = [name for name in federation.names if name.startswith("model")]
        for name in others:
            federation.start(name, *(("--workload-option", "die=2") if name == "model-3" else ()))
        for name in others:
            federation.wait_for(name, "waiting for a client")
        for name in federation.names:
            if name not in others:
                federation.start(name)
        federation.wait(names=["server"])
        first, second = federation.history()
        states = sorted((federation.checkpoints / "server").glob("round-*/state.safetensors"))
    assert (first["merged"], second["merged"]) == (True, False)
    assert "2 ranks are left, at least 3 are needed" in second["refused"]["1"]
    assert states[-1].read_bytes() == states[-2].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["client-1", "server"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_client_or_the_server_that_is_killed_after_a_stage_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], name: str, stage: int
) -> None:
    with federation_of(tmp_path, "secure(fedavg, threshold=2, range=4)") as federation:
        start_all(federation, {"model-1": ("--workload-option", f"hold={stage}")})
        federation.wait_until((tmp_path / "held").exists)
        assert (federation.checkpoints / "rank-1" / "secure" / f"stage-{stage}.safetensors").exists()
        federation.kill(name)
        federation.start(name, *(("--resume",) if name == "server" else ()))
        federation.allow(2)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert_same(federation.final_state(), undisturbed)


def kill_before_the_end(federation: Programs, name: str, *flags: str) -> None:
    """Kill a program and start it again, unless the run is over: told of its end, it would wait for another one."""
    federation.kill("server", signal.SIGSTOP)
    if federation.rounds_finished() < 3:
        federation.kill(name)
        federation.start(name, *flags)
    if federation.processes["server"].poll() is None:
        federation.kill("server", signal.SIGCONT)


MASK = ("--mask-here",)
MASKING = {"client-1": MASK, "client-2": MASK}


@pytest.mark.slow
def test_masks_that_two_clients_make_give_the_same_bits_as_those_of_the_trainers(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    with federation_of(tmp_path, "secure(fedavg, threshold=2, range=4)") as federation:
        start_all(federation, MASKING)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert [line["accepted"] for line in federation.history()] == [3, 3, 3]
        assert_same(federation.final_state(), undisturbed)
        # The trainers had no part in it; what was kept of the rounds went with the run.
        made = [path.name for path in federation.checkpoints.glob("rank-*/secure")]
        assert len(made) == 1 and not list((federation.exchange / "masked").glob("*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_client_that_masks_and_is_killed_after_a_stage_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], stage: int
) -> None:
    with federation_of(tmp_path, "secure(fedavg, threshold=2, range=4)") as federation:
        # Rank 3 masks in its trainer, which is held in the same stage: the round is not over before it goes on.
        start_all(federation, {**MASKING, "model-3": ("--workload-option", f"hold={stage}")})
        federation.wait_until((tmp_path / "held").exists)
        asked = federation.exchange / "masked" / "rank-1" / f"stage-{stage}.safetensors"
        federation.wait_until(asked.exists)
        federation.kill("client-1")
        federation.start("client-1", *MASK)
        federation.allow(2)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert [line["accepted"] for line in federation.history()] == [3, 3, 3]
        assert_same(federation.final_state(), undisturbed)


@pytest.mark.slow
def test_a_client_that_masks_and_is_killed_while_its_trainer_trains_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    flags = ("--threads", "1", "--workload", "tests.held:digits")
    with federation_of(tmp_path, "secure(fedavg, threshold=2, range=4)", model_flags=flags) as federation:
        start_all(federation, MASKING)
        federation.wait_for("client-1", "train, round 1")
        federation.kill("client-1")
        federation.start("client-1", *MASK)
        federation.allow(3)
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert [line["accepted"] for line in federation.history()] == [3, 3, 3]
        assert_same(federation.final_state(), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model-1", "server"])
def test_a_trainer_or_the_server_that_is_killed_where_clients_mask_changes_nothing(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], name: str
) -> None:
    with federation_of(tmp_path, "secure(fedavg, threshold=2, range=4)") as federation:
        start_all(federation, MASKING)
        session = federation.exchange / "masked" / "rank-1" / "session.safetensors"
        federation.wait_until(lambda: session.exists() or federation.rounds_finished() == 3)
        kill_before_the_end(federation, name, *(("--resume",) if name == "server" else ()))
        assert set(federation.wait().values()) == {0}, federation.tails()
        assert_same(federation.final_state(), undisturbed)


@pytest.mark.slow
def test_a_client_that_masks_gives_a_server_nothing_openly(tmp_path: Path) -> None:
    with federation_of(tmp_path, "fedavg", ranks=2, rounds=1, client_flags=MASK) as federation:
        federation.start_all()
        assert federation.wait(names=["server"]) == {"server": 15}
        assert "asks for an update openly" in federation.history()[0]["refused"]["1"]


@dataclass
class OneOfTwoProcesses(Federation):
    """Rank 1 is trained by two processes, which know nothing of secure sums; rank 2 by one."""

    def command(self, name: str) -> list[str]:
        command = Programs.command(self, name)
        return [*TORCHRUN, *command[1:]] if name == "model-1" else command


def same_trainers(directory: Path, *flags: str, **options: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Run a round of two ranks of which rank 1 is in two processes; returns the final state and the history."""
    directory.mkdir()
    model_flags = ("--threads", "1", "--workload-option", "epochs=2")
    settings: dict[str, Any] = {"server_flags": ("--rounds", "1", *flags), "model_flags": model_flags}
    with programs(directory, OneOfTwoProcesses, **settings) as federation:
        start_all(federation, {"client-1": options.get("client", ())})
        assert set(federation.wait().values()) == {0}, federation.tails()
        return dict(map_file(federation.final_state())), federation.history()


@pytest.mark.slow
def test_a_client_masks_for_a_trainer_of_two_processes(tmp_path: Path) -> None:
    secure, lines = same_trainers(tmp_path / "secure", "--aggregate", "secure(fedavg, range=4)", client=MASK)
    plain, plain_lines = same_trainers(tmp_path / "plain")
    # The sum has steps of 4 / 2^30.
    assert secure.keys() == plain.keys()
    assert max(float((secure[name] - plain[name]).abs().max()) for name in plain) < 1e-6
    assert [line["accepted"] for line in lines] == [2]
    assert lines[0]["secure"]["unmasked"] == 2
    for one, other in zip(lines, plain_lines, strict=True):
        numbers = [[line["clients"][rank]["num_examples"] for rank in ("1", "2")] for line in (one, other)]
        assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_clients_mask_on_a_superlink_too(tmp_path: Path) -> None:
    engine = ("--engine", "superlink")
    settings: dict[str, Any] = {"ranks": 2, "rounds": 1, "forked": False, "client_flags": (*engine, *MASK)}
    rule = "secure(fedavg, range=4)"
    with federation_of(tmp_path / "superlink", rule, *engine, **settings) as federation:
        federation.start_all()
        assert set(federation.wait().values()) == {0}, federation.tails()
        found, lines = dict(map_file(federation.final_state())), federation.history()
        assert not list(federation.checkpoints.glob("rank-*/secure"))
        assert not list((federation.exchange / "masked").glob("*/*"))
    expected, _ = run(tmp_path / "embedded", rule, ranks=2, rounds=1)
    assert [line["accepted"] for line in lines] == [2]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_what_the_store_holds_of_secure_parts_is_as_even_as_random_bytes(tmp_path: Path) -> None:
    flags = (*MODEL, "--workload-option", "seeded=true")
    rule = ("features.*=secure(fedavg, range=4)", "--aggregate", "classifier.1.*=secure(fedavg, range=9)")
    spied = ("--aggregate", "classifier.3.*=tests.secure_digits:keep_store")
    run(tmp_path, *rule, *spied, rounds=1, model_flags=flags)
    found = [map_file(path) for path in (tmp_path / "kept").iterdir()]
    masked = [state[PREFIX + MASKED] for state in found if PREFIX + MASKED in state]
    assert len(masked) == 3
    for vector in masked:
        # The masks are others in each run: one in millions is so uneven.
        assert uniformity(vector.numpy().tobytes()) > 1e-7
    # An update has nothing else of these parts, and the one whole state is what the round started from.
    summed = [state for state in found if any(name.startswith(("features", "classifier.1")) for name in state)]
    assert len(summed) == 1
    assert sum("classifier.3.bias" in state for state in found) == 4


@pytest.mark.smoke
def test_an_entry_out_of_range_is_named_and_nothing_is_clipped(tmp_path: Path) -> None:
    rule = "secure(fedavg, range=1e-6)"
    with federation_of(tmp_path, rule, ranks=2, rounds=1) as federation:
        federation.start_all()
        assert federation.wait(names=["server"]) == {"server": 15}
        (line,) = federation.history()
    assert line["merged"] is False
    assert "'classifier.1.bias' moved by" in line["refused"]["1"]
    assert "beyond the range of 1e-06" in line["refused"]["1"]


@pytest.mark.slow
def test_a_trainer_for_secure_sums_only_sends_nothing_openly(tmp_path: Path) -> None:
    flags = (*MODEL, "--secure-only")
    with federation_of(tmp_path, "fedavg", ranks=2, rounds=1, model_flags=flags) as federation:
        federation.start_all()
        assert federation.wait(names=["server"]) == {"server": 15}
        assert "secure sums only" in federation.history()[0]["refused"]["1"]
    run(tmp_path / "secure", "secure(fedavg, range=4)", ranks=2, rounds=1, model_flags=flags)
