"""NoPeek: a term of the loss that makes activations tell less of the inputs that they are made of.

Vepakomma, Singh, Gupta and Raskar, "NoPeek: Information leakage reduction to share activations in distributed deep
learning", 2020. The measure is that of Székely, Rizzo and Bakirov, "Measuring and testing dependence by correlation of
distances", 2007.
"""

import torch


def distance_correlation(inputs: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    """Return the distance correlation of a batch's inputs and activations, between 0 and 1, as a 0-d tensor.

    Both have the examples, at least two, along their first dimension; the others may be any. Add it to the loss, times
    a weight. 0 means that they are independent, for very many examples; with few it is larger.
    """
    given, told = _centred(inputs), _centred(activations)
    norm = ((given * given).mean() * (told * told).mean()).sqrt()
    # What is the same for all examples tells nothing.
    squared = (given * told).mean().clamp(min=0) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    # The root has no finite slope at 0.
    return (squared + torch.finfo(squared.dtype).tiny).sqrt()


def _centred(batch: torch.Tensor) -> torch.Tensor:
    """Return the distances between all examples, with the mean of each row and column taken off."""
    flat = batch.flatten(1) if batch.dim() > 1 else batch.unsqueeze(1)
    flat = flat if flat.is_floating_point() else flat.float()
    distances = torch.cdist(flat, flat)
    return distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True) + distances.mean()
