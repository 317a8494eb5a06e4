"""What the scripts share: flags' types, logging, exit codes. Only here and in the scripts is the command line read."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from fedsplit.errors import FedSplitError, UsageError
from fedsplit.exchange.records import Scalar
from fedsplit.run.events import JsonFormatter, event

log = logging.getLogger("fedsplit")

EXIT_INTERRUPTED = 130
N = TypeVar("N", int, float)
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is, and each flag with its default unless that is None or the help names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Not `in (None, False)`: a default of 0 equals False and is one to show.
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Spellings such as -rank are accepted for those who are used to them, and not advertised.
        spellings = action.option_strings
        action.option_strings = [text for text in spellings if text.startswith("--") or len(text) == 2]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


def make_parser(doc: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows a module's docstring; it refuses short forms, which break when flags are added."""
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def add_command(
    commands: Commands, name: str, doc: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Add a command of ``python -m fedsplit``; its module's docstring is its help."""
    summary = doc.splitlines()[0].rstrip(".")
    parser = commands.add_parser(name, help=summary, description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.set_defaults(run=run, log_format="text")
    add_verbose(parser)
    return parser


def add_files(parser: argparse.ArgumentParser, *, endings: Sequence[str]) -> None:
    """Add ``--checkpoint-dir`` and ``--output`` to a command that makes a file of a run."""
    parser.add_argument(
        "--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR", help="the server's --checkpoint-dir"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=f"where to; a name ending in {' or '.join(endings)}"
    )


def check_output(output: Path, *, endings: Sequence[str]) -> None:
    """Raise UsageError for a file name with another ending, or in a directory that is not there."""
    if output.suffix not in endings:
        raise UsageError(f"--output {output}: expected a name ending in {' or '.join(endings)}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no directory {output.parent}")


def add_verbose(parser: argparse.ArgumentParser, *, flower: bool = False) -> None:
    """Add ``-v/--verbose``, to a program with Flower in it or to another."""
    shown = "show debug lines too, and as text what Flower logs" if flower else "show debug lines too"
    parser.add_argument("-v", "--verbose", action="store_true", help=shown)


def add_logging(parser: argparse.ArgumentParser, *, flower: bool = False) -> None:
    """Add ``-v/--verbose`` and ``--log-format``."""
    add_verbose(parser, flower=flower)
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text",
        help="text: for people; json: for machines, one object a line on stderr",
    )  # fmt: skip


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, 1, "a positive integer")


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, 0, "0 or a positive integer")


def seconds(text: str) -> float:
    """Seconds, more than 0."""
    value = _number(text, float, 0.0, "a number of seconds")
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, not {text!r}")
    return value


def key_value(text: str) -> tuple[str, str]:
    """``key=value``, both as text."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise argparse.ArgumentTypeError(f"expected key=value, not {text!r}")
    return key.strip(), value.strip()


def scalar(text: str) -> Scalar:
    """Read a value as bool, int or float where it is one, else as text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser,
        argv: Sequence[str] | None, program: str) -> int:  # fmt: skip
    """Parse, set up logging, run, and turn a FedSplitError into one line and its exit code.

    Anything else that is raised is a fault of ours or of the user's own code, and is shown with its traceback.
    """
    arguments = parser.parse_args(argv)
    set_up_logging(program, verbose=arguments.verbose, log_format=arguments.log_format)
    # Workloads and rules of one's own are looked for where the user stands.
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109
        sys.path.insert(0, here)
    try:
        return main(arguments) or 0
    except FedSplitError as exc:
        log.debug("where it came from", exc_info=exc)
        _say_last(program, arguments.log_format, f"error: {exc}", error=type(exc).__name__, exit_code=exc.exit_code)
        return exc.exit_code
    except KeyboardInterrupt:
        _say_last(program, arguments.log_format, "interrupted", exit_code=EXIT_INTERRUPTED)
        return EXIT_INTERRUPTED


def count(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural where it is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def read_file(path: Path | None, flag: str) -> bytes | None:
    """Read a file that a flag names; raises UsageError if it cannot be read."""
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(f"{flag} {path}: {exc.strerror}") from exc


def read_certificates(ca: Path | None, certificate: Path | None, key: Path | None) -> tuple[bytes, bytes, bytes] | None:
    """Read the server's three TLS files; None without them, UsageError with only some."""
    flags = {"--ssl-ca-certfile": ca, "--ssl-certfile": certificate, "--ssl-keyfile": key}
    contents = [read_file(path, flag) for flag, path in flags.items()]
    found = [content for content in contents if content is not None]
    if not found:
        return None
    if len(found) < len(flags):
        raise UsageError(f"TLS needs all of {', '.join(flags)}")
    return found[0], found[1], found[2]


def set_up_logging(program: str, *, verbose: bool, log_format: str = "text") -> None:
    """Log to stderr, a line an event, as text or as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter(f"%(asctime)s {program} %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter(program) if log_format == "json" else text)
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
    if log_format == "json":
        # Also what nobody caught is one line.
        sys.excepthook = lambda kind, exc, tb: log.critical("%s: %s", kind.__name__, exc, exc_info=(kind, exc, tb))


def _say_last(program: str, log_format: str, text: str, **data: object) -> None:
    if log_format == "json":
        log.error("%s", text, extra=event("exit", **data))
    else:
        print(f"{program}: {text}", file=sys.stderr)


def _number(text: str, kind: Callable[[str], N], least: N, expected: str) -> N:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}") from None
    if not value >= least:
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return value
