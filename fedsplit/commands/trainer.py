"""Runs the trainer of a rank: the model, the data, the optimizer. It imports no Flower and knows no server.

    python -m fedsplit trainer --rank 1

Your own training instead of the shipped digits:

    python -m fedsplit trainer --rank 1 --workload my_package.my_module:make_workload

or a script of your own around `fedsplit.Trainer`: see docs/own-training.md. The upper part of a model that is
cut, beside the server; see docs/split-learning.md:

    python -m fedsplit trainer --part upper --cut features.2

In several processes, as one trainer:

    torchrun --standalone --nproc-per-node 2 -m fedsplit trainer --rank 1
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedsplit import cli
from fedsplit.errors import UsageError
from fedsplit.exchange.directory import Exchange, Place, place_name
from fedsplit.split_learning.order import MOST_WINDOW
from fedsplit.workloads import WorkloadContext, create_workload
from fedsplit.workloads.device import Launch, process_group, set_up_torch

if TYPE_CHECKING:
    import torch

log = logging.getLogger("fedsplit")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, and what is run."""
    add = parser.add_argument
    add("--rank", "-rank", type=cli.positive_int, default=1, metavar="K", help="rank of this trainer and its client")
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR",
        help="this rank's own state is kept in DIR/rank-K")  # fmt: skip
    add_workload(parser)
    add("--part", choices=("lower", "upper"),
        help="which part of a model that is cut is trained here: lower, at a rank (as with --cut); upper, beside the "
        "server, with the --exchange-dir of the server, and no rank (default: the whole model)")  # fmt: skip
    add_cut(parser)
    add("--num-partitions", type=cli.positive_int, default=2, metavar="N",
        help="into how many parts the data is divided; the same for every rank")  # fmt: skip
    add("--seed", type=cli.natural, default=0, metavar="N",
        help="seed for the initial model and for dividing the data; the same for every rank")  # fmt: skip
    add("--device", default="auto", metavar="auto|cpu|cuda|…", help="where to train; auto takes a GPU if there is one")
    add("--threads", type=cli.positive_int, metavar="N",
        help="threads to compute with (default: this machine's cores divided by --num-partitions)")  # fmt: skip
    add("--state", choices=("keep", "reset"), default="keep",
        help="keep: optimizer and generators go on from round to round; reset: each round starts fresh")  # fmt: skip
    add("--client-wait", type=cli.seconds, metavar="S",
        help="seconds to wait for this rank's client (default: forever)")  # fmt: skip
    add("--secure-only", action="store_true",
        help="send updates only into secure sums; one that the server asks for openly is refused")  # fmt: skip
    cli.make_program(parser, "trainer", run)


