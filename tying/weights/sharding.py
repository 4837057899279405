"""Weights that are sharded over processes: their local shards, their layouts, and sums over the processes.

Sharded weights are tensors of torch's class ``DTensor``, which FSDP2 and tensor parallelism make. No other file knows
them. Every function takes plain tensors too, which need no communication.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed
from torch import Tensor, nn

from tying.errors import ConfigurationError
from tying.selection.relation import Relation
from tying.selection.tie import TiedGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor  # takes as long to import as this package
    from torch.distributed.tensor.placement_types import Placement

Placements = Sequence["Placement"]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a ``DTensor``: each process holds a shard of it, or a replica.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, which shares the tensor's memory; or the tensor itself.

    Example:
        >>> local(torch.zeros(2))
        tensor([0., 0.])
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every process must call it, and receives all other shards.

    Example:
        >>> full(torch.zeros(2))
        tensor([0., 0.])
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return a whole tensor, which all processes have, in the layout of a reference, on its device.

    This sends nothing. Each process keeps its part of the value; a value that is sharded already does not change.

    Example:
        >>> shard_like(torch.zeros(2), reference=torch.ones(2))
        tensor([0., 0.])
    """
    if not is_sharded(reference) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    mesh = reference.device_mesh
    whole = DTensor.from_local(value.to(reference.device), mesh, replicated(reference), run_check=False)
    return whole.redistribute(placements=reference.placements)


def replicated(reference: "DTensor") -> Placements:
    """Return the placements of a tensor of which each process of a reference's mesh holds the whole."""
    from torch.distributed.tensor import Replicate

    return [Replicate()] * reference.device_mesh.ndim


def sharded_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that ``fully_shard`` has been called on, the model's own being ''.

    Example:
        >>> sharded_modules(nn.Linear(2, 2))
        []
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [name for name, module in model.named_modules() if isinstance(module, fsdp.FSDPModule)] if fsdp else []


def placements_of(reference: Tensor) -> Placements | None:
    """Return how a tensor is sharded over each dimension of its mesh; None for a plain tensor."""
    return tuple(reference.placements) if is_sharded(reference) else None


def aligned(tensor: Tensor, relation: Relation, placements: Placements) -> Tensor:
    """Return ``relation(tensor)`` with the given placements, differentiably.

    This sends nothing, and shares memory, if :func:`is_view` is true. Else it sends the tensor once. A relation that
    splits or joins axes needs the whole tensor on each process.
    """
    assert is_sharded(tensor)
    if not relation.permutes:
        tensor = tensor.redistribute(placements=replicated(tensor))
    image: Any = relation(tensor)
    if tuple(image.placements) != tuple(placements):
        image = image.redistribute(placements=placements)
    return cast(Tensor, image)


def related(value: Tensor, relation: Relation, reference: Tensor) -> Tensor:
    """Return ``relation(value)`` in the layout of a reference; of a sharded value, every process must call it."""
    if not is_sharded(reference):
        return relation(full(value))
    if is_sharded(value):
        return aligned(value, relation, reference.placements)
    return shard_like(relation(value), reference)


def is_view(tensor: Tensor, relation: Relation, placements: Placements) -> bool:
    """Return whether :func:`aligned` shares the tensor's memory; the answer is the same in all processes."""
    related: Any = relation(tensor.detach()) if relation.permutes else None
    return related is not None and tuple(related.placements) == tuple(placements)


def local_tensors(group: TiedGroup, placements: Placements | None = None) -> list[Tensor]:
    """Return a group's tensors in the source's layout, as ``group.tensors()``; of sharded ones, the local shards.

    Args:
        group: a group of plain tensors, or of tensors on one mesh.
        placements: those of the returned shards; by default the source's.
    """
    placements = placements or placements_of(group.parameters[0])
    if placements is None or group.shared:
        return [*map(local, group.tensors())]
    pairs = zip(group.parameters, group.to_source, strict=True)
    return [local(aligned(parameter, relation, placements)) for parameter, relation in pairs]


def local_member(group: TiedGroup, index: int, value: Tensor, placements: Placements) -> Tensor:
    """Return a value for a member of a group as the member's local shard; the way back from :func:`local_tensors`.

    Args:
        group: a group of tensors on one mesh.
        index: the position of the member.
        value: a local shard in the source's layout, with the given placements.
        placements: those of the value.
    """
    from torch.distributed.tensor import DTensor

    source: Any = group.parameters[0]
    member: Any = group.parameters[index]
    whole = DTensor.from_local(
        value, source.device_mesh, placements, run_check=False, shape=source.shape, stride=source.stride()
    )
    return local(aligned(whole, group.relations[index], member.placements))


