"""Hashing the weights of anybody's model."""

import copy
import io
import math
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from toys import Toy, batches, same, train

from tying import ConfigurationError
from tying.callbacks import HardTying, LowRankWeights, WeightHashing
from tying.hard import audit, bake, load_plain, tie, tied
from tying.hashing import (
    BlockHash,
    DirichletHash,
    HashedLinear,
    IdentityHash,
    ModulusHash,
    RecurrentHash,
    UniformHash,
    XXHash,
    cluster_weight,
    entropy,
    hash_weights,
    loads,
    plot_loads,
    report,
    table_loads,
)
from tying.hashing.parametrization import HashedParametrization, HashState
from tying.mixins import WeightHashingMixin
from tying.weights.derived import count_parameters


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.Linear(10, 30), nn.Linear(30, 5), **options)


def test_a_table_for_each_layer():
    model = network()
    before = copy.deepcopy(model)
    report = hash_weights(model, ["**.weight"], 0.1)
    assert [(one.name, one.table_size) for one in report.weights] == [
        ("0.weight", 20),
        ("2.weight", 30),
        ("3.weight", 15),
    ]
    assert (report.stored, report.virtual, report.skipped) == (65, 650, ("1.weight",))
    assert type(model[0]) is HashedLinear
    assert [name for name, _ in model.named_parameters()][:2] == ["0.table", "0.bias"]
    entries = [model[i].virtual.slots() % 15 for i in (0, 2)]
    assert not torch.equal(entries[0].flatten(), entries[1].flatten()[:200])  # draws of its own
    for i in (0, 2, 3):
        assert torch.equal(model[i].bias, before[i].bias)
        values = before[i].weight.flatten().tolist()
        assert all(entry in values for entry in model[i].table.tolist())  # drawn from the weights as they were


def test_one_table_for_the_network():
    model = network()
    scales = torch.tensor([float(model[i].weight.detach().double().std()) for i in (0, 2, 3)])
    counts = torch.tensor([model[i].weight.numel() for i in (0, 2, 3)])
    common = float(((counts * scales**2).sum() / counts.sum()).sqrt())
    report = hash_weights(model, ["**.weight"], 0.1, UniformHash(3), scope="network")
    assert report.stored == 65
    assert model[0].table is model[2].table is model[3].table
    assert [group.names for group in tied(model)] == [("0.table", "2.table", "3.table")]
    index = UniformHash(3).index(650, 65)
    begin = 0
    for i, scale in zip((0, 2, 3), (scales / common).tolist(), strict=True):
        count = model[i].virtual.shape.numel()
        own = index[begin : begin + count].view(model[i].virtual.shape)
        assert torch.equal(model[i].virtual.slots(), own)
        torch.testing.assert_close(model[i].weight, model[0].table[own] * scale)
        begin += count
    assert abs(float(model[0].table.detach().std()) / common - 1) < 0.3
    assert report.weights[0].realised == entropy(loads(index, 65))
    assert report.weights[0].generating == pytest.approx(math.log(65))


def test_the_gradient_of_a_network_table_is_the_sum_over_its_uses():
    model = network().double()
    hash_weights(model, ["**.weight"], 0.1, scope="network", sign=True)
    x = torch.randn(4, 20, dtype=torch.float64)
    dense = network().double()
    dense.load_state_dict(bake(model))
    for one in (model, dense):
        one(x).square().sum().backward()
    expected = torch.zeros(65, dtype=torch.float64)
    for i in (0, 2, 3):
        virtual = model[i].virtual
        signs = virtual.hash.sign(torch.arange(virtual.first, virtual.first + virtual.shape.numel()))
        uses = signs * dense[i].weight.grad.flatten() * virtual.scale
        expected.index_add_(0, virtual.slots().flatten(), uses)
    torch.testing.assert_close(model[0].table.grad, expected, rtol=0, atol=1e-12)


