"""TLS on the embedded engine: what is refused, in which words, and that the run of the others goes on."""

from __future__ import annotations

import contextlib
import datetime
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.make_certificates import make_certificates
from fedsplit.engines.tls import check_exposure, check_server, check_server_files, client_context, is_loopback
from fedsplit.errors import ConnectionFailedError, UsageError
from tests.bounds import BOUND_S
from tests.in_process import Scripts
from tests.ports import free_port
from tests.programs import ROOT, programs

DAY = datetime.timedelta(days=1)


def certificates(directory: Path, *hosts: str, begins_in_days: float = -1.0, days: float = 365.0) -> Path:
    begins = datetime.datetime.now(datetime.UTC) + begins_in_days * DAY
    make_certificates(directory, hosts or ["127.0.0.1"], begins=begins, days=days)
    return directory


def read(directory: Path) -> tuple[bytes, bytes, bytes]:
    ca, certificate, key = ((directory / name).read_bytes() for name in ("ca.pem", "server.pem", "server-key.pem"))
    return ca, certificate, key


def server_flags(directory: Path) -> tuple[str, ...]:
    return (
        "--ssl-ca-certfile", str(directory / "ca.pem"), "--ssl-certfile", str(directory / "server.pem"),
        "--ssl-keyfile", str(directory / "server-key.pem"),
    )  # fmt: skip


@contextlib.contextmanager
def tls_server(directory: Path) -> Iterator[int]:
    """Something that speaks TLS with a certificate, whatever it is worth."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem", directory / "server-key.pem")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """Something that answers everybody with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.recv(1000)
                    connection.sendall(answer)

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


# -- listening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.9.8.7", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
    ("192.0.2.7", False), ("no-such-host.invalid", False),
])  # fmt: skip
def test_only_loopback_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_listening_to_others_without_tls_is_refused_unless_it_is_asked_for() -> None:
    check_exposure("127.0.0.1", encrypted=False, insecure=False, has_token=True)
    check_exposure("0.0.0.0", encrypted=True, insecure=False, has_token=True)
    check_exposure("0.0.0.0", encrypted=False, insecure=True, has_token=False)
    with pytest.raises(UsageError, match="--insecure"):
        check_exposure("0.0.0.0", encrypted=False, insecure=False, has_token=False)
    with pytest.raises(UsageError, match="over TLS or on loopback only"):
        check_exposure("0.0.0.0", encrypted=False, insecure=True, has_token=True)


FLAGS = [
    ("server_main.py --address 0.0.0.0:{port}", "refusing to listen at 0.0.0.0 without TLS"),
    ("server_main.py --address 0.0.0.0:{port} --insecure --join-token-file {token}", "over TLS or on loopback"),
    ("client_main.py --server-address 192.0.2.7:{port} --join-token-file {token}", "over TLS"),
    ("server_main.py --address 127.0.0.1:{port} --supernode-public-key {token}", "--engine superlink"),
    ("client_main.py --server-address 127.0.0.1:{port} --supernode-private-key {token}", "--engine superlink"),
    ("server_main.py --address 127.0.0.1:{port} --engine superlink --join-token-file {token}", "use --supernode"),
]


@pytest.mark.parametrize(("command", "said"), FLAGS)
def test_flags_that_would_not_protect_are_refused(scripts: Scripts, tmp_path: Path, command: str, said: str) -> None:
    token = tmp_path / "token"
    token.write_text("a secret of many letters")
    token.chmod(0o600)
    script, *flags = command.format(port=free_port(), token=token).split()
    ended = scripts.run(script, *flags)
    assert ended.code == 2, ended.errors
    assert said in ended.errors
    assert len(ended.errors.strip().splitlines()) == 1


def test_a_servers_files_are_checked_before_it_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = read(certificates(tmp_path / "good"))
    other = read(certificates(tmp_path / "other"))
    check_server_files(good)
    assert not caplog.text
    check_server_files(read(certificates(tmp_path / "soon", days=3)))
    assert "--ssl-certfile expires on" in caplog.text
    for files, said in (
        (read(certificates(tmp_path / "old", begins_in_days=-10, days=5)), "expired on"),
        (read(certificates(tmp_path / "early", begins_in_days=2)), "not valid before"),
        ((good[0], good[1], other[2]), "not the key"),
        ((b"x", good[1], good[2]), "--ssl-ca-certfile"),
        ((good[0], b"x", good[2]), "--ssl-certfile"),
        ((good[0], good[1], b"x"), "--ssl-keyfile"),
    ):
        with pytest.raises(UsageError, match=said):
            check_server_files(files)


def test_keys_are_made_for_nobody_else(tmp_path: Path) -> None:
    directory = certificates(tmp_path / "certificates")
    assert directory.stat().st_mode & 0o077 == 0
    for name in ("ca-key.pem", "server-key.pem"):
        assert (directory / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_documented_openssl_commands_make_what_the_server_takes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    commands = re.search(r"```bash\n(openssl req -x509.*?)```", text, re.S)
    assert commands
    script = commands[1].replace("IP:192.0.2.7", "IP:127.0.0.1")
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, capture_output=True, check=True, timeout=BOUND_S)
    check_server_files(read(tmp_path))
    with tls_server(tmp_path) as port:
        check_server("127.0.0.1", port, client_context((tmp_path / "ca.pem").read_bytes()), 5.0)


