"""Save a model in a packed file, in which weights of few distinct values take a few bits each."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from einops import EinopsError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tying.errors import ConfigurationError, check_choice
from tying.files import atomically, read
from tying.hashing.hashes import CodebookHash
from tying.hashing.parametrization import HashedParametrization
from tying.hashing.report import hashed_in
from tying.selection.relation import Relation, Step
from tying.weights.derived import derived_by_others, locate_parameters, names_by_weight
from tying.weights.state_dict import bake, tie_records

VERSION = 2  # of packed files; version 1 held the clustered weights alone, with gaps
GAP_BITS = 5
FILLER = (1 << GAP_BITS) - 1  # a gap of this many zeros without a value after it
BLOCK = 1 << 16  # number of integers that are packed at a time; a multiple of 8
Coding = Literal["raw", "symbols", "mask", "gaps"]
_DAMAGES = (AttributeError, EinopsError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers for bit patterns, by their bytes


@dataclass(frozen=True)
class Packed:
    """A tensor in the smallest of four codings.

    Attributes:
        shape: shape of the tensor.
        dtype: name of its dtype.
        coding: ``"raw"``: all values, in their own dtype. The others store each distinct value once, in ``values``, and
            an index of ⌈log₂ k⌉ bits: ``"symbols"``: for every entry; ``"mask"`` and ``"gaps"``: for every entry that
            is not zero.
        values: the values, or the k distinct ones, as bytes.
        indices: the packed indices.
        places: where the entries that are not zero are: one bit for each entry; or the number of zeros before each, in
            5 bits, where 31 means 31 zeros without an entry after them.
        counts: number of values, of indices, and of places.

    Source: S. Han, H. Mao and W. J. Dally, Deep compression, 2016, sections 2 and 4.
    """

    shape: tuple[int, ...]
    dtype: str
    coding: Coding
    values: Tensor
    indices: Tensor
    places: Tensor
    counts: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """Number of bytes of values, indices and places."""
        return len(self.values) + len(self.indices) + len(self.places)

    @property
    def huffman_nbytes(self) -> int:
        """Number of bytes if indices and gaps had Huffman codes, without the tables of these codes."""
        if self.coding == "raw":
            return self.nbytes
        streams = [_unpack("indices", self.indices, self.counts[1], index_bits(self.counts[0]))]
        if self.coding == "gaps":
            streams.append(_unpack("places", self.places, self.counts[2], GAP_BITS))
        fixed = len(self.places) if self.coding == "mask" else 0
        return min(self.nbytes, len(self.values) + fixed + sum(_bytes(huffman_bits(stream), 1) for stream in streams))


def index_bits(count: int) -> int:
    """Return the number of bits of an index into ``count`` values.

    Example:
        >>> index_bits(32), index_bits(33), index_bits(1)
        (5, 6, 1)
    """
    return max(1, (count - 1).bit_length())


def pack(tensor: Tensor) -> Packed:
    """Return a tensor in its smallest coding; every bit is kept, except the signs of zeros.

    Example:
        >>> content = pack(torch.tensor([0.5, 2.0]).repeat(50))
        >>> content.coding, content.nbytes, torch.equal(unpack(content), torch.tensor([0.5, 2.0]).repeat(50))
        ('symbols', 21, True)
    """
    flat = tensor.detach().cpu().contiguous().flatten()
    dtype, empty = str(tensor.dtype).removeprefix("torch."), torch.empty(0, dtype=torch.uint8, device="cpu")
    raw = Packed(tuple(tensor.shape), dtype, "raw", flat.view(torch.uint8), empty, empty, (len(flat), 0, 0))
    if not len(flat) or flat.element_size() not in _WORDS:
        return raw
    words = flat.view(_WORDS[flat.element_size()]).masked_fill(flat == 0, 0)  # masks of pruning make zeros negative
    values, slots = torch.unique(words, return_inverse=True)
    codings: list[tuple[Coding, Tensor, Tensor, Tensor, int]] = [("symbols", values, slots, empty, 1)]
    if len(zero := (values == 0).nonzero().flatten()):
        values, slots = values[values != 0], torch.where(slots == zero, -1, slots - (slots > zero).long())
        indices, gaps = indices_and_gaps(slots)
        codings += [("mask", values, indices, slots >= 0, 1), ("gaps", values, indices, gaps, GAP_BITS)]
    coding, values, indices, places, bits = min(codings, key=_coded_bytes)
    if _coded_bytes((coding, values, indices, places, bits)) >= raw.nbytes:
        return raw
    packed = _pack(indices, index_bits(len(values))), _pack(places, bits)
    counts = len(values), len(indices), len(places)
    return Packed(raw.shape, dtype, coding, values.view(torch.uint8), *packed, counts)


def _coded_bytes(coded: tuple[Coding, Tensor, Tensor, Tensor, int]) -> int:
    _, values, indices, places, bits = coded
    return values.nbytes + _bytes(len(indices), index_bits(len(values))) + _bytes(len(places), bits)


def unpack(content: Packed) -> Tensor:
    """Return the tensor.

    Raises:
        ConfigurationError: counts, shape and bytes do not fit together.
    """
    check_choice("coding", content.coding, get_args(Coding))
    dtype, size = getattr(torch, content.dtype), math.prod(content.shape)
    values = content.values.clone().view(dtype)
    if len(values) != content.counts[0]:
        raise ConfigurationError(f"{len(values)} values instead of {content.counts[0]}")
    if content.coding == "raw":
        return values.view(content.shape)
    words = values.view(_WORDS[values.element_size()])
    indices = _unpack("indices", content.indices, content.counts[1], index_bits(len(values)))
    if content.coding == "symbols":
        return words[indices].view(dtype).view(content.shape)
    places = _unpack("places", content.places, content.counts[2], 1 if content.coding == "mask" else GAP_BITS)
    positions = places.nonzero().flatten() if content.coding == "mask" else _positions(places)
    if len(positions) != len(indices) or (len(positions) and int(positions[-1]) >= size):
        raise ConfigurationError(f"places of {len(positions)} entries of {size} do not fit {len(indices)} indices")
    return words.new_zeros(size).index_put((positions,), words[indices]).view(dtype).view(content.shape)


def indices_and_gaps(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots that are not negative, and the number of negative ones before each, as in :class:`Packed`.

    Example:
        >>> indices_and_gaps(torch.tensor([3, -1, -1, 0]))
        (tensor([3, 0]), tensor([0, 2]))
    """
    positions = (slots >= 0).nonzero().flatten()
    zeros = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    fillers = zeros // FILLER
    gaps = torch.full((int(fillers.sum()) + len(positions),), FILLER, device="cpu")
    gaps[torch.arange(len(positions), device="cpu") + fillers.cumsum(0)] = zeros % FILLER
    return slots[positions], gaps


