"""FedPer and LG-FedAvg: one half of the network is everybody's, the other each rank's own.

FedPer shares the features and keeps the classifier (Arivazhagan et al., "Federated Learning with Personalization
Layers", 2019, arXiv:1912.00818, Algorithms 1 and 2):

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.fedper:FedPer \\
        --aggregate "classifier.*=local" --aggregate fedavg \\
        --workload-option partition=dirichlet --workload-option alpha=0.1

LG-FedAvg is the other way round (Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global
Representations", 2020, arXiv:2001.01523):

    python -m fedsplit run --ranks 4 --rounds 20 --workload examples.algorithms.fedper:FedPer \\
        --aggregate "features.*=local" --aggregate fedavg \\
        --workload-option partition=dirichlet --workload-option alpha=0.1

Both halves are trained together, as in FedAvg. What is local never travels, and is kept in the trainer's checkpoints.
"""

from __future__ import annotations

from examples.algorithms.digits import Digits


class FedPer(Digits):
    """The trainer's half: FedAvg's. The network's two parts are called `features` and `classifier`."""
