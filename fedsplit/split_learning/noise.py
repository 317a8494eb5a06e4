"""Gaussian noise on activations before they leave a rank.

What is promised: the activations of a batch get independent numbers of mean 0 and the given standard deviation, the
same ones when a task is done again, others in every round. Who does not know the rank's secret cannot draw them too.
Not promised: a bound on what the activations tell. Differential privacy would need activations of a bounded norm, and
an account of how often each example is sent. The generator is torch's, which is not made for cryptography.
"""

import hashlib
import secrets
from pathlib import Path

import torch

from fedsplit.disk.files import make_private_directory, open_regular, write_chunks
from fedsplit.errors import CheckpointError
from fedsplit.trainer.task import Task

_FILE, _SECRET_BYTES = "cut-noise.key", 32


class CutNoise:
    """Adds noise of a standard deviation `sigma`, drawn from a rank's `secret` and the task.

    Not from the seed, which the server may know: it could take the noise off again. And not from a generator that lives
    on: a task that is begun anew must draw what it drew before.
    """

    def __init__(self, sigma: float, secret: bytes) -> None:
        self.sigma, self._secret = sigma, secret
        self._generator = torch.Generator()

    def begin(self, task: Task) -> None:
        """Begin a task."""
        text = f"{task.run_id}/{task.kind}/{task.server_round}".encode()
        seed = hashlib.sha256(self._secret + text).digest()
        self._generator.manual_seed(int.from_bytes(seed[:8], "little"))

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """Return activations with noise; their gradient is that of what is returned."""
        drawn = torch.randn(activations.shape, generator=self._generator)
        return activations + (self.sigma * drawn).to(activations)


def read_secret(directory: Path) -> bytes:
    """Return the secret that a rank keeps in its directory of local states, made at the first call."""
    path = directory / _FILE
    if not path.exists():
        make_private_directory(directory, CheckpointError)
        write_chunks(path, [secrets.token_bytes(_SECRET_BYTES)], durable=True)
    with open_regular(path) as file:
        return file.read()