def _positions(gaps: Tensor) -> Tensor:
    """Return the positions of the entries that gaps lead to."""
    return torch.where(gaps == FILLER, FILLER, gaps + 1).cumsum(0)[gaps != FILLER] - 1


def huffman_bits(symbols: Tensor) -> int:
    """Return the number of bits of a Huffman code for symbols, without its table.

    Example:
        >>> huffman_bits(torch.tensor([0, 0, 0, 1, 2]))
        7
    """
    counts = sorted(torch.unique(symbols, return_counts=True)[1].tolist())  # a sorted list is a heap
    bits = 0
    while len(counts) > 1:  # joining the two rarest nodes adds one bit to each symbol below them
        node = heappop(counts) + heappop(counts)
        bits += node
        heappush(counts, node)
    return bits or sum(counts)  # if there is a single symbol, it takes one bit


def clustered(model: nn.Module) -> dict[str, tuple[HashedParametrization, Tensor]]:
    """Return the parametrization and the codebook of each clustered weight of a model, by each of its names."""
    return {
        name: (weight, table)
        for name, weight, table in hashed_in(model, aliases=True)
        if isinstance(weight.hash, CodebookHash)
    }


class Contents(NamedTuple):
    """The contents of a packed file.

    Attributes:
        tensors: the tensors of the plain state dict, by name.
        ties: the names of equal tensors: for each, the name in ``tensors`` and the map from its layout.
        others: entries of the state dict that are no tensors.
        names: all names, in the order of the state dict.
        dense_nbytes: number of bytes of the plain state dict's tensors, each name for itself.
    """

    tensors: dict[str, Packed]
    ties: dict[str, tuple[str, Relation]]
    others: dict[str, Any]
    names: list[str]
    dense_nbytes: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of all packed tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def rate(self) -> float:
        """How many times smaller the packed tensors are than the plain state dict."""
        return self.dense_nbytes / max(1, self.nbytes)

    @property
    def huffman_rate(self) -> float:
        """The rate if indices and gaps had Huffman codes."""
        return self.dense_nbytes / max(1, sum(tensor.huffman_nbytes for tensor in self.tensors.values()))


