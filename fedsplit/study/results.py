"""What runs came to: a few numbers of each, and over runs that differ only in the seed their mean and deviation.

The deviation is that of a sample (divided by n - 1), as papers print it; there is none of a single run. A number that
one of the runs lacks, such as a loss that became NaN, is missing for all of them: a mean over the others would flatter.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedsplit.errors import CheckpointError
from fedsplit.run.directory import Places
from fedsplit.run.history import JUDGED_BY, Line, read_rounds
from fedsplit.run.time_account import update_bytes
from fedsplit.watch.plot import Curve
from fedsplit.watch.rounds import metrics_at, ranks_of, value

SEED = "seed"
# What a server notes of itself and what no result depends on.
_BESIDE = ("checkpoint-dir", "resume", "keep-checkpoints", "payload-store", "tracker")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run: its settings as texts, but for the seed, and its history of at least one round."""

    directory: Path
    settings: Mapping[str, str]
    seed: str
    lines: Sequence[Line]

    @cached_property
    def numbers(self) -> dict[str, float]:
        """What it came to, by the name that a table shows; see `_judge` for those of accuracy and loss."""
        seconds = sum(line.get("seconds") or 0.0 for line in self.lines)
        return {
            **_judge(self.lines), "rounds": self.lines[-1]["round"], "seconds": seconds,
            "bytes a round": statistics.fmean(map(update_bytes, self.lines)),
        }  # fmt: skip

    def curve(self, name: str) -> dict[int, float]:
        """Return a test metric by round."""
        phase = _phase(self.lines)
        return {line["round"]: value(line, phase, name) for line in self.lines if metrics_at(line, phase)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in the seed: what tells them from the other groups, as text and by setting."""

    label: str
    varied: Mapping[str, str]
    runs: Sequence[Result]

    def numbers(self) -> dict[str, tuple[float, float]]:
        """Return mean and deviation of each of `Result.numbers`."""
        names = dict.fromkeys(name for run in self.runs for name in run.numbers)
        return {name: spread([run.numbers.get(name, math.nan) for run in self.runs]) for name in names}

    def curve(self, name: str) -> Curve:
        """Return mean and deviation of a test metric for each round that any of the runs evaluated."""
        curves = [run.curve(name) for run in self.runs]
        rounds = sorted({server_round for curve in curves for server_round in curve})
        return [(each, *spread([curve.get(each, math.nan) for curve in curves])) for each in rounds]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and deviation; NaN for what there is not."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def find_runs(directories: Iterable[Path]) -> list[Result]:
    """Read the runs of checkpoint directories; a directory of such directories, as of a study, stands for all of them.

    Raises CheckpointError for a directory without a run.
    """
    found = list[Path]()
    for directory in directories:
        is_of_many = directory.is_dir() and not Places(directory).server.exists()
        inside = [path for path in directory.iterdir() if Places(path).history.exists()] if is_of_many else []
        found += sorted(inside) or [directory]
    return [read_result(directory) for directory in dict.fromkeys(found)]


def read_result(directory: Path) -> Result:
    """Read a run: its history, and its settings as a study noted them, else as its server did.

    Raises CheckpointError if there is no round or if the settings cannot be read.
    """
    places = Places(directory)
    lines = read_rounds(places.history)
    try:
        if places.settings.exists():
            settings = json.loads(places.settings.read_bytes())
        else:
            settings = json.loads(places.run.read_bytes())["settings"]
        texts = {name: as_text(each) for name, each in settings.items() if name not in _BESIDE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"the settings of the run in {directory} cannot be read ({type(exc).__name__})") from exc
    seed = texts.pop(SEED, "0")
    # As many as there are: neither a run that is on nor one that went on for longer is put together with others.
    texts["rounds"] = str(lines[-1]["round"])
    return Result(directory=directory, settings=texts, seed=seed, lines=lines)


def as_text(setting: object) -> str:
    """Return a setting as it is typed; what may be given several times with semicolons, as in a run config."""
    if isinstance(setting, list):
        return "; ".join(map(as_text, setting))
    return str(setting).lower() if isinstance(setting, bool) else str(setting)


def group(results: Sequence[Result]) -> list[Group]:
    """Put runs together that differ only in the seed, in the order in which they come.

    Of runs that do not even differ in the seed each stands alone: something that nobody noted tells them apart.
    """
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(json.dumps(result.settings, sort_keys=True), []).append(result)
    members = list[list[Result]]()
    for runs in found.values():
        is_group = len({run.seed for run in runs}) == len(runs)
        members += [runs] if is_group else [[run] for run in runs]
    shared = [name for name in results[0].settings if all(name in result.settings for result in results)]
    names = [name for name in shared if len({result.settings[name] for result in results}) > 1]
    varied = [{label_of(name): runs[0].settings[name] for name in names} for runs in members]
    labels = [" ".join(f"{name}={text}" for name, text in each.items()) for each in varied]
    is_unique = {label: number == 1 for label, number in Counter(labels).items()}
    labels = [
        label if label and is_unique[label] else f"{label} {_describe(runs)}".strip()
        for label, runs in zip(labels, members, strict=True)
    ]
    return [
        Group(label=label, varied=each, runs=runs) for label, each, runs in zip(labels, varied, members, strict=True)
    ]


def label_of(setting: str) -> str:
    """Return what a setting is called in names and tables."""
    return setting.removeprefix("options.")


def _describe(runs: Sequence[Result]) -> str:
    return str(runs[0].directory) if len(runs) == 1 else f"{runs[0].directory} to {runs[-1].directory}"


def _phase(lines: Sequence[Line]) -> str:
    """Return what the run is judged by: the trainers' evaluation, else that on the server."""
    return "evaluate" if any(metrics_at(line, "evaluate") for line in lines) else "central"


def _judge(lines: Sequence[Line]) -> dict[str, float]:
    """Return accuracy and loss: of the last evaluation the mean over all test examples and the worst rank's, and the
    mean of the best round.
    """  # fmt: skip
    phase = _phase(lines)
    evaluated = [line for line in lines if metrics_at(line, phase)]
    found = dict[str, float]()
    for name, sign in JUDGED_BY.items():
        values = [value(line, phase, name) for line in evaluated]
        if there := [sign * number for number in values if not math.isnan(number)]:
            found |= {name: values[-1], f"best {name}": sign * max(there)}
            ranks = [value(evaluated[-1], phase, name, rank) for rank in ranks_of(lines)]
            if ranks := [sign * number for number in ranks if not math.isnan(number)]:
                found[f"worst rank's {name}"] = sign * min(ranks)
    return found
