"""Packed files: what they hold, how large they are, and what is said of damaged ones."""

import copy
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from toys import Toy, train

from tying import ConfigurationError
from tying.callbacks import MixtureTying, WeightClustering
from tying.hard import bake, lower_rank, tie
from tying.hashing import CodebookHash, HashedLinear, cluster_weight, hash_weights, load_packed, save_packed
from tying.hashing.packing import GAP_BITS, Packed, contents, huffman_bits, index_bits, pack, unpack

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
DTYPES += [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn]


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def recounted(tensor):
    """Return the bytes of each coding of a tensor, by loops."""
    entries, width = tensor.flatten().tolist(), tensor.element_size()
    size = {"raw": width * len(entries)}
    distinct = Counter(entries)
    size["symbols"] = width * len(distinct) + math.ceil(len(entries) * index_bits(len(distinct)) / 8)
    if zeros := distinct.pop(0, 0):
        gaps = run = 0
        for entry in entries:
            run = run + 1 if entry == 0 else 0
            gaps += entry != 0 or run % 31 == 0
        gaps -= run // 31  # fillers without an entry after them are left out
        rest = width * len(distinct) + math.ceil((len(entries) - zeros) * index_bits(len(distinct)) / 8)
        size["mask"] = rest + math.ceil(len(entries) / 8)
        size["gaps"] = rest + math.ceil(gaps * GAP_BITS / 8)
    return size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "values",
    [
        torch.arange(2000).remainder(4).view(40, 50),
        torch.arange(2000).remainder(4).view(40, 50) * (torch.arange(2000).view(40, 50) % 97 == 1),
        torch.zeros(70),
        torch.arange(9).view(3, 3),
        torch.tensor(3),
        torch.empty(0, 2),
    ],
    ids=["few", "sparse", "zeros", "distinct", "scalar", "empty"],
)
def test_every_bit_is_kept(values, dtype):
    tensor = values.to(dtype)
    again = unpack(pack(tensor))
    assert (again.dtype, again.shape) == (dtype, tensor.shape)
    assert torch.equal(bits(again), bits(tensor))


def test_payloads_of_nans_are_kept_and_zeros_lose_their_sign():
    tensor = torch.tensor([math.nan, -math.nan, math.inf, 0.0, -0.0] * 30)
    tensor.view(torch.int32)[0] += 1
    again = unpack(pack(tensor))
    assert pack(tensor).coding == "mask"
    assert torch.equal(bits(again), bits(torch.where(tensor == 0, 0.0, tensor)))  # pruning makes both zeros


@pytest.mark.parametrize("clusters", [1, 2, 5, 16, 32, 1000])
@pytest.mark.parametrize("kept", [1.0, 0.9, 0.3, 0.05, 0.001])
def test_the_smallest_coding_is_chosen(clusters, kept):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(clusters, generator=generator)[torch.randint(clusters, (40, 50), generator=generator)]
    tensor = torch.where(torch.rand(40, 50, generator=generator) < kept, tensor, 0.0)
    content, sizes = pack(tensor), recounted(tensor)
    assert content.nbytes == sizes[content.coding] == min(sizes.values())
    assert torch.equal(unpack(content), tensor)


def test_each_coding_is_the_smallest_somewhere():
    dense = torch.arange(2000.0).remainder(16) + 1
    position = torch.arange(2000)
    chosen = {pack(dense * (position % step == 0)).coding for step in (1, 2, 40)} | {pack(torch.randn(99)).coding}
    assert chosen == {"symbols", "mask", "gaps", "raw"}


