"""Makes a certificate authority and a server certificate, for tests and for federations without a CA of their own.

    python examples/make_certificates.py --directory certificates --host fl.example.org --host 192.0.2.7

writes ``ca.pem`` (give it to every client), ``ca-key.pem`` (keep it offline), ``server.pem`` and ``server-key.pem``:

    python server_main.py --address 0.0.0.0:8080 --ssl-ca-certfile certificates/ca.pem \\
        --ssl-certfile certificates/server.pem --ssl-keyfile certificates/server-key.pem
    python client_main.py --server-address fl.example.org:8080 --root-certificates ca.pem
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedsplit.engines.certificates import make_certificates


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
