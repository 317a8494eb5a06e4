"""What all programs share: the three scripts are the three commands, a mistake is one line and an exit code."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import client_main
import model_main
import server_main
from fedsplit import __main__ as command_line
from fedsplit import cli
from fedsplit.engines.processes import free_port
from fedsplit.errors import MissingPackageError, UsageError
from fedsplit.run.directory import STATE_FILE, Run
from tests.bounds import BOUND_S
from tests.in_process import Scripts
from tests.programs import ROOT

SCRIPTS = {"server": server_main, "client": client_main, "trainer": model_main}


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command of ``python -m fedsplit``."""
    for action in command_line.make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[name]  # type: ignore[no-any-return]
    raise AssertionError("there are no commands")


def all_parsers() -> dict[str, argparse.ArgumentParser]:
    scripts = {module.__name__: module.make_parser() for module in SCRIPTS.values()}
    commands = next(a for a in command_line.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return scripts | commands.choices


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_and_its_command_take_the_same_flags_and_run_the_same(name: str) -> None:
    script, command = SCRIPTS[name].make_parser(), command_parser(name)
    assert script.format_help().partition("options:")[2] == command.format_help().partition("options:")[2]
    assert script.get_default("run") is command.get_default("run")
    assert script.prog.endswith("_main.py")
    assert command.prog.endswith(f"fedsplit {name}")


def test_every_help_names_a_default_and_every_flag_in_seconds_says_so() -> None:
    silent = []
    for name, parser in all_parsers().items():
        for action in parser._actions:
            given = not action.option_strings or action.required or action.nargs == 0
            text = parser.formatter_class("x")._get_help_string(action) or ""  # type: ignore[attr-defined]
            if not given and "default" not in text and "repeatable" not in text and "TLS" not in text:
                # The files of TLS: the first one says that without it there is none.
                silent += [f"{name} {action.option_strings[0]}"] if action.metavar != "FILE" else []
            if action.metavar == "S" and "seconds" not in text:
                silent.append(f"{name} {action.option_strings[0]}: in what unit?")
    assert silent == []


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("client", "--rank 0", "argument --rank/-rank: expected a positive integer, not '0'"),
        ("client", "--rank one", "argument --rank/-rank: expected a positive integer, not 'one'"),
        ("client", "--max-wait 0", "argument --max-wait: expected a number of seconds above 0, not '0'"),
        ("client", "--max-wait nan", "argument --max-wait: expected a number of seconds above 0, not 'nan'"),
        ("client", "--ran 1", "unrecognized arguments: --ran 1"),
        ("server", "--evaluate-every -1", "argument --evaluate-every: expected 0 or a positive integer, not '-1'"),
        ("server", "--train-config lr", "argument --train-config: expected key=value, not 'lr'"),
        ("trainer", "--state lose", "argument --state: invalid choice: 'lose'"),
    ],
)
def test_a_flag_that_argparse_refuses_is_one_line_that_names_the_program(
    name: str, flags: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, words in ((SCRIPTS[name].main, flags.split()), (command_line.main, [name, *flags.split()])):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("client", "--server-address localhost", "expected HOST:PORT"),
        ("client", "--root-certificates missing.pem", "--root-certificates missing.pem: No such file or directory"),
        ("client", "--supernode-private-key key", "works with --engine superlink only"),
        ("server", "--address here", "expected HOST:PORT"),
        ("server", "--aggregate fedagv", "fedavg"),
        ("server", "--keep-checkpoints 1", "at least 2"),
        ("server", "--fraction-train 0", "above 0"),
        ("server", "--ssl-certfile missing.pem", "--ssl-certfile missing.pem: No such file or directory"),
        ("server", "--supernode-public-key key", "works with --engine superlink only"),
    ],
)
def test_a_flag_that_cannot_work_is_one_line_and_exit_code_2(
    name: str, flags: str, said: str, scripts: Scripts, tmp_path: Path
) -> None:
    ended = scripts.run(SCRIPTS[name].__name__, *flags.split())
    assert ended.code == UsageError.exit_code
    (line,) = ended.errors.splitlines()
    assert line.startswith(f"{name}: error: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--strategy no_such_module:Mine", "cannot import 'no_such_module'"),
        ("--strategy json:NoSuchClass", "has no class 'NoSuchClass'"),
        ("--strategy FedAvg(fraction_fitt=0.5)", "refuses its parameters"),
        ("--aggregate no_such_module:rule", "cannot import 'no_such_module'"),
        ("--aggregate json:no_such_rule", "'json' has no function 'no_such_rule'"),
        ("--aggregate dp(json:no_such_rule,clip=1.0,noise=1.0)", "'json' has no function 'no_such_rule'"),
        ("--aggregate flower.FedNothing", "FedNothing"),
    ],
)
def test_a_wrong_strategy_or_rule_leaves_the_earlier_run_as_it_is(
    flags: str, said: str, scripts: Scripts, tmp_path: Path
) -> None:
    with Run(tmp_path / "checkpoints") as run:
        run.checkpoints.save(run_id=run.run_id, server_round=1, files={STATE_FILE: [b"state"]}, metrics={}, info={})
    before = contents(tmp_path)
    assert any(path.name == STATE_FILE for path in before)
    ended = scripts.run("server_main", "--address", f"127.0.0.1:{free_port()}", *flags.split())
    assert (ended.code, said in ended.errors) == (UsageError.exit_code, True), ended.errors
    assert contents(tmp_path) == before


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_only_some_of_the_files_of_tls_are_refused(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("")
    ended = scripts.run("server_main", "--ssl-ca-certfile", "ca.pem")
    assert ended.code == UsageError.exit_code
    assert "TLS needs all of --ssl-ca-certfile, --ssl-certfile, --ssl-keyfile" in ended.errors


@pytest.mark.parametrize(
    ("argv0", "expected"),
    [
        ("/home/me/fedsplit/__main__.py", "python -m fedsplit server -r 1"),
        ("server_main.py", "python server_main.py server -r 1"),
        ("/home/me/.venv/bin/fedsplit", "fedsplit server -r 1"),
    ],
)
def test_the_typed_command_is_recorded_as_typed(argv0: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [argv0, "server", "-r", "1"])
    assert " ".join(cli.typed_command()) == expected


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    assert str(MissingPackageError("the workload digits", "scikit-learn", "digits")) == (
        "the workload digits needs scikit-learn, which is not installed: pip install 'fedsplit[digits]'"
    )
    assert MissingPackageError.exit_code == UsageError.exit_code


# -- what is imported --------------------------------------------------------------------------------------------------

HEAVY = ("torch", "flwr", "grpc", "numpy", "sklearn", "matplotlib", "torchvision", "rich", "cryptography")


@pytest.mark.parametrize(
    "statement",
    ["import fedsplit", "import fedsplit.__main__; fedsplit.__main__.make_parser()", "import client_main, server_main"],
)
def test_a_parser_is_there_before_anything_heavy_is_imported(statement: str) -> None:
    code = f"import sys; {statement}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == []


def test_flowers_client_is_imported_without_databases_which_still_open_when_they_are_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; from fedsplit.engines.flower_client import start_client; print('sqlalchemy' in sys.modules)\n"
        "from flwr.supercore.object_store import ObjectStoreFactory\n"
        "for name in (':flwr-in-memory:', sys.argv[1]): print(type(ObjectStoreFactory(name).store()).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "objects.db")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BOUND_S, check=True)
    assert said.stdout.split() == ["False", "InMemoryObjectStore", "SqlObjectStore"]


def test_flowers_client_is_imported_whole_where_that_fails() -> None:
    """As in a release that takes something else from the store that is left out; here the first import fails."""
    code = (
        "import sys\n"
        "class Once:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.endswith('.in_memory_object_store'):\n"
        "            sys.meta_path.remove(self)\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Once())\n"
        "from fedsplit.engines.flower_client import start_client\n"
        "print(start_client.__name__, 'sqlalchemy' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=BOUND_S)
    assert said.stdout.split() == ["start_client", "True"], said.stderr


def test_the_scripts_do_nothing_but_call_their_command() -> None:
    for module in SCRIPTS.values():
        assert isinstance(module, ModuleType)
        assert len(Path(str(module.__file__)).read_text().splitlines()) < 40
