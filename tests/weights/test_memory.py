"""Every tensor that a model holds or saves owns the memory of its own values, and no more."""

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
from families import FAMILIES, Sites
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from ways import BUILT, MADE, made

from tying.callbacks import UntiedBiases
from tying.depth import Residual
from tying.hard import bake, load_plain
from tying.hashing import cluster_weight, load_packed, save_packed
from tying.soft import GaussianMixturePrior, anchored
from tying.weights.derived import derived_weights, install


def assert_own(tensors):
    """Fail if a tensor is a part of a larger storage; tensors that are one share theirs."""
    larger = {
        name: (value.untyped_storage().nbytes(), value.nbytes)
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() != value.nbytes
    }
    assert larger == {}


def assert_model_owns(model):
    assert_own(dict(model.named_parameters()))
    assert_own(dict(model.named_buffers()))
    assert_own(model.state_dict())
    assert_own(bake(model))
    assert_own({f"{name}.drawn": getattr(module, "drawn", None) for name, module in model.named_modules()})


def stored(content):
    file = io.BytesIO()
    torch.save(content, file)
    return len(file.getvalue())


@pytest.mark.parametrize("way", [*MADE, *BUILT])
def test_models_own_their_memory(way):
    model = made(way)
    assert_model_owns(model)
    assert_model_owns(copy.deepcopy(model))
    for derived in derived_weights(model).values():  # a view of more, as a slice of a checkpoint is one
        weight = getattr(derived.owner, derived.name).detach()
        setattr(derived.owner, derived.name, torch.stack([weight, weight])[0])
    assert_model_owns(model)
    load_plain(model, {key: torch.stack([value, value])[0] for key, value in bake(model).items()})
    assert_model_owns(model)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_model_owns(model)
    entries = {entry.untyped_storage().data_ptr(): entry for entry in model.state_dict().values()}  # ties stand twice
    assert stored(model.state_dict()) < sum(entry.nbytes for entry in entries.values()) + 2000 * len(model.state_dict())


class Sliced(nn.Module):
    """A parametrization whose right_inverse returns a view of a work space, as torch's solvers do."""

    def forward(self, values):
        return values * 1

    def right_inverse(self, weight):
        return torch.stack([weight, weight])[0]


class SlicedPair(Sliced):
    def forward(self, first, second):
        return first + second

    def right_inverse(self, weight):
        return weight.expand(2, *weight.shape).contiguous().unbind()


class Same(Sliced):
    def right_inverse(self, weight):
        return weight


@pytest.mark.parametrize("step", [Sliced, SlicedPair, Same])
def test_no_right_inverse_can_leak_its_work_space(step):
    layer, weight = nn.Linear(8, 8), torch.randn(8, 8)
    install(layer, "weight", step())
    assert_own(dict(layer.named_parameters()))
    layer.weight = weight
    assert_own(dict(layer.named_parameters()))
    before = weight.clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert torch.equal(weight, before)  # nor is a parameter a view of what was assigned


def test_what_callbacks_and_files_hold(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    anchors = {name: torch.stack([p, p])[0].detach() for name, p in model.named_parameters()}
    penalty = anchored(dict(model.named_parameters()), anchors)
    assert_own({str(i): parameter for i, g in enumerate(penalty.groups) for parameter in g.parameters})
    prior = GaussianMixturePrior(components=17)
    prior.merge(threshold=1e9)
    assert_own(dict(prior.named_parameters()))
    codebook = cluster_weight(model, "0.weight", 4)
    assert_own({"codebook": codebook})
    save_packed(model, tmp_path / "packed.pt")
    content = torch.load(tmp_path / "packed.pt", weights_only=True)
    assert_own({str(i): value for i, value in enumerate(tensors_in(content))})
    assert_own(load_packed(tmp_path / "packed.pt"))


def tensors_in(content):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(part)


class Big(nn.Module):
    """A network of more than 4 MiB of weights, in which every family finds what to tie."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(384, 384), nn.Linear(384, 384)
        self.blocks = nn.Sequential(Residual(nn.Linear(384, 384)), Residual(nn.Linear(384, 384)))
        self.kernels = nn.Sequential(*(nn.Conv2d(384, 384, 1) for _ in range(4)))
        self.lstms = nn.ModuleList([nn.LSTM(384, 16)])

    def forward(self, x):
        x = self.blocks(self.second(self.first(x).tanh()).tanh())
        x = x + self.lstms[0](x.unsqueeze(0))[0].mean()
        return self.kernels(x[:, :, None, None]).flatten(1)


class Fitted(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Big()
        self.save_hyperparameters()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return F.mse_loss(self.net(batch[0]), batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 384)), batch_size=2)


SITES = Sites(
    pair=("net.first.weight", "net.second.weight"),
    twins=("net.blocks.0", "net.blocks.1"),
    alike="net.kernels.*.weight",
    blocks="net.blocks.*",
    basic=16,
)
CALLBACKS = {name: family.callback for name, family in FAMILIES.items()} | {
    "UntiedBiases": lambda sites: UntiedBiases(["net.kernels.*.bias"], [384]),
}


@pytest.mark.filterwarnings("ignore:MixtureTying begins with")
@pytest.mark.parametrize("family", CALLBACKS)
def test_checkpoints_are_of_the_size_of_what_is_trained(family, tmp_path):
    model, callback = Fitted(), CALLBACKS[family](SITES)
    assert sum(parameter.nbytes for parameter in model.parameters()) > 4 << 20
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    states = {id(s): s for s in (getattr(m, "drawn", None) for m in model.modules()) if s is not None}  # of hashes
    due = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *states.values()))
    assert (tmp_path / "model.ckpt").stat().st_size <= 1.05 * due + (64 << 10)
