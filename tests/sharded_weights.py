"""The cells of callbacks that change weights or blocks: shared, relaxed, computed and repeated ones."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed
from sharded_faults import error_of
from sharded_functions import check
from sharded_models import SHARDINGS, TIES, Cell, Net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tying.callbacks import (
    GeneratedWeights,
    HardTying,
    Looping,
    LowRankWeights,
    RecurrentDepth,
    RelaxedTying,
    ResidualMerging,
    TemplateWeights,
    UntiedBiases,
    WeightHashing,
    ZoneoutStates,
)
from tying.depth import Residual, StochasticDepth, loop, recur, zone_out
from tying.errors import ConfigurationError
from tying.hard import (
    LowRankResidual,
    audit,
    bake,
    generate_weights,
    load_plain,
    lower_rank,
    relax,
    restore,
    shard_groups,
    share_templates,
    tie,
    untie_biases,
)
from tying.hashing import HashedParametrization, hash_weights
from tying.mixins import TyingMixin
from tying.weights.sharding import full, is_sharded, local, shard_like

BLOCKS = ["network.blocks.*.branch.weight"]
BIASES = ["network.blocks.0.**.bias"]
SHARED = ["network.blocks.{0..2}"]
SPLIT = ["network.encoder.2.weight ~ network.decoder.0.weight | (o g) i -> (i g) o"]


class Joined(Net):
    """Shards together what shares parameters; its first block may be another."""

    first: type[nn.Module] | None = None

    def __init__(self, shard=None):
        super().__init__(shard)
        if self.first is not None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.network.blocks[0] = Residual(self.first()).double()

    def units(self):
        return shard_groups(self, ["network.encoder", "network.decoder", "network.blocks.*"])


class Tied(Joined):
    """Ties before fully_shard, and after parallelize_module."""

    ties = TIES

    def change(self):
        if self.shard is None or self.device_mesh["tensor_parallel"].size() == 1:
            tie(self, self.ties)

    def units(self):
        tie(self, self.ties)
        return super().units()


class Split(Tied):
    ties = SPLIT


class Signal(nn.Module):
    """A convolution along the entries of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.convolution(x.unsqueeze(1)).squeeze(1)


