"""Log records that machines read too: an event is the fields beside a line's text under ``--log-format json``.

A line of JSON: ``{"time": "2026-01-31T12:00:00.000Z", "program": "server", "level": "info", "message": "…"}``, and with
an event ``"event": "round"`` and ``"data": {…}``; for a round the data are its line of ``history.jsonl``.
"""

import json
import logging
import math
import time
from typing import Any


def event(name: str, /, **data: Any) -> dict[str, Any]:
    """Return what a log call takes as ``extra``."""
    return {"event": name, "data": data}


class JsonFormatter(logging.Formatter):
    """Writes a record of a program as one line of JSON."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        began = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{began}.{int(record.msecs):03d}Z", "program": self._program, "level": record.levelname.lower(),
            "message": record.getMessage(),
        }  # fmt: skip
        line |= {name: finite(getattr(record, name)) for name in ("event", "data") if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, allow_nan=False, default=str)


def finite(value: Any) -> Any:
    """Return a value for JSON: numbers that it has no word for become null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_bytes(number: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def format_seconds(seconds: float) -> str:
    """Return a length of time for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
