"""Kills the five programs with SIGKILL at moments drawn by a seed, starts each again as a user would, and compares.

    python -m tests.chaos --kills 100 --seed 1

The final global state must be, bit for bit, that of plain loops that nobody disturbed, and the history must have every
round once. The workload is the digits: an optimizer with momentum and a generator that draws the order of the data,
both of which must come back as they were.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedsplit.states.state_dict import map_file
from fedsplit.workloads import WorkloadContext, create_workload
from tests.programs import Programs, programs
from tests.reference import federated_averaging

# How long a program is left alone after one was killed; starting one takes seconds, a round a fraction of one.
SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 6.0
RESTART_AFTER_S = 1.0


@dataclass
class Outcome:
    """What was done to a federation, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    rounds_at_kill: list[int] = field(default_factory=list)


def disturb(federation: Programs, *, kills: int, seed: int, timeout_s: float) -> Outcome:
    """Start the programs and kill them at random until so many were killed; then let them finish.

    Raises
    ------
    AssertionError
        If a program ends by itself with an error, the run is over before all kills were made, or it never ends.
    """
    draw, outcome, began = random.Random(seed), Outcome(), time.monotonic()
    federation.start_all()
    restarts: dict[str, float] = {}
    next_kill = time.monotonic() + draw.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S)
    while True:
        now = time.monotonic()
        assert now - began < timeout_s, f"not over after {timeout_s} s, {outcome}\n{federation.tails()}"
        for name in [name for name, due in restarts.items() if now >= due]:
            del restarts[name]
            federation.start(name, *(["--resume"] if name == "server" else []))
        ended = {name: code for name, process in federation.processes.items() if (code := process.poll()) is not None}
        for name, code in ended.items():
            assert name in restarts or code == 0, f"{name} ended with {code}, {outcome}\n{federation.tails()}"
        if sum(outcome.kills.values()) < kills:
            assert ended.get("server") != 0, f"the run was over after {outcome}: give it more rounds"
            if now >= next_kill:
                alive = [name for name in federation.names if name not in restarts and name not in ended]
                if alive:
                    name = draw.choice(alive)
                    federation.kill(name)
                    outcome.kills[name] += 1
                    outcome.rounds_at_kill.append(len(federation.history()))
                    restarts[name] = now + draw.uniform(0, RESTART_AFTER_S)
                next_kill = now + draw.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S)
        elif not restarts and "server" in ended:
            _let_everybody_hear_of_the_end(federation)
            break
        time.sleep(0.01)
    outcome.seconds = time.monotonic() - began
    return outcome


def _let_everybody_hear_of_the_end(federation: Programs) -> None:
    """What was killed on its way out, having heard of the end, learns of it from programs started once more."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and any(process.poll() is None for process in federation.processes.values()):
        time.sleep(0.05)
    if any(federation.processes[name].poll() is None for name in federation.names):
        federation.start("server", "--resume")
        for name in federation.names:
            if name.startswith("client") and federation.processes[name].poll() is not None:
                federation.start(name)
    codes = federation.wait()
    assert set(codes.values()) == {0}, f"{codes}\n{federation.tails()}"


def check(federation: Programs, *, rounds: int, seed: int = 0) -> None:
    """Compare with plain loops; raises AssertionError."""
    assert [line["round"] for line in federation.history()] == list(range(1, rounds + 1))
    torch.set_num_threads(1)

    def make_workload(rank: int) -> object:
        return create_workload("digits", WorkloadContext(rank=rank, num_partitions=federation.ranks, seed=seed))

    expected = federated_averaging(make_workload, ranks=federation.ranks, rounds=rounds)
    found = map_file(federation.final_state())
    assert json.loads((federation.final_state().parent / "manifest.json").read_bytes())["round"] == rounds
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"these entries are not what an undisturbed run gives: {different}"


def run_chaos(directory: Path, *, kills: int, seed: int, rounds: int, exchange_dir: Path | None = None,
              timeout_s: float = 3000.0) -> Outcome:  # fmt: skip
    """Disturb a federation in a directory and check what it came to."""
    with programs(directory, server_flags=("--rounds", str(rounds)), exchange_dir=exchange_dir) as federation:
        outcome = disturb(federation, kills=kills, seed=seed, timeout_s=timeout_s)
        check(federation, rounds=rounds)
    return outcome


def main() -> int:
    """Run the long version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=100, help="SIGKILLs in all, half of them with each place of the exchange"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="rounds (default: enough for the kills)")
    arguments = parser.parse_args()
    kills = -(-arguments.kills // 2)
    rounds = arguments.rounds or 10 * kills
    for seed, place in enumerate(("/dev/shm", None), start=arguments.seed):
        directory = Path(tempfile.mkdtemp(prefix="fedsplit-chaos-"))
        exchange = Path(tempfile.mkdtemp(prefix="fedsplit-chaos-", dir=place)) if place else None
        outcome = run_chaos(directory, kills=kills, seed=seed, rounds=rounds, exchange_dir=exchange)
        made = f"{sum(outcome.kills.values())} kills ({dict(outcome.kills)}) over {rounds} rounds"
        result = "every round once, final state bit for bit as undisturbed"
        print(f"exchange on {place or 'disk'}: {made} in {outcome.seconds:.0f} s: {result}", flush=True)
        for path in (directory, exchange):
            if path:
                shutil.rmtree(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
