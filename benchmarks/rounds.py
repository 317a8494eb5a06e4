"""What a round costs when training costs nothing: the five programs against Flower's in-process NumPyClient.

Both on Flower's embedded engine, two clients, an evaluation each round, the same number of bytes. A round is the time
from one call of the user's training code to its next call, as rank 1 sees it. Exchange, checkpoints and payload store
are on the RAM disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import Federation, Figure, Options, StockFederation, interleaved

TOPIC = "round"
SMALL, LARGE = 100_000, 100_000_000


def run(options: Options) -> list[Figure]:
    """Measure."""
    large = LARGE if not options.tiny else 5_000_000
    small_samples = _measure(SMALL, options.pick(40, 20, 6), options.pick(5, 3, 1))
    large_samples = _measure(large, options.pick(8, 6, 4), options.pick(5, 3, 1))
    return [*_figures(SMALL, small_samples), *_figures(large, large_samples)]


def _measure(size: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    def detached(store: str) -> Callable[[Path], Sequence[float]]:
        return lambda directory: Federation(
            directory=directory, rounds=rounds, model_bytes=size, store=store
        ).run()[0]  # fmt: skip

    def stock(directory: Path) -> Sequence[float]:
        return StockFederation(directory=directory, rounds=rounds, model_bytes=size).run()[0]

    return interleaved(repeats, {"stock": stock, "messages": detached("none"), "reference": detached("auto")})


def _figures(size: int, samples: dict[str, list[float]]) -> list[Figure]:
    label = f"{size / 1e6:g} MB"
    figures = []
    for side, name, ratio in (("messages", "bytes in messages", 0.12), ("reference", "by reference", 0.05)):
        small = size == SMALL
        figures.append(
            Figure(
                topic=TOPIC,
                name=f"detached round, {label}, {name}",
                unit="ms",
                samples=[1000 * s for s in samples[side]],
                peer="Flower in-process NumPyClient",
                peer_samples=[1000 * s for s in samples["stock"]],
                judged_by="difference" if small else "ratio",
                target=6.0 if small else ratio,
            )
        )
    return figures
