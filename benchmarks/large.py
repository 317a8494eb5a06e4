"""Large models: only with ``--large``, as it takes memory and minutes.

1.5 GB with the bytes in messages, and 4 GB by reference, on the embedded engine.
One client, as two would need twice the memory. Everything is on the RAM disk, which has three states at the end of a
round (the old one, the update, the new one) beside those of the server and the trainer: 20 GB free are needed.
"""

from __future__ import annotations

import json

from benchmarks.common import Federation, Figure, Options, scratch_directory

TOPIC = "large"


def run(options: Options) -> list[Figure]:
    """Measure one round each."""
    sizes = (("none", 1_500_000_000, "bytes in messages"), ("auto", 4_000_000_000, "by reference"))
    figures = []
    for store, size, name in sizes:
        label = f"round of {size / 1e9:g} GB, {name}"
        if not options.large:
            figures.append(Figure(topic=TOPIC, name=label, unit="s", missing="only with --large"))
            continue
        with scratch_directory() as directory:
            federation = Federation(directory=directory, rounds=1, model_bytes=size, ranks=1, store=store)
            _, programs = federation.run(timeout_s=1800.0)
            history = directory / "checkpoints" / "server" / "history.jsonl"
            seconds = [json.loads(line)["seconds"] for line in history.read_text().splitlines()]
        peaks = ", ".join(f"{each} {program.peak_bytes / 1e9:.1f} GB" for each, program in programs.all.items())
        figures.append(Figure(topic=TOPIC, name=label, unit="s", samples=seconds, note=f"peaks: {peaks}"))
    return figures
