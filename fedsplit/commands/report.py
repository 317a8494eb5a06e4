"""Writes what a run did and how to repeat it as one HTML page.

    python -m fedsplit report --checkpoint-dir checkpoints --output report.html

The page needs no network and no script: it can be sent by mail, and reads well on a phone and in dark mode. It may be
written while the run is on.
"""

from __future__ import annotations

import argparse
import json

from fedsplit import cli
from fedsplit.commands.plot import read_rounds
from fedsplit.commands.report_page import Report, render
from fedsplit.disk.checkpoints import CheckpointStore
from fedsplit.disk.files import write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.run.directory import STATE_FILE, Places

_ENDINGS = (".html", ".htm")


def add_to(commands: cli.Commands) -> None:
    """Add the command's parser."""
    cli.add_files(cli.add_command(commands, "report", __doc__, run), endings=_ENDINGS)


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    cli.check_output(arguments.output, endings=_ENDINGS)
    report = read_report(Places(arguments.checkpoint_dir))
    write_chunks(arguments.output, [render(report).encode()])
    print(f"{arguments.output}: {cli.count(len(report.lines), 'round')} of run {report.run_id}")
    return 0


def read_report(places: Places) -> Report:
    """Read all that a page tells; raises CheckpointError if there is no run, or it has no rounds yet."""
    try:
        record = json.loads(places.run.read_bytes())
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"no run in {places.server}: is it the server's --checkpoint-dir?") from exc
    lines = read_rounds(places.history)
    newest = CheckpointStore(places.server).newest()
    if newest is None:
        return Report(record=record, lines=lines)
    digest = newest.files[STATE_FILE]
    return Report(record=record, lines=lines, state_round=newest.server_round, state_digest=digest)
