"""Workloads by name: built-in ones, MODULE:FACTORY, and what is said when there is none."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.errors import UsageError, WorkloadError
from fedsplit.workloads import BUILT_IN, StatefulWorkload, WorkloadContext, create_workload, load_workload

CONTEXT = WorkloadContext(rank=1)
_serial = itertools.count()

GOOD = """
import torch
class Workload:
    def __init__(self, context): self.model, self.context = torch.nn.Linear(1, 1), context
    def train(self, task): pass
    def evaluate(self, task): pass
class Group:
    Factory = Workload
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module that can be imported, under a name of its own; return the name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"users_module_{next(_serial)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_name_has_a_factory(name: str) -> None:
    assert callable(load_workload(name))


def test_a_factory_of_ones_own_is_called_with_the_context(module: Callable[[str], str]) -> None:
    name = module(GOOD)
    assert create_workload(f"{name}:Workload", CONTEXT).context is CONTEXT  # type: ignore[attr-defined]
    assert load_workload(f"{name}:Group.Factory").__name__ == "Workload"


@pytest.mark.parametrize("name", ["digit", "", "a/b.py:F", "a.py:", ":F", ".a:F", "a:b:c", "a b:F"])
def test_an_unknown_name_lists_the_names_and_the_form(name: str) -> None:
    with pytest.raises(WorkloadError, match=r"digits, cifar10, mnist, fashion-mnist, or MODULE:FACTORY"):
        load_workload(name)


@pytest.mark.parametrize("name", ["no_such_module:F", "no_such_package.module:F", "fedsplit.no_such:F"])
def test_a_module_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(WorkloadError, match=r"no module '(no_such_module|no_such_package|fedsplit.no_such)'"):
        load_workload(name)


def test_an_attribute_that_is_not_there_is_named_with_the_file(module: Callable[[str], str]) -> None:
    name = module(GOOD)
    with pytest.raises(WorkloadError, match=rf"{name}\.py.*has no 'Factory'"):
        load_workload(f"{name}:Factory")


def test_an_attribute_that_cannot_be_called_is_refused(module: Callable[[str], str]) -> None:
    with pytest.raises(WorkloadError, match="found a int"):
        load_workload(f"{module(GOOD)}:number")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_dependency", ModuleNotFoundError),
        ("raise ImportError('mine')", ImportError),
        ("1 / 0", ZeroDivisionError),
        ("def", SyntaxError),
    ],
)
def test_an_error_inside_the_users_module_comes_through(
    module: Callable[[str], str], source: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        load_workload(f"{module(source)}:F")


def test_everything_that_a_workload_lacks_is_named(module: Callable[[str], str]) -> None:
    name = module("class F:\n    train = 3\n    def __init__(self, context): self.model = 'x'")
    with pytest.raises(WorkloadError, match=r"lacks model .*found str\), train\(task\), evaluate\(task\)"):
        create_workload(f"{name}:F", CONTEXT)


def test_half_of_the_local_state_is_refused(module: Callable[[str], str]) -> None:
    name = module(GOOD + "Workload.local_state = lambda self: {}")
    with pytest.raises(WorkloadError, match=r"lacks load_local_state\(state\)"):
        create_workload(f"{name}:Workload", CONTEXT)


def test_a_workload_with_both_halves_is_stateful() -> None:
    assert isinstance(create_workload("digits", CONTEXT), StatefulWorkload)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_unknown_option_is_refused_before_any_data_is_read(name: str, tmp_path: Path) -> None:
    context = WorkloadContext(rank=1, data_dir=tmp_path, options={"epoch": "1"})
    with pytest.raises(UsageError, match=r"no option epoch; it knows: alpha, batch-size, epochs, "):
        create_workload(name, context)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_digits_train_without_an_import_of_torchs_compiler() -> None:
    program = (
        "import sys, fedsplit, fedsplit.workloads as w\n"
        "digits = w.create_workload('digits', w.WorkloadContext(rank=1))\n"
        "with fedsplit.Trainer(1, digits.model, standalone=True, standalone_rounds=1) as trainer:\n"
        "    for task in trainer:\n"
        "        task.load_into(digits.model)\n"
        "        if task.kind == 'evaluate':\n"
        "            task.reply(loss=digits.evaluate(task).loss, num_examples=1)\n"
        "        else:\n"
        "            task.reply(digits.model, num_examples=digits.train(task).num_examples)\n"
        "digits.load_local_state(digits.local_state())\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_the_package_loads_no_torch_and_digits_neither_sklearn_nor_torchvision() -> None:
    program = (
        "import sys, fedsplit.workloads as w\n"
        "print(sorted({'torch', 'numpy', 'sklearn', 'torchvision', 'flwr', 'grpc'} & set(sys.modules)))\n"
        "w.create_workload('digits', w.WorkloadContext(rank=1))\n"
        "print(sorted({'sklearn', 'torchvision', 'flwr', 'grpc'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
