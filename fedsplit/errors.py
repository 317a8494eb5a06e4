"""The exceptions of fedsplit: one tree, an exit code for each class.

A message says what was expected, what was found, where, and what to do next, so that the line a program prints
before it exits is enough to go on. The tree::

    FedSplitError                 1
    ├── UsageError                2   a flag or an argument cannot work (also a ValueError)
    │   ├── OutOfRangeError       2   an update is beyond the range of its secure rule
    │   └── MissingPackageError   2   an optional package is needed and not installed
    ├── ExchangeError             3   the exchange directory cannot be used: permissions, space, ownership
    │   ├── RoleTakenError        4   a live process already holds this role of this rank
    │   ├── NoSpaceError          3   a disk is full; who can wait for space does
    │   ├── DirectoryLostError    3   the directory was removed or replaced while it was in use
    │   └── RecordError           5   a record or payload on the exchange is not what the protocol says
    │       └── SchemaError       5   a record is of another version of the protocol
    ├── StateMismatchError        6   two state_dicts do not have the same keys, shapes or dtypes
    ├── ConnectionFailedError     7   the server cannot be reached, or cannot listen
    │   └── RefusedError          8   the server turned this client away
    ├── PeerMissingError          9   the process on the other side stayed away longer than allowed
    ├── TrainingError            10   the trainer's own code failed
    │   └── TaskOverError        10   a task was given up, or begun anew, between two of its steps
    ├── WorkloadError            11   a workload cannot be loaded or lacks a method; its data is not there
    ├── AggregationError         12   a rule of aggregation cannot work, or returned what it must not
    ├── CheckpointError          13   a checkpoint cannot be written or read
    ├── RunStoppedError          14   the server was stopped before the run was complete
    └── RunFailedError           15   the run cannot go on: no initial state, no space, no clients
"""


class FedSplitError(Exception):
    """Root of every error that fedsplit raises on purpose."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        # A class without a code of its own has its parent's.
        cls.exit_code = cls.exit_code if exit_code is None else exit_code


class UsageError(FedSplitError, ValueError, exit_code=2): ...


class OutOfRangeError(UsageError): ...


class MissingPackageError(UsageError):
    """An optional package is not installed; `wanted_by` is what needs it, such as ``the workload digits``."""

    def __init__(self, wanted_by: str, package: str, extra: str) -> None:
        super().__init__(f"{wanted_by} needs {package}, which is not installed: pip install 'fedsplit[{extra}]'")


class ExchangeError(FedSplitError, exit_code=3): ...


class NoSpaceError(ExchangeError):
    """A disk is full; what was being written is as it was before."""


class DirectoryLostError(ExchangeError): ...


class RoleTakenError(ExchangeError, exit_code=4): ...


class RecordError(ExchangeError, exit_code=5): ...


class SchemaError(RecordError):
    """A record is of another version of the protocol: waiting will not mend it."""


class StateMismatchError(FedSplitError, exit_code=6): ...


class ConnectionFailedError(FedSplitError, exit_code=7): ...


class RefusedError(ConnectionFailedError, exit_code=8): ...


class PeerMissingError(FedSplitError, exit_code=9): ...


class TrainingError(FedSplitError, exit_code=10): ...


class TaskOverError(TrainingError):
    """A task was given up, or begun anew, while its script waited for the other half of the model."""


class WorkloadError(FedSplitError, exit_code=11): ...


class AggregationError(FedSplitError, exit_code=12): ...


class CheckpointError(FedSplitError, exit_code=13): ...


class RunStoppedError(FedSplitError, exit_code=14): ...


class RunFailedError(FedSplitError, exit_code=15): ...
