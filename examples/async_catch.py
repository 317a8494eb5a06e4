"""A trainer that never stops training: reinforcement learning with its simulator in the loop, in a thread of its own.

    python server_main.py --rounds 20
    python client_main.py --rank 1
    python client_main.py --rank 2
    python examples/async_catch.py --rank 1
    python examples/async_catch.py --rank 2

Between the server's requests the simulator plays on, and a request is answered at once with the newest state. What was
learned while the server merged is not lost: the global state is taken over plus what this trainer has moved since its
last answer. docs/integrations.md says more.

The game is Catch: a ball falls through a grid of 8 rows, a paddle of one cell catches it or not. Balls fall in one half
of the grid for rank 1 and in the other for rank 2, and the evaluation asks for all of it: over 0.8 are caught. A paddle
that moves at random catches 0.17, and either trainer alone would learn to catch 0.5.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from fedsplit import Trainer

ROWS, COLUMNS, GAMES = 8, 6, 64


def make_policy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(ROWS * COLUMNS + COLUMNS, 64), nn.ReLU(), nn.Linear(64, 3))


def play(
    policy: nn.Module, columns: torch.Tensor, random: torch.Generator, *, greedy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Play a game for each ball; returns the summed log-probability of each game's moves, and whether it was won."""
    paddle = torch.full_like(columns, COLUMNS // 2)
    likelihood = torch.zeros(len(columns))
    for row in range(ROWS - 1):
        seen = torch.zeros(len(columns), ROWS * COLUMNS + COLUMNS)
        seen[torch.arange(len(columns)), row * COLUMNS + columns] = 1
        seen[torch.arange(len(columns)), ROWS * COLUMNS + paddle] = 1
        logits = policy(seen).log_softmax(dim=1)
        moves = logits.argmax(1) if greedy else torch.multinomial(logits.detach().exp(), 1, generator=random).squeeze(1)
        likelihood = likelihood + logits.gather(1, moves[:, None]).squeeze(1)
        paddle = (paddle + moves - 1).clamp(0, COLUMNS - 1)
    return likelihood, (paddle == columns).float()


class Simulation:
    """Trains a policy on and on, in a thread; others look at it, and move it, between two updates.

    Parameters
    ----------
    policy
        Trained in place.
    rank
        Which half of the grid the balls fall in.
    """

    def __init__(self, policy: nn.Module, rank: int) -> None:
        self.policy = policy
        self.between_updates = threading.Lock()
        self.games = 0
        # It pauses once it has played so many.
        self.most = 0
        self._optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
        self._random = torch.Generator().manual_seed(rank)
        self._first = 0 if rank % 2 else COLUMNS // 2
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="simulation")

    def __enter__(self) -> Simulation:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def wait_for(self, games: int) -> None:
        """Wait until so many games have been played in all; raises what ended the simulation, if it has."""
        self.most = max(self.most, games)
        while self._error is None and self.games < games:
            time.sleep(0.001)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._end.is_set():
                # Whoever plays far more than the others, or alone before the first request, learns its own half of the
                # grid by heart, and no mean with the others gets it out of that again.
                if self.games >= self.most:
                    time.sleep(0.001)
                    continue
                with self.between_updates:
                    self._update()
                time.sleep(0)  # a lock is not fair: let somebody who waits for it have it
        except BaseException as exc:  # noqa: BLE001  (shown to the server by who waits for this thread)
            self._error = exc

    def _update(self) -> None:
        columns = torch.randint(self._first, self._first + COLUMNS // 2, (GAMES,), generator=self._random)
        likelihood, won = play(self.policy, columns, self._random)
        loss = -(likelihood * (won - won.mean())).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.games += GAMES


def serve(trainer: Trainer, simulation: Simulation, judge: Callable[[nn.Module], float], games_per_answer: int) -> None:
    """Answer with the newest state, while the simulation goes on."""
    answered: dict[str, torch.Tensor] = {}
    games = 0
    for task in trainer:
        if task.kind == "evaluate":
            candidate = make_policy()  # not the one in training
            task.load_into(candidate)
            task.reply(loss=1 - judge(candidate), num_examples=1, metrics={"caught": judge(candidate)})
            continue
        simulation.wait_for(games + games_per_answer)
        with simulation.between_updates, torch.no_grad():
            for name, tensor in simulation.policy.state_dict().items():
                # The global state, and on top of it what was learned here since the last answer.
                learned = tensor - answered[name] if name in answered else 0
                tensor.copy_(task.state_dict[name] + learned)
            answered = {name: tensor.clone() for name, tensor in simulation.policy.state_dict().items()}
            since, games = simulation.games - games, simulation.games
            simulation.most = games + 2 * games_per_answer
        task.reply(answered, num_examples=since)


def judge(policy: nn.Module) -> float:
    """The share of balls that are caught, over the whole grid."""
    with torch.no_grad():
        _, won = play(policy, torch.arange(COLUMNS), torch.Generator(), greedy=True)
    return won.mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--exchange-dir", default="exchange")
    parser.add_argument("--checkpoint-dir", default="checkpoints")
    parser.add_argument(
        "--games", type=int, default=2000, help="at least so many between two answers, and at most twice"
    )
    parser.add_argument("--standalone", action="store_true", help="without a federation, for a debugger")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)

    policy = make_policy()
    with Trainer(
        arguments.rank, policy, exchange_dir=arguments.exchange_dir, checkpoint_dir=arguments.checkpoint_dir,
        standalone=arguments.standalone, standalone_rounds=15,
    ) as trainer, Simulation(policy, arguments.rank) as simulation:  # fmt: skip
        serve(trainer, simulation, judge, arguments.games)


if __name__ == "__main__":
    main()
