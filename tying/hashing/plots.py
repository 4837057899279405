"""How a hash uses its table, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from tying.atomic import save_figure
from tying.errors import ConfigurationError
from tying.hashing.loads import entropy
from tying.hashing.report import loads_of, tables_in


def table_loads(model: nn.Module) -> dict[str, Tensor]:
    """Return how many weights use each entry of each table of a model, by the name of the first weight that does.

    Example:
        >>> from tying.hashing import HashedLinear, ModulusHash
        >>> table_loads(nn.Sequential(HashedLinear(5, 2, table_ratio=0.3, hash=ModulusHash())))
        {'0.weight': tensor([4, 3, 3])}
    """
    return {next(iter(group)): loads_of(group) for group in tables_in(model)}


def plot_loads(model: nn.Module, path: Path | str) -> None:
    """Write a PNG with the loads of each table of a model: as a heat map of its entries, and as a histogram.

    Raises:
        ConfigurationError: no weight is hashed.
    """
    draw_loads(table_loads(model), Path(path))


def draw_loads(counts: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG with two panels for each title: loads, (table_size,), as a heat map and as a histogram."""
    from matplotlib.figure import Figure

    if not counts:
        raise ConfigurationError("no weight of the model is hashed")
    across = min(len(counts), 3)
    down = math.ceil(len(counts) / across)
    figure = Figure(figsize=(6.8 * across, 2.9 * down), layout="constrained")
    panels = figure.subplots(down, 2 * across, squeeze=False).flatten()
    for unused in panels[2 * len(counts) :]:
        unused.remove()
    for (title, own), heat, bars in zip(counts.items(), panels[::2], panels[1::2], strict=False):
        side = math.ceil(math.sqrt(len(own)))
        square = F.pad(own.float(), (0, side * side - len(own)), value=math.nan).view(side, side)
        figure.colorbar(heat.imshow(square.numpy(), cmap="viridis"), ax=heat, label="weights that use it")
        heat.set(xticks=[], yticks=[])
        heat.set_title(title, fontsize="small", loc="left")
        bars.hist(own.numpy(), bins=min(50, int(own.max()) + 1))
        bars.set(xlabel="weights that use an entry", ylabel="entries")
        told = f"entropy {entropy(own):.3f}, at most {math.log(len(own)):.3f} nats"
        bars.set_title(told, fontsize="small", loc="right")
    save_figure(figure, path)
