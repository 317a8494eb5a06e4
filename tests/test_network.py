"""Several hosts: each of the server and the client-trainer pairs in a network of its own, with a cable that can be cut.

The cable is a thread of this process that carries Ethernet frames from one end to the other: late, now and then not at
all, and while it is cut none of them. (The kernel's netem does the same where it is built in; often it is not.)

Covered: TLS and a join token over real addresses, delay and loss all the time, a cable that is cut in the middle of a
round for longer than either side takes to notice, and the same bits in the end as without any network. Not covered:
what a router or a firewall in between may do to an idle connection.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import math
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from examples.make_certificates import make_certificates
from fedsplit.states.state_dict import map_file
from fedsplit.workloads import WorkloadContext, create_workload
from tests.programs import ROOT, Programs
from tests.reference import federated_averaging

DELAY_S, JITTER_S, LOSS = 0.020, 0.005, 0.01
PORT = 8080
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


def missing() -> str | None:
    """Say why networks cannot be made here, or None."""
    if shutil.which("ip") is None:
        return "needs the command ip (Debian: iproute2)"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    name = f"fsprobe{os.getpid()}"
    try:
        os.close(open_tap(name))
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except OSError as exc:
        return f"cannot make a network device (/dev/net/tun): {exc}"
    except subprocess.CalledProcessError as exc:
        return f"cannot make a network namespace here: {exc.stderr.strip()}"
    return None


def open_tap(name: str) -> int:
    """Make a network card whose cable is the returned file."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


class Cable:
    """Joins two network cards; keeps count of what it lost."""

    def __init__(
        self, first: int, second: int, seed: int, *, delay_s: float = DELAY_S, jitter_s: float = JITTER_S,
        loss: float = LOSS, bits_per_s: float = math.inf,
    ) -> None:  # fmt: skip
        self.cut = False
        self._delay_s, self._jitter_s, self._loss, self._bits_per_s = delay_s, jitter_s, loss, bits_per_s
        self.carried = self.lost = 0
        self._other = {first: second, second: first}
        self._random = random.Random(seed)
        self._stop = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        for end in self._other:
            os.close(end)

    def _carry(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        # When each direction has sent what it was given so far.
        free = dict.fromkeys(self._other, 0.0)
        while not self._stop:
            pause = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.05
            for end in select.select(list(self._other), [], [], min(pause, 0.05))[0]:
                frame = os.read(end, 65536)
                if self.cut or self._random.random() < self._loss:
                    self.lost += 1
                    continue
                number += 1
                free[end] = max(free[end], time.monotonic()) + 8 * len(frame) / self._bits_per_s
                due = free[end] + self._delay_s + self._random.random() * self._jitter_s
                heapq.heappush(under_way, (due, number, self._other[end], frame))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, frame = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # the card may be down by now
                    os.write(end, frame)
                    self.carried += 1


class Network:
    """A namespace for the server and one for each rank, each joined to the server's by a cable of its own."""

    def __init__(self, ranks: int, cable: Callable[..., Cable] = Cable) -> None:
        self.ranks = ranks
        self._cable = cable
        self.prefix = f"fs{os.getpid()}"
        self.server = f"{self.prefix}s"
        self.cables: dict[int, Cable] = {}

    def __enter__(self) -> Network:
        try:
            ip("netns", "add", self.server)
            ip("-n", self.server, "link", "set", "lo", "up")
            for rank in range(1, self.ranks + 1):
                ip("netns", "add", self.space(rank))
                ip("-n", self.space(rank), "link", "set", "lo", "up")
                near = self._plug(f"fs{rank}s", self.server, f"10.213.{rank}.1/24")
                far = self._plug(f"fs{rank}c", self.space(rank), f"10.213.{rank}.2/24")
                # Of the hundreds of frames of a run each of these loses one among the first fifty or so.
                self.cables[rank] = self._cable(near, far, seed=11 + rank)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for cable in self.cables.values():
            cable.close()
        for name in (self.server, *map(self.space, range(1, self.ranks + 1))):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)

    def space(self, rank: int) -> str:
        return f"{self.prefix}c{rank}"

    @staticmethod
    def _plug(card: str, space: str, address: str) -> int:
        end = open_tap(card)
        ip("link", "set", card, "netns", space)
        ip("-n", space, "address", "add", address, "dev", card)
        ip("-n", space, "link", "set", card, "up")
        return end


