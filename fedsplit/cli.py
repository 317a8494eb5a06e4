"""What all programs share: parsers, flags and their types, logging, exit codes."""

import argparse
import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from fedsplit.errors import FedSplitError, UsageError
from fedsplit.exchange.records import Scalar
from fedsplit.run.events import JsonFormatter, event

log = logging.getLogger("fedsplit")

EXIT_INTERRUPTED = 130
N = TypeVar("N", int, float)
Runner: TypeAlias = Callable[[argparse.Namespace], int]


# -- parsers -----------------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a docstring as it is, and a flag with its default unless there is none or the help text names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Not `in (None, False)`: a default of 0 equals False, and is shown.
        has_none = action.default is None or action.default is False or action.default == []
        return action.help if has_none or "default" in (action.help or "") else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # The old spelling -rank is accepted and not shown.
        spellings = action.option_strings
        action.option_strings = [text for text in spellings if text.startswith("--") or len(text) == 2]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


def make_parser(doc: str, prog: str) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a docstring."""
    # No abbreviated flags: those that are unique today may not be so in the next release.
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def defaults(add_flags: Callable[[argparse.ArgumentParser], None]) -> dict[str, Any]:
    """Return what the flags of a program are when none is given, by their names in the namespace."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return vars(parser.parse_args([]))


def make_tool(parser: argparse.ArgumentParser, run: Runner) -> None:
    """Make a parser that of a command which looks at a run or makes something of one."""
    parser.set_defaults(run=run, program="fedsplit", log_format="text")
    parser.add_argument("-v", "--verbose", action="store_true", help="show debug lines too")


def make_program(parser: argparse.ArgumentParser, program: str, run: Runner, *, flower: bool = False) -> None:
    """Make a parser that of the server, a client or a trainer, whose name log lines begin with; `flower` logs too."""
    parser.set_defaults(run=run, program=program)
    flowers = ", and in text what Flower logs" if flower else ""
    parser.add_argument("-v", "--verbose", action="store_true", help=f"show debug lines too{flowers}")
    parser.add_argument("--log-format", choices=("text", "json"), default="text",
        help="text: for people; json: for machines, one object a line on stderr")  # fmt: skip
    parser.add_argument("--verify", choices=("auto", "always"), default="auto",
        help="whether a state is digested again by whoever reads it. auto: not a file of this machine and this user "
        "that nobody may write, and that is as its writer left it; always: every one")  # fmt: skip


def add_files(parser: argparse.ArgumentParser, endings: Sequence[str]) -> None:
    """Add ``--checkpoint-dir`` and ``--output`` to a command that makes a file of a run."""
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="the server's --checkpoint-dir")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FILE",
        help=f"the file to write; its name ends in {' or '.join(endings)}")  # fmt: skip


def check_output(output: Path, endings: Sequence[str], flag: str = "--output") -> None:
    """Raise UsageError for a file name with another ending, or in a directory that does not exist."""
    if output.suffix not in endings:
        raise UsageError(f"{flag} {output}: expected a name that ends in {' or '.join(endings)}")
    if not output.parent.is_dir():
        raise UsageError(f"{flag} {output}: there is no directory {output.parent}")


# -- types of flags ----------------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a positive integer")


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, lambda value: value >= 0, "0 or a positive integer")


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def seconds(text: str) -> float:
    """Seconds, more than 0."""
    return _number(text, float, lambda value: value > 0, "a number of seconds above 0")


def _number(text: str, kind: Callable[[str], N], is_allowed: Callable[[N], bool], expected: str) -> N:
    with contextlib.suppress(ValueError):
        if is_allowed(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")


def key_value(text: str) -> tuple[str, str]:
    """``key=value``, both as text."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise argparse.ArgumentTypeError(f"expected key=value, not {text!r}")
    return key.strip(), value.strip()


def key_scalar(text: str) -> tuple[str, Scalar]:
    """``key=value``, the value as bool, int or float where it is one, else as text."""
    key, value = key_value(text)
    return key, scalar(value)


def scalar(text: str) -> Scalar:
    """Read a value as bool, int or float where it is one, else as text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def check_keys(engine: str, *, join_token_file: Path | None, keys: object, keys_flag: str) -> None:
    """Refuse the flag that tells the clients of the other engine apart."""
    if engine == "superlink" and join_token_file:
        raise UsageError(
            f"--join-token-file works with --engine embedded only; with --engine superlink, use {keys_flag}"
        )
    if engine == "embedded" and keys:
        raise UsageError(f"{keys_flag} works with --engine superlink only; here, use --join-token-file")


def read_file(path: Path | None, flag: str) -> bytes | None:
    """Read the file that a flag names; None if the flag was not given, UsageError if the file cannot be read."""
    try:
        return None if path is None else path.read_bytes()
    except OSError as exc:
        raise UsageError(f"{flag} {path}: {exc.strerror}") from exc


# -- running -----------------------------------------------------------------------------------------------------------


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse the flags, set up logging, run, and turn a FedSplitError into one line and its exit code.

    Anything else that is raised is a bug here or in the user's own code, and is shown with its traceback. Argparse
    raises SystemExit: 2 for flags that it does not take, 0 after ``--help``.
    """
    arguments = parser.parse_args(argv)
    program, log_format = arguments.program, arguments.log_format
    set_up_logging(program, verbose=arguments.verbose, log_format=log_format)
    # The user's own workloads and rules are modules in the working directory.
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109
        sys.path.insert(0, here)
    try:
        return int(arguments.run(arguments))
    except FedSplitError as exc:
        log.debug("where it came from", exc_info=exc)
        _say_last(program, log_format, f"error: {exc}", error=type(exc).__name__, exit_code=exc.exit_code)
        return exc.exit_code
    except KeyboardInterrupt as exc:
        code: int = getattr(exc, "exit_code", EXIT_INTERRUPTED)
        _say_last(program, log_format, str(exc) or "interrupted", exit_code=code)
        return code


def typed_command() -> list[str]:
    """Return the command that the user typed, as words, without the paths of this machine's Python."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return ["python", "-m", "fedsplit", *sys.argv[1:]]
    return ["python", *sys.argv] if program.suffix == ".py" else [program.name, *sys.argv[1:]]


def set_up_logging(program: str, *, verbose: bool, log_format: str = "text") -> None:
    """Log to stderr, one line an event, as text or as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter(f"%(asctime)s {program} %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter(program) if log_format == "json" else text)
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
    if log_format == "json":
        # An exception that nobody caught is one line too.
        sys.excepthook = lambda kind, exc, tb: log.critical("%s: %s", kind.__name__, exc, exc_info=(kind, exc, tb))


def _say_last(program: str, log_format: str, text: str, **data: object) -> None:
    if log_format == "json":
        log.error("%s", text, extra=event("exit", **data))
    else:
        print(f"{program}: {text}", file=sys.stderr)


def print_table(
    rows: Sequence[Sequence[str]], headings: Sequence[str] = (), *, styles: Sequence[str] = (),
    numbers: Sequence[str] = (), separator: str = "\t",
) -> None:  # fmt: skip
    """Print a table: aligned on a terminal, and one plain line a row elsewhere, for other programs to read.

    On a terminal each row has its style of rich's, if there are any, and the columns whose headings are in `numbers`
    stand to the right; elsewhere the `separator` stands between two cells.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        for row in [headings, *rows] if headings else rows:
            print(separator.join(row))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(headings))
    for heading in headings or [""] * len(rows[0]):
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*map(Text, row), style=style)
    console.print(table)


def count(number: int, noun: str) -> str:
    """Return a number and its noun: ``1 round``, ``2 rounds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
