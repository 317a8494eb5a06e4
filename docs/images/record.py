"""Records the server's terminal in a real run as an SVG: ``PYTHONPATH=. python docs/images/record.py``.

Three ranks train the digits; the trainer of rank 3 is killed in the fourth round, and the picture is taken while the
server waits for it.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.programs import Programs

OUTPUT = Path(__file__).with_name("live-table.svg")
WIDTH = 106
WAITED_FOR = "waiting for rank 3 (no trainer)"
# Rich's own, without the font that it would fetch, and with no more frame than a terminal has.
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>The server's terminal in a run of three ranks: the split, the rounds, and who is waited for</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect fill="#14171c" stroke="#4a525c" width="100%" height="100%" rx="10"/>
<g transform="translate({terminal_x}, 20)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


class Screen:
    """As much of a terminal as rich's live display needs: lines, a cursor that goes up, lines that are erased."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = 0

    def write(self, text: str) -> None:
        """Show what a program prints."""
        for piece in re.split(r"(\n|\r|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])", text):
            if piece == "\n":
                self._row += 1
                if self._row == len(self.lines):
                    self.lines.append("")
            elif piece.endswith("A") and piece.startswith("\x1b["):
                self._row = max(0, self._row - int(piece[2:-1] or 1))
            elif piece == "\x1b[2K":
                self.lines[self._row] = ""
            elif piece and piece != "\r" and "?25" not in piece:
                self.lines[self._row] += piece


def main() -> None:
    """Run, and draw what was seen."""
    with tempfile.TemporaryDirectory() as directory:
        flags = ("--rounds", "6", "--min-clients", "3", "--aggregate", "classifier.*=median", "--aggregate", "fedavg")
        draw(record(Programs(Path(directory), ranks=3, server_flags=flags)))


def record(programs: Programs) -> list[str]:
    """Return the lines that the terminal showed while the server waited for the trainer that was killed."""
    for name in programs.names[1:]:
        programs.start(name)
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, WIDTH, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    server = subprocess.Popen(
        programs.command("server"), cwd=programs.directory, stdin=end, stdout=end, stderr=end, env=environment
    )
    os.close(end)
    screen, seen, killed = Screen(), list[str](), False
    while server.poll() is None:
        try:
            screen.write(os.read(terminal, 1 << 16).decode(errors="replace"))
        except OSError:
            break
        if not killed and any("round 4 of 6: training" in line for line in screen.lines):
            programs.kill("model-3")
            killed = True
        if killed and not seen and any(re.search(re.escape(WAITED_FOR) + ", [3-9] s", line) for line in screen.lines):
            seen = list(screen.lines)
            programs.start("model-3")
    server.wait(30)
    programs.wait(names=programs.names[1:])
    return seen


def draw(lines: list[str]) -> None:
    """Write the picture."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False, force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    OUTPUT.write_text(console.export_svg(title="", code_format=FORMAT, unique_id="fedsplit"))


if __name__ == "__main__":
    main()