def test_recurrence_is_one_layer_used_again():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))).double()
    report = hash_weights(model, ["**"], None, RecurrentHash(layers=3), scope="network")
    assert (report.stored, report.virtual) == (42, 126)
    cell = nn.RNN(6, 6, batch_first=True).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    hidden, layer = x, (model[0].weight, model[0].bias)
    for _ in range(3):
        hidden = F.linear(hidden, *layer)
    torch.testing.assert_close(model(x), hidden, rtol=0, atol=0)
    with torch.no_grad():
        cell.weight_ih_l0.zero_()
        cell.bias_ih_l0.zero_()
        cell.weight_hh_l0.copy_(model[0].weight)
        cell.bias_hh_l0.copy_(model[0].bias)
    steps = x
    for i in range(3):
        steps = torch.tanh(F.linear(steps, model[i].weight, model[i].bias))
    _, last = cell(torch.zeros(4, 3, 6, dtype=torch.float64), x[None])
    torch.testing.assert_close(steps, last[0], rtol=0, atol=1e-12)
    steps.sum().backward()
    last.sum().backward()
    ours = next(iter({id(p): p for p in model.parameters()}.values())).grad
    theirs = torch.cat([cell.weight_hh_l0.grad.flatten(), cell.bias_hh_l0.grad])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_means_keep_what_is_shared_already():
    model = network()
    hash_weights(model, ["**.weight"], 0.2, scope="network")
    values = bake(model)
    again = network()
    again.load_state_dict(values)
    scales = [model[i].virtual.scale for i in (0, 2, 3)]
    hash_weights(again, ["0.weight"], 0.2, UniformHash(3), init="mean")
    sums = torch.zeros(40).index_add_(0, again[0].virtual.slots().flatten(), values["0.weight"].flatten())
    torch.testing.assert_close(again[0].table, sums / loads(again[0].virtual.slots(), 40).clamp(min=1))
    assert len(scales) == 3


def test_other_modules_are_parametrized():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2)
    report = hash_weights(model, ["*_weight", "**.weight"], 0.25, XXHash(2), sign=True, scope="network")
    assert {one.name for one in report.weights} == {"in_proj_weight", "out_proj.weight"}
    assert report.stored == 64
    x = torch.randn(3, 1, 8)
    model(x, x, x)[0].sum().backward()
    assert sum(p.numel() for p in model.parameters() if p.ndim == 1 and p.grad is not None) == 64 + 24 + 8
    plain = nn.MultiheadAttention(8, 2)
    plain.load_state_dict(bake(model))
    torch.testing.assert_close(plain(x, x, x)[0], model(x, x, x)[0])


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_state_round_trips(scope):
    model, other = network(), network()
    hash_weights(model, ["**.weight"], 0.1, DirichletHash(0.5, 1), scope=scope)
    torch.manual_seed(5)
    other[0].weight.data.normal_(std=3)  # another initialisation has other scales
    hash_weights(other, ["**.weight"], 0.1, DirichletHash(0.5, 1), scope=scope)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 20)
    assert torch.equal(other.eval()(x), model.eval()(x))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    assert (copied[0].table is copied[2].table) == (scope == "network")


def test_counts_bake_and_audit():
    model = network()
    hash_weights(model, ["**.weight"], 0.1, scope="network")
    assert count_parameters(model) == (65 + 45 + 20, 650 + 45 + 20)
    assert audit(model).saved_bytes == 4 * (650 - 65)
    plain = bake(model)
    dense = network()
    dense.load_state_dict(plain)
    x = torch.randn(3, 20)
    torch.testing.assert_close(dense.eval()(x), model.eval()(x))
    single = network()
    hash_weights(single, ["0.weight"], 1.0)
    with pytest.warns(UserWarning, match="cannot hold all weights"):
        load_plain(single, dense.state_dict())
    torch.testing.assert_close(single[2].weight, dense[2].weight)


def test_units_that_repeat_are_told():
    model = nn.Sequential(nn.Linear(784, 200), nn.Linear(200, 200), nn.Linear(200, 10))
    report = hash_weights(model, ["*.weight"], 1000 / 198_800, ModulusHash(), scope="network")
    assert [one.units for one in report.weights] == [125, 5, 5]
    assert "only 125 of 200 units are distinct" in str(report)
    wide = hash_weights(nn.Linear(2000, 2000), ["weight"], 0.1, ModulusHash())
    assert wide.weights[0].units == 200


