"""A trainer that never stops training: the example's loop, its client played by the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.async_catch import GAMES, Simulation, judge, make_policy, serve
from fedsplit.states.state_dict import StateDict, own_state
from tests.test_trainer import bits
from tests.training import Client as Federation
from tests.training import wait_until


class Script:
    """The example, in a thread; its simulation can be looked at."""

    def __init__(self, games_per_answer: int = 2 * GAMES) -> None:
        self.policy = make_policy()
        self.simulation = Simulation(self.policy, 1)
        self._games = games_per_answer

    def serve(self, trainer: Any) -> None:
        with self.simulation:
            serve(trainer, self.simulation, judge, self._games)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def difference(first: StateDict, second: StateDict) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_the_trainer_trains_between_requests_and_answers_at_once(federation: Federation) -> None:
    script = Script(games_per_answer=30 * GAMES)
    with federation.script(script.serve, script.policy):
        first = federation.wait(federation.ask("train", 1, own_state(make_policy())))
        state = federation.state_of(first)
        wait_until(lambda: script.simulation.games >= first.num_examples + 50 * GAMES)
        result = federation.wait(federation.ask("train", 2, state))
        # 50 updates and more are in the answer.
        assert result.num_examples >= 50 * GAMES
        assert difference(federation.state_of(result), state) > 1e-3


def test_a_trainer_that_nobody_asks_pauses(federation: Federation) -> None:
    script = Script()
    with federation.script(script.serve, script.policy):
        state = own_state(make_policy())
        for server_round in (1, 2, 3):
            result = federation.wait(federation.ask("train", server_round, state))
            assert result.num_examples <= 4 * GAMES
            wait_until(lambda: script.simulation.games == script.simulation.most)
            state = federation.state_of(result)


def test_an_answer_waits_until_enough_was_learned_since_the_last(federation: Federation) -> None:
    script = Script(games_per_answer=30 * GAMES)
    with federation.script(script.serve, script.policy):
        state = own_state(make_policy())
        for server_round in (1, 2, 3):
            result = federation.wait(federation.ask("train", server_round, state))
            assert result.num_examples >= 30 * GAMES
            state = federation.state_of(result)


def test_what_was_learned_while_the_server_merged_is_put_on_top_of_the_global_state(federation: Federation) -> None:
    script = Script()
    with federation.script(script.serve, script.policy):
        first = federation.run("train", 1, own_state(make_policy()))
        merged = {name: tensor + 10 for name, tensor in first.items()}
        second = federation.run("train", 2, merged)
        learned = {name: second[name] - merged[name] for name in merged}
        # Neither lost (then it were 0) nor mistaken for the way to the global state (then it were about 10).
        assert 0 < max(tensor.abs().max().item() for tensor in learned.values()) < 5


def test_evaluation_does_not_touch_the_policy_in_training(federation: Federation) -> None:
    script = Script()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in own_state(make_policy()).items()}
    with federation.script(script.serve, script.policy):
        federation.run("train", 1, own_state(make_policy()))
        result = federation.wait(federation.ask("evaluate", 1, zeros))
        assert 0 <= result.metrics["caught"] <= 1
        assert all(tensor.abs().max() > 0 for tensor in own_state(script.policy).values())


def test_an_error_in_the_simulation_reaches_the_server(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ArithmeticError("the ball is gone")

    script = Script()
    with federation.script(script.serve, script.policy, fails=ArithmeticError):
        state = federation.run("train", 1, own_state(make_policy()))
        monkeypatch.setattr("examples.async_catch.play", broken)
        # It may have played enough games for the next answer before it broke.
        for server_round in (2, 3):
            result = federation.wait(federation.ask("train", server_round, state))
            if result.error:
                break
    assert result.error["message"] == "the ball is gone"
    assert bits(state)
