"""Penalties that pull weights to constants."""

from collections.abc import Mapping

from torch import Tensor, nn

from tying.selection.relation import Relation
from tying.selection.tie import TiedGroup
from tying.soft.group_penalty import TyingPenalty


def anchored(weights: Mapping[str, nn.Parameter], anchors: Mapping[str, Tensor], strength: float = 1.0) -> TyingPenalty:
    """Return the penalty ``½ Σ ‖w − w⁰‖²``: soft tying of each weight with a constant.

    Args:
        weights: w, by name.
        anchors: w⁰, by the same names.
        strength: see :class:`TyingPenalty`.

    Example:
        >>> import torch
        >>> w = nn.Parameter(torch.tensor([1.0, 4.0]))
        >>> penalty = anchored({"w": w}, {"w": torch.tensor([1.0, 2.0])})
        >>> penalty.prox_(1.0)
        >>> w.tolist()
        [1.0, 3.0]

    Source: X. Li, Y. Grandvalet and F. Davoine, Explicit inductive bias for transfer learning with convolutional
    networks, 2018.
    """
    groups = []
    for name, weight in weights.items():
        constant = anchors[name].detach().to(weight)
        if constant.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
            constant = constant.clone()  # a state_dict's tensor, which changes with its weight
        members = weight, nn.Parameter(constant, requires_grad=False)
        groups.append(TiedGroup((name, f"anchor of {name}"), members, (Relation(), Relation())))
    return TyingPenalty(groups, strength=strength)
