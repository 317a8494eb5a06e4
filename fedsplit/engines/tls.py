"""TLS: mistakes are found before Flower connects, so that each is one line and not endless silence.

gRPC retries a handshake that fails for ever, and names no reason. So the server's files are checked before it listens,
and a client tries a handshake of its own before each connection. It tells apart a certificate that has expired, one
made for another host or by another CA, and a server that does not speak TLS where the client does, or the reverse. Each
of them ends the client.
"""

import contextlib
import datetime
import ipaddress
import logging
import socket
import ssl

from fedsplit.errors import ConnectionFailedError, UsageError

log = logging.getLogger("fedsplit")

_NO_TLS = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE")
_SOON = datetime.timedelta(days=14)
# What an HTTP/2 client sends first: the preface, and empty settings.
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS, _TLS_ALERT = 4, 21


def is_loopback(host: str) -> bool:
    """Tell whether every address of a host is a loopback address, which no other machine can reach."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return bool(addresses) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def check_exposure(host: str, *, encrypted: bool, insecure: bool, has_token: bool) -> None:
    """Refuse to listen where others could read and change what is said: without TLS, on anything but loopback.

    Raises UsageError, unless `insecure` is set; with a join token in any case.
    """
    if encrypted or is_loopback(host):
        return
    if has_token:
        raise UsageError(
            f"--join-token-file works over TLS or on loopback only: on {host} without TLS its proof could be passed on "
            "by whoever listens; add --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile"
        )
    if not insecure:
        raise UsageError(
            f"refusing to listen at {host} without TLS: everybody on the way could read and change the models; add "
            "--ssl-ca-certfile, --ssl-certfile and --ssl-keyfile (examples/make_certificates.py makes them), or say "
            "--insecure if the network itself is private"
        )


def check_server_files(certificates: tuple[bytes, bytes, bytes]) -> None:
    """Check CA certificate, server certificate and server key, PEM; warns if the server's expires soon.

    Raises UsageError if one is no PEM, or the certificate is not valid now, names no host, or is not the key's.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    what = "--ssl-ca-certfile holds no PEM certificate"
    try:
        x509.load_pem_x509_certificate(certificates[0])
        what = "--ssl-certfile holds no PEM certificate"
        certificate = x509.load_pem_x509_certificate(certificates[1])
        what = "--ssl-keyfile holds no unencrypted PEM private key"
        key = serialization.load_pem_private_key(certificates[2], password=None)
    except (ValueError, TypeError) as exc:
        raise UsageError(what) from exc
    if key.public_key() != certificate.public_key():
        raise UsageError("--ssl-keyfile is not the key of --ssl-certfile")
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound as exc:
        raise UsageError("--ssl-certfile names no host (subjectAltName), so no client could accept it") from exc
    now = datetime.datetime.now(datetime.UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        raise UsageError(f"--ssl-certfile expired on {ends:%Y-%m-%d %H:%M} UTC; make a new certificate")
    if now < begins:
        raise UsageError(f"--ssl-certfile is not valid before {begins:%Y-%m-%d %H:%M} UTC; is this clock right?")
    if now + _SOON > ends:
        log.warning("--ssl-certfile expires on %s UTC", f"{ends:%Y-%m-%d %H:%M}")


def client_context(root_certificates: bytes) -> ssl.SSLContext:
    """Return the TLS context that trusts these CA certificates and no others; raises UsageError if there are none."""
    try:
        context = ssl.create_default_context(cadata=root_certificates.decode())
    except (ssl.SSLError, ValueError) as exc:
        raise UsageError("--root-certificates holds no PEM certificate") from exc
    context.set_alpn_protocols(["h2"])
    return context


def check_server(host: str, port: int, context: ssl.SSLContext | None, timeout_s: float, *, grpc: bool = True) -> None:
    """Connect once, as the client will: with a context from `client_context`, or without TLS.

    `grpc` says whether the server must speak that, as the embedded engine does and a SuperLink does not. Raises
    ConnectionFailedError if it makes no sense to try again, OSError if the server is not there, or not yet.
    """
    where = f"{host}:{port}"
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        if context is None:
            _check_plaintext(connection, host, port, grpc)
            return
        try:
            context.wrap_socket(connection, server_hostname=host).close()
        except ssl.SSLCertVerificationError as exc:
            raise ConnectionFailedError(_certificate_problem(exc, where, host)) from exc
        except ssl.SSLError as exc:
            problem = f"no TLS connection to {where}: {exc.reason or exc}"
            if exc.reason in _NO_TLS:
                problem = (
                    f"the server at {where} does not speak TLS, this client does (--root-certificates); start the "
                    "server with --ssl-ca-certfile, --ssl-certfile and --ssl-keyfile"
                )
            raise ConnectionFailedError(problem) from exc


def _check_plaintext(connection: socket.socket, host: str, port: int, grpc: bool) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(_HTTP2_HELLO)
    try:
        answer = connection.recv(9)
    except ConnectionResetError:
        answer = b""
    where, is_http2 = f"{host}:{port}", answer[3:4] == bytes([_HTTP2_SETTINGS])
    if answer[:1] == bytes([_TLS_ALERT]) or (not answer and _speaks_tls(host, port, connection.gettimeout())):
        problem = (
            f"the server at {where} speaks TLS and this client does not; give it the CA's certificate with "
            "--root-certificates"
        )
    elif not answer:
        # So does a server that is starting or ending.
        raise ConnectionResetError("it closed the connection at once")
    elif grpc and answer.startswith(b"HTTP/"):
        problem = f"the server at {where} runs on a SuperLink; start this client with --engine superlink"
    elif grpc and not is_http2:
        problem = f"what answers at {where} is not a server of fedsplit; check --server-address"
    elif not grpc and is_http2:
        problem = f"the server at {where} runs on the embedded engine; leave out --engine superlink"
    else:
        return
    raise ConnectionFailedError(problem)


def _speaks_tls(host: str, port: int, timeout_s: float | None) -> bool:
    """Tell whether a server answers a TLS handshake, with whatever certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
    except OSError:
        return False
    return True


def _certificate_problem(exc: ssl.SSLCertVerificationError, where: str, host: str) -> str:
    match exc.verify_code:  # of OpenSSL's x509_vfy.h
        case 9:
            return f"the certificate of the server at {where} is not valid yet; are both clocks right?"
        case 10:
            return f"the certificate of the server at {where} has expired; it needs a new one (or this clock is wrong)"
        case 62 | 64:
            return (
                f"the certificate of the server at {where} was not made for {host}; use the name in the certificate as "
                "--server-address, or add this one to the certificate (subjectAltName)"
            )
    reason = exc.verify_message
    return f"the certificate of the server at {where} is not signed by a CA of --root-certificates ({reason})"