@pytest.mark.parametrize(
    ("prepare", "arguments", "told"),
    [
        (lambda m: None, {"parameters": ["nothing"]}, "matches no parameter"),
        (lambda m: None, {"parameters": ["**.bias"]}, "match nothing of two dimensions or more"),
        (lambda m: None, {"table_ratio": 0.0}, r"table_ratio must be in \(0, 1\], not 0.0"),
        (lambda m: None, {"table_ratio": 1.5}, r"table_ratio must be in \(0, 1\], not 1.5"),
        (lambda m: None, {"scope": "model"}, "scope must be 'layer' or 'network', not 'model'"),
        (lambda m: None, {"init": "zero"}, "init must be 'fresh' or 'mean', not 'zero'"),
        (lambda m: None, {"index": "structured"}, "has no structure here"),
        (lambda m: None, {"hash": RecurrentHash(layers=7), "table_ratio": None, "scope": "network"}, "are not those of 7 equal layers"),
        (lambda m: tie(m.append(nn.Linear(10, 20)), ["0.weight ~ 5.weight | o i -> i o"]), {"parameters": ["0.weight"]}, "'0.weight' is tied to '5.weight' through a relation"),
        (lambda m: tie(m.append(nn.Linear(10, 20)), ["0.weight ~ 5.weight | o i -> i o"]), {"parameters": ["5.weight"]}, "'5.weight' is tied to '0.weight' through a relation"),
        (lambda m: hash_weights(m, ["0.weight"]), {"parameters": ["0.weight"]}, "'0.weight' is computed from others: hash or parametrize it, or tie it, but not both"),
        (lambda m: None, {"hash": "uniform"}, "hash must be one of tying.hashing"),
        (lambda m: nn.utils.parametrizations.orthogonal(m[4]), {"parameters": ["4.weight"]}, "'4.weight' is parametrized already"),
        (lambda m: hash_weights(m, ["0.weight"]), {"parameters": ["0.table", "2.weight"]}, "'0.table' is the table of a hashed layer already"),
        (lambda m: m[2].double(), {"scope": "network", "parameters": ["0.weight", "2.weight"]}, "'2.weight': it cannot share a table with '0.weight': dtype is torch.float32 for one and torch.float64"),
        (lambda m: m[2].requires_grad_(False), {"scope": "network", "parameters": ["**.weight", "2.weight"]}, "cannot share a table with '0.weight': requires_grad is .* Make them alike first, or exclude one of them"),
        (lambda m: m.append(nn.Embedding(4, 3, max_norm=1.0)), {"parameters": ["5.weight"]}, "'5.weight': it belongs to an embedding with max_norm"),
    ],
)  # fmt: skip
def test_mistakes_change_nothing(prepare, arguments, told):
    model = network()
    model.append(nn.Linear(20, 10))
    prepare(model)
    before = [(type(module), [id(p) for p in module._parameters.values()]) for module in model.modules()]
    with pytest.raises(ValueError, match=told):
        hash_weights(model, **{"parameters": ["**.weight"], "table_ratio": 0.1, **arguments})
    assert [(type(module), [id(p) for p in module._parameters.values()]) for module in model.modules()] == before


