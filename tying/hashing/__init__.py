"""Weights that share the slots of a table: hashes, hashed layers, clustering, and reports."""

from tying.deprecated import module_aliases
from tying.hashing.apply import hash_weights
from tying.hashing.codebook import cluster, cluster_weight, compression_rate
from tying.hashing.hashes import (
    BlockHash,
    CodebookHash,
    DirichletHash,
    Hash,
    IdentityHash,
    ModulusHash,
    NeighborhoodHash,
    RecurrentHash,
    SeededHash,
    ToeplitzHash,
    UniformHash,
    XXHash,
)
from tying.hashing.layers import HashedConv2d, HashedEmbedding, HashedLinear
from tying.hashing.packing import load_packed, save_packed
from tying.hashing.parametrization import HashedParametrization
from tying.hashing.report import HashedWeight, HashReport, entropy, loads, plot_loads, report, table_loads

__all__ = [
    "BlockHash",
    "CodebookHash",
    "DirichletHash",
    "Hash",
    "HashReport",
    "HashedConv2d",
    "HashedEmbedding",
    "HashedLinear",
    "HashedParametrization",
    "HashedWeight",
    "IdentityHash",
    "ModulusHash",
    "NeighborhoodHash",
    "RecurrentHash",
    "SeededHash",
    "ToeplitzHash",
    "UniformHash",
    "XXHash",
    "cluster",
    "cluster_weight",
    "compression_rate",
    "entropy",
    "hash_weights",
    "load_packed",
    "loads",
    "plot_loads",
    "report",
    "save_packed",
    "table_loads",
]

__getattr__ = module_aliases("tying.hashing")
