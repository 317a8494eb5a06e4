"""What each of examples/algorithms reaches on the digits: accuracy after so many rounds, and bytes a round.

Real programs, four ranks, the digits divided by Dirichlet(0.1) and (0.5), three seeds. Only where it is named: it is
72 runs of 20 s and more. The same as Markdown goes to ``benchmarks/results/algorithms.md``.

`accuracy` is measured on the test set that the ranks have in common, by each on its share; `own accuracy` on examples
that were held out from each rank's own part, which is what personalised methods are for.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.common import RESULTS, Figure, Options, history_of_run

TOPIC = "algorithms"
RANKS, ROUNDS = 4, 20


@dataclass(frozen=True)
class Algorithm:
    """A workload of examples/algorithms, the server's rules, and the workload's options."""

    name: str
    workload: str
    rules: Sequence[str] = ("fedavg",)
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """What the last round of a run reached, in percent, and what travels for one rank in one round, in bytes."""

    accuracy: float
    own_accuracy: float
    bytes_up: float
    bytes_down: float


HERE = "examples.algorithms"
ALGORITHMS = (
    Algorithm("FedAvg", "digits:Digits"),
    Algorithm("FedProx", "fedprox:FedProx"),
    Algorithm("SCAFFOLD", "scaffold:Scaffold", (f"{HERE}.scaffold:merge",)),
    Algorithm("FedDyn", "feddyn:FedDyn", (f"{HERE}.feddyn:merge",)),
    Algorithm("FedAvg, uneven work", "digits:Digits", options=("work=uneven",)),
    Algorithm("FedNova, uneven work", "fednova:FedNova", (f"{HERE}.fednova:merge",), ("work=uneven",)),
    Algorithm("Ditto", "ditto:Ditto"),
    Algorithm("FedAvg, BatchNorm", "fedbn:FedBN"),
    Algorithm("FedBN", "fedbn:FedBN", ("<*BatchNorm*>=local", "fedavg")),
    Algorithm("FedPer", "fedper:FedPer", ("classifier.*=local", "fedavg")),
    Algorithm("LG-FedAvg", "fedper:FedPer", ("features.*=local", "fedavg")),
    Algorithm("LoRA only", "lora:Lora", ("*lora_*=fedavg", "*=local")),
)


def run(options: Options) -> list[Figure]:
    """Measure."""
    alphas = (0.1, 0.5)[: options.pick(2, 2, 1)]
    seeds, rounds = range(options.pick(3, 1, 1)), options.pick(ROUNDS, ROUNDS, 2)
    # Seed by seed: on a machine that is busy for a while no algorithm is the only one to be late.
    outcomes: dict[tuple[str, float], list[Outcome]] = {}
    for seed in seeds:
        for alpha in alphas:
            for each in ALGORITHMS:
                outcomes.setdefault((each.name, alpha), []).append(_measure(each, alpha, seed, rounds))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "algorithms.md").write_text(markdown(outcomes))
    return [_figure(name, alpha, found) for (name, alpha), found in outcomes.items()]


def _measure(algorithm: Algorithm, alpha: float, seed: int, rounds: int) -> Outcome:
    options = (*algorithm.options, "partition=dirichlet", f"alpha={alpha}")
    lines, bytes_down = history_of_run(
        "--ranks", str(RANKS), "--rounds", str(rounds), "--seed", str(seed), "--evaluate-every", str(rounds),
        "--workload", f"{HERE}.{algorithm.workload}", *(f"--aggregate={rule}" for rule in algorithm.rules),
        *(f"--workload-option={option}" for option in options),
    )  # fmt: skip
    found, sent = lines[-1]["evaluate"], [row["bytes"] for row in lines[-1]["clients"].values()]
    return Outcome(
        accuracy=100 * found["accuracy"], own_accuracy=100 * found["own_accuracy"],
        bytes_up=statistics.mean(sent), bytes_down=bytes_down,
    )  # fmt: skip


def markdown(outcomes: Mapping[tuple[str, float], Sequence[Outcome]]) -> str:
    """Return the table for docs/algorithms.md: a line for each algorithm, two columns for each alpha."""
    alphas = list(dict.fromkeys(alpha for _, alpha in outcomes))
    heads = [f"{what}, alpha {alpha:g}" for alpha in alphas for what in ("accuracy", "own accuracy")]
    rows = [["algorithm", *heads, "up", "down"], ["---"] * (len(heads) + 3)]
    for name in dict.fromkeys(name for name, _ in outcomes):
        cells = []
        for alpha in alphas:
            found = outcomes[name, alpha]
            cells += [_shown([each.accuracy for each in found]), _shown([each.own_accuracy for each in found])]
        rows.append([name, *cells, f"{found[0].bytes_up / 1e3:.1f} kB", f"{found[0].bytes_down / 1e3:.1f} kB"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shown(samples: Sequence[float]) -> str:
    """Return mean and deviation, as of a sample; a single run has none."""
    deviation = f" ± {statistics.stdev(samples):.1f}" if len(samples) > 1 else ""
    return f"{statistics.mean(samples):.1f}{deviation}"


def _figure(name: str, alpha: float, found: Sequence[Outcome]) -> Figure:
    note = (
        f"mean {_shown([each.accuracy for each in found])}; own {_shown([each.own_accuracy for each in found])}; "
        f"a rank's round: {found[0].bytes_up / 1e3:.1f} kB up, {found[0].bytes_down / 1e3:.1f} down"
    )
    samples = [each.accuracy for each in found]
    return Figure(topic=TOPIC, name=f"{name}, alpha {alpha:g}", unit="%", samples=samples, note=note)
