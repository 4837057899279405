"""Weights that share the entries of a table: hashes, layers, and what a hash does."""

from tying.hashing.codebook import cluster, cluster_weight, compression_rate
from tying.hashing.hashes import Hash, IdentityHash, ModulusHash
from tying.hashing.layers import HashedConv2d, HashedEmbedding, HashedLinear
from tying.hashing.layouts import BlockHash, CodebookHash, RecurrentHash, ToeplitzHash
from tying.hashing.loads import entropy, loads
from tying.hashing.network import hash_weights
from tying.hashing.packing import load_packed, save_packed
from tying.hashing.plots import plot_loads, table_loads
from tying.hashing.report import HashedWeight, HashReport, report
from tying.hashing.seeded import DirichletHash, NeighborhoodHash, SeededHash, UniformHash, XXHash
from tying.hashing.virtual import VirtualWeight

__all__ = [
    "BlockHash",
    "CodebookHash",
    "DirichletHash",
    "Hash",
    "HashReport",
    "HashedConv2d",
    "HashedEmbedding",
    "HashedLinear",
    "HashedWeight",
    "IdentityHash",
    "ModulusHash",
    "NeighborhoodHash",
    "RecurrentHash",
    "SeededHash",
    "ToeplitzHash",
    "UniformHash",
    "VirtualWeight",
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
