"""Layers whose weights are mixtures of a few shared templates."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList
from typing_extensions import override

from tying.errors import ConfigurationError, check_counts
from tying.figures import WIDTH, new_figure
from tying.files import save_figure
from tying.hard.factorization import least_squares, numerical_rank
from tying.selection.index import clean_name
from tying.weights.derived import redrawn
from tying.weights.replace import parametrize_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # an optional package


def mix_templates(templates: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``W = Σ_j α_j T_j``.

    Args:
        templates: (k, ...), T.
        coefficients: (k,), α.

    Returns:
        a weight of the templates' shape.
    """
    mixture: Tensor = torch.tensordot(coefficients, templates, dims=1)
    return mixture


def nearest_mixtures(weights: Tensor, templates: Tensor) -> tuple[Tensor, Tensor]:
    """Return templates and coefficients whose mixtures are nearest to weights, by singular value decomposition.

    They are exact if the weights are as many as the templates or fewer, or mixtures of as many. Templates are
    orthogonal, of the length of the weights, so that coefficients are about 1 at most. Templates that the weights do
    not need keep their values, with coefficients of 0.

    Args:
        weights: (layers, N).
        templates: the present templates, (k, N).

    Returns:
        (k, N) and (layers, k).

    Example:
        >>> weights = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
        >>> templates, coefficients = nearest_mixtures(weights, torch.ones(2, 3))
        >>> templates[1], coefficients @ templates
        (tensor([1., 1., 1.]), tensor([[1.0000, 2.0000, 3.0000],
                [2.0000, 4.0000, 6.0000]]))
    """
    u, s, v = torch.linalg.svd(weights, full_matrices=False)
    count = min(len(templates), numerical_rank(s, weights.shape))
    length = weights.norm() / len(weights) ** 0.5
    nearest = templates.to(weights, copy=True)
    nearest[:count] = length * v[:count]
    coefficients = weights.new_zeros(len(weights), len(templates))
    coefficients[:, :count] = u[:, :count] * s[:count] / length
    return nearest, coefficients


def layer_similarity(coefficients: Sequence[Tensor] | Tensor) -> Tensor:
    """Return ``|⟨α_i, α_l⟩| / (‖α_i‖ ‖α_l‖)``: 1 if two layers are equal up to scale.

    Args:
        coefficients: (layers, k), or a list with a vector (k,) for each layer.

    Returns:
        (layers, layers), symmetric.

    Example:
        >>> layer_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 1., 0.],
                [1., 1., 0.],
                [0., 0., 1.]])
    """
    rows = coefficients if isinstance(coefficients, Tensor) else torch.stack([*coefficients])
    unit = F.normalize(rows.detach(), dim=1, eps=torch.finfo(rows.dtype).tiny)
    return (unit @ unit.T).abs()


