"""Files that earlier versions have written, for `test_golden.py`; run as `python tests/make_golden.py`, once for a version.

`states.pt`: for each way of making weights, the state dict, an input and its output. `FAMILY.ckpt`: a Lightning checkpoint
from the middle of a run, and in `ends.pt` the weights at that run's end. `packed.pt`: clustered weights.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from tying import __version__
from tying.depth import (
    HMLSTM,
    FractalBlock,
    HyperLSTM,
    PassthroughGRU,
    PassthroughHighway,
    Recurrent,
    Residual,
    StochasticDepth,
    Swapout,
    ZoneoutLSTM,
    apply_merge,
)
from tying.hard import generate_weights, lower_rank, share_templates, tie, untie_biases
from tying.hashing import (
    BlockHash,
    DirichletHash,
    HashedConv2d,
    HashedEmbedding,
    HashedLinear,
    ModulusHash,
    NeighborhoodHash,
    RecurrentHash,
    ToeplitzHash,
    UniformHash,
    XXHash,
    cluster_weight,
    hash_weights,
)
from tying.soft import GaussianMixturePrior

FOLDER = Path(__file__).parent / "golden" / __version__


class Attention(nn.Module):
    """Attention and an LSTM: modules whose weights are no attribute named ``weight``."""

    def __init__(self):
        super().__init__()
        self.attention, self.lstm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(self.attention(x, x, x)[0])[0]


class Transformer(nn.Module):
    """An encoder layer, merged."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def linears(count=2, bias=True):
    return nn.Sequential(*(nn.Linear(6, 6, bias) for _ in range(count)))


def changed(model, change, *arguments, **options):
    change(model, *arguments, **options)
    return model


def hashed(hash, **options):
    return nn.Sequential(HashedLinear(8, 6, table_ratio=0.25, hash=hash, **options))


# makes a model, fresh; and what it takes
MODELS = {
    "tie": (lambda: changed(linears(), tie, ["0.weight ~ 1.weight"]), (3, 6)),
    "transposed tie": (lambda: changed(linears(), tie, ["0.weight ~ 1.weight | o i -> i o"]), (3, 6)),
    "low rank": (lambda: changed(linears(), lower_rank, ["*.weight"], 2), (3, 6)),
    "low rank and diagonal": (lambda: changed(linears(), lower_rank, ["0.weight"], 2, diagonal=True), (3, 6)),
    "templates": (lambda: changed(linears(3), share_templates, ["*.weight"], 2), (3, 6)),
    "generated": (
        lambda: changed(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3)), generate_weights, ["*.weight"], 3, 4, 4),
        (2, 4, 6, 6),
    ),
    "untied biases": (
        lambda: changed(nn.Sequential(nn.Conv2d(2, 3, 3)), untie_biases, ["0.bias"], torch.zeros(1, 2, 5, 5)),
        (2, 2, 5, 5),
    ),
    "uniform": (lambda: hashed(UniformHash(3)), (3, 8)),
    "uniform, signed": (lambda: hashed(UniformHash(3), sign=True, density=0.5), (3, 8)),
    "uniform, computed": (lambda: hashed(UniformHash(3), index="computed"), (3, 8)),
    "modulus": (lambda: hashed(ModulusHash()), (3, 8)),
    "dirichlet": (lambda: hashed(DirichletHash(0.5, 2)), (3, 8)),
    "neighborhood": (lambda: hashed(NeighborhoodHash(2, 5)), (3, 8)),
    "xxhash": (lambda: hashed(XXHash(7), sign=True), (3, 8)),
    "blocks": (lambda: hashed(BlockHash(4, 1)), (3, 8)),
    "toeplitz": (lambda: nn.Sequential(HashedLinear(8, 4, hash=ToeplitzHash(2, 1, (2, 2), 1))), (3, 8)),
    "hashed convolution": (lambda: nn.Sequential(HashedConv2d(2, 4, 3, table_ratio=0.2)), (2, 2, 5, 5)),
    "hashed embedding": (lambda: nn.Sequential(HashedEmbedding(20, 4, padding_idx=0, table_ratio=0.3)), None),
    "a table a layer": (lambda: changed(linears(), hash_weights, ["*.weight"], 0.2), (3, 6)),
    "a network's table": (
        lambda: changed(linears(), hash_weights, ["*.weight"], 0.2, DirichletHash(2.0), scope="network"), (3, 6)),
    "a recurrent network's table": (
        lambda: changed(linears(3), hash_weights, ["**"], None, RecurrentHash(3), scope="network"), (3, 6)),
    "hashed attention and LSTM": (
        lambda: changed(Attention(), hash_weights, ["attention.in_proj_weight", "lstm.weight_*"], 0.25), (2, 3, 4)),
    "clustered": (lambda: changed(linears(), cluster_weight, "0.weight", 4), (3, 6)),
    "merged": (
        lambda: changed(nn.Sequential(Residual(nn.Linear(6, 6)), Residual(nn.Linear(6, 6))), apply_merge, "*", StochasticDepth(0.5), [0.9, 0.6]),
        (3, 6),
    ),
    "merged transformer": (lambda: changed(Transformer(), apply_merge, "layer", Swapout(0.7, 0.8)), (2, 3, 4)),
    "recurrent": (lambda: Recurrent(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), steps=3), (3, 6)),
    "fractal": (lambda: FractalBlock(3, nn.Linear, 6, 6), (3, 6)),
    "zoneout": (lambda: ZoneoutLSTM(4, 3, zoneout_cell=0.2, zoneout_hidden=0.1), (5, 2, 4)),
    "passthrough": (lambda: PassthroughGRU(4, 6, rank=2), (5, 2, 4)),
    "highway": (lambda: PassthroughHighway(6, rank=2), (3, 6)),
    "multiscale": (lambda: HMLSTM(4, 3), (5, 2, 4)),
    "hyper": (lambda: HyperLSTM(4, 3, hyper_size=2, embedding_size=2), (5, 2, 4)),
    "mixture": (lambda: GaussianMixturePrior(components=4), (3, 6)),
}  # fmt: skip


def output_of(model, x):
    """Return the first tensor of what an evaluated model returns."""
    with torch.no_grad():
        out = model.eval()(x)
    return out if isinstance(out, torch.Tensor) else out[0]


def main():
    import lightning.pytorch as pl
    from families import FAMILIES
    from test_kill_points import UPDATES, train

    from tying.hashing import save_packed

    FOLDER.mkdir(parents=True, exist_ok=True)
    states = {}
    for name, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        x = torch.arange(20).view(4, 5) if shape is None else torch.randn(shape)
        states[name] = {"state": model.state_dict(), "input": x, "output": output_of(model, x)}
    torch.save(states, FOLDER / "states.pt")
    ends = {}
    for family in [*FAMILIES, *UPDATES]:

        class Middle(pl.Callback):
            def on_train_batch_end(self, trainer, *_, family=family):
                if trainer.global_step == 8:
                    trainer.save_checkpoint(FOLDER / f"{family.replace(', ', '-')}.ckpt")

        ends[family] = train(family, Middle())
    torch.save(ends, FOLDER / "ends.pt")
    torch.manual_seed(0)
    save_packed(changed(linears(), cluster_weight, "0.weight", 4), FOLDER / "packed.pt")


if __name__ == "__main__":
    main()
