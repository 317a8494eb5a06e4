"""Workloads by name: the built-in ones, and anybody's ``package.module:Factory``.

Importing this package loads neither torch nor a data set library. `sys.path` is left alone: whether a module in the
current directory can be imported is up to the script.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

from fedsplit.errors import WorkloadError
from fedsplit.workloads.base import EvaluateResult, StatefulWorkload, TrainResult, Workload, WorkloadContext
from fedsplit.workloads.options import OptionReader

__all__ = [
    "BUILT_IN", "EvaluateResult", "Factory", "OptionReader", "StatefulWorkload", "TrainResult", "Workload",
    "WorkloadContext", "create_workload", "load_workload",
]  # fmt: skip

Factory = Callable[[WorkloadContext], Workload]

BUILT_IN = {
    "digits": "fedsplit.workloads.digits:digits",
    "cifar10": "fedsplit.workloads.vision:cifar10",
    "mnist": "fedsplit.workloads.vision:mnist",
    "fashion-mnist": "fedsplit.workloads.vision:fashion_mnist",
}


def load_workload(name: str) -> Factory:
    """Find a workload's factory.

    Parameters
    ----------
    name : str
        A built-in name, or ``package.module:Factory``.

    Raises
    ------
    WorkloadError
        If there is no such workload. An exception out of the module itself comes through as it is, with the
        traceback that its author needs.
    """
    module_name, colon, attribute = BUILT_IN.get(name, name).partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise WorkloadError(
            f"unknown workload {name!r}: expected one of {', '.join(BUILT_IN)}, or MODULE:FACTORY such as "
            f"package.module:Factory (dots, no slashes, no .py)"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        # A module that the user's module imports may be missing as well: that traceback is the user's to see.
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise
        raise WorkloadError(
            f"workload {name!r}: there is no module {exc.name!r}; is it installed, or in the directory that "
            f"the program was started from?"
        ) from exc
    return _factory(module, attribute, name)


def create_workload(name: str, context: WorkloadContext) -> Workload:
    """Make a workload, and see that it has what a workload needs.

    Raises
    ------
    WorkloadError
        If there is no such workload, or what its factory returned is none: all that it lacks is named.
    """
    workload = load_workload(name)(context)
    if lacking := _lacking(workload):
        raise WorkloadError(
            f"workload {name!r}: its factory returned a {type(workload).__name__} that lacks "
            f"{', '.join(lacking)}; a workload has model, train(task) and evaluate(task)"
        )
    return workload


def _factory(module: Any, attribute: str, name: str) -> Factory:
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError as exc:
        raise WorkloadError(
            f"workload {name!r}: {module.__name__} ({getattr(module, '__file__', None)}) has no {attribute!r}"
        ) from exc
    if not callable(found):
        raise WorkloadError(f"workload {name!r}: expected a function or class to call, found a {type(found).__name__}")
    factory: Factory = found
    return factory


def _lacking(workload: object) -> list[str]:
    # Late: what has made a workload has loaded torch already, what only imports this package has not.
    import torch

    def has(method: str) -> bool:
        return callable(getattr(workload, method, None))

    model = getattr(workload, "model", None)
    lacking = [] if isinstance(model, torch.nn.Module) else [f"model (a torch.nn.Module; found {type(model).__name__})"]
    lacking += [f"{method}(task)" for method in ("train", "evaluate") if not has(method)]
    # One without the other would lose the state, or never find any, without a word.
    if has("local_state") != has("load_local_state"):
        lacking.append("load_local_state(state)" if has("local_state") else "local_state()")
    return lacking
