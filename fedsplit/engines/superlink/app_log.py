"""What an app under the deployment engine tells the script that started the engine: its log, its process, how it ended.

Under SuperLink and SuperNode the server and the relays run in processes of Flower's, whose output and exit codes reach
nobody. So they append to a file that the script named in the run config or the node config, one JSON object a line, and
the script goes on from there as if it had been said by itself. Without such a file, as under a plain ``flwr run``, they
log to stderr, which is where `flwr log` looks.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from fedsplit import errors
from fedsplit.disk.files import append_line
from fedsplit.errors import FedSplitError

log = logging.getLogger("fedsplit")

_LOOK_S = 0.1


class Reporter(logging.Handler):
    """Appends what an app has to say to the script's file.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._write({"pid": os.getpid()})

    def emit(self, record: logging.LogRecord) -> None:
        """Report a line of the log."""
        message = record.getMessage()
        if record.exc_info and record.levelno > logging.DEBUG:
            message = self.format(record)
        extra = {name: getattr(record, name) for name in ("event", "data") if hasattr(record, name)}
        self._write({"level": record.levelno, "log": message, "extra": extra})

    def end(self, error: Exception | None) -> None:
        """Report how it ended."""
        self._write({"ended": type(error).__name__ if error else None, "message": str(error or "")})

    def _write(self, record: dict[str, Any]) -> None:
        append_line(self._path, json.dumps(record, default=str))


class Reports:
    """Follows such a file, and logs what it says.

    Attributes
    ----------
    pid : int or None
        The app's process, the newest if there were several.
    ended : bool
        Whether it has reported its end.
    error : FedSplitError or None
        The error that it ended with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pid: int | None = None
        self.ended = False
        self.error: FedSplitError | None = None
        self._offset = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name="reports", daemon=True)
        path.touch(mode=0o600)
        self._thread.start()

    def close(self) -> None:
        """Read what is left and stop."""
        self._stop.set()
        self._thread.join()
        self.read()

    def read(self) -> None:
        """Read what has come since the last time."""
        with self._lock, self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                self._take(json.loads(line))

    def _follow(self) -> None:
        while not self._stop.wait(_LOOK_S):
            self.read()

    def _take(self, record: dict[str, Any]) -> None:
        if "log" in record:
            if log.isEnabledFor(record["level"]):
                log.log(record["level"], "%s", record["log"], extra=record["extra"])
        elif "pid" in record:
            self.pid = int(record["pid"])
        elif "ended" in record:
            self.error = None if record["ended"] is None else _error(record["ended"], record["message"])
            self.ended = True


def _error(name: str, message: str) -> FedSplitError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, FedSplitError):
        return kind(message)
    return FedSplitError(f"{name}: {message}")
