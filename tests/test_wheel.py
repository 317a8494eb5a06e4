"""The wheel holds all that is needed: the five programs run to the end of a run where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bounds import BOUND_S
from tests.programs import ROOT, free_port

# What is installed here is enough: no network, no cache of the user's.
UV = [sys.executable, "-m", "uv", "--offline", "--no-cache", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy of the sources with the setuptools that is installed here, so without a network."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    shutil.copytree(ROOT / "fedsplit", source / "fedsplit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "server_main.py", "client_main.py", "model_main.py"):
        shutil.copy(ROOT / name, source / name)
    build = [*UV, "build", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", str(directory)]
    subprocess.run([*build, str(source)], check=True, timeout=BOUND_S)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_directory(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and with the packages that are installed here but fedsplit."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([*UV, "venv", "--python", sys.executable, str(home)], check=True, timeout=BOUND_S)
    install = [*UV, "pip", "install", "--python", str(home / "bin/python"), "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=BOUND_S)
    # Other than a directory of the environment itself, one that a .pth file names is not searched for .pth files: what
    # makes the checkout importable here does not do so there.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.mark.slow
def test_the_wheel_fills_no_name_but_its_own_and_has_all_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"fedsplit", "fedsplit-0.1.0.dist-info"}
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "fedsplit").rglob("*") if path.is_file()}
    assert {name for name in inside if "__pycache__" not in name} <= set(names)


@pytest.mark.slow
def test_five_programs_from_the_wheel_run_to_the_end_in_an_empty_folder(bin_directory: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    address = f"127.0.0.1:{free_port()}"
    commands = {"server": ["server", "--address", address, "--rounds", "1"]}
    for rank in ("1", "2"):
        commands[f"client-{rank}"] = ["client", "--rank", rank, "--server-address", address]
        commands[f"trainer-{rank}"] = ["trainer", "--rank", rank, "--threads", "1"]

    def call(words: Sequence[str]) -> list[str]:
        return [str(bin_directory / "fedsplit"), *words]

    where = "import fedsplit; print(fedsplit.__file__)"
    python = [str(bin_directory / "python"), "-c", where]
    found = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(bin_directory.parent)), "the wheel's, not the checkout's"

    started = {}
    try:
        for name, words in commands.items():
            with (tmp_path / f"{name}.log").open("wb") as log:
                started[name] = subprocess.Popen(
                    call(words), cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        codes = {name: process.wait(BOUND_S) for name, process in started.items()}
    finally:
        for process in started.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    logs = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(tmp_path.glob("*.log")))
    assert set(codes.values()) == {0}, logs

    for words in (["checkpoints"], ["export", "--output", "model.pt"], ["new", "my_project"]):
        done = subprocess.run(
            call(words), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=BOUND_S
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.pt").stat().st_size > 0
    assert "fedsplit server" in (tmp_path / "my_project/README.md").read_text()
