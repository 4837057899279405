"""Load the weights of another training run into a new model."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from tying.errors import ConfigurationError, listed, nearest
from tying.files import saved_weights
from tying.selection.index import clean_name, covers
from tying.selection.patterns import Pattern


def load_pretrained(model: nn.Module, path: str | Path, fresh: Sequence[str] = ()) -> list[str]:
    """Load the weights and buffers of a model from a checkpoint, by name; return their names.

    Args:
        model: changed in place.
        path: a Lightning checkpoint, or a file with a state dict; tensors that the model lacks are ignored.
        fresh: patterns of parameters, buffers or modules that are not loaded, such as a new head.

    Raises:
        ConfigurationError: the file is missing or of another kind; a pattern matches nothing; a tensor is missing from
            the file or has another shape there. The model is not changed.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(nn.Linear(2, 3).state_dict(), f"{folder}/one.pt")
        ...     load_pretrained(nn.Linear(2, 3), f"{folder}/one.pt", fresh=["bias"])
        ['weight']
    """
    state = model.state_dict()
    current = {clean_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    patterns = [Pattern(text) for text in fresh]
    if idle := [pattern.text for pattern in patterns if not any(covers(pattern, name) for name in current)]:
        raise ConfigurationError(f"fresh: {idle[0]!r} matches nothing.{nearest(idle[0], current)}")
    wanted = {name: value for name, value in current.items() if not any(covers(pattern, name) for pattern in patterns)}
    saved = saved_weights(path, "pretrained")
    if missing := [name for name in wanted if name not in saved]:
        raise ConfigurationError(
            f"pretrained: {path} lacks {listed(missing)}: list in fresh what shall not be loaded."
            f"{nearest(missing[0], saved)}"
        )
    if wrong := [
        f"{name!r} is {tuple(saved[name].shape)} there and {tuple(value.shape)} here"
        for name, value in wanted.items()
        if saved[name].shape != value.shape
    ]:
        raise ConfigurationError(f"pretrained: {path}: {listed(wrong)}: list in fresh what shall not be loaded")
    model.load_state_dict({name: saved[clean_name(name)] for name in state if clean_name(name) in wanted}, strict=False)
    return [*wanted]
