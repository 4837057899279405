"""What merges cost, and what leaving branches out saves: training steps of networks against the plain ones."""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth
from typing_extensions import override

from benchmarks.report import table
from benchmarks.speed.timing import Race, Step, race
from tying.callbacks import Looping, ResidualMerging
from tying.depth import Merge, StochasticDepth, Swapout, apply_merge
from tying.models import ResNet

DEPTH, BATCH = 56, 128
BLOCKS, ROUNDS = 10, 10  # 100 interleaved steps of each side; extremes are those of ten blocks
KEEPS = (0.5, 0.7, 0.8, 0.9, 0.95)
LAYERS, WIDTH, TOKENS, VOCABULARY, IMAGE = 12, 128, 64, 1000, 64  # of the transformers, at half the batch
PLAIN, WRITTEN_OUT = (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 2, 3, 4, 5)  # orders of the layers of an encoder
Mode = Literal["batch", "subset", "row"]
MODES: tuple[Mode, ...] = get_args(Mode)
Batch = tuple[Tensor, Tensor]  # inputs and labels


class Around(Merge):
    """A sum, with a module of somebody else's around its branch or itself."""

    def __init__(self, module: nn.Module, whole: bool = False) -> None:
        super().__init__()
        self.module, self.whole = module, whole

    @override
    def forward(self, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        out: Tensor = self.module(x + branch()) if self.whole else x + self.module(branch())
        return out


def network(merge: nn.Module | None, linear: bool = True) -> ResNet:
    """Return a ResNet-56 with a merge in each block."""
    torch.manual_seed(0)
    net = ResNet(DEPTH).to(memory_format=torch.channels_last)
    if merge is not None:
        ResidualMerging("layer*.*", merge, "linear" if linear else "uniform").apply(net)
    return net


def around(make: Callable[[float], nn.Module], whole: bool = False) -> ResNet:
    """Return a ResNet-56 with somebody else's module in each block, made for a probability that grows to 0.5."""
    net = network(None)
    blocks = [name for name, _ in net.named_modules() if name.count(".") == 1 and name.startswith("layer")]
    for number, name in enumerate(blocks, start=1):
        apply_merge(net, name, Around(make(0.5 * number / len(blocks)), whole))
    return net


def installed(package: str) -> Any:
    """Return a package that nothing here needs, or None."""
    return importlib.import_module(package) if importlib.util.find_spec(package) else None


def step_of(net: nn.Module, data: Batch, dtype: torch.dtype = torch.float32) -> Step:
    """Return a training step of a network, in mixed precision for another dtype."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    x, y = data

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()

    return step


def batch(*shape: int) -> Batch:
    """Return inputs of that shape, and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randint(10, shape[:1], generator=generator)


def images() -> Batch:
    """Return the batch of every step of a ResNet."""
    x, y = batch(BATCH, 3, 32, 32)
    return x.contiguous(memory_format=torch.channels_last), y


def vit(timm: Any, drop: float = 0.0) -> nn.Module:
    """Return timm's ViT-Tiny for small images, with DropPath in each branch if branches shall be dropped."""
    torch.manual_seed(0)
    net: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=IMAGE, depth=LAYERS, num_classes=10)
    for number, block in enumerate(net.get_submodule("blocks").children(), start=1):
        for branch in ("drop_path1", "drop_path2") if drop else ():
            block.register_module(branch, timm.layers.DropPath(drop * number / LAYERS))
    return net


class Logits(nn.Module):
    """A language model of transformers that returns logits of classes alone, (batch, classes, tokens)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(tokens, use_cache=False).logits
        return logits.mT


def gpt2(transformers: Any) -> nn.Module:
    """Return transformers' GPT-2, of small width and without dropout."""
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": WIDTH // 32, "n_positions": TOKENS, "vocab_size": VOCABULARY}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    return Logits(transformers.GPT2LMHeadModel(config))


def merged(make: Callable[[], nn.Module], blocks: str) -> dict[str, nn.Module]:
    """Return a network, plain and with each mode of stochastic depth, whose keeps fall linearly to 0.5."""
    nets = {side: make() for side in ("plain", *MODES)}
    for mode in MODES:
        ResidualMerging(blocks, StochasticDepth(0.5, mode)).apply(nets[mode])
    return nets


def transformer_tables() -> list[str]:
    """Return the tables of timm's vision transformer and of transformers' GPT-2, of those that are installed."""
    count, tables = BATCH // 2, []
    drawn = f"keeps fall linearly to 0.5; median of {BLOCKS} means of 4 interleaved steps (extremes):"
    if timm := installed("timm"):
        sides = {**merged(lambda: vit(timm), "blocks.*"), "DropPath": vit(timm, 0.5)}
        times = means({side: step_of(net, batch(count, 3, IMAGE, IMAGE)) for side, net in sides.items()}, rounds=4)
        tables.append(
            f"ViT-Tiny of timm {version('timm')} at batch {count}, images of {IMAGE} × {IMAGE} pixels; a draw for each "
            f"branch; {drawn}\n\n" + times.table({"/ plain": "plain"}, prefix="ViT, ")
        )
    if transformers := installed("transformers"):
        text = torch.randint(VOCABULARY, (count, TOKENS + 1), generator=torch.Generator().manual_seed(0))
        data, sides = (text[:, :-1], text[:, 1:]), merged(lambda: gpt2(transformers), "net.transformer.h.*")
        times = means({side: step_of(net, data) for side, net in sides.items()}, rounds=4)
        tables.append(
            f"GPT-2 of transformers {version('transformers')} at batch {count}, {LAYERS} layers of width {WIDTH}, "
            f"{TOKENS} of {VOCABULARY} tokens; a draw for each layer; {drawn}\n\n"
            + times.table({"/ plain": "plain"}, prefix="GPT-2, ")
        )
    return tables


