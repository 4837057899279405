"""What tied and computed weights must live through: the survival table, a test for each cell.

A cell that returns words says how it holds, or the remedy, which the test has applied.
"""

import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model
from survival import (
    BY_HAND,
    CHANGED,
    DERIVED,
    ROWS,
    SQUARES,
    TIED,
    TIES,
    Lit,
    Net,
    assert_shared,
    batch,
    data,
    loss_of,
    made,
    untied,
    value_of,
    weight_of,
)
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from benchmarks.report import RESULTS
from tying import Tie
from tying.callbacks import (
    GeneratedWeights,
    HardTying,
    LowRankWeights,
    TemplateWeights,
    UntiedBiases,
    WeightHashing,
)
from tying.hard import audit, bake, load_plain, restore

HERE = Path(__file__).parent
LOST = "lost, says `audit`: assign, or bake first"
PARTS = "parts it silently"
TOLD = "parts it, says `audit`: `restore(model)`"


def below(ties, prefix="net."):
    """Return ties of the network as those of the module that holds it."""
    return [
        Tie(prefix + t.source, t.target and prefix + t.target, t.relation, tuple(e if e[0] == "*" else prefix + e for e in t.exclude))
        for t in ties
    ]  # fmt: skip


def lit(row):
    """Return a module to train, and the callback that lets its weights be shared, or a module that does so itself."""
    squares = [f"net.{pattern}" for pattern in SQUARES]
    callbacks = {
        "low rank": lambda: LowRankWeights(["net.first.weight"], 2),
        "low rank + diagonal": lambda: LowRankWeights(["net.first.weight"], 2, diagonal=True),
        "templates": lambda: TemplateWeights(squares, 2),
        "generated": lambda: GeneratedWeights(["net.kernels.*.weight"], 2, 3, 3),
        "hashed by network": lambda: WeightHashing(squares, 0.25, scope="network"),
        "untied biases": lambda: UntiedBiases(["net.kernels.*.bias"], [6]),
        **{name: lambda name=name: HardTying(below(TIES[name])) for name in TIES},
    }
    torch.manual_seed(0)  # a bank and a generator begin at random
    if row in callbacks:
        return Lit(), [callbacks[row]()]
    module = Lit(row)
    module.configure_model()  # before callbacks copy it, which Lightning lets them do before it calls this
    return module, []


def fit(module, callbacks, folder, epochs=2, **arguments):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data(), **arguments)
    return trainer


def assert_same(one, other, **tolerance):
    x = batch(dtype=next(one.parameters()).dtype)
    torch.testing.assert_close(one(x), other(x), **{"rtol": 0, "atol": 0, **tolerance})


def trained(row, steps=3, x=None, optimizer=None):
    net = made(row).double()
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net, batch(dtype=torch.float64) if x is None else x).backward()
        optimizer.step()
    return net


def baked(net, row):
    """Return the untied network of a network's weights."""
    plain = untied(row).to(next(net.parameters()).dtype)
    plain.load_state_dict(bake(net))
    return plain


def assert_mended(net, row):
    """Fail unless `audit` names a parted tie, and tying again mends it."""
    [problem] = audit(net).problems[:1]
    assert "is another tensor now" in problem
    assert "tying.hard.restore(model)" in problem
    restore(net)
    assert audit(net).problems == ()
    assert_shared(net, row)


def state_dict_round_trip(row, tmp_path):
    net = trained(row).float()
    fresh = made(row, seed=2)
    fresh.load_state_dict(net.state_dict())
    assert_same(fresh, net)
    assert_shared(fresh, row)
    if row in TIES:
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (net, Net())]
        assert shapes[0] == shapes[1]


def untied_checkpoint_both_ways(row, tmp_path):
    net, fresh = trained(row), made(row, seed=2).double()
    plain = baked(net, row)
    assert_same(plain, net, atol=1e-14)
    if row in DERIVED and row not in TIES:
        assert load_plain(fresh, plain.state_dict()) == {}
    else:
        plain.load_state_dict(net.state_dict())
        fresh.load_state_dict(plain.state_dict())
    assert_same(fresh, net, atol=1e-5)
    assert_shared(fresh, row)
    return "by bake and load_plain" if row in DERIVED and row not in TIES else None