HASHED = ["encoder.*.weight", "decoder.*.weight"]


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_training_resumes_bitwise(scope, tmp_path):
    def made():
        torch.manual_seed(0)  # the tables begin with entries drawn from the weights
        return WeightHashing(HASHED, 0.3, DirichletHash(seed=1), scope=scope)

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=0.05)

    whole = Toy(adam)
    train(whole, [made()], max_epochs=4, gradient_clip_val=0.1, accumulate_grad_batches=2)
    half = Toy(adam)
    trainer = train(half, [made()], max_epochs=2, gradient_clip_val=0.1, accumulate_grad_batches=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Toy(adam, seed=3)
    train(
        resumed,
        [made()],
        max_epochs=4,
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
        ckpt_path=tmp_path / "half.ckpt",
    )
    assert same(resumed, whole)
    assert torch.equal(resumed.encoder[0].weight, whole.encoder[0].weight)
    assert not same(whole, half)


def test_a_checkpoint_of_another_hash_is_refused_by_the_layers_name():
    model, other = network(), network()
    hash_weights(model, ["0.weight", "3.weight"], 0.5)
    hash_weights(other, ["0.weight", "3.weight"], 0.5, UniformHash(3))
    with pytest.raises(
        ConfigurationError, match=r"^'0\.virtual': this weight is 200 weights .*; in the checkpoint it is "
    ):
        other.load_state_dict(model.state_dict())


class Within(nn.Linear):
    """A layer whose own weight comes first, and is loaded last."""

    def __init__(self):
        super().__init__(4, 5)
        self.inner = nn.Linear(5, 6)


@pytest.mark.parametrize("index", ["stored", "computed"])
@pytest.mark.parametrize("make", [Within, lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 4))])
def test_what_was_drawn_for_a_network_is_saved_once_and_loaded_by_each(make, index, tmp_path):
    model, other, third = (make() for _ in range(3))
    for one in (model, other, third):
        hash_weights(one, ["**.weight"], 0.5, DirichletHash(0.5, 1), scope="network", index=index)
    virtuals = [one for one in model.modules() if isinstance(one, HashedParametrization)]
    size = virtuals[0].table_size
    other_draw = HashState(DirichletHash(0.5, 2).state(size))  # as another machine might have drawn it, and much more
    for one in virtuals:
        one.state = other_draw
        one.move()
    torch.save(model.state_dict(), tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt")
    drawn = {name: value for name, value in state.items() if name.endswith(".drawn")}
    assert len(drawn) == len(virtuals)  # each is loaded by itself
    assert len({value.untyped_storage().data_ptr() for value in drawn.values()}) == 1

    def weights(one):
        return [layer.weight for layer in one.modules() if hasattr(layer, "weight")]

    other.load_state_dict(state)
    assert all(map(torch.equal, weights(other), weights(model)))
    assert len({id(one.state) for one in other.modules() if isinstance(one, HashedParametrization)}) == 1
    copied = copy.deepcopy(other)
    assert all(map(torch.equal, weights(copied), weights(model)))
    copied.load_state_dict(third.state_dict())  # what its layers have in common is not the original's
    assert all(map(torch.equal, weights(copied), weights(third)))
    assert all(map(torch.equal, weights(other), weights(model)))
    last = "inner" if make is Within else "2"
    third.get_submodule(last).load_state_dict(other.get_submodule(last).state_dict())  # a part, with the table
    assert torch.equal(third.get_submodule(last).weight, model.get_submodule(last).weight)
    entries = [
        [layer.virtual.slots() for layer in one.modules() if hasattr(layer, "virtual")] for one in (third, model)
    ]
    others = [torch.equal(*both) for both in zip(*entries, strict=True)]
    assert others == [False] * (len(others) - 1) + [True]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_copied(kind):
    layer = kind(4, 5)
    hash_weights(layer, ["weight*"], 0.5)
    x = torch.randn(3, 2, 4)
    for _ in range(2):  # before and after the first pass
        other = copy.deepcopy(layer)
        assert torch.equal(other(x)[0], layer(x)[0])
        for one in (other, layer):
            one.zero_grad()
            one(x)[0].sum().backward()
        assert torch.equal(other.weight_hh_l0_table.grad, layer.weight_hh_l0_table.grad)
    with torch.no_grad():
        other.weight_ih_l0_table.zero_()
    assert not torch.equal(other(x)[0], layer(x)[0])


def test_weights_that_are_not_initialised_are_told():
    with pytest.raises(
        ConfigurationError,
        match=r".0\.weight. has no shape yet, since its layer is lazy: call the model on a batch first",
    ):
        hash_weights(nn.Sequential(nn.LazyLinear(4)), ["*.weight"], 0.5)


def test_a_table_without_uses_has_no_entropy():
    told = str(report(nn.Sequential(HashedLinear(16, 1, table_ratio=0.25, density=0.05))))
    assert "entropy of loads 0.0000, of probabilities 1.3863" in told


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_weight_averaging_leaves_hashes_alone():
    model = Toy()
    train(model, [WeightHashing(HASHED, 0.3, DirichletHash(seed=1)), EMAWeightAveraging(decay=0.5)])
    fresh = Toy()
    WeightHashing(HASHED, 0.3, DirichletHash(seed=1)).apply(fresh)
    assert torch.equal(model.encoder[0].virtual.slots(), fresh.encoder[0].virtual.slots())
    assert torch.equal(model.encoder[0].virtual.drawn, fresh.encoder[0].virtual.drawn)


def test_each_table_has_two_panels(tmp_path, monkeypatch):
    model = nn.Sequential(*(nn.Linear(6, 5 + i) for i in range(4)))
    hash_weights(model, ["*.weight"], 0.5)
    drawn = []
    monkeypatch.setattr(sys.modules["tying.hashing.report"], "save_figure", lambda figure, path: drawn.append(figure))
    plot_loads(model, tmp_path / "p.png")
    panels = [one for one in drawn[0].axes if one.get_label() != "<colorbar>"]
    assert len(panels) == 8
    assert [one.get_title(loc="left") for one in panels[::2]] == [f"{i}.weight" for i in range(4)]
    for panel, counts in zip(panels[1::2], table_loads(model).values(), strict=True):
        assert sum(bar.get_height() for bar in panel.patches) == len(counts)
        assert panel.get_title(loc="right").startswith(f"entropy {entropy(counts):.3f}, ")


@pytest.mark.parametrize("scope", ["layer", "network"])
def test_loads_are_plotted(scope, tmp_path):
    model = Toy()
    hashing = WeightHashing(HASHED, 0.3, ModulusHash(), scope=scope)
    trainer = train(model, [hashing], max_epochs=1, default_root_dir=tmp_path)
    assert (tmp_path / "hash_loads.png").read_bytes().startswith(b"\x89PNG")
    counts = table_loads(model)
    assert len(counts) == (4 if scope == "layer" else 1)
    mean = sum(map(entropy, counts.values())) / len(counts)
    assert float(trainer.callback_metrics["tying/entropy"]) == pytest.approx(mean)
    assert sum(int(own.sum()) for own in counts.values()) == 100
    assert all(int(own.max() - own.min()) <= 1 for own in counts.values())
    with pytest.raises(ValueError, match="no weight of the model is hashed"):
        plot_loads(Toy(), tmp_path / "none.png")


def test_applying_twice_changes_nothing():
    model = Toy()
    callback = WeightHashing(HASHED, 0.3)
    names = callback.apply(model)
    table = model.encoder[0].table
    assert (
        WeightHashing(HASHED, 0.3).apply(model)
        == names
        == ["encoder.0.weight", "encoder.2.weight", "decoder.0.weight", "decoder.2.weight"]
    )
    assert model.encoder[0].table is table


def test_hashed_and_tied_company():
    ties = HardTying(["encoder.0.weight ~ decoder.2.weight | o i -> i o"])
    with pytest.raises(ValueError, match=r"'encoder\.0\.weight' is tied to 'decoder\.2\.weight'"):
        train(Toy(), [ties, WeightHashing(["encoder.0.weight"], 0.3)])


@pytest.mark.parametrize("wrong", [{"table_ratio": 10}, {"scope": "model"}, {"init": "zero"}, {"hash": UniformHash}])
def test_the_callback_checks_what_needs_no_model(wrong):
    with pytest.raises(ValueError, match=r"table_ratio must be|scope must be|init must be|hash must be"):
        WeightHashing(HASHED, **wrong)


class Hashes(WeightHashingMixin, Toy):
    weight_hashing = {"parameters": HASHED, "table_ratio": 0.3, "scope": "network"}  # noqa: RUF012


def test_mixin(tmp_path):
    model = Hashes()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Hashes.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.decoder[2].weight, model.decoder[2].weight)
    assert loaded.encoder[0].table is loaded.decoder[2].table