class Memory(nn.Module):
    """An LSTM along the entries of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(2))[0]).squeeze(2)


def changed_by(function: Callable[..., Any], *arguments: Any, block: type[nn.Module] | None = None, **keywords: Any):
    """Return the class of a model that a function changes before it is sharded; its first block may be another."""

    class Changed(Joined):
        first = block

        def change(self):
            function(self, *arguments, **keywords)

    return Changed


def mixed(*callbacks: pl.Callback, block: type[nn.Module] | None = None) -> type[Net]:
    """Return the class of a model whose ``configure_model`` lets mixins change it before it is sharded."""

    class Mixed(TyingMixin, Joined):
        tying: ClassVar = [*callbacks]
        first = block

        def configure_model(self):
            was_configured, shard, self.shard = self.is_configured, self.shard, None
            super().configure_model()
            self.shard = shard
            if shard is not None and not was_configured:
                shard(self, self.device_mesh)

    return Mixed


def baked(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return bake(trainer.lightning_module)


OTHERS = tuple(name for name in SHARDINGS if name not in ("one process", "FSDP2 by layer"))
PARALLEL = ("TP", "FSDP2 and TP")  # whose parallelize_module takes no computed weights
EXAMPLE = torch.zeros(1, 6, dtype=torch.float64)
RANK_1 = LowRankResidual(1)

CELLS: dict[str, Cell] = {
    "hard": Cell(lambda: [HardTying(TIES)], Tied, short=True, ends=baked),
    "hard, split axes": Cell(lambda: [HardTying(SPLIT)], Split, PARALLEL, ends=baked),
    "hard, after": Cell(
        lambda: [HardTying(TIES)], Net, tuple(name for name in SHARDINGS if "SDP2" in name or "HS" in name)
    ),
    "relaxed": Cell(lambda: [RelaxedTying(SHARED, RANK_1)], changed_by(relax, SHARED, RANK_1), ends=baked),
    "low rank": Cell(lambda: [LowRankWeights(BLOCKS, 2)], changed_by(lower_rank, BLOCKS, 2), ends=baked),
    "templates": Cell(
        lambda: [TemplateWeights(BLOCKS, 2)], changed_by(share_templates, BLOCKS, 2), short=True, ends=baked
    ),
    "generated": Cell(
        lambda: [GeneratedWeights(BLOCKS, 4, 2, 2)], changed_by(generate_weights, BLOCKS, 4, 2, 2), ends=baked
    ),
    "hashed": Cell(lambda: [WeightHashing(BLOCKS, 0.5)], changed_by(hash_weights, BLOCKS, 0.5), ends=baked),
    "hashed, one table": Cell(
        lambda: [WeightHashing(BLOCKS, 0.5, scope="network")],
        changed_by(hash_weights, BLOCKS, 0.5, scope="network"),
        short=True,
        ends=baked,
    ),
    "untied biases": Cell(
        lambda: [UntiedBiases(BIASES, [6])],
        changed_by(untie_biases, BIASES, EXAMPLE, block=Signal),
    ),
    "zoneout": Cell(
        lambda: [ZoneoutStates("**.lstm", 0.0, 0.0)], changed_by(zone_out, "**.lstm", 0.0, 0.0, block=Memory)
    ),
    "looping": Cell(
        lambda: [Looping("network.blocks.*", 2, per_pass="scale")], changed_by(loop, "network.blocks.*", 2, "scale")
    ),
    "recurrent": Cell(lambda: [RecurrentDepth("network.blocks.*")], changed_by(recur, "network.blocks.*")),
    "mixin, hard": Cell(list, mixed(HardTying(TIES)), OTHERS),
    "mixin, relaxed": Cell(list, mixed(RelaxedTying(SHARED, RANK_1)), OTHERS, short=True),
    "mixin, low rank and templates": Cell(
        list,
        mixed(LowRankWeights(["network.encoder.*.weight"], 2), TemplateWeights(BLOCKS, 2)),
        OTHERS,
    ),
    "mixin, generated": Cell(list, mixed(GeneratedWeights(BLOCKS, 4, 2, 2)), OTHERS),
    "mixin, hashed": Cell(list, mixed(WeightHashing(BLOCKS, 0.5, scope="network")), OTHERS),
    "mixin, untied biases": Cell(list, mixed(UntiedBiases(BIASES, [6]), block=Signal), OTHERS),
    "mixin, zoneout": Cell(list, mixed(ZoneoutStates("**.lstm", 0.0, 0.0), block=Memory), OTHERS),
    "mixin, merging": Cell(
        list, mixed(ResidualMerging("network.blocks.*", StochasticDepth(keep=1.0), "uniform")), OTHERS
    ),
    "mixin, looping": Cell(list, mixed(Looping("network.blocks.*", 2)), OTHERS),
    "mixin, recurrent": Cell(list, mixed(RecurrentDepth("network.blocks.*")), OTHERS),
}


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda net: tie(net, ["network.encoder.0.bias ~ network.decoder.0.bias"]),
    "related": lambda net: tie(net, TIES),
    "split": lambda net: tie(net, SPLIT),
    "relaxed": lambda net: relax(net, SHARED, RANK_1),
    "low rank": lambda net: lower_rank(net, BLOCKS, 2),
    "templates": lambda net: share_templates(net, BLOCKS, 2),
    "generated": lambda net: generate_weights(net, BLOCKS, 4, 2, 2),
    "hashed": lambda net: hash_weights(net, BLOCKS, 0.5),
    "hashed, one table": lambda net: hash_weights(net, BLOCKS, 0.5, scope="network"),
}


def pairs_of_models():
    """Yield, for each change, two equal models, one of them sharded after the change, and a plain state dict."""
    mesh = init_device_mesh("cpu", (2,))
    for change in CHANGES.values():
        models = Net(), Net()
        for model in models:
            torch.manual_seed(0)
            change(model)
        models[1].load_state_dict(models[0].state_dict())
        fully_shard(models[1].network, mesh=mesh)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            given = {name: torch.randn_like(value) for name, value in Net().state_dict().items()}
        yield *models, given


@check
def reports_on_sharded_weights(plain, sharded):
    for whole, parted, _ in pairs_of_models():
        yield str(audit(parted)) == str(audit(whole)), True


@check
def sharded_weights_bake(plain, sharded):
    for whole, parted, _ in pairs_of_models():
        yield [*bake(parted)] == [*bake(whole)], True
        yield from zip(bake(parted).values(), bake(whole).values(), strict=True)
        yield is_sharded(next(parted.parameters())), True


@check
def sharded_weights_load_plain_ones(plain, sharded):
    for whole, parted, given in pairs_of_models():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for unequal in ("source", "mean"):
                errors = [load_plain(model, given, unequal) for model in (parted, whole)]
                yield [*errors[0]] == [*errors[1]], True
                yield torch.tensor([*errors[0].values()]), torch.tensor([*errors[1].values()])
                yield from zip(bake(parted).values(), bake(whole).values(), strict=True)


@check
def sharded_weights_load_their_state(plain, sharded):
    for whole, parted, _ in pairs_of_models():
        state = parted.state_dict()
        before = [value.clone() for value in bake(whole).values()]
        with torch.no_grad():
            for parameter in parted.parameters():
                local(parameter).zero_()
        parted.load_state_dict({name: shard_like(value, state[name]) for name, value in whole.state_dict().items()})
        yield from zip(bake(parted).values(), before, strict=True)


@check
def copies_that_differ_on_one_process_are_refused_on_all(plain, sharded):
    weight, tied = "network.encoder.0.weight", "network.decoder.2.weight"
    for _, parted, _ in [*pairs_of_models()][1:2]:
        before = [full(parameter).clone() for parameter in parted.parameters()]
        state = {name: value.clone() for name, value in parted.state_dict().items()}
        if torch.distributed.get_rank() == 1:
            local(state[tied])[0, 0] += 1
        expected = f"'{weight}' and '{tied}' are tied, but differ in this state dict"
        yield refusal(parted.load_state_dict, state).startswith(expected), True
        yield from zip(map(full, parted.parameters()), before, strict=True)
        del state[tied]
        parted.load_state_dict(state)  # a missing copy is the other one
        yield from zip(map(full, parted.parameters()), before, strict=True)


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """Return the text of the error with which a function refuses its arguments."""
    try:
        function(*arguments)
    except ConfigurationError as error:
        return str(error)
    return "no error"


@check
def models_that_are_sharded_otherwise_are_refused(plain, sharded):
    for name, change in CHANGES.items():
        expected = "cannot be tied: fully_shard has sharded it already. Tie in configure_model before, and shard " * (
            name in ("plain", "related", "split")
        )
        text = refusal(change, sharded)
        yield (expected or "is sharded over processes, and can no longer be computed") in text, True
        yield "tying.hard.shard_groups(model, units)" in text, True
    yield "shard network.encoder.0, network.decoder.2 together" in refusal(tie, sharded, TIES), True


@check
def files_of_whole_tensors_are_read_beyond_what_lightning_loads(plain, sharded):
    mesh, callback = init_device_mesh("cpu", (2,)), WeightHashing(BLOCKS, 0.5, scope="network")
    whole, parted, tied = Net(), Net(), Net()
    for model in (whole, parted):
        callback.apply(model)
    tie(tied, TIES)
    for model in (parted, tied):
        fully_shard(model.network, mesh=mesh)
    hashed = [module for module in whole.modules() if isinstance(module, HashedParametrization)]
    for module in hashed:
        module.scale *= 3
    with tempfile.NamedTemporaryFile() as file:
        torch.save({"state_dict": whole.state_dict()}, file.name)
        callback._load_extra_state(parted, file.name)
    scales = [module.scale for module in parted.modules() if isinstance(module, HashedParametrization)]
    yield torch.tensor(scales), torch.tensor([module.scale for module in hashed])
    with tempfile.NamedTemporaryFile() as file:
        torch.save({"state_dict": Net().state_dict()}, file.name)
        text = refusal(HardTying(TIES)._load_extra_state, tied, file.name)
    yield (
        text.startswith("HardTying: 'network.encoder.0.weight' and 'network.decoder.2.weight' are tied, but differ"),
        True,
    )


@check
def callbacks_of_models_that_are_sharded_otherwise_are_refused(plain, sharded):
    mesh = init_device_mesh("cpu", (2,))
    for cell in CELLS.values():
        for callback in [*cell.callbacks(), *getattr(cell.model, "tying", ())]:
            if callback.precedes_sharding:
                model = Joined() if cell.model is Net else cell.model()
                fully_shard(model.network, mesh=mesh)
                text = refusal(callback.apply_among, model, [])
                yield (
                    text.startswith(f"{callback.label}: fully_shard has sharded the model, which this callback has"),
                    True,
                )
                yield (", such as [network." in text) == bool(callback.ties), True


@check
def models_that_are_tied_before_tensor_parallelism_end_training_with_one_sentence(plain, sharded):
    bias, shard = "network.encoder.0.bias ~ network.decoder.0.bias", SHARDINGS["TP"].shard
    apart = (
        "'network.encoder.0.bias' and 'network.decoder.0.bias' were tied before the model was sharded, and are separate"
    )
    for function, arguments, callbacks, expected in [
        (tie, [[bias]], [HardTying([bias])], f"HardTying: {apart}"),
        (tie, [[bias]], [], apart),
        (tie, [TIES], [HardTying(TIES)], "HardTying: parallelize_module cannot take network.decoder.0.weight"),
        (
            lower_rank,
            [["**.weight"], 1],
            [LowRankWeights(["**.weight"], 1)],
            "LowRankWeights: parallelize_module cannot take",
        ),
    ]:
        text = error_of(changed_by(function, *arguments)(shard), callbacks, "TP")
        yield text.startswith(f"step 0, ConfigurationError: {expected}"), True


@check
def ties_across_units_that_are_sharded_apart_are_refused_at_the_first_step(plain, sharded):
    mesh = init_device_mesh("cpu", (2,))
    tie(plain, TIES)
    for unit in (plain.network.encoder, plain.network.decoder):
        fully_shard(unit, mesh=mesh)
    yield refusal(plain, EXAMPLE) == SEPARATE, True


@check
def ties_before_parallelize_module_are_refused_at_the_first_step(plain, sharded):
    names = [f"network.blocks.{place}.branch" for place in (0, 1)]
    tie(plain, [" ~ ".join(names)])
    plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in names}
    parallelize_module(plain, init_device_mesh("cpu", (2,)), plan)
    expected = SEPARATE.replace("network.encoder.0", names[0]).replace("network.decoder.2", names[1])
    yield refusal(plain, EXAMPLE) == expected, True
    restore(plain)
    yield plain(EXAMPLE).shape == EXAMPLE.shape, True


@check
def computed_weights_under_tensor_parallelism_are_refused(plain, sharded):
    mesh = init_device_mesh("cpu", (2,))
    hash_weights(plain, BLOCKS, 0.5)
    parallelize_module(plain.network.blocks[0].branch, mesh, ColwiseParallel(output_layouts=Replicate()))
    expected = "the weight of a HashedLinear is computed from other parameters, which are sharded: tensor parallelism "
    yield refusal(plain, EXAMPLE).startswith(expected), True
    parallel = Net()
    parallelize_module(parallel.network.blocks[0].branch, mesh, ColwiseParallel(output_layouts=Replicate()))
    for name in [*CHANGES][3:]:
        yield "Tensor parallelism does not support computed weights" in refusal(CHANGES[name], parallel), True


@check
def members_that_are_partly_sharded_are_refused(plain, sharded):
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(plain.network.blocks[0].branch, mesh, ColwiseParallel(output_layouts=Replicate()))
    text = refusal(tie, plain, ["network.blocks.0.branch.weight ~ network.blocks.1.branch.weight"])
    expected = "is sharded over processes, and 'network.blocks.1.branch.weight' is not: shard both"
    yield text.startswith(f"'network.blocks.0.branch.weight' {expected}"), True


SEPARATE = (
    "'network.encoder.0.weight' and 'network.decoder.2.weight' were tied before the model was sharded, and are separate "
    "shards now, which would train apart. Under tensor parallelism, tie after parallelize_module; with FSDP2, tie before "
    "fully_shard, and shard network.encoder.0, network.decoder.2 together, as tying.hard.shard_groups(model, units) lists "
    "them"
)
