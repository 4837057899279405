"""Integer hash functions, with the same results on every machine, device and release."""

from torch import Tensor

_LOW = 0xFFFFFFFF
_PRIME_2, _PRIME_3, _PRIME_4, _PRIME_5 = 2246822519, 3266489917, 668265263, 374761393


def hash32(ids: Tensor, seed: int) -> Tensor:
    """Return 32 pseudo-random bits for each identifier, independent for different seeds.

    Multiplications and shifts mix the low 32 bits of an identifier, with two keys from the seed; the high bits are
    folded in first.

    Args:
        ids: int64, of any shape.
        seed: any integer.

    Returns:
        int64, in [0, 2³²).

    Example:
        >>> import torch
        >>> hash32(torch.arange(3), seed=0).tolist()
        [2872864583, 1772158550, 138880084]
    """
    low_key, high_key = splitmix64(seed)
    x = ((ids ^ ((ids >> 32) * 0x9E3779B1)) + low_key) & _LOW
    x = ((x ^ (x >> 16)) * 0x7FEB352D & _LOW) ^ high_key
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def reduce_range(bits: Tensor, count: int) -> Tensor:
    """Map 32-bit integers to [0, count); each result is equally frequent to within 2⁻³² · count."""
    return (bits * count) >> 32


def xxh32(ids: Tensor, seed: int) -> Tensor:
    """Return the xxh32 digest of each identifier as four little-endian bytes.

    Args:
        ids: int64, in [0, 2³²).
        seed: in [0, 2³²).

    Returns:
        int64, in [0, 2³²).

    Example:
        >>> import torch
        >>> xxh32(torch.tensor([0, 1]), seed=0).tolist()
        [148298089, 4089149075]

    Source: Y. Collet, xxHash fast digest algorithm, 2012-2021, https://github.com/Cyan4973/xxHash.
    """
    x = (ids * _PRIME_3 + (seed + _PRIME_5 + 4)) & _LOW
    x = (((x << 17) | (x >> 15)) & _LOW) * _PRIME_4 & _LOW
    x = (x ^ (x >> 15)) * _PRIME_2 & _LOW
    x = (x ^ (x >> 13)) * _PRIME_3 & _LOW
    return x ^ (x >> 16)


def splitmix64(seed: int) -> tuple[int, int]:
    """Return two 32-bit keys for a seed: the halves of its splitmix64 hash."""
    mask = (1 << 64) - 1
    z = (seed + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return z & _LOW, z >> 32
