"""A study's file: TOML whose keys are flags of ``python -m fedsplit run``, and the runs that it asks for.

docs/studies.md says how it is written. A ``command`` is not varied over: ``{seed}``, ``{alpha}`` and the like in it are
filled in here, and ``{rank}``, ``{exchange_dir}`` and ``{checkpoint_dir}`` by ``run``.
"""

import difflib
import hashlib
import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.errors import UsageError
from fedsplit.study.results import SEED, as_text, label_of

_OPTIONS = "options"
_COMMAND = "command"
_FORBIDDEN = re.compile(r"[^\w.+-]+")
_PLACEHOLDER = re.compile(r"\{([\w-]+)\}")
_LONGEST_NAME = 150


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run: its directory's name, and a value for every key of the file; an option's is ``options.alpha``."""

    name: str
    settings: Mapping[str, Any]

    def words(self) -> list[str]:
        """Return the flags of ``python -m fedsplit run``, without those for places and the command."""
        found = []
        for key, setting in self.settings.items():
            option = key.removeprefix(f"{_OPTIONS}.")
            for each in setting if isinstance(setting, list) else [setting]:
                if key == _COMMAND or (option != key and _COMMAND in self.settings) or each is False:
                    continue
                if option != key:
                    found.append(f"--workload-option={option}={as_text(each)}")
                else:
                    found.append(f"--{key}" if each is True else f"--{key}={as_text(each)}")
        return found

    def command(self) -> list[str]:
        """Return the words of the user's own script; none without one."""
        values = {label_of(key): as_text(setting) for key, setting in self.settings.items() if key != _COMMAND}
        words = self.settings.get(_COMMAND, [])
        return [_PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), word) for word in words]


def read_study(path: Path | None, changes: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """Read a study's file, if there is one, with changes such as ``("options.alpha", "[0.1, 0.5]")``.

    A change whose value is no TOML is taken as text. Raises UsageError for what cannot be read.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError) as exc:
        raise UsageError(str(getattr(exc, "strerror", None) or exc)) from exc
    for key, text in changes:
        name = key.removeprefix(f"{_OPTIONS}.")
        (table if name == key else _options(table))[name] = _read_value(text)
    return table


def _options(table: dict[str, Any]) -> dict[str, Any]:
    if isinstance(options := table.setdefault(_OPTIONS, {}), dict):
        return options
    raise UsageError(f"{_OPTIONS}: expected a table of workload options, as in [options], found {options!r}")


def _read_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def plan_runs(table: dict[str, Any], flags: Collection[str]) -> list[PlannedRun]:
    """Return the runs of a study in order, those that differ only in the seed side by side.

    A key must be one of the `flags`, ``options`` or ``command``; raises UsageError for anything else.
    """
    _check_keys(table, flags)
    command, options = table.get(_COMMAND), _options(table)
    if command is not None:
        _check_command(command, options)
    settings = {key: each for key, each in table.items() if key not in (_COMMAND, _OPTIONS, SEED)}
    settings |= {f"{_OPTIONS}.{key}": each for key, each in options.items()} | {SEED: table.get(SEED, 0)}
    choices = {key: _choices(key, each) for key, each in settings.items()}
    fixed = {} if command is None else {_COMMAND: command}
    combinations = [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]
    varied = [key for key, each in settings.items() if isinstance(each, list) or key == SEED]
    names = [_name({key: each[key] for key in varied}) for each in combinations]
    times = Counter(names)
    return [
        PlannedRun(name=name if times[name] == 1 else f"{name[:_LONGEST_NAME]}-{_digest(each)}", settings=each | fixed)
        for name, each in zip(names, combinations, strict=True)
    ]


def _check_keys(table: Mapping[str, Any], flags: Collection[str]) -> None:
    known = [*flags, _OPTIONS, _COMMAND]
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(sorted(known))}"
            raise UsageError(f"{key}: python -m fedsplit run has no such flag that a study may set{meant}")


def _choices(key: str, setting: Any) -> list[Any]:
    """Return the values that a key takes; raises UsageError for none, for two that are equal, and for odd ones."""
    choices = setting if isinstance(setting, list) else [setting]
    if not choices:
        raise UsageError(f"{key}: expected at least one value, found an empty list")
    for choice in choices:
        if any(not isinstance(each, str | int | float) for each in (choice if isinstance(choice, list) else [choice])):
            raise UsageError(f"{key}: expected a text, a number, true or false, or a list of these, found {choice!r}")
        if sum(as_text(each) == as_text(choice) for each in choices) > 1:
            raise UsageError(f"{key}: {as_text(choice)} stands there twice")
    return choices


def _check_command(command: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise UsageError(f'{_COMMAND}: expected a list of words, as in ["python", "train.py"], found {command!r}')
    used = {name for word in command for name in _PLACEHOLDER.findall(word)}
    if lacking := [name for name in ("rank", "exchange_dir", "checkpoint_dir") if name not in used]:
        raise UsageError(
            f"{_COMMAND}: put {{{lacking[0]}}} into one of its words: it is another one for every run or rank"
        )
    if unused := [key for key in options if key not in used]:
        raise UsageError(
            f"{_OPTIONS}.{unused[0]}: the command does not use it; put {{{unused[0]}}} into one of its words"
        )


def _name(varied: Mapping[str, Any]) -> str:
    """Return a name for a directory, as in ``aggregate=median,alpha=0.1,seed=0``."""
    parts = [f"{label_of(key)}={_FORBIDDEN.sub('-', as_text(each)).strip('-')}" for key, each in varied.items()]
    name = ",".join(parts)
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}-{_digest(varied)}"


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
