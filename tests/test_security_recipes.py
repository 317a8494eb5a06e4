"""The deployment recipes, as far as a machine without systemd as init, Slurm, Docker and a cluster can try them."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bounds import BOUND_S
from tests.programs import ROOT, free_port, programs

RECIPES = ROOT / "examples" / "deployment"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    for unit in (RECIPES / "systemd").iterdir():
        # Where they would be installed there is nothing here; every other word is checked.
        text = unit.read_text().replace("/opt/fedsplit/.venv/bin/python", sys.executable)
        (tmp_path / unit.name.replace("@", "@1")).write_text(text)
    units = sorted(str(path) for path in tmp_path.iterdir())
    ended = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=BOUND_S)
    problems = [line for line in ended.stderr.splitlines() if str(tmp_path) in line or "fedsplit" in line]
    assert problems == []


@pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*.yaml")) + sorted(RECIPES.rglob("*.service")), ids=lambda p: p.name
)
def test_every_flag_in_a_recipe_is_one_of_the_script_that_it_is_given_to(path: Path) -> None:
    text = path.read_text()
    for script in ("server_main.py", "client_main.py", "model_main.py"):
        shown = importlib.import_module(script.removesuffix(".py")).make_parser().format_help()
        for block in re.findall(rf"{script}(.*?)(?:ports:|volumes:|securityContext|# Clients|Restart=|\Z)", text, re.S):
            for flag in re.findall(r"--[a-z][a-z-]+", re.sub(r"(?m)^\s*#.*$", "", block)):
                assert flag in shown, (script, flag)


def test_client_and_trainer_of_a_pair_share_a_volume_and_a_user() -> None:
    compose: dict[str, Any] = yaml.safe_load((RECIPES / "docker" / "compose.yaml").read_text())
    for rank in (1, 2):
        pair = [compose["services"][f"{kind}-{rank}"] for kind in ("client", "trainer")]
        assert all(f"exchange-{rank}:/exchange" in service["volumes"] for service in pair)
        assert {service["user"] for service in pair} == {"10001:10001"}
        assert "mode=0700" in compose["volumes"][f"exchange-{rank}"]["driver_opts"]["o"]
    (pod,) = yaml.safe_load_all((RECIPES / "kubernetes" / "rank-1.yaml").read_text())
    spec = pod["spec"]
    mounts = [{mount["name"]: mount["mountPath"] for mount in each["volumeMounts"]} for each in spec["containers"]]
    assert [each["exchange"] for each in mounts] == ["/exchange", "/exchange"]
    assert {volume["name"]: volume for volume in spec["volumes"]}["exchange"]["emptyDir"]["medium"] == "Memory"
    assert spec["securityContext"]["runAsUser"] == 10001
    # The trainer has neither the key nor the CA.
    assert "secrets" not in mounts[1]


def test_what_is_mounted_into_containers_was_given_to_their_user_and_the_key_of_the_ca_to_none() -> None:
    text = (RECIPES / "docker" / "compose.yaml").read_text()
    compose: dict[str, Any] = yaml.safe_load(text)
    mounts = {mount.split(":")[0] for service in compose["services"].values() for mount in service["volumes"]}
    secrets = {mount.removeprefix("./") for mount in mounts if mount.startswith("./secrets")}
    (given,) = re.findall(r"chown 10001 (.*)", text)
    # make_certificates.py and `umask 077` make each file for its own user alone.
    assert secrets == set(given.split())
    assert not any("ca-key" in mount or mount == "./secrets" for mount in mounts)


@pytest.mark.slow
def test_the_slurm_job_runs_a_pair_to_the_end_and_leaves_nothing(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    # Slurm itself is not here: this starts a step as srun does on an allocation's only node.
    (commands / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (commands / "srun").chmod(0o755)
    with programs(tmp_path, server_flags=("--rounds", "2"), model_flags=("--threads", "1")) as federation:
        jobs = []
        federation.start("server")
        for rank in (1, 2):
            environment = {
                "PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": f"test-{free_port()}-{rank}", "RANK": str(rank),
                "SLURM_SUBMIT_DIR": str(tmp_path), "FEDSPLIT": str(ROOT), "PYTHON": sys.executable,
                "SERVER": f"127.0.0.1:{federation.port}", "TRAINER_FLAGS": "--threads 1 --num-partitions 2",
                "OMP_NUM_THREADS": "1", "HOME": str(tmp_path),
            }  # fmt: skip
            job = subprocess.Popen(["bash", str(RECIPES / "slurm" / "rank.sbatch")], env=environment, cwd=tmp_path)
            jobs.append((job, Path(f"/dev/shm/fedsplit-{environment['SLURM_JOB_ID']}")))
        assert federation.wait(names=["server"]) == {"server": 0}, federation.log("server")
        assert [job.wait(BOUND_S) for job, _ in jobs] == [0, 0]
        assert not any(exchange.exists() for _, exchange in jobs)
        assert [line["accepted"] for line in federation.history()] == [2, 2]
