"""The peer of `benchmarks.peers`: FedAvg of NVIDIA FLARE 2.9 whose trainers are processes of their own, two sites.

    python benchmarks/flare_fedavg.py external|attach BYTES ROUNDS DIR SERVER_PORT ADMIN_PORT

For a Python that has nvflare, which this project does not need. ``external`` runs in FLARE's simulator, with its
``launch_external_process``: each site starts its trainer once, this file again, and hands it every round's state.
``attach`` provisions a server and two sites below the directory, starts them and both trainers, which a site then never
starts, and submits the job. The hand-off is FLARE's shared directory, as it recommends on one machine. The
trainer changes one number. The moments at which its state came go to ``stamps-1`` in the directory.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

LAYERS = 10
ADMIN = "admin@nvidia.com"
SITES = ("site-1", "site-2")


class Net(torch.nn.Module):
    """A model of equal layers, of a given size."""

    def __init__(self, size):
        super().__init__()
        for index in range(LAYERS):
            layer = torch.full((max(1, size // (4 * LAYERS)),), 0.5)
            self.register_parameter(f"layer{index}", torch.nn.Parameter(layer))


def train(directory, profile=None):
    """Be a trainer."""
    import nvflare.client as flare

    flare.init(config_file=profile)
    path = directory / f"stamps-{flare.get_site_name().rpartition('-')[2]}"
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        with path.open("a") as file:
            file.write(f"{time.monotonic()!r}\n")
        model.params["layer0"][0] += 1
        flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.5}))


def external(size, rounds, directory, _ports):
    """Simulate."""
    from nvflare.recipe import SimEnv

    recipe = make_recipe(size, rounds, train_args=f"train {directory}", launch_external_process=True,
                         command=f"{sys.executable} -u")  # fmt: skip
    recipe.execute(SimEnv(num_clients=2, workspace_root=f"{directory}/flare", log_config="ERROR"))


def make_recipe(size, rounds, **options):
    """Return FLARE's FedAvg of the model."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

    model = {"class_path": "flare_fedavg.Net", "args": {"size": size}}
    return FedAvgRecipe(name="peer", model=model, min_clients=2, num_rounds=rounds, train_script=__file__, **options)


def attach(size, rounds, directory, ports):
    """Provision a server and two sites, start them and the trainers, run the job; ends all that was started."""
    from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
    from nvflare.recipe import ProdEnv

    kits, shared = provision(directory, ports), directory / "shared"
    shared.mkdir(mode=0o770)
    route = {"scheme": "shared-file", "resources": {"root_dir": str(shared), "connection_security": "clear"}}
    app = "nvflare.private.fed.app"
    with contextlib.ExitStack() as started:
        start(started, kits / "localhost", "-m", f"{app}.server.server_train", "-m", kits / "localhost", "-s",
              "fed_server.json", "--set", "secure_train=true", "org=org", "config_folder=config")  # fmt: skip
        for site in SITES:
            (kits / site / "local/comm_config.json").write_text(json.dumps({"client_api_attach": route}))
            start(started, kits / site, "-m", f"{app}.client.client_train", "-m", kits / site, "-s",
                  "fed_client.json", "--set", f"uid={site}", "secure_train=true", "org=org",
                  "config_folder=config")  # fmt: skip
            profile = directory / f"{site}.json"
            profile.write_text(json.dumps({"schema_version": 1, "execution_mode": "attach", "attach_id": "trainer",
                                           "site_name": site, "rendezvous_dir": str(shared)}))  # fmt: skip
            start(started, directory, __file__, "train", directory, profile)
        recipe = make_recipe(size, rounds)
        # The recipe makes no client of this mode.
        recipe._create_client_runner = lambda _: ClientAPIExecutor(
            execution_mode="attach", attach_id="trainer", params_exchange_format="pytorch",
            server_expected_format="numpy",
        )  # fmt: skip
        env = ProdEnv(str(kits / ADMIN), login_timeout=60.0, username=ADMIN)
        print("result:", recipe.execute(env).get_result(timeout=30.0 * rounds + 60.0))


def provision(directory, ports):
    """Make the kits of the server, the sites and the administrator; returns their directory."""
    from nvflare.lighter.provision import prepare_builders, prepare_packager, prepare_project
    from nvflare.lighter.provisioner import Provisioner

    builders = ("workspace.WorkspaceBuilder", "static_file.StaticFileBuilder", "cert.CertBuilder",
                "signature.SignatureBuilder")  # fmt: skip
    plan = {
        "api_version": 3, "name": "peer", "description": "",
        "participants": [
            {"name": "localhost", "type": "server", "org": "org", "fed_learn_port": ports[0], "admin_port": ports[1]},
            *({"name": site, "type": "client", "org": "org"} for site in SITES),
            {"name": ADMIN, "type": "admin", "org": "org", "role": "project_admin"},
        ],
        "builders": [{"path": f"nvflare.lighter.impl.{name}", "args": {}} for name in builders],
    }  # fmt: skip
    plan["builders"][1]["args"]["config_folder"] = "config"
    provisioner = Provisioner(str(directory), prepare_builders(plan), prepare_packager(plan))
    provisioner.provision(prepare_project(plan))
    kits = directory / "peer/prod_00"
    for path in kits.glob("*/local/resources.json.default"):
        # A site refuses classes that are not on its list: this mode's, and the model.
        path.write_text(path.read_text().replace('"enforce"', '"warn"'))
    return kits


def start(started, directory, *arguments):
    """Start a Python program in a directory, which is ended with `started`."""
    log = started.enter_context((directory / "log").open("a"))
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=directory, stdout=log, stderr=log)
    started.callback(process.wait)
    started.callback(process.kill)


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    if mode == "train":
        train(Path(arguments[0]), *arguments[1:])
    else:
        size, rounds, directory, *ports = arguments
        run = {"external": external, "attach": attach}[mode]
        run(int(size), int(rounds), Path(directory), [int(port) for port in ports])