def test_without_a_scale_weights_are_the_entries_and_train_like_them():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    hashed = copy.deepcopy(plain)
    hash_weights(hashed, ["*.weight"], hash=IdentityHash(), scope="network", init="mean", scaled=False)
    assert [hashed[i].virtual.scale for i in (0, 2)] == [1.0, 1.0]
    x, y = torch.randn(5, 6), torch.randn(5, 2)
    for model in (plain, hashed):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    for i in (0, 2):
        torch.testing.assert_close(hashed[i].weight, plain[i].weight)


def test_a_plain_state_gives_one_table_the_mean_over_all_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 2))
    hash_weights(model, ["*.weight"], 0.1, scope="network", scaled=False)
    before = bake(model)
    load_plain(model, before)
    for name, weight in before.items():
        torch.testing.assert_close(model.get_parameter(name) if "bias" in name else model[int(name[0])].weight, weight)
    plain = {name: torch.randn_like(weight) for name, weight in before.items()}
    with pytest.warns(UserWarning, match="cannot hold all weights"):
        load_plain(model, plain)
    entries = torch.cat([model[i].virtual.slots().flatten() for i in (0, 1)])
    values = torch.cat([plain[f"{i}.weight"].flatten() for i in (0, 1)])
    for entry in entries.unique().tolist():
        torch.testing.assert_close(model[0].table[entry], values[entries == entry].mean())


