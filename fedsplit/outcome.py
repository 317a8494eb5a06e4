"""How an app tells the script that started its engine how it ended: a small file that the script named.

Under the deployment engine the server and the relays run in processes of Flower's, whose exit codes reach nobody.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedsplit import errors
from fedsplit.errors import FedSplitError
from fedsplit.files import write_json


def write_outcome(path: str, error: FedSplitError | None) -> None:
    """Write how it ended; does nothing without a path, as under a plain ``flwr run``."""
    if path:
        write_json(Path(path), {"error": type(error).__name__ if error else None, "message": str(error or "")})


def read_outcome(path: Path) -> tuple[bool, FedSplitError | None]:
    """Return whether it has ended, and with which error."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False, None
    if record["error"] is None:
        return True, None
    kind = getattr(errors, str(record["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, FedSplitError)):
        kind = FedSplitError
    return True, kind(str(record["message"]))