# -- connecting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hosts", "begins_in_days", "days", "said"), [
    (["127.0.0.1"], -10.0, 5.0, "has expired"),
    (["127.0.0.1"], 2.0, 5.0, "is not valid yet"),
    (["fl.example.org"], -1.0, 5.0, "was not made for 127.0.0.1"),
])  # fmt: skip
def test_a_certificate_that_is_not_one_for_the_server_is_told_of(
    tmp_path: Path, hosts: list[str], begins_in_days: float, days: float, said: str
) -> None:
    directory = certificates(tmp_path / "c", *hosts, begins_in_days=begins_in_days, days=days)
    with tls_server(directory) as port, pytest.raises(ConnectionFailedError, match=said):
        check_server("127.0.0.1", port, client_context((directory / "ca.pem").read_bytes()), 5.0)


def test_a_certificate_of_another_ca_is_told_of(tmp_path: Path) -> None:
    other = (certificates(tmp_path / "other") / "ca.pem").read_bytes()
    with tls_server(certificates(tmp_path / "c")) as port, pytest.raises(ConnectionFailedError, match="not signed by"):
        check_server("127.0.0.1", port, client_context(other), 5.0)
    with pytest.raises(UsageError, match="--root-certificates"):
        client_context(b"not a certificate")


def test_two_sides_of_which_one_speaks_tls_are_told_apart(tmp_path: Path) -> None:
    directory = certificates(tmp_path / "c")
    with (
        tls_server(directory) as port,
        pytest.raises(ConnectionFailedError, match="speaks TLS and this client does not"),
    ):
        check_server("127.0.0.1", port, None, 5.0)
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    with answering(settings) as port:
        check_server("127.0.0.1", port, None, 5.0)
        with pytest.raises(ConnectionFailedError, match="does not speak TLS, this client does"):
            check_server("127.0.0.1", port, client_context((directory / "ca.pem").read_bytes()), 5.0)
        with pytest.raises(ConnectionFailedError, match="leave out --engine superlink"):
            check_server("127.0.0.1", port, None, 5.0, grpc=False)
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        check_server("127.0.0.1", port, None, 5.0, grpc=False)
        with pytest.raises(ConnectionFailedError, match="--engine superlink"):
            check_server("127.0.0.1", port, None, 5.0)
    with (
        answering(b"SSH-2.0-OpenSSH_9.2") as port,
        pytest.raises(ConnectionFailedError, match="not a server of fedsplit"),
    ):
        check_server("127.0.0.1", port, None, 5.0)
    with answering(b"") as port, pytest.raises(OSError, match="closed the connection"):
        check_server("127.0.0.1", port, None, 5.0)


# -- the programs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_over_tls_the_run_completes_while_those_who_do_not_belong_are_refused(tmp_path: Path) -> None:
    directory = certificates(tmp_path / "certificates")
    expired = tmp_path / "expired"
    expired.mkdir()
    for name in ("ca.pem", "ca-key.pem"):
        (expired / name).write_bytes((directory / name).read_bytes())
    certificates(expired, begins_in_days=-10, days=5)
    ca = ("--root-certificates", str(directory / "ca.pem"))
    with programs(tmp_path, ranks=5, server_flags=("--rounds", "3", *server_flags(directory))) as federation:
        federation.start("server")
        federation.start("client-1", *ca)
        federation.wait_for("server", "rank 1: client connected")
        with tls_server(expired) as impostor:
            # The same CA, but a certificate that has expired; a name that is not in the certificate; no TLS at all.
            federation.start("client-3", *ca, "--server-address", f"127.0.0.1:{impostor}")
            federation.start("client-4", *ca, "--server-address", f"localhost:{federation.port}")
            federation.start("client-5")
            refused = ["client-3", "client-4", "client-5"]
            assert federation.wait(names=refused) == dict.fromkeys(refused, 7), federation.tails()
        federation.start("client-2", *ca)
        for rank in (1, 2):
            federation.start(f"model-{rank}")
        names = ["server", "client-1", "client-2", "model-1", "model-2"]
        assert set(federation.wait(names=names).values()) == {0}, federation.tails()
        for rank, said in (
            (3, "has expired"),
            (4, "was not made for localhost"),
            (5, "speaks TLS and this client does not"),
        ):
            lines = federation.log(f"client-{rank}").strip().splitlines()
            assert len(lines) == 1
            assert said in lines[0]
        assert [line["accepted"] for line in federation.history()] == [2, 2, 2]


@pytest.mark.slow
def test_a_client_that_expects_tls_leaves_a_server_without_it(tmp_path: Path) -> None:
    directory = certificates(tmp_path / "certificates")
    with programs(tmp_path) as federation:
        federation.start("server")
        federation.wait_for("server", "waiting for clients")
        federation.start("client-1", "--root-certificates", str(directory / "ca.pem"))
        assert federation.wait(names=["client-1"]) == {"client-1": 7}, federation.tails()
        assert "does not speak TLS, this client does" in federation.log("client-1")


@pytest.mark.slow
def test_a_server_does_not_start_with_an_expired_certificate(tmp_path: Path) -> None:
    directory = certificates(tmp_path / "certificates", begins_in_days=-10, days=5)
    with programs(tmp_path, server_flags=server_flags(directory)) as federation:
        federation.start("server")
        assert federation.wait(names=["server"]) == {"server": 2}
        assert "expired on" in federation.log("server")
