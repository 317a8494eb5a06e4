"""The six programs of a model that is cut: those of `tests.programs`, and the trainer of the upper part."""

from __future__ import annotations

import sys
from dataclasses import dataclass

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
