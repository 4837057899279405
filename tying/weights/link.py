"""Weights that are another weight in a different layout: a derived weight whose original is the source itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import override

from tying.selection.relation import Relation
from tying.weights.derived import derived_in, install, remove


class Link(nn.Module):
    """The parametrization ``weight = relation(source)``; assigning the weight writes through to the source.

    Args:
        relation: the map from the source's layout to the weight's.
        following: names of the parameters behind the weight in its module, for :func:`unlink`.
    """

    def __init__(self, relation: Relation, following: Sequence[str] = ()) -> None:
        super().__init__()
        self.relation = relation
        self.following = tuple(following)

    @override
    def forward(self, source: Tensor) -> Tensor:
        return self.relation(source)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the source whose image is the given weight."""
        return self.relation.inverse()(weight).contiguous()

    @override
    def extra_repr(self) -> str:
        return str(self.relation)


class LinkList(ParametrizationList):
    """Holds the source of a link, which torch must not overwrite when somebody removes the parametrization.

    If ``is_tensor`` were true, torch would lay the source out as the weight, also for all others that hold it.
    """

    def __init__(self, link: Link, source: nn.Parameter) -> None:
        nn.ModuleList.__init__(self, [link])
        self.unsafe, self.is_tensor = True, False
        self.original = source

    @override
    def forward(self) -> Tensor:
        weight = self.original
        for step in self:
            weight = step(weight)
        return weight

    @override
    def right_inverse(self, value: Tensor) -> None:
        for step in reversed(self):
            value = step.right_inverse(value)  # type: ignore[operator]  # a method
        with torch.no_grad():
            self.original.copy_(value)


def link(module: nn.Module, name: str, source: nn.Parameter, relation: Relation) -> None:
    """Make a parameter of ``module`` the image of ``source``; checkpoints keep its plain name and layout."""
    names = [*module._parameters]
    if not links_in(module):
        module.register_state_dict_post_hook(_store_plainly)  # type: ignore[no-untyped-call]  # torch's
        module.register_load_state_dict_pre_hook(_read_plainly)  # type: ignore[no-untyped-call]  # torch's
    install(module, name, LinkList(Link(relation, names[names.index(name) + 1 :]), source))


def unlink(module: nn.Module, name: str) -> nn.Parameter:
    """Replace the image of a source by a parameter of equal value, at its former place; return it."""
    following = links_in(module)[name].following
    weight = remove(module, name)
    for behind in following:
        if behind in module._parameters:
            module._parameters[behind] = module._parameters.pop(behind)
    return weight


def links_in(module: nn.Module) -> dict[str, Link]:
    """Return the links of a module's weights, by the weight's attribute name."""
    return {
        derived.name: derived.steps[0]
        for derived in derived_in(module)
        if len(derived.steps) == 1 and isinstance(derived.steps[0], Link)
    }


def _store_plainly(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    for name, relation in links_in(module).items():
        key = f"{prefix}parametrizations.{name}.original"
        if key in state_dict:
            state_dict[prefix + name] = relation(state_dict.pop(key))


def _read_plainly(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, relation in links_in(module).items():
        if prefix + name in state_dict:
            weight = state_dict.pop(prefix + name)
            state_dict[f"{prefix}parametrizations.{name}.original"] = relation.right_inverse(weight)
