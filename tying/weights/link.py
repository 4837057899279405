"""A weight that is another one in a different layout: a parametrization whose original is the source itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import override

from tying.selection.relation import Relation
from tying.weights.derived import privatize_class


class Link(nn.Module):
    """The parametrization ``weight = relation(source)``; assigning the weight writes through to the source.

    Args:
        relation: the map from the source's layout to the weight's.
        following: the parameters that stood behind the weight in its module.
    """

    def __init__(self, relation: Relation, following: Sequence[str] = ()) -> None:
        super().__init__()
        self.relation = relation
        self.following = tuple(following)

    @override
    def forward(self, source: Tensor) -> Tensor:
        return self.relation(source)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the source that makes the weight what is given."""
        return self.relation.inverse()(weight).contiguous()

    @override
    def extra_repr(self) -> str:
        return str(self.relation)


class LinkList(ParametrizationList):
    """Holds a related weight's source, which torch must not write into when somebody removes the parametrization.

    Were ``is_tensor`` true, torch would lay out the source as the weight, for all others that hold it, too.
    """

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
    own = module.get_parameter(name)
    names = [*module._parameters]
    privatize_class(module)
    setattr(module, name, nn.Parameter(own.detach().clone(), own.requires_grad))  # registering writes into it
    parametrization = Link(relation, names[names.index(name) + 1 :])
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    held: ParametrizationList = getattr(module.parametrizations, name)
    held.__class__, held.original, held.is_tensor = LinkList, source, False
    # parametrize has given the module a class of its own, but a second parameter of it finds the hooks in place
    if len(links_in(module)) == 1:
        module.register_state_dict_post_hook(_store_plainly)  # type: ignore[no-untyped-call]  # torch's
        module.register_load_state_dict_pre_hook(_read_plainly)  # type: ignore[no-untyped-call]  # torch's


def unlink(module: nn.Module, name: str) -> None:
    """Make a parameter of ``module`` its own again, with the values it has, where it stood."""
    held: ParametrizationList = getattr(module.parametrizations, name)
    source = held.get_parameter("original")
    following = links_in(module)[name].following
    held.original = nn.Parameter(source.detach().clone(), source.requires_grad)
    held.is_tensor = True  # removing writes into it, and keeps it a parameter
    privatize_class(module)
    parametrize.remove_parametrizations(module, name)
    for behind in following:
        if behind in module._parameters:
            module._parameters[behind] = module._parameters.pop(behind)


def links_in(module: nn.Module) -> dict[str, Link]:
    """Return what computes the parameters of ``module`` itself that are images of others, by name."""
    held: Mapping[str, ParametrizationList] = getattr(module, "parametrizations", {})
    return {name: steps[0] for name, steps in held.items() if len(steps) == 1 and isinstance(steps[0], Link)}


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
