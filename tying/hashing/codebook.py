"""Trained quantisation: weights that share the entries of a small codebook."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from typing_extensions import override

from tying.errors import ConfigurationError, check_choice, check_count
from tying.extras import extra
from tying.hashing.apply import check_fits_table, check_hashable, put_tables
from tying.hashing.hashes import CodebookHash
from tying.hashing.parametrization import HashedParametrization
from tying.weights.derived import Locations, ParameterLocation, locate_parameters
from tying.weights.values import check_finite, check_real

Start = Literal["linear", "density", "forgy"]


def starting_centroids(weights: Tensor, clusters: int, init: Start) -> Tensor:
    """Return initial centroids for k-means, (clusters,).

    Args:
        weights: (n,).
        clusters: k.
        init: ``"linear"``: evenly spaced between the smallest and the largest weight; ``"density"``: evenly spaced
            quantiles; ``"forgy"``: random weights.

    Example:
        >>> starting_centroids(torch.tensor([0.0, 1.0, 1.0, 4.0]), 3, "linear")
        tensor([0., 2., 4.])
    """
    if init == "linear":
        return torch.linspace(float(weights.min()), float(weights.max()), clusters).to(weights)
    if init == "density":
        ranks = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters * (len(weights) - 1)
        return weights.sort().values[ranks.round().long()]
    return weights[torch.randperm(len(weights))[:clusters]]


def cluster(weights: Tensor, clusters: int, init: Start = "linear") -> tuple[Tensor, Tensor]:
    """Return the centroids of k-means, and the index of each weight's nearest centroid.

    This is Lloyd's algorithm, by scikit-learn. If there are at most k distinct weights, they are the centroids.

    Args:
        weights: (n,).
        clusters: k, at most n.
        init: see :func:`starting_centroids`.

    Returns:
        Centroids (k,), or fewer if some have no weight; and indices (n,), int64.

    Raises:
        ConfigurationError: ``init`` is unknown, there are more clusters than weights, or a weight is not a finite real
            number.

    Example:
        >>> cluster(torch.tensor([0.0, 0.2, 1.0]), clusters=2)
        (tensor([0.1000, 1.0000]), tensor([0, 0, 1]))

    Source: S. Han, H. Mao and W. J. Dally, Deep compression, 2016, section 3.
    """
    check_choice("init", init, get_args(Start))
    check_count("clusters", clusters, f"[1, {len(weights)}]")
    check_real("weights", weights)
    check_finite("weights", weights)
    distinct, inverse = torch.unique(weights, return_inverse=True)
    if len(distinct) <= clusters:
        return distinct, inverse
    with extra("clustering"):
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]  # it has no types
    points = weights.detach().cpu().double()
    start = starting_centroids(points, clusters, init).numpy()[:, None]
    k_means = KMeans(clusters, init=start, n_init=1, max_iter=300, tol=0.0).fit(points.numpy()[:, None])
    _, labels = torch.unique(torch.from_numpy(k_means.labels_).long(), return_inverse=True)
    return (torch.bincount(labels, points) / torch.bincount(labels)).to(weights), labels.to(weights.device)


def compression_rate(weights: int, clusters: int, bits: int = 32) -> float:
    """Return ``r = n b / (n log₂ k + k b)``: bits of n dense weights, divided by bits of their indices and codebook.

    Args:
        weights: n.
        clusters: k.
        bits: b, the number of bits of a dense weight and of a codebook entry.

    Example:
        >>> compression_rate(16, 4)
        3.2
    """
    return weights * bits / (weights * math.log2(clusters) + clusters * bits)


def _cluster_nonzero(weights: Tensor, clusters: int, init: Start = "linear") -> tuple[Tensor, Tensor]:
    """Return the result of :func:`cluster` for the nonzero weights; zero weights get index −1."""
    nonzero = weights[weights != 0]
    assignments, centroids = torch.full_like(weights, -1, dtype=torch.int64), weights.new_zeros(1)
    if len(nonzero):
        centroids, assignments[weights != 0] = cluster(nonzero, min(clusters, len(nonzero)), init)
    return centroids, assignments


class Codebook(HashedParametrization):
    """The map from a codebook to a clustered weight. A plain weight that is loaded is clustered anew."""

    @override
    @staticmethod
    def joint_inverse(
        parts: Sequence[tuple[HashedParametrization, nn.Parameter, Tensor]],
    ) -> dict[Tensor | nn.Module, Tensor]:
        """Return the codebook nearest to a weight, and new assignments unless the present ones are as near.

        Args:
            parts: the parametrization, the codebook, and the values of the weight. Weights that share a codebook keep
                their assignments.
        """
        nearest = HashedParametrization.joint_inverse(parts)
        (step, codebook, weight), *others = parts
        if others or step.drawn is None or not weight.isfinite().all():
            return nearest
        centroids, assignments = _cluster_nonzero(weight.flatten(), len(codebook))
        clustered = torch.cat([centroids, centroids.new_zeros(1)])[assignments]
        error = (step(nearest[codebook]).flatten() - weight.flatten()).norm()
        if (clustered - weight.flatten()).norm() >= error:
            return nearest
        entries = torch.cat([centroids, codebook.detach()[len(centroids) :]])
        return {**nearest, codebook: entries, step.drawn: assignments.to(step.drawn)}


@torch.no_grad()
def cluster_weight(model: nn.Module, name: str, clusters: int, init: Start = "linear") -> nn.Parameter:
    """Cluster a weight of a model, and replace it by a codebook; return the codebook.

    Zero weights stay zero and belong to no cluster. If torch prunes the weight, the pruning becomes permanent. If there
    are fewer nonzero weights than clusters, each has a codebook entry. ``load_plain`` clusters a weight anew;
    assigning or resetting it keeps the clusters.

    In-place writes (``.data``, ``nn.init``, an adapter's merge) to a computed weight are lost: assign the weight, or
    load ``bake(model)`` into the untied model first.

    Args:
        model: changed in place.
        name: name of the weight.
        clusters: k.
        init: see :func:`starting_centroids`.

    Raises:
        ConfigurationError: there are more clusters than weights, or the weight is computed or tied through a relation,
            or belongs to an embedding with an option that hashed embeddings do not support.
        NonFiniteError: the weight is not finite.

    Example:
        >>> layer = nn.Linear(100, 10)
        >>> cluster_weight(layer, "weight", clusters=4).shape, len(layer.weight.unique())
        (torch.Size([4]), 4)
    """
    return put_codebook(model, name, *find_codebook(model, name, clusters, init))


@torch.no_grad()
def find_codebook(model: nn.Module, name: str, clusters: int, init: Start) -> tuple[Tensor, Tensor]:
    """Return the assignments (n,) and the centroids (k,) of a weight, on the CPU; see :func:`cluster_weight`.

    A pruning of the weight becomes permanent.
    """
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ConfigurationError(f"{name!r} is not a parameter of the model, which has no module {path!r}") from None
    if prune.is_pruned(module) and hasattr(module, f"{attribute}_orig"):
        prune.remove(module, attribute)  # type: ignore[no-untyped-call]  # torch's
    locations = locate_parameters(model)
    check_clusterable(name, locations, clusters)
    check_finite(name, locations[name].parameter)
    centroids, assignments = _cluster_nonzero(locations[name].parameter.flatten(), clusters, init)
    return assignments.cpu(), centroids.cpu()


def uses_of(parametrization: HashedParametrization) -> Tensor:
    """Return how many weights read each codebook entry, at least one."""
    return parametrization.loads().clamp(min=1)


def check_clusterable(name: str, locations: Locations, clusters: int) -> None:
    """Raise a ConfigurationError if :func:`cluster_weight` cannot cluster a weight.

    Args:
        name: name of the weight.
        locations: locations of all parameters of the model.
        clusters: k.
    """
    if name not in locations:
        raise ConfigurationError(f"{name!r} is not a parameter of the model, or is computed already")
    check_hashable(name, locations)
    try:
        check_fits_codebook(locations.owners(name), clusters)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name!r}: {error}") from None


def check_fits_codebook(owners: Sequence[ParameterLocation], clusters: int) -> None:
    """Raise a ConfigurationError if a codebook cannot do what the owners of a weight need, or has too many entries."""
    check_fits_table(owners)
    check_count("clusters", clusters, f"[1, {owners[0].parameter.numel()}]")


def put_codebook(model: nn.Module, name: str, assignments: Tensor, centroids: Tensor) -> nn.Parameter:
    """Replace a weight of a model by a codebook; return the codebook as a parameter.

    Args:
        model: changed in place.
        name: the weight's name.
        assignments: slot of each weight, −1 for zero; (n,).
        centroids: (k,).
    """
    locations = locate_parameters(model)
    weight = locations[name].parameter
    parametrization = Codebook(weight.shape, len(centroids), CodebookHash(assignments), index="stored")
    codebook = nn.Parameter(centroids.to(weight), weight.requires_grad)
    put_tables(model, locations, [{name: parametrization}], [codebook])
    return codebook