def test_hans_example():
    """84,480 weights of 16 values: 4 bits each, and what is not clustered."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(264, 320), nn.Linear(320, 20))
    cluster_weight(model, "0.weight", 16)
    free = sum(p.nbytes for name, p in model.named_parameters() if name != "0.table")
    size = save_packed(model, Path("packed.pt"))
    assert size - free <= 4.4 * 84_480 / 8
    plain = nn.Sequential(nn.Linear(264, 320), nn.Linear(320, 20))
    plain.load_state_dict(load_packed("packed.pt"))
    assert torch.equal(plain[0].weight, model[0].weight)


class Everything(nn.Module):
    """Weights of every kind that a file holds: clustered, pruned, tied, computed, of several dtypes, and buffers."""

    def __init__(self):
        super().__init__()
        self.clustered, self.pruned, self.hashed = nn.Linear(40, 30), nn.Linear(40, 30), nn.Linear(20, 20)
        self.low, self.small, self.masked = nn.Linear(8, 8), nn.Linear(30, 20).bfloat16(), nn.Linear(40, 30)
        self.embedding, self.head, self.back = nn.Embedding(30, 20), nn.Linear(20, 30), nn.Linear(30, 20)
        self.norm = nn.BatchNorm1d(7)
        self.head.weight = self.embedding.weight  # by hand
        self.register_buffer("ids", torch.arange(30))
        self.register_buffer("mask", torch.eye(9).bool())

    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        assert state == {"steps": 3}


def changed():
    torch.manual_seed(0)
    model = Everything()
    prune.l1_unstructured(model.pruned, "weight", amount=0.92)
    prune.l1_unstructured(model.masked, "weight", amount=0.92)  # and not clustered
    for name in ("clustered.weight", "pruned.weight", "small.weight"):
        cluster_weight(model, name, 8)
    hash_weights(model, ["hashed.weight"], 0.1)
    lower_rank(model, ["low.weight"], 2)
    tie(model, ["back.weight ~ embedding.weight | d v -> v d"])
    return model


def test_a_file_is_the_whole_plain_state_dict(tmp_path):
    model = changed()
    save_packed(model, tmp_path / "packed.pt")
    state, baked = load_packed(tmp_path / "packed.pt"), bake(model)
    assert [*state] == [*baked]
    assert state["_extra_state"] == baked.pop("_extra_state")
    for name, value in baked.items():
        assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(state[name], value), name
    plain = Everything()
    plain.load_state_dict(state)  # strictly
    assert torch.equal(plain.back.weight, model.embedding.weight.T)
    content = contents(model)
    assert content.ties.keys() == {"head.weight", "embedding.weight"}  # stored once
    assert {content.tensors[name].coding for name in ("clustered.weight", "small.weight")} == {"symbols"}
    assert torch.equal(plain.masked.weight, model.masked.weight)
    assert content.tensors["pruned.weight"].coding == content.tensors["masked.weight"].coding == "gaps"


def network_wide():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    labels = torch.randint(-1, 6, (800,))
    with torch.no_grad():
        model[1].weight *= 3  # the weights are scaled
    hash_weights(model, ["*.weight"], 6 / 800, CodebookHash(labels), scope="network")
    return model


def signed():
    return nn.Sequential(HashedLinear(20, 20, table_ratio=0.02, hash=CodebookHash(torch.arange(400) % 8), sign=True))


def partly_parted():
    """Tie two weights; other code then parts them."""
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    tie(model, ["0.weight ~ 1.weight"])
    model[1].weight = nn.Parameter(torch.randn(20, 20))
    cluster_weight(model, "2.weight", 4)
    return model


@pytest.mark.parametrize("make", [changed, network_wide, signed, partly_parted])
def test_the_rate_is_that_of_the_file(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    size = save_packed(model, tmp_path / "packed.pt")
    content, state = contents(model), load_packed(tmp_path / "packed.pt")
    assert all(torch.equal(value, state[name]) for name, value in bake(model).items() if name != "_extra_state")
    dense = [value for name, value in state.items() if name != "_extra_state"]  # which torch stores
    assert content.dense_nbytes == sum(value.numel() * value.element_size() for value in dense)
    assert content.nbytes == sum(min(recounted(state[name]).values()) for name in content.tensors)
    assert 0 < size - content.nbytes <= 2048 + 200 * len(state)  # as the docstring says
    assert content.rate == content.dense_nbytes / content.nbytes


def test_huffmans_code_is_recounted():
    torch.manual_seed(0)
    tensor = torch.randn(7)[torch.randn(3000).abs().mul(2).long().clamp(max=6)] * (torch.rand(3000) < 0.05)
    content = pack(tensor)
    assert content.coding == "gaps"
    slots = torch.unique(tensor[tensor != 0], return_inverse=True)[1]
    positions = tensor.nonzero().flatten().tolist()
    gaps = []
    for last, position in zip([-1, *positions], positions, strict=False):
        zeros = position - last - 1
        gaps += [31] * (zeros // 31) + [zeros % 31]
    streams = [math.ceil(huffman_bits(stream) / 8) for stream in (slots, torch.tensor(gaps))]
    assert content.huffman_nbytes == 4 * len(slots.unique()) + sum(streams) < content.nbytes
    assert pack(torch.randn(9)).huffman_nbytes == 36


@pytest.mark.filterwarnings("ignore:WeightClustering begins in epoch", "ignore:MixtureTying begins with")
@pytest.mark.parametrize(
    "callback",
    [WeightClustering(["*.*.weight"], clusters=4), MixtureTying(["encoder.*.weight"], strength=1e-3, components=4)],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_show_the_rate_of_the_file(callback, tmp_path, caplog):
    model = Toy()
    with caplog.at_level("INFO"):
        trainer = train(model, [callback], max_epochs=2)
    save_packed(model, tmp_path / "packed.pt")
    stored = torch.load(tmp_path / "packed.pt", weights_only=True)["bytes"].nbytes
    rate = sum(value.nbytes for value in load_packed(tmp_path / "packed.pt").values()) / stored
    assert float(trainer.callback_metrics["tying/compression"]) == pytest.approx(rate, rel=1e-6)
    if isinstance(callback, MixtureTying):
        assert f"{rate:.1f} times smaller than its state dict" in caplog.text


def test_a_model_without_few_values_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no weight of the model is clustered.*WeightClustering.*first"):
        save_packed(nn.Linear(2, 2), tmp_path / "none.pt")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("version", sorted(folder.name for folder in GOLDEN.iterdir()))
def test_files_of_version_1_hold_the_clustered_weights(version):
    content = torch.load(GOLDEN / version / "packed.pt", weights_only=True)
    state = load_packed(GOLDEN / version / "packed.pt")
    assert content["version"] == 1
    for name, fields in content["weights"].items():
        assert state[name].unique().tolist() == fields["codebook"].sort().values.tolist()
        assert state[name].shape == fields["shape"]


def renamed(content):
    content["tensors"]["0.wieght"] = content["tensors"].pop("0.weight")


def recoded(**fields):
    """Return a change of what a file says of its clustered weight."""

    def change(content):
        shape, dtype, coding, counts = content["tensors"]["0.weight"]
        content["tensors"]["0.weight"] = tuple(
            ({"shape": shape, "dtype": dtype, "coding": coding, "counts": counts} | fields).values()
        )

    return change


DAMAGES = {
    "no names": (lambda content: content.pop("names"), "KeyError.*names"),
    "no bytes": (lambda content: content.update(bytes=None), "TypeError"),
    "fewer bytes": (lambda content: content.update(bytes=content["bytes"][:-1]), "bytes instead of"),
    "more bytes": (lambda content: content.update(bytes=content["bytes"].repeat(2)), "bytes instead of"),
    "no bytes at all": (lambda content: content.update(bytes=content["bytes"][:0]), "0 bytes instead of 31"),
    "a list": (lambda content: content.update(tensors=[1]), "AttributeError"),
    "another name": (renamed, "KeyError.*0.weight"),
    "another shape": (recoded(shape=(5, 5)), "RuntimeError.*shape"),
    "a negative shape": (recoded(shape=(-6, -2)), "RuntimeError"),
    "no shape": (recoded(shape=None), "TypeError"),
    "an unknown dtype": (recoded(dtype="float23"), "AttributeError.*float23"),
    "no dtype": (recoded(dtype="nn"), "TypeError"),
    "a wider dtype": (recoded(dtype="float64"), "values|bytes"),
    "an unknown coding": (recoded(coding="zip"), "coding must be 'raw', 'symbols', 'mask' or 'gaps', not 'zip'"),
    "another coding": (recoded(coding="gaps"), "do not fit|bytes"),
    "fewer counts": (recoded(counts=(4, 12)), "ValueError"),
    "fewer indices": (recoded(counts=(4, 8, 0)), "RuntimeError|bytes"),
    "negative counts": (recoded(counts=(-4, 12, 0)), "values|bytes|index"),
    "a tie to nothing": (lambda content: content.update(ties={"0.bias": ("2.bias", [])}), "KeyError.*2.bias"),
    "no relation": (
        lambda content: content.update(ties={"0.weight": ("0.weight", [("a b", ())])}),
        "ValueError|Einops",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage, tmp_path):
    model, (change, told) = nn.Sequential(nn.Linear(4, 3)), DAMAGES[damage]
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(12.0).remainder(4).view(3, 4) + 1)
    cluster_weight(model, "0.weight", 4)
    path = tmp_path / "a.pt"
    save_packed(model, path)
    content = torch.load(path)
    before = copy.deepcopy(content)
    change(content)
    assert str(content) != str(before)
    torch.save(content, path)
    with pytest.raises(ConfigurationError, match=rf"(?s)^{re.escape(str(path))} is damaged: .*({told})"):
        load_packed(path)


def test_other_files_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("text")
    torch.save({"version": 3, "bytes": torch.zeros(1)}, tmp_path / "newer.pt")
    for name, told in {
        "other.pt": "other.pt holds no packed weights",
        "text.pt": "text.pt is not a checkpoint of tensors",
        "newer.pt": "newer.pt is of version 3; this package reads versions 1 to 2",
        "none.pt": "there is no file",
    }.items():
        with pytest.raises(ConfigurationError, match=told):
            load_packed(tmp_path / name)


def test_bytes_by_hand():
    """The format of version 2: a change of it would make older files unreadable."""
    values = torch.tensor([1.0, 2.0, 3.0]).view(torch.uint8).tolist()
    symbols = pack(torch.tensor([1.0, 3.0, 2.0, 1.0] * 10))  # slots 0, 2, 1, 0, the low bit first
    assert symbols.values.tolist() == values
    assert symbols.indices.tolist() == [0b00011000] * 10
    assert (symbols.places.tolist(), symbols.counts) == ([], (3, 40, 0))
    sparse = torch.zeros(200)
    sparse[[2, 150]] = 2.0
    gaps = pack(sparse)  # 2 zeros; 147 = 4 · 31 + 23 zeros
    assert (gaps.coding, gaps.indices.tolist(), gaps.counts) == ("gaps", [0], (1, 2, 6))
    places = [2, 31, 31, 31, 31, 23]
    stream = "".join(format(place, "05b")[::-1] for place in places).ljust(32, "0")
    assert gaps.places.tolist() == [int(stream[begin : begin + 8], 2) for begin in range(0, 32, 8)]
    mask = pack(torch.tensor([0.0, 2.0, 2.0, 0.0, 1.0, 3.0, 0.0, 3.0] * 5))
    assert (mask.coding, mask.counts) == ("mask", (3, 25, 40))
    assert mask.places.tolist() == [0b01101101] * 5


def test_a_file_by_hand(tmp_path):
    """Version 2 in full: a change of its fields would make older files unreadable."""
    weight, labels = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), [0b00011000]
    content = {
        "version": 2,
        "names": ["code", "weight", "tied", "_extra_state"],
        "tensors": {"weight": ((2, 3), "float32", "raw", (6, 0, 0)), "code": ((4,), "uint8", "symbols", (3, 4, 0))},
        "ties": {"tied": ("weight", [("o i -> i o", (("i", 3), ("o", 2)))])},
        "others": {"_extra_state": 3},
        "bytes": torch.cat([bits(weight), torch.tensor([7, 8, 9, *labels], dtype=torch.uint8)]),
    }
    torch.save(content, tmp_path / "hand.pt")
    state = load_packed(tmp_path / "hand.pt")
    assert [*state] == content["names"]
    assert torch.equal(state["weight"], weight)
    assert torch.equal(state["tied"], weight.T)
    assert state["tied"].is_contiguous()
    assert (state["code"].tolist(), state["code"].dtype, state["_extra_state"]) == ([7, 9, 8, 7], torch.uint8, 3)


def test_index_bits_count_values():
    assert [index_bits(count) for count in (1, 2, 3, 4, 5, 2**20, 2**20 + 1)] == [1, 1, 2, 2, 3, 20, 21]
    assert Packed((0,), "float32", "raw", *[torch.empty(0, dtype=torch.uint8)] * 3, (0, 0, 0)).nbytes == 0
