"""Check the functions of tying.weights.sharding on sharded tensors; each check returns values that must be equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from sharded_models import TIES, Net
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from tying import resolve
from tying.errors import ConfigurationError
from tying.soft import TyingPenalty, gap
from tying.weights.sharding import (
    anywhere,
    check_meshes,
    full,
    is_view,
    largest,
    local,
    local_member,
    local_tensors,
    placements_of,
    shard_like,
    total,
)

JOINED = "network.encoder.2.weight ~ network.decoder.0.weight | (o g) i -> (i g) o"
CHECKS: dict[str, Callable[[Net, Net], Iterator[tuple[Any, Any]]]] = {}


def check(function):
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


@check
def whole_tensors(plain, sharded):
    for parameter, whole in zip(sharded.parameters(), plain.parameters(), strict=True):
        yield full(parameter), whole
        yield local(shard_like(whole.detach(), parameter)), local(parameter)


@check
def shards_share_memory(plain, sharded):
    for parameter in sharded.parameters():
        with torch.no_grad():
            before = full(parameter).clone()
            local(parameter).add_(1.0)
            yield full(parameter), before + 1
            local(parameter).sub_(1.0)


@check
def groups_in_the_layout_of_their_source(plain, sharded):
    for tie in [*TIES, JOINED]:
        for group, whole in zip(resolve(sharded, [tie]), resolve(plain, [tie]), strict=True):
            source = group.parameters[0]
            shards = local_tensors(group)
            for index, (shard, tensor) in enumerate(zip(shards, whole.tensors(), strict=True)):
                yield shard, local(shard_like(tensor.detach(), source))
                back = local_member(group, index, shard.detach(), placements_of(source) or [])
                yield back, local(group.parameters[index])


@check
def plain_groups_send_nothing(plain, sharded):
    [group] = resolve(sharded, TIES[1:])
    with CommDebugMode() as communication:
        local_tensors(group)
        shard_like(torch.zeros(5, dtype=torch.float64), group.parameters[0])
    yield communication.get_total_counts(), 0
    yield is_view(group.parameters[1], group.to_source[1], placements_of(group.parameters[0]) or []), True


class CountBytes(TorchDispatchMode):
    """Counts the collectives of a process, and the bytes that it hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.nbytes = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if "c10d_functional" in function.namespace and not {"wait_tensor", "_wrap_tensor_autograd"} & {
            *str(function).split(".")
        }:
            self.count += 1
            self.nbytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


PLAIN = "network.blocks.*.branch.weight"
TRANSPOSED = "network.blocks.0.branch.weight ~ network.blocks.1.branch.weight | o i -> i o"


@check
def pulls_of_plain_ties_send_nothing(plain, sharded):
    for penalty in ("l2", "l1"):
        pull = TyingPenalty(resolve(sharded, [PLAIN, TIES[1]]), penalty)
        with CountBytes() as sent, CommDebugMode() as communication:
            pull.add_gradients_(0.1)
            pull.pull_(0.1)
            pull.prox_(0.1)
        yield (sent.count, communication.get_total_counts()), (0, 0)


@check
def pulls_of_transposed_ties_send_at_most_one_side(plain, sharded):
    pull = TyingPenalty(resolve(sharded, [TRANSPOSED]))
    for update in (pull.add_gradients_, pull.pull_, pull.prox_):
        with CountBytes() as sent:
            update(0.1)
        yield (sent.count, sent.nbytes), (2, plain.network.blocks[0].branch.weight.nbytes)


@check
def gradients_of_the_penalty_in_a_loss(plain, sharded):
    for ties in ([PLAIN], [TRANSPOSED], TIES):
        values = []
        for model in (sharded, plain):
            model.zero_grad()
            value = TyingPenalty(resolve(model, ties))()
            value.backward()
            values.append(value)
        yield values[0], values[1]
        for parameter, whole in zip(sharded.parameters(), plain.parameters(), strict=True):
            if whole.grad is not None:
                yield full(parameter.grad), whole.grad


@check
def gaps_of_tensors(plain, sharded):
    for group, whole in zip(resolve(sharded, TIES), resolve(plain, TIES), strict=True):
        yield gap(group.tensors()), gap(whole.tensors())


@check
def sums_over_all_shards(plain, sharded):
    parameters = [*sharded.parameters(), torch.ones(3)]
    with CommDebugMode() as communication:
        sums = total([local(p.detach()).double().square().sum() for p in parameters], parameters)
    for value, whole in zip(sums, [*plain.parameters(), torch.ones(3)], strict=True):
        yield value, whole.detach().double().square().sum()
    yield communication.get_total_counts(), 1


@check
def values_of_all_processes(plain, sharded):
    rank = torch.distributed.get_rank()
    yield largest(torch.tensor([float(rank), -float(rank)])), torch.tensor([1.0, 0.0])
    for flag, expected in [(rank == 1, True), (rank == 0, True), (False, False)]:
        yield anywhere(flag), expected


@check
def meshes_that_differ_are_refused(plain, sharded):
    weight, other = "network.encoder.0.weight", Net()
    fully_shard(other.network, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards")))
    sharded_weight = sharded.get_parameter(weight)
    for tensor, message in [
        (plain.get_parameter(weight), "'a' is sharded over processes, and 'b' is not: shard both, by a "),
        (
            other.get_parameter(weight),
            "'a' is sharded over the mesh data 2, and 'b' over replicas 1 × shard",
        ),
    ]:
        try:
            check_meshes({"a": sharded_weight, "b": tensor})
        except ConfigurationError as error:
            yield message in str(error), True
        else:
            yield False, True


def run() -> dict[str, list[tuple[Any, Any]]]:
    """Return the pairs of each check, on two processes."""
    results = {}
    for name, pairs in CHECKS.items():
        plain, sharded = Net(), Net()
        fully_shard(sharded.network, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("data",)))
        results[name] = [
            tuple(side.detach().clone() if isinstance(side, torch.Tensor) else side for side in pair)
            for pair in pairs(plain, sharded)
        ]
    return results
