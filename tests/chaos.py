"""Kills and stops the programs at moments drawn by a seed, starts each again as a user would, and compares.

    python -m tests.chaos --faults 100 --seed 1
    python -m tests.chaos --faults 60 --buffer 1
    python -m tests.chaos --faults 60 --split-learning sfl-v2 --tail classifier.2

With ``--split-learning`` there is a sixth: the trainer of the upper part.

A fault is a SIGKILL of one program, of two to five at the same instant, or a SIGSTOP with a SIGCONT some seconds later;
every other of these catches the program while it holds the lock of the hand-off.

The final global state must be, bit for bit, that of plain loops that nobody disturbed, and the history must have every
round once. The workload is the digits: an optimizer with momentum and a generator that draws the order of the data,
both of which must come back as they were. With ``--buffer`` rounds are asynchronous, and every update and every
state must be that of plain loops which follow the journal of merges.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from fedsplit.aggregation.numeric import moved
from fedsplit.disk.digest import bytes_digest
from fedsplit.run.journal import read_journal
from fedsplit.split_learning.order import MODES
from fedsplit.states.state_dict import StateDict, encode, map_file
from fedsplit.workloads import WorkloadContext, create_workload
from tests.halves import whole
from tests.programs import Programs, programs
from tests.reference import federated_averaging, mean
from tests.six_programs import SixPrograms

# How long a program is left alone after one was killed; starting one takes seconds, a round a fraction of one.
SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 6.0
RESTART_AFTER_S = 1.0
STOPPED_SHARE = 0.3
# How many programs are killed at the same instant.
AT_ONCE = (1, 1, 1, 2, 3, 5)
# How long to try to catch a program with the lock, which it holds for microseconds.
CATCH_S = 3.0


@dataclass
class Outcome:
    """What was done to a federation, and what came of it."""

    kills: Counter[str] = field(default_factory=Counter)
    at_once: Counter[int] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    stops_with_lock: int = 0
    seconds: float = 0.0
    rounds_at_fault: list[int] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """How many faults there were; programs killed at once are one."""
        return self.at_once.total() + self.stops.total()


def disturb(federation: Programs, *, faults: int, seed: int, rounds: int, timeout_s: float,
            longest_pause_s: float = LONGEST_PAUSE_S) -> Outcome:  # fmt: skip
    """Start the programs, and kill and stop them at random until there were so many faults; then let them finish.

    A fault comes after a pause that is drawn, or as soon as its share of the rounds is over on a machine that is fast.
    The last trainings are held until all faults were made: no machine is so fast that the run is over before.

    Raises
    ------
    AssertionError
        If a program ends by itself with an error, or the run never ends.
    """
    draw, outcome, began = random.Random(seed), Outcome(), time.monotonic()
    # Each rank may have an update of an older state under way, which is a round of its own where rounds do not wait.
    federation.allow(rounds - federation.ranks)
    federation.start_all()
    restarts: dict[str, float] = {}
    stopped: dict[str, float] = {}
    next_fault = time.monotonic() + draw.uniform(SHORTEST_PAUSE_S, longest_pause_s)
    while True:
        now = time.monotonic()
        assert now - began < timeout_s, f"not over after {timeout_s} s, {outcome}\n{federation.tails()}"
        for name in [name for name, due in restarts.items() if now >= due]:
            del restarts[name]
            federation.start(name, *(["--resume"] if name == "server" else []))
        for name in [name for name, due in stopped.items() if now >= due]:
            del stopped[name]
            federation.kill(name, signal.SIGCONT)
        ended = {name: code for name, process in federation.processes.items() if (code := process.poll()) is not None}
        for name, code in ended.items():
            assert name in restarts or code == 0, f"{name} ended with {code}, {outcome}\n{federation.tails()}"
        if outcome.faults < faults:
            assert ended.get("server") != 0, f"the run was over after {outcome}, though its last trainings were held"
            finished = federation.rounds_finished()
            if now >= next_fault or finished > rounds * (outcome.faults + 1) / (faults + 1):
                alive = [name for name in federation.names if not {name} & {*restarts, *ended, *stopped}]
                outcome.rounds_at_fault.append(finished)
                if alive and draw.random() < STOPPED_SHARE:
                    name = draw.choice(alive)
                    stopped[name] = now + draw.uniform(SHORTEST_PAUSE_S, longest_pause_s)
                    outcome.stops_with_lock += _stop(federation, name, with_lock=draw.random() < 0.5)
                    outcome.stops[name] += 1
                elif alive:
                    together = draw.sample(alive, min(len(alive), draw.choice(AT_ONCE)))
                    for name in together:
                        # Sent to all before any is waited for.
                        federation.processes[name].kill()
                        restarts[name] = now + draw.uniform(0, RESTART_AFTER_S)
                    for name in together:
                        federation.kill(name)
                    outcome.kills.update(together)
                    outcome.at_once[len(together)] += 1
                next_fault = now + draw.uniform(SHORTEST_PAUSE_S, longest_pause_s)
        elif not stopped and not restarts:
            federation.allow(rounds)
            if "server" in ended:
                _let_everybody_hear_of_the_end(federation)
                break
        time.sleep(0.01)
    outcome.seconds = time.monotonic() - began
    return outcome


def _stop(federation: Programs, name: str, *, with_lock: bool) -> bool:
    """Stop a program, while it holds the lock of a hand-off if that is wanted; tells whether it does."""
    process = federation.processes[name]
    place = federation.place(name)
    tries_end = time.monotonic() + (CATCH_S if with_lock and place else 0.0)
    lock = federation.exchange / place / "handoff.lock"
    while True:
        process.send_signal(signal.SIGSTOP)
        # A signal to a busy process takes effect a little later: until then it may still let go of the lock.
        while process.poll() is None and not _is_stopped(process.pid):
            time.sleep(0.0001)
        holds = process.pid == lock_holder(lock)
        if holds or time.monotonic() >= tries_end:
            return holds
        process.send_signal(signal.SIGCONT)
        time.sleep(0.0005)


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def lock_holder(path: Path) -> int | None:
    """Return the process that holds the lock on a file, as Linux lists it."""
    try:
        inode = path.stat().st_ino
    except FileNotFoundError:
        return None
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if "->" not in fields and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            return int(fields[4])
    return None


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
    found = map_file(federation.final_state())
    if isinstance(federation, SixPrograms):
        expected, found = federation.unsplit(rounds), whole(found)
    else:
        expected = federated_averaging(
            lambda rank: create_workload(
                "digits", WorkloadContext(rank=rank, num_partitions=federation.ranks, seed=seed)
            ),
            ranks=federation.ranks, rounds=rounds,
        )  # fmt: skip
    assert set(found) == set(expected)
    assert json.loads((federation.final_state().parent / "manifest.json").read_bytes())["round"] == rounds
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"these entries are not what an undisturbed run gives: {different}"


def check_journal(federation: Programs, *, rounds: int, seed: int = 0) -> None:
    """Compare with plain loops in the order of the journal; raises AssertionError."""
    entries = read_journal(federation.checkpoints / "server" / "journal.jsonl")
    assert [entry["round"] for entry in entries] == list(range(rounds + 1))
    torch.set_num_threads(1)
    workloads: dict[str, Any] = {
        str(rank): create_workload("digits", WorkloadContext(rank=rank, num_partitions=federation.ranks, seed=seed))
        for rank in range(1, federation.ranks + 1)
    }
    states: list[StateDict] = [{name: t.clone() for name, t in workloads["1"].model.state_dict().items()}]
    made: dict[tuple[str, int], tuple[int, StateDict]] = {}
    for entry in entries[1:]:
        now, updates = states[-1], []
        for rank in entry["asked"]:
            workload = workloads[rank]
            workload.model.load_state_dict(now)
            task = SimpleNamespace(kind="train", config={}, should_stop=lambda: False)
            number = workload.train(task).num_examples
            made[rank, entry["round"] - 1] = number, {n: t.clone() for n, t in workload.model.state_dict().items()}
        for rank, update in sorted(entry["updates"].items(), key=lambda item: int(item[0])):
            # Taken out: nothing is merged twice.
            number, state = made.pop((rank, update["base_round"]))
            assert update["digest"] == digest(state), (
                f"round {entry['round']}: the update of rank {rank} has other bits"
            )
            weight, base = float((entry["round"] - update["base_round"]) ** -0.5), states[update["base_round"]]
            if weight != 1:
                state = {name: moved(now[name], base[name], tensor, weight) for name, tensor in state.items()}
            updates.append((number, state))
        states.append({name: mean([(n, state[name]) for n, state in updates]) for name in now} if updates else now)
        assert entry["state"] == digest(states[-1]), f"round {entry['round']}: the state has other bits"


def digest(state: StateDict) -> str:
    """Return the name that the server gives a state."""
    return bytes_digest(b"".join(encode(state)))


def run_chaos(directory: Path, kind: type[Programs] = Programs, *, faults: int, seed: int, rounds: int,
              timeout_s: float = 3000.0, longest_pause_s: float = LONGEST_PAUSE_S, buffer: int | None = None,
              more_flags: Sequence[str] = (), **settings: object) -> Outcome:  # fmt: skip
    """Disturb a federation in a directory and check what it came to."""
    flags = ("--rounds", str(rounds), *(("--buffer", str(buffer)) if buffer else ()), *more_flags)
    (directory / "tests").symlink_to(Path(__file__).parent)
    workload = "tests.held:cut_digits" if kind is SixPrograms else "tests.held:digits"
    settings["model_flags"] = ("--threads", "1", "--workload", workload)
    with programs(directory, kind, server_flags=flags, **settings) as federation:
        outcome = disturb(federation, faults=faults, seed=seed, rounds=rounds, timeout_s=timeout_s,
                          longest_pause_s=longest_pause_s)  # fmt: skip
        (check_journal if buffer else check)(federation, rounds=rounds)
    return outcome


def main() -> int:
    """Run the long version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--faults", type=int, default=100, help="faults in all, half of them with each place of the exchange"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--buffer", type=int, help="asynchronous rounds that merge so many updates (default: none)")
    parser.add_argument("--rounds", type=int, help="rounds (default: enough for the faults)")
    parser.add_argument("--split-learning", choices=MODES, help="cut the model (default: it is whole)")
    parser.add_argument("--tail", help="cut it a second time after this module: U-shaped")
    parser.add_argument("--upper-trainers", type=int, default=1, help="so many trainers of upper parts, under sfl-v1")
    arguments = parser.parse_args()
    faults = -(-arguments.faults // 2)
    # A merge of one update is half a round of two ranks.
    rounds = arguments.rounds or (25 if arguments.buffer else 10) * faults
    kind: type[Programs] = SixPrograms if arguments.split_learning else Programs
    cut = {"mode": arguments.split_learning, "tail": arguments.tail, "uppers": arguments.upper_trainers}
    settings = cut if arguments.split_learning else {}
    for seed, place in enumerate(("/dev/shm", None), start=arguments.seed):
        directory = Path(tempfile.mkdtemp(prefix="fedsplit-chaos-"))
        exchange = Path(tempfile.mkdtemp(prefix="fedsplit-chaos-", dir=place)) if place else None
        outcome = run_chaos(directory, kind, faults=faults, seed=seed, rounds=rounds, exchange_dir=exchange,
                            buffer=arguments.buffer, **settings)  # fmt: skip
        made = (
            f"{outcome.kills.total()} kills ({dict(outcome.kills)}, {dict(outcome.at_once)} by how many at once), "
            f"{outcome.stops.total()} stops ({dict(outcome.stops)}, {outcome.stops_with_lock} with the lock) "
            f"over {rounds} rounds"
        )
        result = "every merge as the journal says, bit for bit" if arguments.buffer else (
            "every round once, final state bit for bit as undisturbed"
        )  # fmt: skip
        print(f"exchange on {place or 'disk'}: {made} in {outcome.seconds:.0f} s: {result}", flush=True)
        for path in (directory, exchange):
            if path:
                shutil.rmtree(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