def contents(model: nn.Module) -> Contents:
    """Return what :func:`save_packed` writes; its rate is the one that reports show.

    Example:
        >>> from tying.hashing import cluster_weight
        >>> model = nn.Linear(100, 20)
        >>> _ = cluster_weight(model, "weight", clusters=16)
        >>> f"{contents(model).nbytes}, {contents(model).rate:.2f}"  # 1,000 of indices, 64 of values, 80 of the bias
        '1144, 7.06'
    """
    state = bake(model)
    dense = {name: value for name, value in state.items() if isinstance(value, Tensor) and not is_lazy(value)}
    ties = _ties(model, dense)
    return Contents(
        tensors={name: pack(value) for name, value in dense.items() if name not in ties},
        ties=ties,
        others={name: value for name, value in state.items() if name not in dense},
        names=[*state],
        dense_nbytes=sum(value.nbytes for value in dense.values()),
    )


def _ties(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[str, Relation]]:
    """Return, for names of weights that are equal to another by a tie, the other's name and the map from its layout."""
    ties: dict[str, tuple[str, Relation]] = {}
    for record in tie_records(model):
        source = record.names[0]
        ties |= {name: (source, relation) for name, relation in zip(record.names, record.relations, strict=True)}
    for source, *others in names_by_weight(derived_by_others(model)):
        ties |= {name: (source, Relation()) for name in others}
    first: dict[int, str] = {}  # name of each parameter; some are shared without tying.hard.tie
    for name, location in locate_parameters(model).items():
        if location.holder is location.owner:
            ties.setdefault(name, (first.setdefault(id(location.parameter), name), Relation()))
    return {
        name: (source, relation)
        for name, (source, relation) in ties.items()
        if name != source == ties.get(source, (source,))[0]  # sources are stored themselves
        and {name, source} <= state.keys()
        and torch.equal(relation(state[source]), state[name])  # other code may have parted them
    }


def save_packed(model: nn.Module, path: Path | str) -> int:
    """Write the plain state dict of a model to a packed file; return the file's size in bytes.

    The file holds all entries that ``tying.hard.bake(model)`` returns, without loss. A tensor of few distinct values,
    such as a clustered weight, is stored as these values and packed indices where that is smaller; zeros, such as those
    of a pruned weight, take one bit or less where that is smaller. Tied weights are stored once. Beyond these bytes,
    the file takes at most 2 KiB and 200 bytes per tensor.

    Raises:
        ConfigurationError: no weight has few enough values.
    """
    content = contents(model)
    if not any(tensor.coding != "raw" and len(tensor.shape) > 1 for tensor in content.tensors.values()):
        raise ConfigurationError(
            "no weight of the model is clustered, or has few enough values to be packed: use WeightClustering, "
            "MixtureTying or cluster_weight first"
        )
    streams = [part for packed in content.tensors.values() for part in (packed.values, packed.indices, packed.places)]
    written = {
        "version": VERSION,
        "names": content.names,
        "tensors": {
            name: (packed.shape, packed.dtype, packed.coding, packed.counts) for name, packed in content.tensors.items()
        },
        "ties": {
            name: (source, [(step.pattern, step.axes) for step in relation.steps])
            for name, (source, relation) in content.ties.items()
        },
        "others": content.others,
        "bytes": torch.cat(streams),  # one tensor: torch.save aligns each
    }
    with atomically(Path(path)) as temporary:
        torch.save(written, temporary)
    return Path(path).stat().st_size


