"""Trained quantisation: weights that are the entries of a small codebook, and files that hold them packed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tying.atomic import atomically
from tying.errors import ConfigurationError, listed
from tying.hard.places import places_of
from tying.hashing.layers import hash_attribute
from tying.hashing.layouts import CodebookHash
from tying.hashing.virtual import VirtualWeight
from tying.names import computed_in

Start = Literal["linear", "density", "forgy"]
VERSION = 1  # of packed files
GAP_BITS = 5
FAR = (1 << GAP_BITS) - 1  # the gap that says: so many zeros, and no weight yet


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
    points = weights.detach().cpu().double().numpy()[:, None]
    start = starting_centroids(weights.detach().cpu().double(), clusters, init).numpy()[:, None]
    labels = torch.from_numpy(KMeans(clusters, init=start, n_init=1, max_iter=300, tol=0.0).fit(points).labels_).long()
    used, labels = torch.unique(labels, return_inverse=True)
    labels = labels.to(weights.device)
    sums = torch.zeros(len(used), dtype=torch.float64, device=weights.device)
    sums = sums.index_add_(0, labels, weights.detach().double()) / torch.bincount(labels)
    return sums.to(weights.dtype), labels


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

    Zeros stay zeros, and are no cluster: those of pruning, which becomes permanent.

    Args:
        model: changed in place.
        name: of the weight.
        clusters: k.
        init: see :func:`starting_centroids`.

    Raises:
        ConfigurationError: more clusters than weights other than zero, or the weight is computed.

    Example:
        >>> layer = nn.Linear(100, 10)
        >>> cluster_weight(layer, "weight", clusters=4).shape, len(layer.weight.unique())
        (torch.Size([4]), 4)
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if prune.is_pruned(module) and f"{attribute}_orig" in module._parameters:
        prune.remove(module, attribute)  # type: ignore[no-untyped-call]  # torch's
    place = places_of(model).get(name)
    if place is None or place.holder is not place.owner:
        raise ConfigurationError(f"{name!r} is no parameter of the model, or is computed already")
    weight = place.parameter
    flat = weight.detach().flatten()
    try:
        centroids, labels = cluster(flat[flat != 0], clusters, init)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name!r}: {error}") from None
    assignments = torch.full((len(flat),), -1, dtype=torch.int64, device=flat.device)
    assignments[flat != 0] = labels
    return put_codebook(module, attribute, assignments.cpu(), centroids)


def put_codebook(module: nn.Module, attribute: str, assignments: Tensor, centroids: Tensor) -> nn.Parameter:
    """Put a codebook in the place of a weight of a module; return it as the parameter it is now.

    Args:
        module: changed in place.
        attribute: the weight's name there.
        assignments: which centroid each weight is; −1 for zero; (n,).
        centroids: (k,).
    """
    weight = module._parameters[attribute]
    assert weight is not None
    virtual = VirtualWeight(weight.shape, len(centroids), CodebookHash(assignments), index="stored").to(weight.device)
    table = nn.Parameter(centroids.to(weight), weight.requires_grad)
    hash_attribute(module, attribute, virtual, table)
    return table


@dataclass(frozen=True)
class Packed:
    """A clustered weight in as few bits as its codebook, indices and gaps take.

    Attributes:
        shape: of the weight.
        codebook: float32, (k,).
        indices: of the weights that are not zero, ⌈log₂ k⌉ bits each, packed.
        gaps: how many zeros stand before each of them, 5 bits each, packed; 31: so many, and no weight yet.
        counts: number of indices, and of gaps.
    """

    shape: tuple[int, ...]
    codebook: Tensor
    indices: Tensor
    gaps: Tensor
    counts: tuple[int, int]

    @property
    def bits(self) -> int:
        """Of all of it: codebook, indices and gaps."""
        return 32 * len(self.codebook) + index_bits(len(self.codebook)) * self.counts[0] + GAP_BITS * self.counts[1]


def index_bits(clusters: int) -> int:
    """Return how many bits an index takes.

    Example:
        >>> index_bits(32), index_bits(33), index_bits(1)
        (5, 6, 1)
    """
    return max(1, math.ceil(math.log2(clusters)))


def packed(assignments: Tensor, codebook: Tensor) -> Packed:
    """Pack a clustered weight.

    Args:
        assignments: which entry each weight is, −1 for zero; of the weight's shape.
        codebook: (k,).

    Example:
        >>> one = packed(torch.tensor([[0, -1], [-1, 1]]), torch.tensor([0.5, 2.0]))
        >>> one.bits, unpacked(one)
        (76, tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]]))
    """
    flat = assignments.flatten().cpu()
    at = (flat >= 0).nonzero().flatten()
    zeros = torch.diff(at, prepend=at.new_tensor([-1])) - 1
    fillers, rest = zeros // FAR, zeros % FAR
    gaps = torch.full((int(fillers.sum()) + len(at),), FAR)
    gaps[torch.arange(len(at)) + fillers.cumsum(0)] = rest
    indices = _pack(flat[at], index_bits(len(codebook)))
    held = codebook.detach().float().cpu().clone()
    return Packed(tuple(assignments.shape), held, indices, _pack(gaps, GAP_BITS), (len(at), len(gaps)))


def unpacked(one: Packed) -> Tensor:
    """Return the weight; float32."""
    gaps = _unpack(one.gaps, one.counts[1], GAP_BITS)
    at = torch.where(gaps == FAR, FAR, gaps + 1).cumsum(0)[gaps != FAR] - 1
    weight = torch.zeros(math.prod(one.shape))
    weight[at] = one.codebook[_unpack(one.indices, one.counts[0], index_bits(len(one.codebook)))]
    return weight.view(one.shape)


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """Return all clustered weights of a model, packed, by name."""
    found = {}
    for path, module in model.named_modules():
        for one in computed_in(module):
            [*_, last] = one.steps
            if isinstance(last, VirtualWeight) and isinstance(last.hash, CodebookHash):
                table = getattr(module, one.prefixes[0])
                found[f"{path}.{one.name}".lstrip(".")] = packed(last.entries(), table)
    return found


def save_packed(model: nn.Module, path: Path | str) -> int:
    """Write all clustered weights of a model to a file, packed; return its bytes.

    Raises:
        ConfigurationError: no weight is clustered.
    """
    weights = packed_weights(model)
    if not weights:
        raise ConfigurationError("no weight of the model is clustered")
    with atomically(Path(path)) as aside:
        torch.save({"version": VERSION, "weights": {name: vars(one) for name, one in weights.items()}}, aside)
    return Path(path).stat().st_size


def load_packed(path: Path | str) -> dict[str, Tensor]:
    """Return the weights in a file of :func:`save_packed`, by name, as a plain state dict holds them.

    Raises:
        ConfigurationError: it is no such file, or one of another version.
    """
    content = torch.load(path, weights_only=True)
    if not isinstance(content, Mapping) or "version" not in content or "weights" not in content:
        raise ConfigurationError(f"{path} holds no packed weights")
    if content["version"] != VERSION:
        raise ConfigurationError(f"{path} is of version {content['version']}; this package reads version {VERSION}")
    return {name: unpacked(Packed(**fields)) for name, fields in content["weights"].items()}


def clustered_size(model: nn.Module, names: Sequence[str]) -> tuple[int, int]:
    """Return the bits of weights, dense in float32, and packed.

    Raises:
        ConfigurationError: one of them is not clustered.
    """
    weights = packed_weights(model)
    if missing := [name for name in names if name not in weights]:
        raise ConfigurationError(f"{listed(missing)}: not clustered")
    return sum(32 * math.prod(weights[n].shape) for n in names), sum(weights[n].bits for n in names)


def _pack(values: Tensor, bits: int) -> Tensor:
    spread = (values.numpy()[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(spread.astype(np.uint8).ravel()))


def _unpack(content: Tensor, count: int, bits: int) -> Tensor:
    spread = np.unpackbits(content.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy((spread.astype(np.int64) << np.arange(bits)).sum(axis=1))