class Encoder(nn.Module):
    """Torch's encoder layers, in an order that may repeat some, and a classifier of their mean."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(2 * WIDTH, 4, 8 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in PLAIN)
        self.head, self.order = nn.Linear(2 * WIDTH, 10), [*order]

    @override
    def forward(self, x: Tensor) -> Tensor:
        for place in self.order:
            x = self.layers[place](x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


def looped(passes: int, per_pass: Literal["norm", "scale"] | None = None) -> nn.Module:
    """Return an encoder that runs its two middle layers several times."""
    net = Encoder(PLAIN)
    Looping("layers.[23]", passes, per_pass=per_pass).apply(net)
    return net


def loop_table() -> str:
    """Return the table of a loop of two passes beside the same network with the repeats written out."""
    count = BATCH // 8
    sides = {
        "repeats written out": Encoder(WRITTEN_OUT),
        "loop": looped(2),
        "loop, norms of each pass": looped(2, "norm"),
        "loop, scales of each pass": looped(2, "scale"),
        "one pass": looped(1),
        "plain": Encoder(PLAIN),
    }
    times = means({side: step_of(net, batch(count, TOKENS, 2 * WIDTH)) for side, net in sides.items()}, rounds=2)
    return (
        f"Two of {len(PLAIN)} encoder layers of torch, of width {2 * WIDTH}, in two passes; batch {count} of {TOKENS} "
        f"steps; median of {BLOCKS} means of 2 interleaved steps (extremes):\n\n"
        + times.table({"/ written out": "repeats written out"}, prefix="encoder, ")
    )


def means(steps: dict[str, Step], rounds: int = ROUNDS) -> Race:
    """Return mean seconds of each step, in turns, for each of ten blocks of rounds: what is drawn varies."""
    return race(steps, BLOCKS, rounds, statistics.fmean)


def held(net: nn.Module) -> float:
    """Return MiB that a forward pass keeps for its backward pass, weights apart; the mean of eight passes."""
    weights = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    x, y = images()
    totals = []
    for _ in range(8):
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor, storages: dict[int, torch.UntypedStorage] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage  # held, or else its address might be used again
            return tensor.detach()  # the tensor itself would hold the graph that holds it

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            F.cross_entropy(net(x), y)
        totals.append(sum(storage.nbytes() for storage in storages.values()) / 2**20)
    return statistics.fmean(totals)


def measure() -> str:
    """Run all measurements, and return their tables as Markdown."""
    sides: dict[str, ResNet] = {
        "plain": network(None),
        **{f"stochastic depth, {mode}": network(StochasticDepth(0.5, mode)) for mode in MODES},
        "swapout": network(Swapout(0.5, 0.5)),
        "torchvision's StochasticDepth, row": around(lambda p: TorchvisionStochasticDepth(p, "row")),
        **(
            {f"DropPath of timm {version('timm')}": around(timm.layers.DropPath)} if (timm := installed("timm")) else {}
        ),
        "torch's Dropout after each block": around(nn.Dropout, whole=True),
    }
    memory = {side: f"{held(net):.0f}" for side, net in sides.items()}
    times = means({side: step_of(net, images()) for side, net in sides.items()})
    mixed = means({side: step_of(net, images(), torch.bfloat16) for side, net in [*sides.items()][:5]}, rounds=3)
    ratios = {side: mixed.told(side, "plain") for side in mixed.seconds}
    by_keep = []
    for keep in KEEPS:
        nets = {mode: network(StochasticDepth(keep, mode), linear=False) for mode in MODES[1:]}
        kept = means({mode: step_of(net, images()) for mode, net in nets.items()}, rounds=2)
        by_keep.append([f"{keep:g}", kept.told("subset", "row")])
    return "\n\n".join(
        [
            f"A training step of ResNet-{DEPTH} at batch {BATCH}, channels last; keeps fall linearly to 0.5; median of "
            f"{BLOCKS} means of {ROUNDS} interleaved steps (extremes); in bf16, of 3:",
            times.table({"/ plain": "plain"}, {"/ plain, bf16": ratios, "MiB held for backward": memory}),
            "Rows chosen and computed, over rows masked, at one keep in all blocks:",
            table(["keep", "subset / row"], by_keep),
            *transformer_tables(),
            loop_table(),
        ]
    )
