"""What shared weights must live through: the survival table, a test for each cell.

A cell that returns words says how it holds, or why it cannot.
"""

import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from safetensors.torch import load_file, save_file
from survival import ROWS, TIES, Lit, Net, assert_shared, batch, data, loss_of, made
from torch import nn
from torch.utils.checkpoint import checkpoint

from tying import Tie
from tying.callbacks import GeneratedWeights, HardTying, LowRankWeights, TemplateWeights
from tying.hard import bake, load_plain

HERE = Path(__file__).parent


def below(ties, prefix="net."):
    """Return ties of the network as those of the module that holds it."""
    return [
        Tie(prefix + t.source, t.target and prefix + t.target, t.relation, tuple(e if e[0] == "*" else prefix + e for e in t.exclude))
        for t in ties
    ]  # fmt: skip


def lit(row):
    """Return a module to train, and the callback that lets its weights be shared."""
    callbacks = {
        "low rank": lambda: LowRankWeights(["net.first.weight"], 2),
        "templates": lambda: TemplateWeights(["net.kernels.*.weight"], 2),
        "generated": lambda: GeneratedWeights(["net.kernels.*.weight"], 2, 3, 3),
    }
    torch.manual_seed(0)  # a bank and a generator begin at random
    return Lit(), [HardTying(below(TIES[row])) if row in TIES else callbacks[row]()]


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


def state_dict_round_trip(row, tmp_path):
    net = trained(row).float()
    fresh = made(row)
    fresh.load_state_dict(net.state_dict())
    assert_same(fresh, net)
    assert_shared(fresh, row)
    if row in TIES:
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (net, Net())]
        assert shapes[0] == shapes[1]


def untied_checkpoint_both_ways(row, tmp_path):
    net, plain, fresh = trained(row).float(), Net(), made(row)
    plain.load_state_dict(net.state_dict() if row in TIES else bake(net))
    assert_same(plain, net, atol=1e-6)
    if row in TIES:
        fresh.load_state_dict(plain.state_dict())
    else:
        assert load_plain(fresh, plain.state_dict()) == {}
    assert_same(fresh, net, atol=1e-5)
    assert_shared(fresh, row)
    return {
        "low rank": "by bake and load_plain",
        "templates": "by bake; back: the nearest",
        "generated": "by bake; back: the nearest",
    }.get(row)


def assigning_load(row, tmp_path):
    net, fresh = trained(row).float(), made(row)
    fresh.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    assert_shared(fresh, row)
    assert_same(fresh, net)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    loss_of(fresh, batch()).backward()
    optimizer.step()
    assert_shared(fresh, row)


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
    if row in TIES:
        assert_same(Lit.load_from_checkpoint(tmp_path / "a.ckpt", row=None).net, module.net, atol=1e-6)
        return None
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        Lit.load_from_checkpoint(tmp_path / "a.ckpt", row=None)
    return "unshared: by bake"


def deepcopy(row, tmp_path):
    net = trained(row)
    copied = copy.deepcopy(net)
    assert_same(copied, net)
    assert_shared(copied, row)
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in net.parameters()})
    state = {name: torch.zeros_like(value) for name, value in copied.state_dict().items()}
    copied.load_state_dict(state)
    assert any(value.abs().sum() > 0 for value in net.state_dict().values())
    assert_shared(copied, row)


def pickling(row, tmp_path):
    net = trained(row)
    if row in ("plain tie", "whole modules"):
        again = pickle.loads(pickle.dumps(net))
        assert_same(again, net)
        assert_shared(again, row)
        return None
    with pytest.raises(
        RuntimeError, match="Serialization of parametrized modules is only supported through state_dict"
    ):
        pickle.dumps(net)
    return "refused by torch: state_dict"


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
    assert_shared(moved, row)


def weights_only_load(row, tmp_path):
    net, fresh = trained(row).float(), made(row)
    torch.save(net.state_dict(), tmp_path / "shared.pt")
    fresh.load_state_dict(torch.load(tmp_path / "shared.pt", weights_only=True))
    assert_same(fresh, net)
    assert_shared(fresh, row)
    stored = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in torch.load(tmp_path / "shared.pt", weights_only=True).values()
    }
    assert sum(stored.values()) == sum(4 * p.numel() for p in net.parameters())  # each weight once


def safetensors(row, tmp_path):
    net, plain = trained(row).float(), Net()
    save_file(bake(net), tmp_path / "plain.safetensors")
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    assert_same(plain, net, atol=1e-6)
    return "plain copies, by bake"


def weight_averaging(row, tmp_path):
    module, callbacks = lit(row)
    fit(module, [*callbacks, EMAWeightAveraging(decay=0.5)], tmp_path)
    assert_ties_of(module, row)
    module, [callback] = lit(row)
    with pytest.raises(ValueError, match=f"EMAWeightAveraging stands before {type(callback).__name__}"):
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
    "`state_dict` round trip": state_dict_round_trip,
    "untied checkpoint, both ways": untied_checkpoint_both_ways,
    "`load_state_dict(assign=True)`": assigning_load,
    "resume, bitwise": resume_bitwise,
    "`load_from_checkpoint`": load_from_checkpoint,
    "`deepcopy`": deepcopy,
    "`pickle`": pickling,
    "`.double()`": double,
    "`.to('meta')`, `to_empty`, load": meta_and_back,
    "`torch.load(weights_only=True)`": weights_only_load,
    "safetensors": safetensors,
    "`WeightAveraging`": weight_averaging,
    "stochastic weight averaging": swa,
    "weight decay, charged once": weight_decay_once,
    "gradient clipping": clipping,
    "accumulation": accumulation,
    "`torch.compile(fullgraph=True)`": compiled_full_graph,
    "`torch.export`": exported,
    "ONNX": onnx,
    "activation checkpointing": activation_checkpointing,
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
)
@pytest.mark.parametrize(("row", "column"), CELLS)
def test_survives(row, column, tmp_path, record_property):
    record_property("cell", ("survival", row, column))
    record_property("remark", COLUMNS[column](row, tmp_path) or "yes")


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
