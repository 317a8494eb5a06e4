"""What a server is started with: the server's flags and the run config of ``flwr run``, one to one.

A run config holds only numbers, texts and truth values. So what may be absent is an empty text or 0 there, and what may
be given several times is one text with semicolons: ``aggregate = "bn*=local; fedavg"``.

This module imports neither torch nor Flower, so that a wrong flag is told of at once.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_type_hints

from msgspec import ValidationError, convert

from fedsplit.aggregation.grammar import parse_call
from fedsplit.aggregation.spec import RuleSpec, parse_rules
from fedsplit.aggregation.staleness import parse_staleness
from fedsplit.cli import key_scalar
from fedsplit.codecs.spec import parse_wire
from fedsplit.disk.identity import Verify
from fedsplit.errors import UsageError
from fedsplit.exchange.records import Scalar, SecureTerms

_REPEATABLE = ("aggregate", "tracker", "train_config", "wire")
_ABSENT: dict[str, Scalar] = {
    "initial_checkpoint": "", "round_timeout": 0, "strategy": "", "buffer": 0, "merge_after": 0, "max_staleness": -1,
}  # fmt: skip
# What a Flower strategy decides itself, so that a flag beside --strategy would say nothing.
_OF_THE_RULES = ("aggregate", "fraction_train", "min_results")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server's flags with their defaults, checked: raises UsageError for what cannot be."""

    rounds: int = 3
    min_clients: int = 2
    min_results: int = 1
    fraction_train: float = 1.0
    evaluate_every: int = 1
    aggregate: tuple[str, ...] = ()
    strategy: str | None = None
    checkpoint_dir: Path = Path("checkpoints")
    keep_checkpoints: int = 3
    resume: bool = False
    initial_checkpoint: Path | None = None
    round_timeout: float | None = None
    client_wait: float = 300.0
    train_config: tuple[tuple[str, Scalar], ...] = ()
    payload_store: str = "auto"
    verify: Verify = "auto"
    seed: int = 0
    tracker: tuple[str, ...] = ()
    balance: bool = False
    # How states and updates travel in messages.
    wire: tuple[str, ...] = ()
    # Asynchronous rounds: a merge after so many updates, or a round that ends with the first so many.
    buffer: int | None = None
    merge_after: int | None = None
    max_staleness: int | None = None
    staleness: str = "polynomial:0.5"
    mix_states: bool = False
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rounds", "min_clients", "min_results"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{_key(name)} must be at least 1, not {getattr(self, name)}")
        if not 0.0 < self.fraction_train <= 1.0:
            raise UsageError(f"--fraction-train must be above 0 and at most 1, not {self.fraction_train}")
        if self.evaluate_every < 0:
            raise UsageError(f"--evaluate-every must be 0 (never) or more, not {self.evaluate_every}")
        if self.keep_checkpoints < 2:
            raise UsageError("--keep-checkpoints must be at least 2: the newest checkpoint may be the corrupt one")
        if self.initial_checkpoint and not self.initial_checkpoint.is_file():
            raise UsageError(f"--initial-checkpoint {self.initial_checkpoint} does not exist")
        if self.strategy is not None:
            parse_call(self.strategy)
            if beside := [name for name in _OF_THE_RULES if getattr(self, name) != getattr(ServerSettings, name)]:
                raise UsageError(
                    f"--{_key(beside[0])} cannot go with --strategy: the strategy itself decides who trains and how "
                    "updates are merged; give it parameters, as in 'FedAvg(fraction_fit=0.5)'"
                )
        wire = parse_wire(self.wire)
        self._check_asynchronous()
        if self.secure_terms:
            secure = next(spec for spec in self.rules if spec.name == "secure")
            if wire:
                raise UsageError(f"--wire cannot go with {secure}: what is masked packs no better than noise")
            if self.is_asynchronous:
                raise UsageError(
                    f"{secure} cannot go with --buffer or --merge-after: the masks of a sum cancel out only when all "
                    "its updates are of one round"
                )

    def _check_asynchronous(self) -> None:
        parse_staleness(self.staleness)
        if not self.is_asynchronous:
            names = ("max_staleness", "staleness", "mix_states", "server_lr")
            if alone := [name for name in names if getattr(self, name) != getattr(ServerSettings, name)]:
                raise UsageError(f"--{_key(alone[0])} is for asynchronous rounds: give --buffer or --merge-after too")
            return
        if self.buffer is not None and self.merge_after is not None:
            raise UsageError("--buffer and --merge-after exclude each other: each says when updates are merged")
        flag, size = ("buffer", self.buffer) if self.buffer is not None else ("merge-after", self.merge_after or 0)
        if size < 1:
            raise UsageError(f"--{flag} must be at least 1, not {size}")
        if size < self.min_results:
            raise UsageError(f"--{flag} {size} merges fewer updates than --min-results {self.min_results} asks for")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise UsageError(f"--max-staleness must be 0 or more, not {self.max_staleness}")
        if not 0 < self.server_lr < math.inf:
            raise UsageError(f"--server-lr must be above 0, not {self.server_lr}")
        if self.mix_states and self.buffer is None:
            raise UsageError("--mix-states goes with --buffer only")
        if self.strategy is not None:
            raise UsageError(
                f"--strategy cannot go with --{flag}: a Flower strategy chooses its clients for a round and merges "
                "what they sent at its end; take a rule, as --aggregate 'flower.FedAdam(eta=0.01)'"
            )

    @property
    def is_asynchronous(self) -> bool:
        """Whether updates are merged that started from an older state."""
        return self.buffer is not None or self.merge_after is not None

    @cached_property
    def rules(self) -> tuple[RuleSpec, ...]:
        """The rules of the split."""
        return parse_rules(self.aggregate)

    @property
    def local_patterns(self) -> tuple[tuple[str, bool], ...]:
        """``(pattern, local)`` for every rule in order: what a trainer needs to know of the split."""
        return tuple((spec.part, spec.name == "local") for spec in self.rules)

    @cached_property
    def secure_terms(self) -> SecureTerms | None:
        """How the parts of ``secure`` rules are summed; None without one."""
        specs = [spec for spec in self.rules if spec.name == "secure"]
        if not specs:
            return None
        threshold, neighbours = (
            {spec.params.get(name, default) for spec in specs}
            for name, default in (("threshold", 2 / 3), ("neighbours", 0))
        )
        if len(threshold) > 1 or len(neighbours) > 1:
            raise UsageError(
                f"{specs[0]} and {specs[1]} differ in threshold or neighbours: there is one sum of all secure parts; "
                "give them the same, only the ranges may differ"
            )
        return SecureTerms(
            ranges={spec.part: float(spec.params["range"]) for spec in specs}, threshold=float(threshold.pop()),
            neighbours=neighbours.pop(),
        )  # fmt: skip

    def is_evaluated(self, server_round: int) -> bool:
        """Tell whether a round ends with an evaluation."""
        return self.evaluate_every > 0 and server_round % self.evaluate_every == 0

    def to_run_config(self) -> dict[str, Scalar]:
        """Return the settings as a run config; paths become absolute, since the app runs elsewhere."""
        config: dict[str, Scalar] = {}
        for name, value in asdict(self).items():
            if name == "train_config":
                value = [f"{key}={content}" for key, content in value]
            if name in _REPEATABLE:
                value = "; ".join(value)
            elif isinstance(value, Path):
                value = str(value.absolute())
            config[_key(name)] = _ABSENT[name] if value is None else value
        return config

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a run config; raises UsageError for a value of the wrong kind. Keys of others are left alone."""
        kinds = {name: kind for name, kind in get_type_hints(cls).items() if _key(name) in config}
        return cls(**{name: _read(name, kind, config[_key(name)]) for name, kind in kinds.items()})


def _key(name: str) -> str:
    return name.replace("_", "-")


def _read(name: str, kind: Any, value: Any) -> Any:
    try:
        if name in _REPEATABLE:
            texts = [text.strip() for text in convert(value, str).split(";") if text.strip()]
            return tuple(map(key_scalar, texts) if name == "train_config" else texts)
        return None if name in _ABSENT and value == _ABSENT[name] else convert(value, kind, dec_hook=_path)
    except (ValidationError, ArgumentTypeError) as exc:
        raise UsageError(f"run config: {_key(name)}: {exc}; found {value!r}") from exc


def _path(kind: type[Path], value: Any) -> Path:
    return kind(value)
