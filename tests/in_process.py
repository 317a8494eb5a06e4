"""Runs a script in the test's own process, for what ends before any round: a mistake in a flag, a port in use."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Ended(NamedTuple):
    """How a script ended, and what it had printed on stderr."""

    code: int
    errors: str


class Scripts:
    """The three scripts, called in a directory; `scripts` in conftest.py puts back what a call changes."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        monkeypatch.chdir(directory)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        self._captured = captured
        self._flower, self._ours = logging.getLogger("flwr"), logging.getLogger("fedsplit")
        self._before = ([*self._flower.filters], [*self._ours.handlers], self._ours.level, self._ours.propagate)

    def run(self, script: str, *flags: str) -> Ended:
        """Call a script's ``main`` with flags."""
        try:
            code = importlib.import_module(script.removesuffix(".py")).main(list(flags))
        except SystemExit as exc:  # argparse
            code = exc.code
        return Ended(code, self._captured.readouterr().err)

    def put_back(self) -> None:
        """Undo what a call has changed in the loggers."""
        self._flower.filters[:], self._ours.handlers[:], level, self._ours.propagate = self._before
        self._ours.setLevel(level)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)
