"""Whether memory stays where it is: 2,000 rounds of 10 MB, and what each of the five programs has meanwhile.

    python -m benchmarks long             about five minutes on two cores
    python -m benchmarks --quick long     200 rounds

Looked at every second; the first fifth of the rounds is for warming up. What is judged is how much the median of the
last fifth is above the one of the second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from benchmarks.common import Federation, Figure, Options, Programs, scratch_directory, stamps

TOPIC = "long"
SIZE = 10_000_000
PROGRAMS = ("server", "client-1", "client-2", "model-1", "model-2")


def run(options: Options) -> list[Figure]:
    """Measure one run."""
    rounds = options.pick(2000, 200, 20)
    seen: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    with scratch_directory() as directory, Programs(directory) as programs:
        Federation(directory=directory, rounds=rounds, model_bytes=SIZE).start(programs)
        path, done = directory / "stamps-1", 0
        # The last rounds are left out: who has ended has no memory.
        while done < rounds - 2:
            programs.check()
            time.sleep(0.1 if rounds < 1000 else 1.0)
            done = len(stamps(path)) if path.exists() else 0
            if rounds // 5 < done < rounds - 2:
                for name, samples in seen.items():
                    samples.append(programs.all[name].now_bytes() / 1e6)
        programs.wait(timeout_s=120.0)
    return [
        Figure(topic=TOPIC, name=f"growth of {name} in {rounds} rounds of {SIZE / 1e6:g} MB", unit="%",
               samples=[growth(samples)], target=2.0, note=f"median {statistics.median(samples):.0f} MB")
        for name, samples in seen.items()
    ]  # fmt: skip


def growth(samples: Sequence[float]) -> float:
    """Return by how many per cent the last quarter of the samples is above the first, by their medians."""
    quarter = max(1, len(samples) // 4)
    return 100 * (statistics.median(samples[-quarter:]) / statistics.median(samples[:quarter]) - 1)
