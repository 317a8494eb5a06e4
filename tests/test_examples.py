"""Every example, in a short form, as its docstring says to start it, and the page about one's own script."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from fedsplit.run.history import read_history
from tests.bounds import BOUND_S
from tests.programs import ROOT
from tests.training import federation, run_to_the_end

PAGE = (ROOT / "docs" / "own-training.md").read_text()


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install fedsplit[integrations]")


def example(name: str, *flags: str) -> tuple[str, ...]:
    return (sys.executable, str(ROOT / "examples" / f"{name}.py"), "--rank", "{rank}", *flags)


def travelled(directory: Path) -> set[str]:
    """Return the names of every entry of every payload that lies on the exchange or in the server's directory."""
    places = [*directory.glob("exchange/rank-*/*.safetensors"), *directory.glob("checkpoints/server/**/*.safetensors"),
              *(path for path in directory.glob("checkpoints/server/payloads/**/*") if path.is_file())]  # fmt: skip
    names: set[str] = set()
    for path in places:
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.slow
@needs("lightning")
def test_lightning_learns_the_digits_with_its_schedule_and_its_log_going_on(tmp_path: Path) -> None:
    with federation(tmp_path, trainer=example("lightning_digits"), server_flags=("--rounds", "3")) as found:
        run_to_the_end(found)
        assert found.metric("accuracy")[-1] >= 0.9
    for rank in (1, 2):
        lines = (tmp_path / "logs" / f"rank-{rank}" / "version_0" / "metrics.csv").read_text().splitlines()
        columns = lines[0].split(",")
        rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
        rates = [float(row["lr"]) for row in rows if row["lr"]]
        assert rates == pytest.approx([5e-3 * 0.9**epoch for epoch in range(6)])
        steps = [int(row["step"]) for row in rows]
        assert steps == sorted(steps) and steps[-1] >= 6 * 22


@pytest.mark.slow
@needs("transformers", "peft")
def test_only_the_adapters_of_a_language_model_travel_and_it_learns(tmp_path: Path) -> None:
    split = ("--aggregate", "*lora_*=fedavg", "--aggregate", "*modules_to_save*=fedavg", "--aggregate", "local")
    with federation(tmp_path, trainer=example("lora_languages"), server_flags=("--rounds", "3", *split)) as found:
        run_to_the_end(found)
        assert found.metric("accuracy")[-1] >= 0.7
    names = travelled(tmp_path)
    assert names and all("lora_" in name or "modules_to_save" in name for name in names)


@pytest.mark.slow
def test_a_transformer_that_is_cut_learns_with_adapters_beside_the_server(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    words = ["run", "--rounds", "4", "--split-learning", "sfl-v2", "--workload", "examples.split_lora:Languages"]
    done = subprocess.run([sys.executable, "-m", "fedsplit", *words], cwd=tmp_path, capture_output=True, text=True,
                          timeout=BOUND_S)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    last = read_history(tmp_path / "checkpoints/server/history.jsonl")[-1]
    assert last["evaluate"]["accuracy"] > 0.7 and last["split"]["steps"] > 50


@pytest.mark.slow
def test_a_gan_shares_its_generator_and_keeps_its_discriminators(tmp_path: Path) -> None:
    split = ("--aggregate", "discriminator.*=local", "--aggregate", "fedavg")
    trainer = (sys.executable, str(ROOT / "model_main.py"), "--rank", "{rank}", "--threads", "1",
               "--workload", "examples.gan_digits:gan")  # fmt: skip
    with federation(tmp_path, trainer=trainer, server_flags=("--rounds", "12", *split)) as found:
        run_to_the_end(found)
        assert found.metric("accuracy")[-1] >= 0.7
    names = travelled(tmp_path)
    assert names and all(name.startswith("generator.") for name in names)


@pytest.mark.slow
def test_trainers_that_never_stop_learn_together_what_neither_learns_alone(tmp_path: Path) -> None:
    with federation(tmp_path, trainer=example("async_catch"), server_flags=("--rounds", "20")) as found:
        run_to_the_end(found)
        assert found.metric("caught")[-1] >= 0.8  # alone it is 0.5, at random 0.17


# -- the page about one's own script ----------------------------------------------------------------------------------


def block(name: str) -> str:
    found = re.search(rf"<!-- block: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, name
    return found[1]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A directory with the page's script, changed as its diff says."""
    (tmp_path / "train.py").write_text(block("train.py"))
    (tmp_path / "train.diff").write_text(block("train.diff"))
    subprocess.run(["git", "apply", "-p0", "train.diff"], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"],
                   "GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "GIT_DIR": str(tmp_path / "none")})  # fmt: skip
    assert "Trainer(" in (tmp_path / "train.py").read_text()
    return tmp_path


def run_script(directory: Path, *flags: str) -> str:
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracies(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"accuracy ([0-9.]+)", printed)]


@pytest.mark.slow
def test_the_pages_plain_script_learns(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(block("train.py"))
    found = accuracies(run_script(tmp_path, "1"))
    assert len(found) == 5 and found[-1] >= 0.85


@pytest.mark.slow
def test_the_pages_changed_script_runs_alone_and_leaves_nothing_behind(page: Path) -> None:
    before = sorted(path.name for path in page.iterdir())
    found = accuracies(run_script(page, "1", "--alone"))
    assert len(found) == 3 and found[-1] >= 0.8
    assert sorted(path.name for path in page.iterdir()) == before


@pytest.mark.smoke
def test_the_pages_changed_script_takes_part_in_a_federation(page: Path) -> None:
    with federation(page, trainer=(sys.executable, "train.py", "{rank}"), server_flags=("--rounds", "5")) as found:
        run_to_the_end(found)
        assert found.metric("accuracy")[-1] >= 0.85
        assert accuracies(found.log("model-1"))[-1] >= 0.85


def test_the_page_says_how_many_lines_are_new() -> None:
    added = [line for line in block("train.diff").splitlines() if line.startswith("+") and not line.startswith("+++")]
    ours = [line for line in added if re.search(r"with Trainer|for task|load_into|task\.reply", line)]
    assert len(ours) == 5


# -- what is imported -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "modules", ["fedsplit, fedsplit.trainer.trainer, fedsplit.workloads.image", "fedsplit.client.relay"]
)
def test_no_integration_is_imported_unless_it_is_used(modules: str) -> None:
    code = (
        f"import sys, {modules}; print(sorted(name for name in sys.modules if name.split('.')[0] in "
        "('lightning', 'pytorch_lightning', 'transformers', 'peft', 'accelerate') or 'fedsplit.integrations' in name))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
