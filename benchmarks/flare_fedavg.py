"""The peer of `benchmarks.peers`: FedAvg of NVIDIA FLARE 2.9 whose trainers are processes of their own, two sites.

    python benchmarks/flare_fedavg.py job BYTES ROUNDS DIR

For a Python that has nvflare, which this project does not need. It runs in FLARE's simulator, with its
``launch_external_process``: each site starts its trainer once, this file again, and hands it every round's state. The
trainer changes one number. The moments at which its state came go to ``stamps-1`` in the directory.
"""

import sys
import time
from pathlib import Path

import torch

LAYERS = 10


class Net(torch.nn.Module):
    """A model of equal layers, of a given size."""

    def __init__(self, size):
        super().__init__()
        for index in range(LAYERS):
            layer = torch.full((max(1, size // (4 * LAYERS)),), 0.5)
            self.register_parameter(f"layer{index}", torch.nn.Parameter(layer))


def train(directory):
    """Be a trainer."""
    import nvflare.client as flare

    flare.init()
    path = directory / f"stamps-{flare.get_site_name().rpartition('-')[2]}"
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        with path.open("a") as file:
            file.write(f"{time.monotonic()!r}\n")
        model.params["layer0"][0] += 1
        flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.5}))


def job(size, rounds, directory):
    """Simulate."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv

    recipe = FedAvgRecipe(
        name="peer", model={"class_path": "flare_fedavg.Net", "args": {"size": size}}, min_clients=2,
        num_rounds=rounds, train_script=__file__, train_args=f"train {directory}", launch_external_process=True,
        command=f"{sys.executable} -u",
    )  # fmt: skip
    recipe.execute(SimEnv(num_clients=2, workspace_root=f"{directory}/flare", log_config="ERROR"))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]))
    else:
        job(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