def add_cut(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `run` has too: where the model is cut."""
    add = parser.add_argument
    add("--cut", metavar="NAME", help="cut the workload's model after the module of this name (default: it is whole)")
    add("--tail", metavar="NAME",
        help="with --cut: cut it again after this module; what follows, and the labels, stay with the rank "
        "(default: the upper part is the last)")  # fmt: skip
    add("--window", type=_window, default=1, metavar="K",
        help="at a rank: hand over K batches at once. Their activations and gradients are those of the lower part at "
        "the first, so gradients of the others come late; for where a message takes long")  # fmt: skip
    add("--cut-dtype", choices=("float16", "bfloat16", "int8"),
        help="at a rank: round activations and gradients to this at the cut (default: as they are)")  # fmt: skip
    add("--cut-noise", type=cli.positive, metavar="SIGMA",
        help="at a rank: add Gaussian noise of this standard deviation to activations (default: none)")  # fmt: skip


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `run` and `demo` have too: what is trained, and where clients and trainers meet."""
    add = parser.add_argument
    add("--exchange-dir", type=Path, default=Path("exchange"), metavar="DIR",
        help="holds rank-K/, shared by client and trainer; a RAM disk such as /dev/shm is fastest")  # fmt: skip
    add("--workload", default="digits", metavar="MODULE:FACTORY",
        help="what to train: digits, mnist, fashion-mnist, cifar10, or a factory of your own")  # fmt: skip
    add("--workload-option", action="append", type=cli.key_value, default=[], metavar="KEY=VALUE",
        help="an option of the workload, for example partition=dirichlet; repeatable")  # fmt: skip
    add("--data-dir", type=Path, metavar="DIR", help="where data sets are (default: data)")


def run(arguments: argparse.Namespace) -> int:
    """Run the trainer until the run is over."""
    launch = Launch.read(os.environ)
    if launch.process == 0:
        # Before anything slow, so that a taken rank or an unusable directory is reported at once.
        with Exchange(arguments.exchange_dir, _place(arguments)).hold("trainer"):
            pass
    elif not arguments.verbose:
        # Each of its lines would only repeat process 0's.
        log.setLevel(logging.WARNING)
    who = "the upper part" if arguments.part == "upper" else f"rank {arguments.rank}"
    log.info("%s: starting (loading torch and the workload %s)", who, arguments.workload)
    device = set_up_torch(arguments.device, arguments.threads, arguments.num_partitions, launch)
    with process_group(device, launch):
        _train(arguments, device)
    return 0


def _train(arguments: argparse.Namespace, device: str) -> None:
    """Make the workload and answer every task of the run with it."""
    context = WorkloadContext(
        rank=arguments.rank, num_partitions=arguments.num_partitions, seed=arguments.seed, device=device,
        data_dir=arguments.data_dir, options=dict(arguments.workload_option),
    )  # fmt: skip
    cut = (arguments.part, arguments.cut, arguments.tail, arguments.cut_dtype, arguments.cut_noise)
    if any(cut) or arguments.window > 1:
        model, answer_all = _make_part(arguments, context)
    else:
        from fedsplit.workloads.runner import run_workload

        workload = create_workload(arguments.workload, context)
        model, answer_all = workload.model, partial(run_workload, workload=workload)

    from fedsplit.trainer.progress import Progress
    from fedsplit.trainer.trainer import Trainer

    place = _place(arguments)
    trainer = Trainer(
        place, model, exchange_dir=arguments.exchange_dir, checkpoint_dir=arguments.checkpoint_dir,
        state=arguments.state, client_wait_s=arguments.client_wait, verify=arguments.verify,
        secure_only=arguments.secure_only,
    )  # fmt: skip
    with trainer:
        answer_all(trainer, progress=Progress(arguments.rank, shown=trainer.process == 0))


def _make_part(arguments: argparse.Namespace, context: WorkloadContext) -> tuple[torch.nn.Module, Callable[..., None]]:
    """Return a part of a model that is cut, and what answers the tasks of a run with it."""
    import torch

    from fedsplit.split_learning.lower import LowerPart
    from fedsplit.split_learning.noise import CutNoise, read_secret
    from fedsplit.split_learning.upper import run_upper
    from fedsplit.split_learning.workload import create_split_workload
    from fedsplit.workloads.runner import run_workload

    is_upper, window, noise = arguments.part == "upper", arguments.window, None
    if is_upper and arguments.cut_dtype:
        raise UsageError("--cut-dtype is for the ranks: the upper part answers in what it is given")
    if is_upper and arguments.cut_noise:
        raise UsageError("--cut-noise is for the ranks: it is added to activations before they leave")
    if is_upper and window > 1:
        raise UsageError("--window is for the ranks: the upper part takes as many batches as come at once")
    workload, parts = create_split_workload(arguments.workload, context, cut=arguments.cut, tail=arguments.tail)
    if is_upper:
        return parts.beyond(), partial(run_upper, workload=workload, parts=parts)
    if parts.tail is not None and window > 1:
        raise UsageError(
            "--window cannot go with --tail: the loss is the rank's own, and the upper part could not go on without it"
        )
    if arguments.cut_noise:
        noise = CutNoise(arguments.cut_noise, read_secret(arguments.checkpoint_dir / place_name(arguments.rank)))
    dtype = arguments.cut_dtype and getattr(torch, arguments.cut_dtype)
    lower = LowerPart(workload, parts, context, dtype, noise, window)
    return lower.model, partial(run_workload, workload=lower)


def _window(text: str) -> int:
    """A number of batches from 1 to 100."""
    if not text.isdecimal() or not 0 < int(text) <= MOST_WINDOW:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MOST_WINDOW}, not {text!r}")
    return int(text)


def _place(arguments: argparse.Namespace) -> Place:
    return "upper" if arguments.part == "upper" else int(arguments.rank)