def other_plain_weights(row, tmp_path):
    """The weights of another network, which need not be the row's."""
    net, plain = made(row).double(), untied(row).double()
    with torch.no_grad():
        for seed, parameter in enumerate(plain.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        plain.second.weight.mul_(-2)
    if row == BY_HAND:
        net.load_state_dict(plain.state_dict())
        return f"{relative_errors(net, plain)['first.weight']:.2g}, silently"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors = load_plain(net, plain.state_dict(), unequal="source")
    measured = {name: error for name, error in relative_errors(net, plain).items() if error > 1e-6}
    assert errors == pytest.approx(measured, rel=1e-6)
    assert any(issubclass(warning.category, UserWarning) for warning in caught) == bool(measured)
    assert_shared(net, row)
    return f"up to {max(errors.values()):.2g}, returned" if errors else "yes"


def relative_errors(net, plain):
    stored = bake(net)
    return {name: float((stored[name] - given).norm() / given.norm()) for name, given in plain.state_dict().items()}


def owns_its_memory(row, tmp_path):
    net = made(row)
    for tensors in ([*net.parameters(), *net.buffers()], net.state_dict().values(), bake(net).values()):
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.numel()}
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in storages.values())
        assert all(tensor.is_contiguous() for tensor in storages.values())


def written_in_place(row, tmp_path):
    net = made(row)
    module, name = weight_of(net, row)
    before = value_of(net, row).clone()
    getattr(module, name).data.add_(1)
    added = value_of(net, row).clone()
    nn.init.constant_(getattr(module, name), 0.5)
    if row in DERIVED and row not in TIES:
        assert torch.equal(added, before)
        assert torch.equal(value_of(net, row), before)
        assert any(CHANGED[row] in limit and "in-place writes" in limit for limit in audit(net).limits)
        plain = baked(net, row)  # the remedy
        nn.init.constant_(weight_of(plain, row)[0].weight, 0.5)
        assert torch.equal(value_of(plain, row), torch.full_like(before, 0.5))
        return LOST
    assert torch.equal(added, before + 1)
    assert torch.equal(value_of(net, row), torch.full_like(before, 0.5))
    assert_shared(net, row)
    assert not any("in-place writes" in limit for limit in audit(net).limits)
    return None


def assigned(row, tmp_path):
    by_tensor, by_parameter = made(row), made(row)
    value = torch.randn(value_of(by_tensor, row).shape, generator=torch.Generator().manual_seed(3))
    module, name = weight_of(by_parameter, row)
    setattr(module, name, nn.Parameter(value))
    if row in DERIVED:
        module, name = weight_of(by_tensor, row)
        setattr(module, name, value)
        assert_shared(by_parameter, row)
        assert_same(by_parameter, by_tensor)
        assert not torch.equal(value_of(by_tensor, row), value_of(made(row), row))
        return "yes" if torch.equal(value_of(by_tensor, row), value) else "the nearest"
    assert torch.equal(value_of(by_parameter, row), value)
    if row in TIES:
        assert_mended(by_parameter, row)
    return {**dict.fromkeys(TIED, TOLD), BY_HAND: PARTS}.get(row)


def reset_all(net):
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def assert_drawn_like_dense(net, row):
    """Fail unless weights are finite, and about as large as those that a dense network begins with."""
    for name, value in bake(net).items():
        if value.is_floating_point():
            assert value.isfinite().all(), name
    weight, dense = (value_of(model, row).double().std() for model in (net, untied(row)))
    assert 0.2 < float(weight / dense) < 5


def reset(row, tmp_path):
    net = trained(row).float()
    before = value_of(net, row).clone()
    reset_all(net)
    assert not torch.equal(value_of(net, row), before)
    assert_drawn_like_dense(net, row)
    assert_shared(net, row)


def emptied_and_reset(row, tmp_path):
    net = made(row).to("meta").to_empty(device="cpu")
    if row in TIES or row == "hashed by network":  # one table
        assert_mended(net, row)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(float("nan"))
    reset_all(net)
    assert_drawn_like_dense(net, row)
    if row == BY_HAND:
        assert net.first.weight is not net.second.weight
        return PARTS
    assert_shared(net, row)
    return TOLD if row in TIES or row == "hashed by network" else None


