"""Writes a minimal project of your own: a workload, a rule of aggregation, and the five commands that run them.

    python -m fedsplit new my_project

Nothing that exists is overwritten. my_project/README.md has the commands.
"""

import argparse
import importlib.util
import keyword
from importlib.resources import files
from pathlib import Path

from fedsplit import cli
from fedsplit.disk.files import write_chunks
from fedsplit.errors import UsageError

# Stands for the project's name in the template's files, and here in the paths that they get.
_PLACEHOLDER = "PROJECT"
_FILES = {
    "README.md.in": "README.md", "pyproject.toml.in": "pyproject.toml", "workload.py": "PROJECT/workload.py",
    "rules.py": "PROJECT/rules.py",
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    cli.make_tool(parser, run)
    parser.add_argument("project", type=Path, metavar="NAME",
        help="the directory to make; its last part is the name of the project and of its package")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.project
    check_name(directory.name)
    if directory.exists():
        raise UsageError(f"{directory} exists already; choose another name")
    for path, text in render(directory.name).items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_chunks(target, [text.encode()])
        print(target)
    print(f"\nnext: cd {directory}, and do what README.md says")
    return 0


def check_name(name: str) -> None:
    """Raise UsageError unless a package may be called so."""
    if not name.isidentifier() or not name.isascii() or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be the name of a Python package; use letters, digits and _, as in my_project"
        )
    if importlib.util.find_spec(name) is not None:
        raise UsageError(f"there is a package {name} already, which the new one would hide; choose another name")


def render(name: str) -> dict[str, str]:
    """Return the project's files by their paths in it."""
    template = files("fedsplit.commands") / "template"
    texts = {target: (template / source).read_text(encoding="utf-8") for source, target in _FILES.items()}
    texts[f"{_PLACEHOLDER}/__init__.py"] = ""
    return {target.replace(_PLACEHOLDER, name): text.replace(_PLACEHOLDER, name) for target, text in texts.items()}
