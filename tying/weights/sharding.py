"""Communication between processes."""

from typing import Any

import torch.distributed


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all processes, by rank; every process must call it.

    Example:
        >>> all_gather_object("here")
        ['here']
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