def test_assigning_one_weight_leaves_entries_of_others_alone():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 2))
    hash_weights(model, ["*.weight"], 0.1, scope="network")
    before = model[0].weight.detach().clone()
    model[1].weight = model[1].weight
    torch.testing.assert_close(model[0].weight, before)


def test_two_tables_of_one_module_take_plain_weights():
    lstm = nn.LSTM(4, 4)
    hash_weights(lstm, ["weight_*"], 0.2, scope="network")
    load_plain(lstm, bake(lstm))
    assert [kind.__name__ for kind in type(lstm).__mro__[:2]] == ["HashedLSTM", "LSTM"]


def test_equal_layers_keep_connections_of_their_own():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    hash_weights(model, ["*.weight"], 0.5, hash=ModulusHash(), density=0.5)
    first, second = (layer.weight != 0 for layer in model)
    assert 0.3 < (first == second).double().mean() < 0.7  # of 400 coins


def test_resetting_a_layer_of_a_common_table_gives_the_spread_of_a_dense_one():
    model = nn.Sequential(nn.Linear(500, 50), nn.Linear(50, 50))
    hash_weights(model, ["*.weight"], 0.5, scope="network")
    for layer in model:
        layer.reset_parameters()
        bound = layer.in_features**-0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
        assert layer.bias.abs().max() <= bound


HALVES = {"first": ["encoder.**.weight"], "second": ["decoder.**.weight"]}


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [WeightHashing(HALVES["first"]), WeightHashing(HALVES["second"])],
        lambda: [WeightHashing(HALVES["first"]), LowRankWeights(HALVES["second"], rank=2)],
        lambda: [LowRankWeights(HALVES["second"], rank=2), WeightHashing(HALVES["first"])],
    ],
    ids=["two hashings", "hashing, low rank", "low rank, hashing"],
)
def test_callbacks_change_a_model_together_and_once(callbacks):
    model, given = Toy(), callbacks()
    for _ in range(2):
        train(model, given, max_epochs=1)
    train(model, callbacks(), max_epochs=1)  # equal ones change nothing more


def test_an_applied_callback_and_an_equal_one():
    model = Toy()
    WeightHashing(HALVES["first"]).apply(model)
    train(model, [WeightHashing(HALVES["first"])], max_epochs=1)


def test_embeddings_hold_no_index():
    model = nn.Sequential(nn.Embedding(1000, 16, padding_idx=0))
    hash_weights(model, ["0.weight"], 0.01)
    assert model[0].virtual.index == "computed"
    assert not model[0].weight[0].any()


@pytest.mark.parametrize(
    ("layers", "scope", "told"),
    [
        ([nn.Linear(20, 10), nn.Linear(10, 20)], "network", "are not those of 2 equal layers"),
        ([nn.Linear(4, 4), nn.Linear(4, 4)], "layer", "use scope='network'"),
    ],
)
def test_a_recurrent_hash_needs_equal_layers(layers, scope, told):
    with pytest.raises(ValueError, match=told):
        hash_weights(nn.Sequential(*layers), ["*.weight"], hash=RecurrentHash(layers=2), scope=scope)


def test_a_table_that_is_parametrized_is_reported():
    model = network()
    hash_weights(model, ["0.weight"], 0.1)
    weight_norm(model[0], "table", dim=None)
    assert [one.table_size for one in report(model).weights] == [20]
    hash_weights(model, ["2.weight"], 0.1)
    weight_norm(model[2], "table", dim=None)
    assert [(one.table_size, one.holder) for one in report(model).weights] == [(20, "0.weight"), (30, "2.weight")]


def test_a_map_as_a_parametrization_is_reported():
    model = network()
    register_parametrization(model[0], "weight", HashedParametrization((10, 20), 9, ModulusHash()), unsafe=True)
    [one] = report(model).weights
    assert (one.name, one.shape, one.table_size) == ("0.weight", (10, 20), 9)
    assert {name: counts.tolist() for name, counts in table_loads(model).items()} == {"0.weight": [23, 23] + [22] * 7}


