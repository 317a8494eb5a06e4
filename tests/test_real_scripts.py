"""The scripts of `examples/scripts/`, as everybody writes them: killed in a round, they end at the same bits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.states.state_dict import StateDict, map_file
from tests.bounds import BOUND_S
from tests.programs import ROOT
from tests.test_examples import block
from tests.training import Federation, end_well, federation

SCRIPTS = ROOT / "examples" / "scripts"
NAMES = ("digits", "gpt")
ROUNDS = 3


@dataclass(frozen=True)
class Script:
    """One of the scripts in a small form, and how many lines it prints in a round of training."""

    name: str
    lines: int
    flags: tuple[str, ...]

    @property
    def trainer(self) -> tuple[str, ...]:
        path = SCRIPTS / f"{self.name}_federated.py"
        # With -u it is not forked from another process, from which a DataLoader would take how to start its workers.
        return (sys.executable, "-u", "-m", "tests.held", str(path), "--site", "{rank}", *self.flags)

    def trained_lines(self, found: Federation, rank: int) -> int:
        """Return how many lines of training a trainer has printed."""
        # A kill may come between a line and its end.
        return len(re.findall(r"(?:train:|step) \d+ of", found.log(f"model-{rank}")))


# The images are moved at random in processes of their own.
DIGITS = Script("digits", lines=44, flags=("--batch-size", "16", "--log-interval", "1", "--workers", "2"))
GPT = Script("gpt", lines=4, flags=("--steps", "40", "--batch-size", "4"))
COMPILED = Script("gpt", lines=4, flags=(*GPT.flags, "--compile"))


@dataclass(frozen=True)
class End:
    """What a run leaves: the global state, and what each trainer keeps."""

    state: StateDict
    kept: dict[str, Any]


def run(directory: Path, script: Script, kills: Mapping[int, str] | None = None) -> End:
    """Run the five programs; in the rounds of `kills` a program is killed while both train, and started again."""
    directory.mkdir()
    flags = ("--rounds", str(ROUNDS))
    with federation(directory, trainer=script.trainer, server_flags=flags) as found:
        found.start_all()
        for number, name in (kills or {}).items():
            in_training(found, script, number)
            found.kill(name)
            found.start(name, *(["--resume"] if name == "server" else []))
        found.allow(ROUNDS)
        end_well(found)
        assert [line["round"] for line in found.history()] == list(range(1, ROUNDS + 1)), found.tails()
        for rank in (1, 2):
            # Nobody trains twice but the one that was killed.
            more = script.trained_lines(found, rank) - ROUNDS * script.lines
            assert (more > 0) == (found.starts[f"model-{rank}"] > 1) and more >= 0, f"{more}\n{found.tails()}"
        states = sorted(found.checkpoints.glob(f"rank-*/round-{ROUNDS:06d}/local_state.pt"))
        assert len(states) == 2, found.tails()
        kept = {path.parts[-3]: torch.load(path, weights_only=True) for path in states}
        for each in kept.values():
            each["generators"] = each["generators"]["torch"]  # the scripts do not seed the others
        return End({name: tensor.clone() for name, tensor in map_file(found.final_state()).items()}, kept)


def in_training(found: Federation, script: Script, number: int) -> None:
    """Wait until rank 2 is in the middle of a round, or on a busy machine at its end, its answer not given yet."""
    found.allow(number - 1)
    found.wait_until(lambda: len(found.history()) == number - 1)
    before, at_its_end = script.trained_lines(found, 2), found.directory / f"held-2-{number}"
    found.wait_until(lambda: script.trained_lines(found, 2) > before + script.lines // 5 or at_its_end.exists())


def difference(first: Any, second: Any, where: str = "") -> str | None:
    """Return where two values differ in a bit, or None."""
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        bits = [each.reshape(-1).contiguous().view(torch.uint8) for each in (first, second)] if same else []
        return None if same and torch.equal(*bits) else where
    if type(first) is not type(second):
        return where
    if isinstance(first, dict):
        if list(first) != list(second):
            return where
        pairs = [(first[key], second[key], f"{where}.{key}") for key in first]
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            return where
        pairs = [
            (one, other, f"{where}[{index}]") for index, (one, other) in enumerate(zip(first, second, strict=True))
        ]
    else:
        return None if first == second else where
    return next((found for pair in pairs if (found := difference(*pair))), None)


def assert_same(found: End, expected: End) -> None:
    assert difference(found.state, expected.state, "state") is None
    assert difference(found.kept, expected.kept, "kept") is None


@pytest.mark.slow
@pytest.mark.parametrize(("script", "kills"), [
    (DIGITS, {1: "client-2", 2: "model-2", 3: "server"}),
    (GPT, {1: "model-2", 2: "server", 3: "client-2"}),
], ids=NAMES)  # fmt: skip
def test_a_script_ends_at_the_same_bits_whatever_is_killed(
    script: Script, kills: Mapping[int, str], tmp_path: Path
) -> None:
    found = run(tmp_path / "killed", script, kills)
    assert_same(found, run(tmp_path / "undisturbed", script))
    if script is GPT:
        assert torch.equal(found.state["lm_head.weight"], found.state["wte.weight"])
        assert found.state["blocks.0.attention.mask"].isinf().sum() == 32 * 31 / 2
        assert torch.equal(found.state["positions"], torch.arange(32))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_language_model_that_is_killed_ends_at_the_same_bits(tmp_path: Path) -> None:
    found = run(tmp_path / "killed", COMPILED, {2: "model-2"})
    assert not any("_orig_mod" in name for name in found.state)
    assert_same(found, run(tmp_path / "undisturbed", COMPILED))


# -- what the page says of them ---------------------------------------------------------------------------------------


def diff_of(name: str) -> list[str]:
    """Return what git shows of the two scripts, without lines that only moved to the right."""
    command = ["git", "diff", "--no-index", "--ignore-all-space", "--unified=2", f"{name}.py", f"{name}_federated.py"]
    shown = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False, timeout=BOUND_S)
    lines = shown.stdout.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("@@"))
    return lines[begin:]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_what_changes_in_a_script_and_that_is_ten_lines(name: str) -> None:
    shown = block(f"{name}.diff").splitlines()
    # After @@ git says in which function the lines are; which one it takes for that differs.
    assert [line.partition(" @@")[0] for line in shown[2:]] == [line.partition(" @@")[0] for line in diff_of(name)]
    assert len([line for line in shown[2:] if line.startswith("+") and line != "+"]) <= 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_script_runs_without_a_federation(name: str, tmp_path: Path) -> None:
    flags = {"digits": ("--epochs", "4"), "gpt": ("--epochs", "1", "--steps", "50", "--batch-size", "8")}[name]
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=BOUND_S
    ).stdout
    found = [float(number) for number in re.findall(r"(?:accuracy|epoch \d: loss) ([0-9.]+)", said)]
    # Far from what guessing gives: 0.1, and a loss of over 4.
    assert max(found) >= 0.5 if name == "digits" else found[-1] <= 3.7, said
