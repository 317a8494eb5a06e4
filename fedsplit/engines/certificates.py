"""A certificate authority of one's own, and certificates from it: for tests, and for federations without another CA.

``examples/make_certificates.py`` is this as a command.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsplit.disk.files import write_chunks
from fedsplit.errors import UsageError

_CLOCK_SLACK = datetime.timedelta(minutes=5)


def make_certificates(
    directory: Path, hosts: Sequence[str], *, begins: datetime.datetime | None = None, days: float = 365.0
) -> None:
    """Write a CA and a certificate for some hosts; a CA that is there already signs the new certificate.

    Parameters
    ----------
    directory
        Where ``ca.pem``, ``ca-key.pem``, ``server.pem`` and ``server-key.pem`` go.
    hosts
        The names and addresses under which clients reach the server.
    begins, days
        From when, and for how long, the server's certificate is valid.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca, ca_key = _load_or_make_ca(directory)
    key = ec.generate_private_key(ec.SECP384R1())
    begins = begins or datetime.datetime.now(datetime.UTC) - _CLOCK_SLACK
    certificate = (
        _builder(_name("fedsplit server"), ca.subject, key, begins, days)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write_key(directory / "server-key.pem", key)
    write_chunks(directory / "server.pem", [certificate.public_bytes(serialization.Encoding.PEM)])


def _load_or_make_ca(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = directory / "ca.pem", directory / "ca-key.pem"
    if key_path.exists():
        loaded = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise UsageError(f"{key_path} is no elliptic curve key")
        return x509.load_pem_x509_certificate(certificate_path.read_bytes()), loaded
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    name = _name("fedsplit CA")
    certificate = (
        _builder(name, name, key, datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1), 3650)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write_key(key_path, key)
    write_chunks(certificate_path, [certificate.public_bytes(serialization.Encoding.PEM)])
    return certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begins: datetime.datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + datetime.timedelta(days=days))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_chunks(path, [content])
