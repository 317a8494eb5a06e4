"""What a server is started with: the flags of ``server_main.py`` and the run config of ``flwr run``, one to one.

A run config holds only numbers, texts and truth values. So what may be absent is an empty text or 0 there, and what may
be given several times is one text with semicolons: ``aggregate = "bn*=local; fedavg"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import UsageError
from fedsplit.exchange.records import Scalar
from fedsplit.watch.trackers import parse_tracker

if TYPE_CHECKING:
    from fedsplit.server.server import Server
    from fedsplit.server.settings import StrategySettings
    from fedsplit.wire.protocol import Engine

_SEPARATOR = ";"
_REPEATABLE = ("aggregate", "tracker")
_ABSENT: dict[str, Scalar] = {"initial_checkpoint": "", "round_timeout": 0}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """A server's options; the fields are its flags, with their defaults."""

    rounds: int = 3
    min_clients: int = 2
    min_results: int = 1
    fraction_train: float = 1.0
    evaluate_every: int = 1
    aggregate: tuple[str, ...] = ()
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
        if self.rounds < 1:
            raise UsageError(f"--rounds must be at least 1, not {self.rounds}")
        if self.keep_checkpoints < 2:
            raise UsageError("--keep-checkpoints must be at least 2: the newest checkpoint may be the corrupt one")
        if self.initial_checkpoint and not self.initial_checkpoint.is_file():
            raise UsageError(f"--initial-checkpoint {self.initial_checkpoint} does not exist")
        for text in self.tracker:
            parse_tracker(text)

    def settings(self) -> StrategySettings:
        """Return how rounds are shaped; raises UsageError for a rule that cannot be read."""
        from fedsplit.aggregation.spec import parse_rules
        from fedsplit.server.settings import StrategySettings

        return StrategySettings(
            rules=parse_rules(list(self.aggregate)),
            min_clients=self.min_clients,
            min_results=self.min_results,
            fraction_train=self.fraction_train,
            evaluate_every=self.evaluate_every,
            train_config=dict(self.train_config),
            seed=self.seed,
        )

    @contextmanager
    def server(
        self, engine: Engine, *, join_key: bytes | None = None, live: bool = False, command: Sequence[str] = ()
    ) -> Iterator[Server]:
        """Open the run, make its server, and watch it.

        Parameters
        ----------
        engine
            Which of Flower's engines it will run on.
        join_key
            What a client must prove to know before it takes part.
        live
            Whether a live table is wanted.
        command
            What the server was started with, for the report.
        """
        from fedsplit.disk.remote_store import open_remote
        from fedsplit.run.directory import Run
        from fedsplit.server.server import Server
        from fedsplit.server.settings import initial_from
        from fedsplit.watch.attach import watching

        settings = self.settings()
        run = Run(
            self.checkpoint_dir,
            keep_checkpoints=self.keep_checkpoints,
            resume=self.resume,
            settings={**self.to_run_config(), "engine": engine.name},
            initial=initial_from(self.initial_checkpoint),
        )
        with run:
            server = Server(
                run,
                settings,
                rounds=self.rounds,
                round_timeout_s=self.round_timeout,
                client_wait_s=self.client_wait,
                remote=open_remote(self.payload_store),
                offer_store=self.payload_store == "auto",
                join_key=join_key,
                engine=engine,
            )
            with watching(server, live=live, rounds=self.rounds, trackers=self.tracker, command=command):
                yield server

    def to_run_config(self) -> dict[str, Scalar]:
        """Return the options as a run config; paths become absolute, since the app runs elsewhere."""
        config: dict[str, Scalar] = {}
        values: dict[str, Any] = asdict(self)
        for name, value in values.items():
            key = name.replace("_", "-")
            if name in _REPEATABLE:
                config[key] = f"{_SEPARATOR} ".join(value)
            elif name == "train_config":
                config[key] = f"{_SEPARATOR} ".join(f"{each}={content}" for each, content in value)
            elif isinstance(value, Path):
                config[key] = str(value.absolute())
            else:
                config[key] = _ABSENT[name] if value is None else value
        return config

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> ServerOptions:
        """Read a run config; keys that are no option are left alone, they may be another's.

        Raises
        ------
        UsageError
            If a value is of the wrong kind.
        """
        values = {}
        for field in fields(cls):
            key = field.name.replace("_", "-")
            if key in config:
                values[field.name] = _read(field.name, config[key], field.default)
        return cls(**values)


def _read(name: str, value: Any, default: Any) -> Any:
    if name in _REPEATABLE:
        return tuple(_split(name, value))
    if name == "train_config":
        return tuple(_pair(text) for text in _split(name, value))
    if name in _ABSENT and not value:
        return None
    if name in ("checkpoint_dir", "initial_checkpoint") and isinstance(value, str):
        return Path(value)
    kind = float if name == "round_timeout" else type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"run config: {name.replace('_', '-')} must be of type {kind.__name__}, not {value!r}")
    return value


def _split(name: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        raise UsageError(f"run config: {name.replace('_', '-')}: expected a text with semicolons, not {value!r}")
    return [text.strip() for text in value.split(_SEPARATOR) if text.strip()]


def _pair(text: str) -> tuple[str, Scalar]:
    from fedsplit.cli import scalar

    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"run config: train-config: expected key=value, not {text!r}")
    return key.strip(), scalar(value.strip())