def load_packed(path: Path | str) -> dict[str, Any]:
    """Return the state dict in a file that :func:`save_packed` wrote, for ``load_state_dict`` of the plain model.

    A file of version 1 contains the clustered weights only: load it with ``strict=False``.

    Raises:
        ConfigurationError: the file is missing, damaged, or has another kind or version.
    """
    content = read(path, "packed weights")
    if not isinstance(content, Mapping) or "version" not in content or not {"weights", "bytes"} & content.keys():
        raise ConfigurationError(f"{path} holds no packed weights")
    if content["version"] not in (1, VERSION):
        raise ConfigurationError(
            f"{path} is of version {content['version']}; this package reads versions 1 to {VERSION}"
        )
    try:
        return _read_version_1(content["weights"]) if content["version"] == 1 else _read_version_2(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path} is damaged: {error}") from None
    except _DAMAGES as error:
        raise ConfigurationError(f"{path} is damaged: {error!r}") from None


def _read_version_1(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the clustered weights of a file of version 1, whose fields are ``Packed``'s, all with gaps."""
    return {
        name: unpack(
            Packed(
                shape=fields["shape"],
                dtype="float32",
                coding="gaps",
                values=fields["codebook"].view(torch.uint8),
                indices=fields["indices"],
                places=fields["gaps"],
                counts=(len(fields["codebook"]), *fields["counts"]),
            )
        )
        for name, fields in weights.items()
    }


def _read_version_2(content: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: _stream_sizes(*fields) for name, fields in content["tensors"].items()}
    if len(content["bytes"]) != (due := sum(map(sum, sizes.values()))):
        raise ConfigurationError(f"{len(content['bytes'])} bytes instead of {due}")
    streams = iter(content["bytes"].split([size for parts in sizes.values() for size in parts]))
    state = {**content["others"]}
    for name, (shape, dtype, coding, counts) in content["tensors"].items():
        state[name] = unpack(Packed(shape, dtype, coding, next(streams), next(streams), next(streams), counts))
    for name, (source, steps) in content["ties"].items():
        relation = Relation(tuple(Step(pattern, tuple(axes)) for pattern, axes in steps))
        state[name] = relation(state[source]).contiguous()
    return {name: state[name] for name in content["names"]}


def _stream_sizes(shape: object, dtype: str, coding: str, counts: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the number of bytes of values, indices and places."""
    values, indices, places = counts
    width = torch.empty(0, dtype=getattr(torch, dtype), device="cpu").element_size()
    place_bits = GAP_BITS if coding == "gaps" else 1
    return values * width, _bytes(indices, index_bits(values)), _bytes(places, place_bits)


def _bytes(count: int, bits: int) -> int:
    """Return the number of bytes of integers of some bits each."""
    return -(-count * bits // 8)


def _blocks(count: int) -> Iterable[range]:
    return (range(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK))


def _pack(values: Tensor, bits: int) -> Tensor:
    def blocks() -> Iterator[Tensor]:
        for block in _blocks(len(values)):
            part = values[block.start : block.stop].numpy().astype(np.int64)
            yield torch.from_numpy(np.packbits((part[:, None] >> np.arange(bits)) % 2 > 0))

    return torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *blocks()])


def _unpack(name: str, content: Tensor, count: int, bits: int) -> Tensor:
    if len(content) != (size := _bytes(count, bits)):
        raise ConfigurationError(f"{name} of {len(content)} bytes instead of {size}")
    integers = torch.empty(count, dtype=torch.int64, device="cpu")
    for block in _blocks(count):
        part = content[block.start * bits // 8 : _bytes(block.stop, bits)].numpy()
        spread = np.unpackbits(part, count=len(block) * bits).reshape(len(block), bits)
        integers[block.start : block.stop] = torch.from_numpy((spread.astype(np.int64) << np.arange(bits)).sum(axis=1))
    return integers
