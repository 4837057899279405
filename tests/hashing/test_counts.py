"""Every number that reports of hashed and clustered weights print, beside a slow recount from the weights themselves."""

import math
import re
from collections import Counter

import pytest
import torch
from torch import nn
from toys import Toy, train

from tying import ConfigurationError
from tying.callbacks import WeightClustering, WeightHashing
from tying.hard import audit
from tying.hashing import (
    BlockHash,
    DirichletHash,
    IdentityHash,
    ModulusHash,
    NeighborhoodHash,
    UniformHash,
    XXHash,
    cluster_weight,
    compression_rate,
    entropy,
    hash_weights,
    loads,
    report,
)

HASHES = [ModulusHash(), UniformHash(), DirichletHash(0.3), NeighborhoodHash(2), XXHash(), BlockHash(4)]


def recounted(model, names):
    """Count the weights by the values that they read: each entry of a table gets a value of its own first.

    Returns:
        For each weight: its table's identity and size, the loads of its entries, and the number of distinct rows.
    """
    counts = {}
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        size = len(layer.table)
        with torch.no_grad():
            layer.table.copy_(torch.arange(1.0, size + 1))  # network-wide tables are one parameter
        weight = layer.weight.detach() / layer.virtual.scale
        entries = [round(abs(value)) - 1 for value in weight.flatten().tolist()]
        uses = Counter(entry for entry in entries if entry >= 0)
        rows = {tuple(row) for row in weight.tolist()}
        counts[name] = id(layer.table), size, uses, len(rows)
    return counts


@pytest.mark.parametrize("options", [{}, {"sign": True, "density": 0.6}], ids=str)
@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("hash", HASHES, ids=lambda hash: type(hash).__name__)
def test_the_report_is_recounted(hash, scope, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10), nn.Linear(10, 20)).double()
    made = hash_weights(model, ["*.weight"], 0.05, hash, scope=scope, **options)
    names = [f"{number}.weight" for number in range(3)]
    counts = recounted(model, names)
    tables = {table: size for table, size, _, _ in counts.values()}
    assert (made.stored, made.virtual) == (sum(tables.values()), 1100)
    assert made.stored == sum(p.numel() for name, p in model.named_parameters() if name.endswith("table"))
    for weight in made.weights:
        table, size, _, rows = counts[weight.name]
        total = Counter()
        for other, _, uses, _ in counts.values():
            total += uses if other == table else Counter()
        realised = -sum(n / total.total() * math.log(n / total.total()) for n in total.values())
        assert (weight.table_size, weight.units) == (size, rows)
        assert weight.realised == pytest.approx(realised, abs=1e-12)
        told = str(made)
        assert f"table of {size:,}: entropy of loads {realised:.4f}" in told
        assert f"at most {math.log(size):.4f} nats" in told
        assert f"  {weight.name} {weight.shape}: {math.prod(weight.shape):,} values from {size:,}, " in told
        assert (f"only {rows} of {weight.shape[0]} units are distinct" in str(weight)) == (rows < weight.shape[0])
    shared = (
        f"share a table of {made.stored:,}" if scope == "network" else f"have 3 tables with a total of {made.stored:,}"
    )
    assert str(made).startswith(f"3 weights (1,100 values) {shared} slots (ratio {made.stored / 1100:.3g})")
    assert report(model) == made
    unique, used = sum(p.numel() for p in model.parameters()), 1100 + 60
    assert (audit(model).unique, audit(model).virtual) == (unique, used)
    assert audit(model).saved_bytes == 8 * (used - unique)


def test_probabilities_are_those_of_many_weights():
    """What is printed as the entropy of the probabilities is what loads reach, for many weights."""
    for hash in HASHES:
        count, size = 400_000, 40
        uses = loads(hash.index(count, size), size).double()
        torch.testing.assert_close(uses / count, hash.probabilities(count, size), rtol=0.05, atol=1e-3)


def test_the_callback_prints_and_logs_what_is_measured(caplog, capsys):
    model = Toy()
    with caplog.at_level("INFO"):
        trainer = train(model, [WeightHashing(["*.*.weight"], 0.3, DirichletHash(0.5))], max_epochs=1)
    names = [f"{path}.{number}.weight" for path in ("encoder", "decoder") for number in (0, 2)]
    counts = recounted(model, names)
    entropies = [entropy(torch.tensor([*uses.values()])) for _, _, uses, _ in counts.values()]
    assert float(trainer.callback_metrics["tying/entropy"]) == pytest.approx(sum(entropies) / 4, rel=1e-6)
    stored = sum(size for _, size, _, _ in counts.values())
    line = (
        f"WeightHashing: 4 weights (100 values) have 4 tables with a total of {stored} slots (ratio {stored / 100:.3g})"
    )
    assert line in caplog.text


@pytest.mark.filterwarnings("ignore:WeightClustering begins in epoch")
def test_clustering_prints_what_is_measured(caplog):
    model = Toy()
    with caplog.at_level("INFO"):
        train(model, [WeightClustering(["encoder.*.weight"], clusters=3)], max_epochs=1)
    [weights, rate] = re.search(
        r"WeightClustering: (\d+) weights? clustered; .* is ([\d.]+) times smaller", caplog.text
    ).groups()
    assert weights == "2"
    # 50 values of 3 kinds in 2 bits, 40 others and 20 biases
    assert float(rate) == round(480 / (30 / 4 + 0.5 + 20 / 4 + 2 * 12 + 4 * 70), 1)
    for name, size in (("encoder.0.weight", 30), ("encoder.2.weight", 20)):
        [row] = [row for row in audit(model).rows if row.names == (name,)]
        assert (row.used, row.stored) == (size, len(model.get_parameter(name.replace("weight", "table"))))
        assert len(model.get_submodule(name.rpartition(".")[0]).weight.unique()) <= 3


def test_compression_of_the_paper_is_its_formula():
    for n, k, b in ((16, 4, 32), (1000, 32, 32), (77, 1, 16)):
        assert compression_rate(n, k, b) == pytest.approx(n * b / (n * math.log2(k) + k * b))


@pytest.mark.parametrize("index", [[0, 5], [-2, 0]])
def test_slots_outside_the_table_are_refused(index):
    with pytest.raises(ConfigurationError, match=r"slots must be in \[-1, 3\), not from"):
        loads(torch.tensor(index), 3)


def test_entropy_is_exact_at_its_limits():
    assert entropy(torch.tensor([0, 7, 0])) == 0
    assert entropy(torch.ones(50)) == pytest.approx(math.log(50), rel=1e-15)
    assert entropy(torch.zeros(4)) == 0
    assert len(loads(torch.tensor([], dtype=torch.int64), 4)) == 4


def test_a_codebook_is_reported_by_its_uses():
    torch.manual_seed(0)
    layer = nn.Linear(40, 10)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.05] = 0
    zeros = int((layer.weight == 0).sum())
    cluster_weight(layer, "weight", 8)
    [weight] = report(layer).weights
    uses = [int((layer.weight == value).sum()) for value in layer.table]
    assert sum(uses) == 400 - zeros
    assert weight.realised == pytest.approx(-sum(n / sum(uses) * math.log(n / sum(uses)) for n in uses))
    assert weight.generating is None
    assert report(nn.Sequential(nn.Linear(4, 4))).weights == ()
    hash_weights(identity := nn.Sequential(nn.Linear(4, 3)), ["0.weight"], None, IdentityHash())
    assert report(identity).weights[0].realised == pytest.approx(math.log(12))
