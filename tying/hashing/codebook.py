"""Trained quantisation: weights that are the entries of a small codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tying.errors import ConfigurationError
from tying.hashing.apply import check_hashable, hash_attribute
from tying.hashing.hashes import CodebookHash
from tying.hashing.parametrization import HashedParametrization
from tying.hashing.report import loads
from tying.weights.derived import ParameterLocation, locate_parameters

Start = Literal["linear", "density", "forgy"]


def starting_centroids(weights: Tensor, clusters: int, init: Start) -> Tensor:
    """Return where k-means begins, (clusters,).

    Args:
        weights: (n,).
        clusters: k.
        init: ``"linear"``: even from the least to the largest weight; ``"density"``: at quantiles evenly apart;
            ``"forgy"``: weights drawn at random.

    Example:
        >>> starting_centroids(torch.tensor([0.0, 1.0, 1.0, 4.0]), 3, "linear")
        tensor([0., 2., 4.])
    """
    if init == "linear":
        return torch.linspace(float(weights.min()), float(weights.max()), clusters).to(weights)
    if init == "density":
        at = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters * (len(weights) - 1)
        return weights.sort().values[at.round().long()]
    return weights[torch.randperm(len(weights))[:clusters]]


def cluster(weights: Tensor, clusters: int, init: Start = "linear") -> tuple[Tensor, Tensor]:
    """Return the centroids of k-means, and which of them each weight is nearest to.

    Lloyd's algorithm, as scikit-learn does it. Where there are no more distinct weights than clusters, these are the
    centroids.

    Args:
        weights: (n,).
        clusters: k, at most n.
        init: see :func:`starting_centroids`.

    Returns:
        (k,), or fewer where some were nearest to none; and int64, (n,).

    Raises:
        ConfigurationError: an unknown init, or more clusters than weights.

    Example:
        >>> cluster(torch.tensor([0.0, 0.2, 1.0]), clusters=2)
        (tensor([0.1000, 1.0000]), tensor([0, 0, 1]))

    Source: S. Han, H. Mao and W. J. Dally, Deep compression, 2016, section 3.
    """
    if init not in ("linear", "density", "forgy"):
        raise ConfigurationError(f"init is 'linear', 'density' or 'forgy', not {init!r}")
    if not 1 <= clusters <= len(weights):
        raise ConfigurationError(f"{clusters} clusters of {len(weights)} weights: 1 to {len(weights)} are possible")
    distinct, inverse = torch.unique(weights, return_inverse=True)
    if len(distinct) <= clusters:
        return distinct, inverse
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]  # it has no types
    except ImportError:
        raise ConfigurationError("clustering needs scikit-learn: pip install 'tying[clustering]'") from None
    points = weights.detach().cpu().double()
    start = starting_centroids(points, clusters, init).numpy()[:, None]
    found = KMeans(clusters, init=start, n_init=1, max_iter=300, tol=0.0).fit(points.numpy()[:, None])
    _, labels = torch.unique(torch.from_numpy(found.labels_).long(), return_inverse=True)
    means = torch.bincount(labels, points) / torch.bincount(labels)
    return means.to(weights), labels.to(weights.device)


def compression_rate(weights: int, clusters: int, bits: int = 32) -> float:
    """Return ``r = n b / (n log₂ k + k b)``: by how much indices into a codebook are smaller than n weights of b bits.

    Example:
        >>> compression_rate(16, 4)
        3.2
    """
    return weights * bits / (weights * math.log2(clusters) + clusters * bits)


@torch.no_grad()
def cluster_weight(model: nn.Module, name: str, clusters: int, init: Start = "linear") -> nn.Parameter:
    """Let a weight of a model be entries of a codebook; return the codebook.

    Zeros stay zeros, and are no cluster: those of pruning, which becomes permanent. Where fewer weights are left than
    clusters were asked for, each is an entry of its own.

    Args:
        model: changed in place.
        name: of the weight.
        clusters: k.
        init: see :func:`starting_centroids`.

    Raises:
        ConfigurationError: more clusters than weights, or the weight is tied, computed, or an embedding's with an
            option that a hashed one lacks.

    Example:
        >>> layer = nn.Linear(100, 10)
        >>> cluster_weight(layer, "weight", clusters=4).shape, len(layer.weight.unique())
        (torch.Size([4]), 4)
    """
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ConfigurationError(f"{name!r} is no parameter of the model, which has no module {path!r}") from None
    if prune.is_pruned(module) and f"{attribute}_orig" in module._parameters:
        prune.remove(module, attribute)  # type: ignore[no-untyped-call]  # torch's
    check_clusterable(name, locate_parameters(model), clusters)
    flat = module.get_parameter(attribute).detach().flatten()
    left = flat[flat != 0]
    centroids, labels = flat.new_zeros(1), left.long()
    if len(left):
        centroids, labels = cluster(left, min(clusters, len(left)), init)
    assignments = torch.full((len(flat),), -1, dtype=torch.int64, device=flat.device)
    assignments[flat != 0] = labels
    return put_codebook(module, attribute, assignments.cpu(), centroids)


def uses_of(virtual: HashedParametrization) -> Tensor:
    """Return how many weights are each entry of a codebook, at least one."""
    return loads(virtual.slots(), virtual.table_size).clamp(min=1)


def check_clusterable(name: str, places: Mapping[str, ParameterLocation], clusters: int) -> None:
    """Raise where a weight cannot be clustered, as :func:`cluster_weight` says.

    Args:
        name: of the weight.
        places: of the whole model's weights.
        clusters: k.
    """
    if name not in places:
        raise ConfigurationError(f"{name!r} is no parameter of the model, or is computed already")
    check_hashable(name, places)
    count = places[name].parameter.numel()
    if not 1 <= clusters <= count:
        raise ConfigurationError(f"{name!r}: {clusters} clusters of {count} weights: 1 to {count} are possible")


def put_codebook(module: nn.Module, attribute: str, assignments: Tensor, centroids: Tensor) -> nn.Parameter:
    """Put a codebook in the place of a weight of a module; return it as the parameter it is now.

    Args:
        module: changed in place.
        attribute: the weight's name there.
        assignments: which centroid each weight is; −1 for zero; (n,).
        centroids: (k,).
    """
    weight = module.get_parameter(attribute)
    virtual = HashedParametrization(weight.shape, len(centroids), CodebookHash(assignments), index="stored").to(
        weight.device
    )
    table = nn.Parameter(centroids.to(weight), weight.requires_grad)
    hash_attribute(module, attribute, virtual, table)
    return table