def assigning_load(row, tmp_path):
    net, fresh = trained(row).float(), made(row, seed=2)
    fresh.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    assert_same(fresh, net)
    if row == BY_HAND:
        assert fresh.first.weight is not fresh.second.weight
        return PARTS
    assert_shared(fresh, row)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    loss_of(fresh, batch()).backward()
    optimizer.step()
    assert_shared(fresh, row)
    return None


def resume_bitwise(row, tmp_path):
    whole, callbacks = lit(row)
    fit(whole, callbacks, tmp_path, epochs=4)
    half, callbacks = lit(row)
    fit(half, callbacks, tmp_path, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed, callbacks = lit(row)
    fit(resumed, callbacks, tmp_path, epochs=4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_same(resumed.net, whole.net)
    assert not torch.equal(resumed.net(batch()), half.net(batch()))
    (assert_shared(resumed.net, row) if row not in TIES else None)


def load_from_checkpoint(row, tmp_path):
    module, callbacks = lit(row)
    fit(module, callbacks, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    again = Lit.load_from_checkpoint(tmp_path / "a.ckpt", row=row)
    assert_same(again.net, module.net)
    assert_shared(again.net, row)


def deepcopy(row, tmp_path):
    net = trained(row)
    copied = copy.deepcopy(net)
    assert_same(copied, net)
    assert_shared(copied, row)
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in net.parameters()})
    state = {name: torch.zeros_like(value) for name, value in copied.state_dict().items()}
    copied.load_state_dict(
        {name: value if value.is_floating_point() else net.state_dict()[name] for name, value in state.items()}
    )
    assert any(value.abs().sum() > 0 for value in net.parameters())
    assert_shared(copied, row)


def pickling(row, tmp_path):
    net = trained(row)
    again = pickle.loads(pickle.dumps(net))
    assert_same(again, net)
    assert_shared(again, row)
    torch.save(net, tmp_path / "net.pt")
    assert_same(torch.load(tmp_path / "net.pt", weights_only=False), net)
    module, callbacks = lit(row)
    fit(module, callbacks, tmp_path)
    assert_same(pickle.loads(pickle.dumps((module, callbacks)))[0].net, module.net)


def double(row, tmp_path):
    net = made(row).double()
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert_shared(net, row)
    assert_shared(net.half().float(), row)


def meta_and_back(row, tmp_path):
    net = trained(row).float()
    moved = made(row).to("meta").to_empty(device="cpu")
    moved.load_state_dict(net.state_dict())
    assert_same(moved, net)
    if row == BY_HAND:
        assert moved.first.weight is not moved.second.weight
        return PARTS
    assert_shared(moved, row)
    return None


def weights_only_load(row, tmp_path):
    net, fresh = trained(row).float(), made(row, seed=2)
    torch.save(net.state_dict(), tmp_path / "shared.pt")
    loaded = torch.load(tmp_path / "shared.pt", weights_only=True)
    assert {type(value) for value in loaded.values()} == {torch.Tensor}
    fresh.load_state_dict(loaded)
    assert_same(fresh, net)
    assert_shared(fresh, row)
    stored = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in loaded.values()
        if value.is_floating_point()
    }
    numbers = [tensor for tensor in (*net.parameters(), *net.buffers()) if tensor.is_floating_point()]
    assert sum(stored.values()) == sum(tensor.nbytes for tensor in numbers)  # each weight once


def safetensors_of_bake(row, tmp_path):
    net, plain = trained(row).float(), untied(row)
    save_file(bake(net), tmp_path / "plain.safetensors")
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    assert_same(plain, net, atol=1e-6)
    return "plain copies"


def safetensors_of_the_model(row, tmp_path):
    net, fresh = trained(row).float(), made(row, seed=2)
    save_model(net, tmp_path / "model.safetensors")
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    assert_same(fresh, net)
    assert_shared(fresh, row)


def accelerate(row, tmp_path):
    accelerator, net = Accelerator(cpu=True), made(row)
    try:
        net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        loss_of(net, batch()).backward()
        optimizer.step()
        expected = net(batch()).detach()
        accelerator.save_state(tmp_path / "state")
        loss_of(net, batch()).backward()
        optimizer.step()
        assert not torch.equal(net(batch()), expected)
        accelerator.load_state(tmp_path / "state")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # else the next Accelerator has this one's options
    assert torch.equal(net(batch()), expected)
    assert_shared(net, row)


