"""The documentation says what is so: it builds without a warning, its commands run, its messages are in the source.

A block marked ``sh`` is run, all blocks of a page in order and in one empty directory, as a reader would. One that
cannot run has a comment before it, ``<!-- not run: the reason -->``. The commands of every other block are at least
read by the parser of the program that they name.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bounds import BOUND_S
from tests.programs import ROOT, free_port

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
# With tests of their own, which go through the page's blocks.
ELSEWHERE = {"own-training.md": "test_examples.py"}
BLOCK = re.compile(r"(?:<!-- *(?P<marker>not run.*?) *-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
SCRIPTS = {"server_main.py": "server_main", "client_main.py": "client_main", "model_main.py": "model_main"}


def blocks(page: Path) -> Iterator[re.Match[str]]:
    return BLOCK.finditer(page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[list[str]]:
    """Return every command of our programs that a page shows, in words."""
    for block in blocks(page):
        if block["language"] not in ("", "sh", "bash"):
            continue
        text = block["text"].replace("\\\n", " ")
        for line in text.splitlines():
            if not line.startswith(("python ", "fedsplit ")):
                continue
            # Two commands side by side are two terminals.
            for part in re.split(r" {3,}(?=python |fedsplit )| [|&]+ *| && ", line):
                if re.match(r"python (-m fedsplit|\w+_main\.py)\b|fedsplit [a-z]", part):
                    yield [
                        word
                        for word in shlex.split(part.removesuffix("&"), comments=True)
                        if word not in ("python", "…")
                    ]


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    import client_main
    import model_main
    import server_main
    from fedsplit import __main__ as command_line

    modules = {"server_main": server_main, "client_main": client_main, "model_main": model_main}
    if words[0] in SCRIPTS:
        return modules[SCRIPTS[words[0]]].make_parser(), words[1:]
    if words[0] == "fedsplit":
        return command_line.make_parser(), words[1:]
    assert words[:2] == ["-m", "fedsplit"]
    return command_line.make_parser(), words[2:]


def test_every_command_on_every_page_is_one_that_its_program_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsplit.aggregation.spec import parse_rules
    from fedsplit.commands.new import check_name
    from fedsplit.errors import UsageError

    refused, count = [], 0
    for page in PAGES:
        for words in commands(page):
            count += 1
            parser, arguments = parser_of(words)
            try:
                parsed = parser.parse_args(arguments)
                if not any(rule.startswith("@") for rule in getattr(parsed, "aggregate", [])):
                    parse_rules(getattr(parsed, "aggregate", []))
                if getattr(parsed, "command", "") == "new":
                    check_name(parsed.project.name)
            except (SystemExit, ValueError, UsageError) as exc:
                refused.append(f"{page.name}: {shlex.join(words)}: {exc} {capsys.readouterr().err.splitlines()[-1:]}")
    assert refused == []
    assert count > 30, "the pages have commands"


def test_a_block_that_is_not_run_says_why_and_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for block in blocks(page):
            if block["marker"] is not None:
                assert re.match(r"not run[^:]*: .{10,}", block["marker"]), f"{page.name}: {block[0]}"
            for target in re.findall(r"^make ([\w-]+)", block["text"], re.M):
                assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


def runnable(page: Path) -> list[str]:
    if page.name in ELSEWHERE:
        return []
    found = [block["text"] for block in blocks(page) if block["language"] == "sh" and block["marker"] is None]
    # `make test` runs this test; `make check` is what CI runs, and that the targets exist is tested above.
    return [text for text in found if not all(line.startswith("make ") for line in text.splitlines())]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_order_in_an_empty_directory(page: Path, tmp_path: Path) -> None:
    for name in (*SCRIPTS, "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    # The port of the pages may be in use here.
    address, script = f"127.0.0.1:{free_port()}", "\n".join(runnable(page))
    # What is installed already is not fetched again.
    script = re.sub(r"^pip install .*$", "true", script, flags=re.M)
    script = script.replace("server_main.py", f"server_main.py --address {address}")
    script = script.replace("client_main.py", f"client_main.py --server-address {address}")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out.log").open("w") as log:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait(BOUND_S)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
    assert code == 0, (tmp_path / "out.log").read_text()[-3000:]


def test_the_completion_knows_commands_and_flags(tmp_path: Path) -> None:
    shtab = pytest.importorskip("shtab", reason="pip install shtab")
    from fedsplit.__main__ import make_parser

    parser = make_parser()
    parser.prog = "fedsplit"
    (tmp_path / "fedsplit.bash").write_text(shtab.complete(parser, shell="bash"))
    script = """
        source fedsplit.bash
        COMP_WORDS=(fedsplit repo); COMP_CWORD=1; _shtab_fedsplit fedsplit repo fedsplit; echo ${COMPREPLY[@]}
        COMP_WORDS=(fedsplit export --o); COMP_CWORD=2; _shtab_fedsplit fedsplit --o export; echo ${COMPREPLY[@]}
    """
    said = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=BOUND_S
    )
    assert said.stdout.split() == ["report", "--output"]


def test_pages_that_are_tested_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        assert not (ROOT / "docs" / page).exists() or page in (ROOT / "tests" / test).read_text(), (
            f"{test} tests {page}"
        )


# -- messages ----------------------------------------------------------------------------------------------------------


def templates() -> set[str]:
    """Return every text of the source, with … for what is filled in."""
    found = set()
    for path in (ROOT / "fedsplit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%(\.\d+)?[sdgrf]", "…", node.value))
    return found


def test_every_message_of_the_troubleshooting_page_is_in_the_source_word_for_word() -> None:
    known = templates()
    messages = [
        line
        for block in blocks(ROOT / "docs/troubleshooting.md")
        if block["language"] == "text"
        for line in block["text"].splitlines()
    ]
    assert len(messages) > 30
    unknown = [
        message
        for message in messages
        # What ends in … stands for any end.
        if message not in known and not (message.endswith("…") and any(each.startswith(message[:-1]) for each in known))
    ]
    assert unknown == []


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module, reason="pip install 'fedsplit[docs]'")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S)
    assert built.returncode == 0, built.stderr
    assert {page.stem for page in PAGES if page.parent.name == "docs"} <= {
        page.stem for page in tmp_path.glob("*.html")
    }
    pages = "".join(page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html"))
    fetched = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', pages)
    assert fetched == [], "a page of the site fetches nothing from elsewhere"


def test_pictures_are_drawn_for_both_themes_and_say_what_they_show() -> None:
    for picture in (ROOT / "docs/images").glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        assert "<title" in text, picture.name
        # A terminal is dark on any page.
        assert "prefers-color-scheme: dark" in text or "#14171c" in text, picture.name
        assert not re.search(r"(?:href|src)=\"https?:|url\(\"?https?:", text), picture.name


# -- links into the code -----------------------------------------------------------------------------------------------


def line_of(path: Path, name: str) -> int:
    """Return the line at which a function or class of a module begins."""
    found: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = next(node for node in getattr(found, "body", []) if getattr(node, "name", None) == part)
    return int(getattr(found, "lineno", 0))


def test_a_link_into_the_code_leads_to_the_line_where_its_name_begins() -> None:
    links = re.findall(
        r"\[`([\w.]+)`\]\(\.\./(fedsplit/[\w/]+\.py)#L(\d+)\)", (ROOT / "docs/architecture.md").read_text()
    )
    assert len(links) > 10
    wrong = [
        f"{name} of {path} begins at line {line_of(ROOT / path, name)}, not {line}"
        for name, path, line in links
        if line_of(ROOT / path, name) != int(line)
    ]
    assert wrong == []


def test_the_picture_of_the_rooms_is_that_of_todays_imports() -> None:
    specification = importlib.util.spec_from_file_location("rooms", ROOT / "docs/images/rooms.py")
    assert specification and specification.loader
    rooms = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(rooms)
    assert rooms.OUTPUT.read_text(encoding="utf-8") == rooms.draw(rooms.rooms()), "run python docs/images/rooms.py"
