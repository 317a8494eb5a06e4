"""The six programs of a model that is cut: those of `tests.programs`, and the trainer of the upper part, or several."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedsplit.split_learning.cut import parts_of
from fedsplit.workloads import WorkloadContext, create_workload
from tests.halves import State, unsplit
from tests.programs import ROOT, Programs

# After which modules it is cut, and how many are in front of that.
CUT, TAIL, ENDS = "features.2", "classifier.2", {"features.2": 3, "classifier.2": 9}


@dataclass
class SixPrograms(Programs):
    """A federation on the digits, cut after ``features.2``."""

    mode: str = "sfl-v1"
    tail: str | None = None
    uppers: int = 1
    options: dict[str, str] = field(default_factory=lambda: {"epochs": "1"})

    @property
    def names(self) -> list[str]:
        return [*super().names, "upper", *(f"upper-{number}" for number in range(2, self.uppers + 1))]

    def place(self, name: str) -> str:
        if name.startswith("upper-"):
            return f"{name}/upper"
        return super().place(name) or "upper"

    def unsplit(self, rounds: int) -> State:
        """Return what all of it must come to: plain loops over the whole model."""
        end = ENDS[self.tail] if self.tail else None
        found = unsplit(self.mode, ranks=self.ranks, rounds=rounds, cut=ENDS[CUT], tail=end, make=self._workload)
        return dict(zip(self._digits(1).model.state_dict(), found.values(), strict=True))

    def _digits(self, rank: int) -> Any:
        context = WorkloadContext(rank=rank, num_partitions=self.ranks, options=self.options)
        return create_workload("digits", context)

    def _workload(self, rank: int) -> Any:
        """Make the workload of a rank, its model as one chain."""
        workload = self._digits(rank)
        parts = parts_of(workload, CUT, None)
        workload.model = nn.Sequential(*parts.lower._links, *parts.upper._links)  # type: ignore[arg-type]
        return workload

    def command(self, name: str) -> list[str]:
        cut = ["--cut", CUT, *(["--tail", self.tail] if self.tail else [])]
        cut += [text for option in self.options.items() for text in ("--workload-option", "=".join(option))]
        if name.startswith("upper"):
            end = "" if name == "upper" else name
            return [
                sys.executable, str(ROOT / "model_main.py"), "--part", "upper", "--exchange-dir",
                str(self.exchange / end), "--checkpoint-dir", str(self.checkpoints / end), *self.model_flags, *cut,
            ]  # fmt: skip
        command = super().command(name)
        if name == "server":
            return [*command, "--split-learning", self.mode, "--exchange-dir", str(self.exchange), "--upper-trainers",
                    str(self.uppers)]  # fmt: skip
        return [*command, *cut] if name.startswith("model") else command
