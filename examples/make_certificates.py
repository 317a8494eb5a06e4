"""Makes a certificate authority and a server certificate, for tests and for federations without a CA of their own.

    pip install trustme
    python examples/make_certificates.py --directory certificates --host fl.example.org --host 192.0.2.7

writes ``ca.pem`` (give it to every client), ``ca-key.pem`` (keep it offline), ``server.pem`` and ``server-key.pem``:

    python server_main.py --address 0.0.0.0:8080 --ssl-ca-certfile certificates/ca.pem \\
        --ssl-certfile certificates/server.pem --ssl-keyfile certificates/server-key.pem
    python client_main.py --server-address fl.example.org:8080 --root-certificates ca.pem
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from fedsplit.disk.files import write_chunks

try:
    import trustme
except ImportError as exc:
    raise SystemExit("make_certificates.py needs trustme, which is not installed: pip install trustme") from exc

# A client whose clock is behind the server's takes a new certificate too.
CLOCK_SLACK = datetime.timedelta(minutes=5)


def make_certificates(
    directory: Path, hosts: Sequence[str], *, begins: datetime.datetime | None = None, days: float = 365.0
) -> None:
    """Write a CA and a certificate for some hosts; a CA that is there already signs the new certificate.

    Clients reach the server under `hosts`, names and addresses. The server's certificate is valid for so many `days`
    from `begins` on, by default from now.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca_path, ca_key_path = directory / "ca.pem", directory / "ca-key.pem"
    if ca_key_path.exists():
        ca = trustme.CA.from_pem(ca_path.read_bytes(), ca_key_path.read_bytes())
    else:
        ca = trustme.CA(organization_name="fedsplit", path_length=0)
        # Not by write_to_path: these files are nobody else's, and never half written.
        write_chunks(ca_key_path, [ca.private_key_pem.bytes()])
        write_chunks(ca_path, [ca.cert_pem.bytes()])
    begins = begins or datetime.datetime.now(datetime.UTC) - CLOCK_SLACK
    until = begins + datetime.timedelta(days=days)
    server = ca.issue_cert(*hosts, organization_name="fedsplit", not_before=begins, not_after=until)
    write_chunks(directory / "server-key.pem", [server.private_key_pem.bytes()])
    write_chunks(directory / "server.pem", [server.cert_chain_pems[0].bytes()])


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("certificates"), metavar="DIR", help="where they go")
    parser.add_argument("--host", action="append", metavar="NAME", help="a name or address of the server; repeatable")
    parser.add_argument("--days", type=float, default=365.0, metavar="N", help="how long the certificate is valid")
    arguments = parser.parse_args()
    make_certificates(arguments.directory, arguments.host or ["localhost", "127.0.0.1"], days=arguments.days)
    print(f"wrote ca.pem, ca-key.pem, server.pem and server-key.pem to {arguments.directory}")


if __name__ == "__main__":
    main()