@dataclass
class Distributed(Programs):
    """The five programs, each where it would run on several hosts."""

    network: Network = field(default_factory=lambda: Network(2))

    def command(self, name: str) -> list[str]:
        kind, _, rank = name.partition("-")
        token, certificates = str(self.directory / "token"), self.directory / "certificates"
        if kind == "server":
            flags = [
                "--address", f"0.0.0.0:{PORT}", "--checkpoint-dir", str(self.checkpoints), "--join-token-file", token,
                "--ssl-ca-certfile", str(certificates / "ca.pem"), "--ssl-certfile", str(certificates / "server.pem"),
                "--ssl-keyfile", str(certificates / "server-key.pem"), *self.server_flags,
            ]  # fmt: skip
        elif kind == "client":
            flags = [
                "--rank", rank, "--server-address", f"10.213.{rank}.1:{PORT}", "--exchange-dir", str(self.exchange),
                "--root-certificates", str(certificates / "ca.pem"), "--join-token-file", token, *self.client_flags,
            ]  # fmt: skip
        else:
            flags = super().command(name)[2:]
        space = self.network.server if kind == "server" else self.network.space(int(rank))
        return ["ip", "netns", "exec", space, sys.executable, str(ROOT / f"{kind}_main.py"), *flags]


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := missing():
        pytest.skip(reason)
    with Network(2) as made:
        yield made


@pytest.mark.slow
def test_a_cable_cut_in_the_middle_of_a_round_changes_no_bit_of_the_result(tmp_path: Path, network: Network) -> None:
    torch.set_num_threads(1)
    make_certificates(tmp_path / "certificates", ["10.213.1.1", "10.213.2.1"])
    (tmp_path / "token").write_text("a secret of many letters")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "tests").symlink_to(Path(__file__).parent)
    # Different hosts see no common disk.
    flags = ("--rounds", "3", "--payload-store", "none")
    models = ("--threads", "1", "--workload", "tests.held:digits")
    federation = Distributed(tmp_path, server_flags=flags, model_flags=models, network=network)
    federation.allow(1)
    try:
        federation.start_all()
        federation.wait_for("client-2", "train, round 2")
        cable = network.cables[2]
        cable.cut = True
        began = time.monotonic()
        federation.allow(2)
        # The server waits 31 s for an answer, and the client listens into the silence for 45 s.
        federation.wait_for("server", "rank 2: the client is gone")
        federation.wait_for("client-2", "heard nothing of the server")
        cable.cut = False
        cut_s = time.monotonic() - began
        federation.allow(3)
        assert federation.wait() == dict.fromkeys(federation.names, 0), federation.tails()
        assert "rank 2: client is back" in federation.log("server")
        # Trained once, during the cut; the rank that had its link all the time was never dropped.
        assert federation.log("model-2").count("round 2: trained") == 1
        assert "rank 1: the client is gone" not in federation.log("server").partition("round 3/3")[0]
        lines = federation.history()
        assert [(line["round"], line["accepted"]) for line in lines] == [(1, 2), (2, 2), (3, 2)]
        assert lines[1]["seconds"] > cut_s  # type: ignore[operator]
        found = map_file(federation.final_state())
    finally:
        federation.stop()
    assert all(cable.lost > 0 for cable in network.cables.values()), (
        "no frame was lost: the test tested less than it says"
    )
    expected = federated_averaging(
        lambda rank: create_workload("digits", WorkloadContext(rank=rank, num_partitions=2, seed=0)), ranks=2, rounds=3
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
