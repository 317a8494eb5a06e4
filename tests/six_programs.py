"""The six programs of a model that is cut: those of `tests.programs`, and the trainer of the upper part."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.programs import ROOT, Programs


@dataclass
class SixPrograms(Programs):
    """A federation on the digits, cut after ``features.2``."""

    mode: str = "sfl-v1"

    @property
    def names(self) -> list[str]:
        return [*super().names, "upper"]

    def command(self, name: str) -> list[str]:
        cut = ["--cut", "features.2", "--workload-option", "epochs=1"]
        if name == "upper":
            return [
                sys.executable, str(ROOT / "model_main.py"), "--part", "upper", "--exchange-dir", str(self.exchange),
                "--checkpoint-dir", str(self.checkpoints), *self.model_flags, *cut,
            ]  # fmt: skip
        command = super().command(name)
        if name == "server":
            return [*command, "--split-learning", self.mode, "--exchange-dir", str(self.exchange)]
        return [*command, *cut] if name.startswith("model") else command


@contextlib.contextmanager
def six_programs(directory: Path, **settings: object) -> Iterator[SixPrograms]:
    """A federation that leaves nothing running."""
    federation = SixPrograms(directory, **settings)  # type: ignore[arg-type]
    try:
        yield federation
    finally:
        federation.stop()