def distributed_checkpoint(row, tmp_path):
    net, fresh = trained(row).float(), made(row, seed=2)
    dcp.save({"model": net.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    state = fresh.state_dict()
    dcp.load({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    fresh.load_state_dict(state)
    assert_same(fresh, net)
    assert_shared(fresh, row)


def merged(net, row):
    """Return how far the merge of an adapter moves the outputs, and the merged network."""
    path = CHANGED[row].rpartition(".")[0]
    torch.manual_seed(0)
    adapted = get_peft_model(net, LoraConfig(target_modules=[path], r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(batch())
        whole = adapted.merge_and_unload()
        return float((whole(batch()) - expected).abs().max()), whole


def adapter_merge(row, tmp_path):
    error, whole = merged(made(row), row)
    if row == "untied biases":
        assert error < 1e-5
        return None
    if row in DERIVED and row not in TIES:
        assert error > 1e-3
        assert any(CHANGED[row] in limit and "adapter" in limit for limit in audit(made(row)).limits)
        assert merged(baked(made(row), row), row)[0] < 1e-5  # the remedy
        return LOST
    module, name = weight_of(whole, row)
    assert not torch.equal(getattr(module, name), value_of(made(row), row))  # and so is the weight tied to it
    assert_shared(whole, row)
    return "into all that are tied"


def dynamic_quantisation(row, tmp_path):
    def quantized(net):
        return torch.ao.quantization.quantize_dynamic(net.eval(), {nn.Linear}, dtype=torch.qint8)

    net, refused = trained(row).float(), row in ("transposed tie", "templates")
    if refused:
        with pytest.raises(AssertionError, match="only works for"):
            quantized(net)
        assert any("quantize_dynamic" in limit for limit in audit(net).limits)
    for whole in [baked(net, row)] if refused else [net, baked(net, row)]:
        assert float((quantized(whole)(batch()) - net(batch())).norm() / net(batch()).norm()) < 0.1
    if refused:
        return "refused by torch: bake first"
    if row.startswith(("relaxed", "low rank")):
        return f"{row.removesuffix(' + diagonal')} layers stay: bake first"
    return "hashed layers stay: bake first" if row.startswith(("hashed", "clustered")) else None


def symbolic_trace(row, tmp_path):
    net = trained(row).float()
    net.zero_grad()
    traced = torch.fx.symbolic_trace(net)
    assert_same(traced, net, atol=1e-6)
    loss_of(traced, batch()).backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    loss_of(net, batch()).backward()
    for gradient, parameter in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def gradients_by_sample(net, tie_weights):
    """Return the mean over a batch of the gradients that functional_call, vmap and grad compute for each sample."""

    def loss(parameters, sample):
        called = functional_call(net, parameters, (sample[None],), tie_weights=tie_weights)
        return (called - sample).square().mean()

    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    samples = vmap(grad(loss), in_dims=(None, 0))(parameters, batch(dtype=torch.float64))
    return {name: gradients.mean(dim=0) for name, gradients in samples.items()}


def assert_gradients_by_sample(net, tie_weights=True):
    samples = gradients_by_sample(net, tie_weights)
    loss_of(net, batch(dtype=torch.float64)).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(samples[name], parameter.grad, rtol=0, atol=1e-12)


def per_sample_gradients(row, tmp_path):
    """functional_call swaps the parameters of a module of two names twice, and leaves it without them: a bug of torch."""
    if row not in ("relaxed", "templates", "generated"):
        assert_gradients_by_sample(made(row).double())
    if row not in ("relaxed", "templates", "generated", BY_HAND):
        return None
    net = made(row).double()
    if row == BY_HAND:
        net = Net().double()
        net.blocks[1].linear = net.blocks[0].linear
    assert_gradients_by_sample(net, tie_weights=False)
    gradients_by_sample(net, tie_weights=True)
    assert not all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    return "modules: `tie_weights=False`" if row == BY_HAND else "with `tie_weights=False`, as of any shared module"


def weight_averaging(row, tmp_path):
    module, callbacks = lit(row)
    fit(module, [*callbacks, EMAWeightAveraging(decay=0.5)], tmp_path)
    assert_ties_of(module, row)
    for callback in callbacks:
        module, _ = lit(row)
        with pytest.raises(ValueError, match=f"EMAWeightAveraging comes before {type(callback).__name__}"):
            fit(module, [EMAWeightAveraging(), callback], tmp_path)


def swa(row, tmp_path):
    module, callbacks = lit(row)
    fit(module, [*callbacks, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], tmp_path, epochs=3)
    assert_ties_of(module, row)


def assert_ties_of(module, row):
    """Fail unless a trained module's weights are equal where they shall be."""
    net = module.net
    if row in TIES:
        plain = Net()
        plain.load_state_dict(bake(net))
        pairs = {
            "plain tie": (plain.first.weight, plain.second.weight),
            "transposed tie": (plain.encoder.weight, plain.decoder.weight.T),
            "whole modules": (plain.blocks[0].linear.weight, plain.blocks[1].linear.weight),
        }
        assert torch.equal(*pairs[row])
        assert len(list(net.parameters())) < len(list(plain.parameters()))
    else:
        assert_shared(net, row)


def weight_decay_once(row, tmp_path):
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        net = made(row).double()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        kind(net.parameters(), lr=0.1, weight_decay=0.5).step()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter, before[name] * 0.95, rtol=0, atol=1e-12)
        assert_shared(net, row)


def clipping(row, tmp_path):
    net = made(row).double()
    loss_of(net, batch(dtype=torch.float64)).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in {id(p): p for p in net.parameters()}.values()))
    assert float(nn.utils.clip_grad_norm_(net.parameters(), norm / 2)) == pytest.approx(norm, abs=1e-12)
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters()))
    assert clipped == pytest.approx(norm / 2, rel=1e-5)


def accumulation(row, tmp_path):
    net, joint = made(row).double(), made(row).double()
    x = batch(dtype=torch.float64)
    for half in x.chunk(2):
        (loss_of(net, half) / 2).backward()
    loss_of(joint, x).backward()
    for one, other in zip(net.parameters(), joint.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def compiled_full_graph(row, tmp_path):
    torch.compiler.reset()  # each row compiles the same forward anew, and torch counts
    net, plain = made(row), made(row)
    whole = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(whole(batch()), plain(batch()), rtol=0, atol=1e-5)
    loss_of(whole, batch()).backward()
    loss_of(plain, batch()).backward()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-5)
    assert_shared(net, row)


def exported(row, tmp_path):
    net = trained(row).float().eval()
    program = torch.export.export(net, (batch(),))
    torch.testing.assert_close(program.module()(batch()), net(batch()), rtol=0, atol=1e-6)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer)
    torch.testing.assert_close(again.module()(batch()), net(batch()), rtol=0, atol=1e-6)
    once = sum(p.numel() for p in net.parameters())
    kept = sum(v.numel() for v in {v.untyped_storage().data_ptr(): v for v in again.state_dict.values()}.values())
    return f"{once} weights, {kept} when loaded"


