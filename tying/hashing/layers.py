"""Linear, convolution and embedding layers whose weights share the slots of a table."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from tying.errors import ConfigurationError
from tying.hashing.fast_paths import RepeatedRows, Size, repeat_to
from tying.hashing.hashes import CodebookHash, Hash, UniformHash
from tying.hashing.parametrization import HashedParametrization, Index, table_slots
from tying.torch_workarounds import convolve, is_proxy
from tying.weights.derived import as_assigned, computed_property, install, redrawn

Device = torch.device | str | None


class Hashed(nn.Module):
    """Base class of layers whose ``weight`` is computed from a table; assigning a weight stores the nearest table.

    Attributes:
        table: the parameter, (ceil(table_ratio · N),) for N weights.
        virtual: the map from the table to the weight.
    """

    computes: ClassVar[dict[str, tuple[str, str]]] = {"weight": ("table", "virtual")}
    table: nn.Parameter
    virtual: HashedParametrization
    weight = computed_property("table", "virtual")

    def _become(
        self,
        dense: nn.Linear | nn.Conv2d | nn.Embedding,
        ratio: float | None,
        device: Device,
        dtype: torch.dtype | None,
        **options: Any,
    ) -> None:
        """Initialise the layer with the attributes of a dense layer, and a table instead of its weight.

        Args:
            dense: the layer, on the meta device.
            ratio: number of slots over the number of weights.
            device: device of table and bias.
            dtype: dtype of table and bias.
            options: arguments of :class:`HashedParametrization`.
        """
        nn.Module.__init__(self)
        if not (dtype or torch.get_default_dtype()).is_floating_point:
            raise ConfigurationError(f"{type(self).__name__}: dtype must be real and floating-point, not {dtype}")
        shape = dense.weight.shape
        size = table_slots(shape.numel(), ratio, options["hash"])
        self.__dict__.update(dense.__dict__)
        virtual = HashedParametrization(shape, size, **options | embedding_options(dense, "weight", options["index"]))
        install(self, "weight", virtual, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        if getattr(self, "bias", None) is not None:
            self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)))
        self.reset_parameters()

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, as_assigned(self, name, value))

    def reset_parameters(self) -> None:
        """Initialise the table and the bias like the weight and the bias of the dense layer."""
        bound = 1 / math.sqrt(self.virtual.shape[1:].numel())
        limit = bound / self.virtual.scale
        self._draw(lambda values: nn.init.uniform_(values, -limit, limit))
        if isinstance(bias := getattr(self, "bias", None), Tensor):
            nn.init.uniform_(bias, -bound, bound)

    @torch.no_grad()
    def _draw(self, draw: Callable[[Tensor], Tensor]) -> None:
        """Draw the slots of the table; or, of a codebook, as many as the weight has, whose quantiles it gets."""
        with redrawn(self):
            if isinstance(self.virtual.hash, CodebookHash):
                self.table.copy_(self.virtual.drawn_from(draw(self.table.new_empty(self.virtual.shape.numel()))))
            else:
                draw(self.table)


class HashedLinear(Hashed, nn.Linear):
    """A linear layer whose weights share the slots of a table: ``y = x Wᵀ + b``, ``w_i = ξ(i) · t[h(i)]``.

    In-place writes to ``weight`` are lost; see :func:`tying.hashing.hash_weights`.

    Args:
        in_features: size of an input.
        out_features: size of an output.
        bias: add a bias, which is not hashed.
        table_ratio: number of slots over the number of weights, in (0, 1]; default: what the hash requires,
            or 0.1.
        hash: h.
        sign: multiply by ξ = ±1, as HashedNets do.
        density: fraction of connections that are kept; it does not change the table's size.
        index: ``"stored"`` (4 bytes per weight), ``"computed"`` at each read, ``"structured"`` (without an index; for
            modulus, Toeplitz and block hashes), or ``"auto"``.
        device: device of table and bias.
        dtype: dtype of table and bias.

    Shape: (..., in_features) to (..., out_features).

    Raises:
        ConfigurationError: the ratio, the density or the index is out of range, or the hash does not fit.

    Example:
        >>> layer = HashedLinear(2000, 2000, table_ratio=0.1)
        >>> layer.table.shape, layer.weight.shape, layer(torch.zeros(5, 2000)).shape
        (torch.Size([400000]), torch.Size([2000, 2000]), torch.Size([5, 2000]))

    Source: W. Chen et al., Compressing neural networks with the hashing trick, 2015; O. Chang and H. Lipson, Balanced
    and deterministic weight-sharing helps network performance, 2018.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        table_ratio: float | None = None,
        hash: Hash = UniformHash(),  # noqa: B008  # frozen
        sign: bool = False,
        density: float = 1.0,
        index: Index = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._become(
            nn.Linear(in_features, out_features, bias, device="meta"),
            table_ratio,
            device,
            dtype,
            hash=hash,
            sign=sign,
            density=density,
            index=index,
        )

    @override
    def forward(self, input: Tensor) -> Tensor:
        virtual = self.virtual
        if virtual.fast_path is not None and not is_proxy(input):
            if input.shape[-1] != self.in_features:
                raise ConfigurationError(f"this layer takes {self.in_features} features, not {input.shape[-1]}")
            return virtual.fast_path.linear(input, virtual.scaled(self.table), self.bias)
        if (seed := virtual.fusible_seed(self.table)) is not None:
            from tying.hashing.kernels import fused_linear

            output = fused_linear(input, virtual.scaled(self.table), self.out_features, virtual.first, seed)
            return output if self.bias is None else output + self.bias.to(output.dtype)
        return F.linear(input, self.weight, self.bias)