class TemplateBank(nn.Module):
    """Templates from which layers mix their weights.

    Args:
        templates: number of templates, k.
        shape: shape of each template and of the weights.

    Example:
        >>> tuple(TemplateBank(2, (8, 4, 3, 3)).templates.shape)
        (2, 288)

    Source: P. Savarese and M. Maire, Learning implicitly recurrent CNNs through parameter sharing, 2019.
    """

    def __init__(self, templates: int, shape: Sequence[int]) -> None:
        super().__init__()
        check_counts(templates=templates)
        if len(shape) < 2:
            raise ConfigurationError(f"templates need 2 dimensions or more, not {tuple(shape)}: leave vectors out")
        self.shape = (*shape,)  # not the parameter's: a memory format is for as many dimensions as a weight has
        self.templates = nn.Parameter(torch.empty(templates, math.prod(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each template by Kaiming's initialisation."""
        with redrawn(self):
            for template in self.templates.detach():
                nn.init.kaiming_normal_(template.view(self.shape))

    @override
    def forward(self, coefficients: Tensor) -> Tensor:
        return mix_templates(self.templates, coefficients).view(self.shape)

    @override
    def extra_repr(self) -> str:
        return f"templates={len(self.templates)}, shape={self.shape}"


class TemplateMixture(nn.Module):
    """The parametrization ``W = Σ_j α_j T_j`` with a bank that several weights share; see :func:`mix_templates`.

    Assigning a weight stores the nearest mixture. Weight decay should leave the coefficients out, as ``no_decay``
    declares: :func:`tying.weights.optimizers.decay_groups` returns parameter groups that do so.

    In-place writes to the weight are lost; see :func:`share_templates`.

    Args:
        bank: the templates.

    Raises:
        ConfigurationError: the weight does not have the templates' shape.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> bank = TemplateBank(2, (3, 3))
        >>> model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
        >>> for layer in model:
        ...     _ = register_parametrization(layer, "weight", TemplateMixture(bank))
        >>> sum(p.numel() for p in model.parameters())
        26
    """

    no_decay = True

    def __init__(self, bank: TemplateBank) -> None:
        super().__init__()
        self.bank = bank

    @override
    def forward(self, coefficients: Tensor) -> Tensor:
        mixture: Tensor = self.bank(coefficients)
        return mixture

    def describe(self) -> str:
        """Describe the weight for a report."""
        return f"a mixture of {len(self.bank.templates)} templates"

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the coefficients of the nearest mixture."""
        nearest = least_squares(self.bank.templates.detach().T, self._flattened(weight)[:, None])
        return nearest.flatten().to(weight.dtype)

    @staticmethod
    def joint_inverse(
        parts: "Sequence[tuple[TemplateMixture, nn.Parameter, Tensor]]",
    ) -> dict[nn.Parameter | nn.Module, Tensor]:
        """Return the templates and coefficients nearest to several weights of one bank; see :func:`nearest_mixtures`.

        Args:
            parts: for each weight, its parametrization, its coefficients, which others may share, and its values.
        """
        bank = parts[0][0].bank
        weights: dict[nn.Parameter, list[Tensor]] = {}  # by the coefficients
        for mixture, alpha, weight in parts:
            weights.setdefault(alpha, []).append(mixture._flattened(weight).double())
        roots = [len(shared) ** 0.5 for shared in weights.values()]  # weights that are one count as several
        means = [root * torch.stack(shared).mean(dim=0) for root, shared in zip(roots, weights.values(), strict=True)]
        templates, coefficients = nearest_mixtures(torch.stack(means), bank.templates.detach())
        rows = zip(weights, roots, coefficients, strict=True)
        return {bank.templates: templates, **{alpha: row / root for alpha, root, row in rows}}

    def _flattened(self, weight: Tensor) -> Tensor:
        if weight.shape != self.bank.shape:
            raise ConfigurationError(
                f"templates of shape {self.bank.shape} do not fit a weight of shape {tuple(weight.shape)}"
            )
        return weight.detach().flatten()

    def initial(self, weight: Tensor) -> Tensor:
        """Return the coefficients of a module that is reset: a random vector of length 1."""
        return F.normalize(weight.new_empty(len(self.bank.templates)).normal_(), dim=0)


def share_templates(model: nn.Module, parameters: Sequence[str], templates: int) -> dict[str, TemplateBank]:
    """Make weights of a model mixtures of a few templates; weights of equal shape share a bank.

    Coefficients are initialised as rows of a semi-orthogonal matrix, of length 1, so that weights have the variance of
    Kaiming's initialisation.

    In-place writes (``.data``, ``nn.init``, an adapter's merge) to a computed weight are lost: assign the weight, or
    load ``bake(model)`` into the untied model first.

    Args:
        model: changed in place.
        parameters: patterns of names; a leading ``!`` excludes.
        templates: number of templates in each bank.

    Returns:
        The bank of each weight, by name.

    Raises:
        ConfigurationError: a pattern matches nothing, or a weight cannot be a mixture. The model is not changed.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> len(share_templates(model, ["*.weight"], templates=2)), sum(p.numel() for p in model.parameters())
        (4, 168)
    """
    banks: dict[torch.Size, TemplateBank] = {}
    chosen: dict[str, TemplateBank] = {}

    def make(name: str, weight: nn.Parameter) -> TemplateMixture:
        if weight.shape not in banks:
            with torch.device("cpu"):  # not on the default device; then moved to the weight's
                banks[weight.shape] = TemplateBank(templates, weight.shape).to(weight)
        chosen[name] = banks[weight.shape]
        return TemplateMixture(chosen[name])

    parametrize_all(model, parameters, make, "share_templates")
    layers = mixtures(model)
    for bank in banks.values():
        coefficients = [layer.get_parameter("original") for layer, other in layers.values() if other is bank]
        rows = nn.init.orthogonal_(torch.empty(len(coefficients), templates, dtype=torch.float32, device="cpu"))
        with torch.no_grad():
            for alpha, row in zip(coefficients, rows, strict=True):
                alpha.copy_(row / row.norm())
    return chosen


def mixtures(model: nn.Module) -> dict[str, tuple[ParametrizationList, TemplateBank]]:
    """Return the weights of a model that are mixtures: by name, the holder of the coefficients, and the bank."""
    return {
        clean_name(f"{path}.original"): (module, module[0].bank)
        for path, module in model.named_modules()
        if isinstance(module, ParametrizationList) and len(module) == 1 and isinstance(module[0], TemplateMixture)
    }


def fold(model: nn.Module, threshold: float = 0.999) -> list[tuple[str, ...]]:
    """Let layers of one bank share one weight, like the steps of a loop, if their coefficients have the same direction.

    The cosine between the coefficients of two layers must be at least ``threshold``. Both then share the coefficients
    of the first layer as one parameter. A layer that was a positive multiple of the first loses its scale, which a
    following normalisation absorbs.

    Returns:
        The names of the weights of each loop.

    Example:
        >>> from torch.nn.utils.parametrize import register_parametrization
        >>> bank, model = TemplateBank(2, (3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> for layer in model:
        ...     _ = register_parametrization(layer, "weight", TemplateMixture(bank))
        ...     layer.parametrizations.weight.original.data = torch.tensor([1.0, 2.0])
        >>> fold(model)
        [('0.weight', '1.weight')]
    """
    layers = mixtures(model)
    loops: dict[str, list[str]] = {}  # by the name of the first layer

    for name, (layer, bank) in layers.items():
        alphas = {first: layers[first][0].original.detach() for first in loops if layers[first][1] is bank}
        cosines = {first: float(F.cosine_similarity(a, layer.original.detach(), dim=0)) for first, a in alphas.items()}
        first = next((first for first, cosine in cosines.items() if cosine >= threshold), name)
        layer.original = layers[first][0].original
        loops.setdefault(first, []).append(name)
    return [tuple(names) for names in loops.values() if len(names) > 1]


def plot_similarity(model: nn.Module, path: Path) -> None:
    """Write a PNG with the similarity matrix of the layers of each bank of a model.

    Raises:
        ConfigurationError: no weight is a mixture.
    """
    save_figure(similarity_figure(model), path)


def similarity_figure(model: nn.Module) -> "Figure":
    """Return a figure with the similarity matrix of the layers of each bank of a model.

    Raises:
        ConfigurationError: no weight is a mixture.
    """
    banks: dict[TemplateBank, list[tuple[str, Tensor]]] = {}
    for name, (layer, bank) in mixtures(model).items():
        banks.setdefault(bank, []).append((name, layer.get_parameter("original")))
    if not banks:
        raise ConfigurationError("no weight of the model is a mixture of templates")
    columns = min(2, len(banks))
    rows = math.ceil(len(banks) / columns)
    figure = new_figure(
        WIDTH if columns > 1 else 0.7 * WIDTH, 3.4 * rows, "Similarity of the layers that share a bank of templates"
    )
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for unused in panels[len(banks) :]:
        unused.set_axis_off()
    for axes, layers in zip(panels, banks.values(), strict=False):
        names, coefficients = zip(*layers, strict=True)
        image = axes.imshow(layer_similarity(coefficients).cpu().float().numpy(), vmin=0, vmax=1)
        axes.set(xlabel="number of the layer", ylabel="number of the layer")
        axes.set_title(f"{names[0]} …\n{names[-1]}", fontsize="small")
        axes.locator_params(integer=True)
    figure.colorbar(image, ax=panels, label="similarity (1: proportional, 0: orthogonal)")
    return figure