def reduce_gradient(parameter: Tensor) -> None:
    """Give the gradient of a sharded parameter its placements; partial gradients of processes are summed, once.

    An optimizer does so too. Tensor parallelism leaves partial gradients of weights that its processes replicate.
    """
    gradient = parameter.grad
    if gradient is not None and placements_of(gradient) != placements_of(parameter):
        assert is_sharded(gradient)
        assert is_sharded(parameter)
        parameter.grad = gradient.redistribute(placements=parameter.placements)


def reshard(model: nn.Module) -> None:
    """Give a model's modules their shards: FSDP2 leaves whole weights after a forward pass without a backward pass."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # an FSDPModule of torch, which takes long to import
            module.reshard()  # type: ignore[operator]  # a method


def total(sums: Sequence[Tensor], references: Sequence[Tensor]) -> list[Tensor]:
    """Return sums over whole tensors, given each process's sums over its local shards.

    There is one reduction for each kind of layout, whatever the number of sums. Replicas are counted once.

    Args:
        sums: tensors of one shape and dtype.
        references: the sharded, or plain, tensor over which each was summed.

    Example:
        >>> total([torch.tensor(2.0)], [torch.ones(2)])
        [tensor(2.)]
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    totals, kinds = [*sums], dict[Any, list[int]]()
    for place, reference in enumerate(references):
        if is_sharded(reference):
            # a shard that is strided by another is no instance of Shard
            are_replicas = tuple(placement.is_replicate() for placement in reference.placements)
            kinds.setdefault((reference.device_mesh, are_replicas), []).append(place)
    for (mesh, are_replicas), places in kinds.items():
        placements = [Replicate() if is_replica else Partial() for is_replica in are_replicas]
        stacked = torch.stack([sums[place] for place in places])
        reduced = DTensor.from_local(stacked, mesh, placements, run_check=False).full_tensor()
        for place, value in zip(places, reduced, strict=True):
            totals[place] = value
    return totals


def largest(values: Tensor) -> Tensor:
    """Return the largest of the values of all processes, entry by entry; every process must call it.

    Example:
        >>> largest(torch.tensor([1.0]))
        tensor([1.])
    """
    if is_distributed():
        values = values.clone()
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values


def bounds(tensors: Sequence[Tensor]) -> tuple[float, float]:
    """Return the smallest and the largest entry of tensors; if some are sharded, every process must call it.

    Example:
        >>> bounds([torch.tensor([1.0, 3.0]), torch.tensor([2.0])])
        (1.0, 3.0)
    """
    shards = [local(tensor.detach()) for tensor in tensors]
    ends = [shard.aminmax() for shard in shards if shard.numel()]
    low = min((float(end.min) for end in ends), default=math.inf)
    high = max((float(end.max) for end in ends), default=-math.inf)
    if any(map(is_sharded, tensors)):
        opposite, high = largest(torch.tensor([-low, high], dtype=torch.float64, device=shards[0].device)).tolist()
        low = -opposite
    return low, high


def anywhere(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Return whether a flag is true in any process; every process must call it.

    Args:
        flag: this process's.
        device: a device of the process group's backend.

    Example:
        >>> anywhere(False), anywhere(True)
        (False, True)
    """
    return bool(largest(torch.tensor(float(flag), device=device)))


def is_distributed() -> bool:
    """Return whether there are several processes."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return available and torch.distributed.get_world_size() > 1


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all processes, by rank; every process must call it.

    Example:
        >>> all_gather_object("here")
        ['here']
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def check_meshes(tensors: Mapping[str, Tensor]) -> None:
    """Raise an error unless all tensors are plain, or all are sharded over one mesh.

    Raises:
        ConfigurationError: they are not.
    """
    (first, reference), *others = tensors.items()
    mesh = reference.device_mesh if is_sharded(reference) else None
    for name, tensor in others:
        if is_sharded(tensor) != (mesh is not None):
            sharded, plain = (name, first) if is_sharded(tensor) else (first, name)
            raise ConfigurationError(
                f"{sharded!r} is sharded over processes, and {plain!r} is not: shard both, by a fully_shard "
                "or parallelize_module that includes their modules, or neither"
            )
        if is_sharded(tensor) and tensor.device_mesh != mesh:
            raise ConfigurationError(
                f"{first!r} is sharded over the mesh {describe_mesh(reference)}, and {name!r} over "
                f"{describe_mesh(tensor)}: shard both over one mesh"
            )


def describe_mesh(tensor: Tensor) -> str:
    """Return the dimensions of a sharded tensor's mesh in words."""
    assert is_sharded(tensor)
    mesh = tensor.device_mesh
    names = mesh.mesh_dim_names or [f"dimension {place}" for place in range(mesh.ndim)]
    return " × ".join(f"{name} {size}" for name, size in zip(names, mesh.shape, strict=True))