class HashedConv2d(Hashed, nn.Conv2d):
    """A convolution whose weights share the slots of a table; see :class:`HashedLinear`.

    In-place writes to ``weight`` are lost; see :func:`tying.hashing.hash_weights`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel.
        stride: as in nn.Conv2d.
        padding: as in nn.Conv2d.
        dilation: as in nn.Conv2d.
        groups: as in nn.Conv2d.
        bias: add a bias, which is not hashed.
        padding_mode: as in nn.Conv2d.
        table_ratio: number of slots over the number of weights.
        hash: h.
        sign: multiply by ±1.
        density: fraction of connections that are kept.
        index: as in :class:`HashedLinear`.
        device: device of table and bias.
        dtype: dtype of table and bias.

    Shape: (batch, in_channels, height, width) to (batch, out_channels, height, width).

    Example:
        >>> HashedConv2d(3, 8, 3, padding=1, table_ratio=0.25)(torch.zeros(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        table_ratio: float | None = None,
        hash: Hash = UniformHash(),  # noqa: B008  # frozen
        sign: bool = False,
        density: float = 1.0,
        index: Index = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta")
        self._become(
            nn.Conv2d(in_channels, out_channels, *geometry),
            table_ratio,
            device,
            dtype,
            hash=hash,
            sign=sign,
            density=density,
            index=index,
        )

    @override
    def forward(self, input: Tensor) -> Tensor:
        fast_path = self.virtual.fast_path
        if not isinstance(fast_path, RepeatedRows) or self.groups > 1 or is_proxy(input):
            return convolve(self, input, self.weight, self.bias)
        kernels = fast_path.rows(self.virtual.scaled(self.table)).view(-1, *fast_path.shape[1:])
        return repeat_to(convolve(self, input, kernels, None), self.out_channels, -3, self.bias)


class HashedEmbedding(Hashed, nn.Embedding):
    """An embedding whose rows share the slots of a table; only the rows that are looked up are computed.

    In-place writes to ``weight`` are lost; see :func:`tying.hashing.hash_weights`.

    Args:
        num_embeddings: number of rows.
        embedding_dim: size of a row.
        padding_idx: index of a row that is zero and has no gradient.
        table_ratio: number of slots over the number of weights.
        hash: h.
        sign: multiply by ±1.
        density: fraction of weights that are kept.
        index: as in :class:`HashedLinear`; ``"auto"`` is ``"computed"``.
        device: device of the table.
        dtype: dtype of the table.

    Shape: integers (...) to (..., embedding_dim).

    Example:
        >>> from tying.hashing import BlockHash
        >>> layer = HashedEmbedding(1_000_000, 64, table_ratio=1e-3, hash=BlockHash(block=32))
        >>> layer.table.shape, layer(torch.tensor([[3, 999_999]])).shape
        (torch.Size([64000]), torch.Size([1, 2, 64]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        table_ratio: float | None = None,
        hash: Hash = UniformHash(),  # noqa: B008  # frozen
        sign: bool = False,
        density: float = 1.0,
        index: Index = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._become(
            nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta"),
            table_ratio,
            device,
            dtype,
            hash=hash,
            sign=sign,
            density=density,
            index=index,
        )

    @override
    def reset_parameters(self) -> None:
        self._draw(lambda values: nn.init.normal_(values, std=1 / self.virtual.scale))

    @override
    def forward(self, input: Tensor) -> Tensor:
        if is_proxy(input):
            return F.embedding(input, self.weight)
        return self.virtual.rows(self.table, input)


def embedding_options(module: nn.Module, attribute: str, index: Index) -> dict[str, Any]:
    """Return the arguments of :class:`HashedParametrization` that the weight of an embedding needs.

    An ``nn.Embedding`` computes only the rows that it looks up, so it stores no index. Other weights need no arguments.
    """
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or attribute != "weight":
        return {}
    return {
        "index": "computed" if index == "auto" and type(module) is nn.Embedding else index,
        "zero_row": module.padding_idx,
    }