def onnx(row, tmp_path):
    import onnx as format

    net = trained(row).float().eval()
    torch.onnx.export(net, (batch(),), tmp_path / "net.onnx", dynamo=True, external_data=False, verbose=False)
    model = format.load(tmp_path / "net.onnx")
    stored = sum(
        math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type == format.TensorProto.FLOAT
    )
    once, virtual = (sum(p.numel() for p in m.parameters()) for m in (net, Net()))
    assert stored >= min(once, virtual) - 200
    return f"{once} weights, {stored} stored"


def activation_checkpointing(row, tmp_path):
    net, plain = made(row).double(), made(row).double()
    x = batch(dtype=torch.float64)
    (checkpoint(net, x, use_reentrant=False) - x).square().mean().backward()
    loss_of(plain, x).backward()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


COLUMNS = {
    "owns its memory": owns_its_memory,
    "written in place: `.data`, `nn.init`": written_in_place,
    "assigned: a tensor, a `Parameter`": assigned,
    "`reset_parameters`": reset,
    "`.to('meta')`, `to_empty`, reset": emptied_and_reset,
    "`.to('meta')`, `to_empty`, load": meta_and_back,
    "`state_dict` round trip": state_dict_round_trip,
    "untied checkpoint, both ways": untied_checkpoint_both_ways,
    "other plain weights: relative error": other_plain_weights,
    "`load_state_dict(assign=True)`": assigning_load,
    "resume, bitwise": resume_bitwise,
    "`load_from_checkpoint`": load_from_checkpoint,
    "`torch.load(weights_only=True)`": weights_only_load,
    "safetensors: `save_model`, `load_model`": safetensors_of_the_model,
    "safetensors: `save_file(bake(model))`": safetensors_of_bake,
    "accelerate: `save_state`, `load_state`": accelerate,
    "distributed checkpoint": distributed_checkpoint,
    "`deepcopy`": deepcopy,
    "`pickle`, with its callback": pickling,
    "`.double()`": double,
    "`WeightAveraging`": weight_averaging,
    "stochastic weight averaging": swa,
    "weight decay, charged once": weight_decay_once,
    "gradient clipping": clipping,
    "accumulation": accumulation,
    "activation checkpointing": activation_checkpointing,
    "per-sample gradients": per_sample_gradients,
    "PEFT: `merge_and_unload`": adapter_merge,
    "dynamic quantisation": dynamic_quantisation,
    "`torch.fx.symbolic_trace`": symbolic_trace,
    "`torch.compile(fullgraph=True)`": compiled_full_graph,
    "`torch.export`": exported,
    "ONNX": onnx,
}
SLOW = {"`torch.compile(fullgraph=True)`", "ONNX"}
QUICK_ROW = "transposed tie"
CELLS = [
    pytest.param(
        row, column, id=f"{row}-{check.__name__}", marks=[pytest.mark.slow] * (column in SLOW and row != QUICK_ROW)
    )
    for column, check in COLUMNS.items()
    for row in ROWS
]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:Swapping scheduler",
    "ignore:You're using the WeightAveraging callback",
    "ignore:torch.distributed is disabled",
    "ignore:torch.quantize_per_tensor",
    "ignore:Converting a tensor with requires_grad",
)
@pytest.mark.parametrize(("row", "column"), CELLS)
def test_survives(row, column, tmp_path, record_property):
    record_property("cell", ("survival", row, column))
    record_property("remark", COLUMNS[column](row, tmp_path) or "yes")


