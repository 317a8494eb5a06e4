"""What a server is started with: the server's flags and the run config of ``flwr run``, one to one.

A run config holds only numbers, texts and truth values. So what may be absent is an empty text or 0 there, and what may
be given several times is one text with semicolons: ``aggregate = "bn*=local; fedavg"``.

This module imports neither torch nor Flower, so that a wrong flag is told of at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsplit.aggregation.grammar import parse_call
from fedsplit.aggregation.spec import RuleSpec, parse_rules
from fedsplit.errors import UsageError
from fedsplit.exchange.records import Scalar

_REPEATABLE = ("aggregate", "tracker", "train_config")
_ABSENT: dict[str, Scalar] = {"initial_checkpoint": "", "round_timeout": 0, "strategy": ""}
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
    seed: int = 0
    tracker: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rounds", "min_clients", "min_results"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
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
            for name in _OF_THE_RULES:
                if getattr(self, name) != getattr(ServerSettings, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} cannot go with --strategy: the strategy itself decides who trains "
                        "and how updates are merged; give it parameters, as in 'FedAvg(fraction_fit=0.5)'"
                    )
        _ = self.rules

    @cached_property
    def rules(self) -> tuple[RuleSpec, ...]:
        """The rules of the split."""
        return parse_rules(list(self.aggregate))

    @property
    def local_patterns(self) -> tuple[tuple[str, bool], ...]:
        """``(pattern, local)`` for every rule in order: what a trainer needs to know of the split."""
        return tuple((spec.pattern or "*", spec.name == "local") for spec in self.rules)

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
            config[name.replace("_", "-")] = _ABSENT[name] if value is None else value
        return config

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> ServerSettings:
        """Read a run config; raises UsageError for a value of the wrong kind. Keys of others are left alone."""
        keys = {field: field.name.replace("_", "-") for field in fields(cls)}
        return cls(**{field.name: _read(field, key, config[key]) for field, key in keys.items() if key in config})


def _read(field: Field[Any], key: str, value: Any) -> Any:
    name = field.name
    if name in _REPEATABLE:
        if not isinstance(value, str):
            raise UsageError(f"run config: {key}: expected a text with semicolons, not {value!r}")
        texts = [text.strip() for text in value.split(";") if text.strip()]
        return tuple(_pair(text) for text in texts) if name == "train_config" else tuple(texts)
    if name in _ABSENT and not value:
        return None
    if name in ("checkpoint_dir", "initial_checkpoint") and isinstance(value, str):
        return Path(value)
    kind = {"round_timeout": float, "strategy": str}.get(name, type(field.default))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"run config: {key} must be of type {kind.__name__}, not {value!r}")
    return value


def _pair(text: str) -> tuple[str, Scalar]:
    from fedsplit.cli import scalar

    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"run config: train-config: expected key=value, not {text!r}")
    return key.strip(), scalar(value.strip())