RESET = {
    "Conv1d": lambda: nn.Conv1d(4, 4, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 3),
    "EmbeddingBag": lambda: nn.EmbeddingBag(9, 4),
    "LSTM": lambda: nn.LSTM(3, 4),
    "subclass": lambda: type("Own", (nn.Linear,), {})(30, 40),
}


@pytest.mark.parametrize("kind", RESET)
def test_any_module_is_reset_as_the_plain_one(kind):
    plain, hashed = RESET[kind](), RESET[kind]().to("meta")
    hash_weights(hashed, ["**"], 0.5)
    hashed.to_empty(device="cpu")
    for parameter in hashed.parameters():
        nn.init.constant_(parameter, math.nan)
    torch.manual_seed(0)
    hashed.reset_parameters()
    assert hashed.state_dict().keys() >= {name for name, _ in hashed.named_parameters()}
    drawn = bake(hashed)
    for name, weight in plain.named_parameters():
        assert drawn[name].isfinite().all()
        if weight.numel() > 100:
            assert float(drawn[name].std()) == pytest.approx(float(weight.detach().std()), rel=0.1)


def test_padding_rows_of_ones_own_embeddings_stay_zero():
    class Own(nn.Embedding):
        pass

    model = nn.Sequential(Own(9, 4, padding_idx=2))
    hash_weights(model, ["**"], 0.5)
    assert not model[0](torch.tensor([2])).any()
    assert model[0](torch.tensor([3])).any()
    for layer in (Own(9, 4, sparse=True), nn.EmbeddingBag(9, 4, sparse=True)):
        with pytest.raises(ConfigurationError, match="belongs to an embedding with sparse, which a hashed one lacks"):
            hash_weights(nn.Sequential(layer), ["**"], 0.5)


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("hash", [UniformHash(), DirichletHash(0.5), ModulusHash(), XXHash(), BlockHash(4)], ids=repr)
@pytest.mark.parametrize("index", ["stored", "computed"])
def test_another_default_device(hash, scope, index):
    """As Lightning has it in ``configure_model``; nothing can be read from this one."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.device("meta"):
        hash_weights(model, ["*.weight"], 0.5, hash, scope, index=index)
        model(torch.zeros(2, 8, device="cpu")).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("few", [0, 1 << 20])
@pytest.mark.parametrize("hash", [UniformHash(), ModulusHash(), BlockHash(4)], ids=repr)
def test_functions_of_torch(hash, few, monkeypatch):
    monkeypatch.setattr("tying.hashing.gather.FEW", few)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).double() for _ in range(3)]
    for model in models:
        hash_weights(model, ["*.weight"], 0.5, hash)
    parameters, _ = torch.func.stack_module_state(models)
    x = torch.randn(2, 8, dtype=torch.float64)

    def loss(own):
        return torch.func.functional_call(models[0], own, (x,)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(parameters)
    for number, model in enumerate(models):
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][number], parameter.grad)
    own, table = models[0][0].virtual, models[0][0].table.detach()
    cubes = torch.func.jacrev(torch.func.jacrev(lambda entries: own(entries).pow(3).sum()))(table)
    uses = torch.zeros_like(table).index_add_(0, own.slots().flatten(), torch.ones(48, dtype=torch.float64))
    torch.testing.assert_close(cubes, torch.diag(6 * table * uses))


@pytest.mark.parametrize("way", ["hashed by layer", "hashed by network", "clustered"])
def test_a_state_dict_that_is_written_in_place_is_loaded(way):
    """Distributed checkpoints write into the state dict of a fresh model, so that its entries must have equal sizes."""
    trained, fresh = network(), network()
    for net, seed in ((trained, 1), (fresh, 2)):
        torch.manual_seed(seed)
        with torch.no_grad():
            net[0].weight.normal_()  # other scales and assignments
        if way == "clustered":
            cluster_weight(net, "0.weight", 4)
        else:
            hash_weights(net, ["*.weight"], 0.1, scope=way.split()[-1])
    state = fresh.state_dict()
    for name, value in trained.state_dict().items():
        assert value.shape == state[name].shape
        state[name].copy_(value)
    fresh.load_state_dict(state)
    assert torch.equal(fresh[0].weight, trained[0].weight)
    assert torch.equal(fresh[2].weight, trained[2].weight)
