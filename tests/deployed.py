"""Starts Flower's own commands as the documentation says: a SuperLink, SuperNodes, `flwr run`. Ends what it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from examples.make_certificates import make_certificates
from tests.bounds import BOUND_S
from tests.programs import ROOT, free_port

BIN = Path(sys.executable).parent


def make_node_key(path: Path) -> Path:
    """Make a SuperNode's key pair, as `ssh-keygen -t ecdsa -b 384` does; returns the private key's path."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.write_bytes(private)
    path.chmod(0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public + b"\n")
    return path


@dataclass
class Deployed:
    """A SuperLink with TLS and SuperNode authentication, its SuperNodes, and the trainers beside them."""

    directory: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.certificates = self.directory / "certificates"
        make_certificates(self.certificates, ["127.0.0.1"])
        home = self.directory / "flwr-home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink.test]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.certificates / "ca.pem"}"\n'
        )
        # A short interval keeps the test short; it is Flower's own setting.
        self.environment = os.environ | {
            "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own; its output is its log."""
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def start_superlink(self) -> None:
        """Start the SuperLink with TLS and SuperNode authentication, and wait until it listens."""
        ca, certificate, key = (str(self.certificates / name) for name in ("ca.pem", "server.pem", "server-key.pem"))
        self.start("superlink", [
            "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), "--ssl-ca-certfile", ca,
            "--ssl-certfile", certificate, "--ssl-keyfile", key, "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ])  # fmt: skip
        self.wait_for("superlink", "running on")

    def register(self, key: Path) -> None:
        """Tell the SuperLink that a SuperNode with this key may join."""
        self.flwr("supernode", "register", str(key.with_suffix(".pub")), "test")

    def start_supernode(self, name: str, rank: int, key: Path | None) -> None:
        """Start a SuperNode for a rank."""
        flags = [] if key is None else ["--auth-supernode-private-key", str(key)]
        self.start(name, [
            "flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--root-certificates", str(self.certificates / "ca.pem"), *flags,
            "--node-config", f'rank={rank} exchange-dir="{self.directory / "exchange"}"',
        ])  # fmt: skip

    def start_trainer(self, rank: int, ranks: int, *flags: str) -> None:
        """Start the unchanged model_main.py."""
        self.start(f"model-{rank}", [
            sys.executable, str(ROOT / "model_main.py"), "--rank", str(rank), "--exchange-dir", "exchange",
            "--num-partitions", str(ranks), "--threads", "1", *flags,
        ])  # fmt: skip

    def flwr(self, *arguments: str) -> str:
        """Run a command of Flower's command line and return what it prints."""
        ended = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=BOUND_S,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def run(self, **config: object) -> str:
        """Submit a run of this repository with a run config; returns its id."""
        path = self.directory / "run.toml"
        path.write_text("".join(f"{key.replace('_', '-')} = {json.dumps(value)}\n" for key, value in config.items()))
        return str(json.loads(self.flwr("run", ".", "test", "--run-config", str(path), "--format", "json"))["run-id"])

    def status(self) -> str:
        """Return the status of the only run, such as `finished:completed`."""
        return str(json.loads(self.flwr("ls", "test", "--format", "json"))["runs"][0]["status"])

    def wait_for_run(self, timeout_s: float) -> str:
        """Wait until the only run has ended; returns its status."""
        deadline = time.monotonic() + timeout_s
        while not (status := self.status()).startswith("finished"):
            assert time.monotonic() < deadline, f"{status}\n{self.tails()}"
            time.sleep(2)
        return status

    def log(self, name: str) -> str:
        """Return what a command has printed so far."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def tails(self) -> str:
        """Return the end of every log, for a failing test's message."""
        return "\n".join(f"--- {name}\n{self.log(name)[-2500:]}" for name in self.processes)

    def wait_for(self, name: str, text: str, timeout_s: float = BOUND_S) -> None:
        """Wait until a log has a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log(name):
            assert time.monotonic() < deadline, f"{text!r} did not appear in the log of {name}\n{self.tails()}"
            time.sleep(0.1)

    def stop(self) -> None:
        """End the process groups that were started here, SuperNodes first, and wait for every process in them."""
        for name in sorted(self.processes, key=lambda each: each == "superlink"):
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.processes[name].pid, number)
                if _is_gone(self.processes[name], 15.0):
                    break


def _is_gone(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait until no process of a group is left: Flower's commands leave children for a moment."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        process.poll()
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def deployed(directory: Path) -> Iterator[Deployed]:
    """A deployment that leaves nothing running."""
    deployment = Deployed(directory)
    try:
        yield deployment
    finally:
        deployment.stop()
