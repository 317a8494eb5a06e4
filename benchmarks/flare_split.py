"""The peer of `benchmarks.split`: a step of NVIDIA FLARE 2.9, as its example ``cifar10-splitnn`` has it.

    python benchmarks/flare_split.py BYTES BATCHES DIR

For a Python that has nvflare, which this project does not need. Two sites in its simulator: one has the inputs and the
lower part, the other the labels and the upper part, and each batch is one call of the other site through the Collab
API. Activations travel as they are, where the example halves them to float16. The seconds from each batch to the next
go to ``periods.json`` in the directory.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from nvflare.collab import collab
from torch import nn

BATCH, CLASSES = 32, 10


class Site:
    """Has one half of the model; which one is a property of the site."""

    @collab.init
    def initialize(self):
        """Make the half."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.width = int(collab.get_app_prop("bytes")) // (4 * BATCH)
        self.targets = torch.arange(BATCH) % CLASSES
        if collab.get_app_prop("role") == "lower":
            self.model = nn.Module()
            self.model.weight = nn.Parameter(torch.ones(self.width))
            self.inputs = torch.randn(BATCH, self.width)
        else:
            self.model = nn.Linear(self.width, CLASSES)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    @collab.publish
    def train(self):
        """Train all batches, with the site that has the upper part."""
        other = collab.get_clients([collab.get_app_prop("upper_site")])[0]
        stamps = []
        for _ in range(int(collab.get_app_prop("batches"))):
            stamps.append(time.perf_counter())
            activations = self.inputs * self.model.weight
            gradient, _ = other(timeout=600.0).step(activations.detach())
            self.optimizer.zero_grad()
            activations.backward(gradient)
            self.optimizer.step()
        periods = [after - before for before, after in itertools.pairwise(stamps[1:])]
        Path(collab.get_app_prop("directory"), "periods.json").write_text(json.dumps(periods))
        return len(periods)

    @collab.publish
    def step(self, activations):
        """Do a step of the upper part; returns the gradient of the activations, and the loss."""
        activations = activations.detach().requires_grad_()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(activations), self.targets)
        loss.backward()
        self.optimizer.step()
        return activations.grad, loss.item()


class Start:
    """The server's side: it starts the training at the site with the lower part."""

    @collab.main
    def run(self):
        """Ask for it, and wait."""
        return collab.get_clients(["site-1"])[0](timeout=3600.0).train()


def main():
    """Simulate."""
    from nvflare.collab import CollabRecipe
    from nvflare.recipe import SimEnv

    size, batches, directory = sys.argv[1:]
    recipe = CollabRecipe(job_name="split", server=Start(), client=Site(), min_clients=2, sync_task_timeout=600.0)
    for name, value in (("bytes", size), ("batches", batches), ("directory", directory), ("upper_site", "site-2")):
        recipe.set_client_prop(name, value)
    recipe.set_per_site_config({"site-1": {"role": "lower"}, "site-2": {"role": "upper"}})
    recipe.execute(SimEnv(clients=["site-1", "site-2"], workspace_root=f"{directory}/flare", log_config="ERROR"))


if __name__ == "__main__":
    main()
