"""Let weights share the entries of a table, in training."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from tying.callbacks.base import picture_folder
from tying.callbacks.transform import ModelTransform
from tying.hashing import Hash, UniformHash, entropy, hash_weights, table_loads
from tying.hashing.apply import check_choices
from tying.hashing.report import draw_loads


class WeightHashing(ModelTransform):
    """Let each weight, or all weights together, share the entries of a table; see :func:`tying.hashing.hash_weights`.

    When training starts, the use of the tables' entries is plotted as ``hash_loads.png`` in the logger's directory.
    Logs ``tying/entropy``: the entropy of the entries' loads, in nats, averaged over the tables.

    Args:
        parameters: patterns of names; a leading ``!`` excludes. Those of fewer than two dimensions are skipped.
        table_ratio: entries of a table per weight, in (0, 1]; by default a tenth, or what the hash fixes.
        hash: maps each weight to its slot in the table.
        scope: a table for each weight, or one for all.
        init: entries are drawn from the weights as initialised, or are the mean over their uses.
        sign: multiply by ±1, as HashedNets do.
        density: fraction of weights that are kept.
        index: how the hash is evaluated.
        scaled: with ``scope="network"``, multiply by each weight's own scale; see :func:`tying.hashing.hash_weights`.

    Example:
        >>> WeightHashing(["**.weight", "!**.norm*"], table_ratio=1 / 64, scope="network").scope
        'network'
    """

    def __init__(
        self,
        parameters: list[str],
        table_ratio: float | None = None,
        hash: Hash = UniformHash(),  # noqa: B008  # frozen
        scope: Literal["layer", "network"] = "layer",
        init: Literal["fresh", "mean"] = "fresh",
        sign: bool = False,
        density: float = 1.0,
        index: Literal["auto", "stored", "computed", "structured"] = "auto",
        scaled: bool = True,
    ) -> None:
        super().__init__()
        check_choices(table_ratio, hash, scope, init)
        self.parameters, self.table_ratio, self.hash, self.scope, self.init = parameters, table_ratio, hash, scope, init
        self.sign, self.density, self.index, self.scaled = sign, density, index, scaled
        self._entropy = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        loads = table_loads(pl_module)
        if folder := picture_folder(trainer):
            draw_loads(loads, folder / "hash_loads.png")
        self._entropy = sum(map(entropy, loads.values())) / len(loads)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("tying/entropy", self._entropy)

    @override
    def change(self, model: nn.Module) -> list[str]:
        report = hash_weights(
            model,
            self.parameters,
            self.table_ratio,
            self.hash,
            scope=self.scope,
            init=self.init,
            sign=self.sign,
            density=self.density,
            index=self.index,
            scaled=self.scaled,
        )
        count = sum(weight.name == weight.holder for weight in report.weights)
        rank_zero_info(
            f"WeightHashing: {len(report.weights)} weights ({report.virtual:,} values) share "
            f"{f'{count} tables' if count > 1 else 'a table'} of {report.stored:,} entries "
            f"(ratio {report.stored / report.virtual:.3g})"
        )
        return [weight.name for weight in report.weights]