REMEDIED = {  # where ours may carry a remedy although a tie by hand needs none
    "written in place: `.data`, `nn.init`": {LOST},
    "PEFT: `merge_and_unload`": {LOST},
    "dynamic quantisation": {
        "refused by torch: bake first",
        "hashed layers stay: bake first",
        "relaxed layers stay: bake first",
        "low rank layers stay: bake first",
    },
    "untied checkpoint, both ways": {"by bake and load_plain"},  # computed weights have fewer numbers
}
MEASURED = {"other plain weights: relative error", "`torch.export`", "ONNX"}


def test_no_cell_of_the_kept_table_stands_below_a_tie_by_hand():
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (RESULTS / "survival.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert header[1:] == [*ROWS]
    assert [row for row, *_ in lines] == [*COLUMNS, "DDP, two processes", "FSDP2, two processes"]
    for row, by_hand, *ours in lines:
        allowed = REMEDIED.get(row, set()) | {"yes", by_hand}
        allowed |= {TOLD, "the nearest"} if by_hand == PARTS else set()
        allowed |= {"with `tie_weights=False`, as of any shared module"} if "modules" in by_hand else set()
        assert row in MEASURED or allowed >= {*ours}, row


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes made of every row, wrapped by DDP and sharded by FSDP2."""
    out = tmp_path_factory.mktemp("pair") / "pair.json"
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(HERE / "survival_pair.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.exists(), done.stderr[-3000:]  # processes may abort at exit, after all work is done
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
@pytest.mark.parametrize("row", ROWS)
def test_survives_on_two_processes(row, kind, pair, record_property):
    """Two processes on halves of a batch make the weights that one makes of the whole."""
    record_property("cell", ("survival", row, f"{kind}, two processes"))
    outcome = pair[kind][row]
    assert outcome["error"] == ""
    alone = bake(trained(row))
    for name, value in outcome["weights"].items():
        torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), alone[name], rtol=0, atol=1e-10)
    assert outcome["weights"].keys() == alone.keys()
    record_property("remark", outcome["remark"])
