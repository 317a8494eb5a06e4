"""Writes what a run did and how to repeat it as one HTML page.

    python -m fedsplit report --checkpoint-dir checkpoints --output report.html

The page needs no network and no script: it can be sent by mail, and reads well on a phone and in dark mode. It may be
written while the run is on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedsplit import cli
from fedsplit.commands.report_page import Report, render
from fedsplit.disk.checkpoints import CheckpointStore
from fedsplit.disk.files import write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.run.history import read_history
from fedsplit.run.paths import STATE_FILE, Places

_ENDINGS = (".html", ".htm")


def add_to(commands: cli.Commands) -> None:
    """Add the command's parser."""
    parser = cli.add_command(commands, "report", __doc__, run)
    cli.add_files(parser, endings=_ENDINGS)


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    output: Path = arguments.output
    cli.check_output(output, endings=_ENDINGS)
    report = read_report(Places(arguments.checkpoint_dir))
    write_chunks(output, [render(report).encode()])
    print(f"{output}: {cli.count(len(report.lines), 'round')} of run {report.run_id}")
    return 0


def read_report(places: Places) -> Report:
    """Read all that a page tells.

    Raises
    ------
    CheckpointError
        If there is no run, or it has no rounds yet.
    """
    try:
        record = json.loads(places.run.read_bytes())
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"no run in {places.server}: is it the server's --checkpoint-dir?") from exc
    lines = read_history(places.history)
    if not lines:
        raise CheckpointError(f"no rounds in {places.history} yet; is it the server's --checkpoint-dir?")
    server_round, digest = _newest_state(places)
    return Report(record=record, lines=lines, state_round=server_round, state_digest=digest)


def _newest_state(places: Places) -> tuple[int, str]:
    newest = CheckpointStore(places.server).newest()
    if newest is None:
        return 0, ""
    manifest: dict[str, Any] = json.loads(newest.path("manifest.json").read_bytes())
    return newest.server_round, str(manifest["files"][STATE_FILE]["sha256"])
