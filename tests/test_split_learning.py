"""True split learning: a model that is cut comes to what the whole model does, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.halves import Halves, Small, State, unsplit

MODES = ["sfl-v1", "sfl-v2", "sequential"]


def same(found: State, expected: State) -> None:
    assert list(found) == list(expected) or set(found) == set(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different


@pytest.mark.parametrize("mode", MODES)
def test_the_parts_come_to_what_the_whole_model_does_in_the_same_order(mode: str, tmp_path: Path) -> None:
    same(Halves(tmp_path, mode).run(), unsplit(mode))
