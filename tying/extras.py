"""Optional packages: those that an extra of this package installs."""

from collections.abc import Iterator
from contextlib import contextmanager

from tying.errors import ConfigurationError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import an optional package, or name the extra that installs it.

    Args:
        name: name of the extra.

    Raises:
        ConfigurationError: the package is not installed, or its installation is broken.

    Example:
        >>> with extra("plots"):
        ...     import absent
        Traceback (most recent call last):
        tying.errors.ConfigurationError: absent is not installed: pip install 'tying[plots]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is not installed: pip install 'tying[{name}]'") from None
    except ImportError as error:
        raise ConfigurationError(
            f"a package of tying[{name}] is broken: {error}: pip install --force-reinstall 'tying[{name}]'"
        ) from None
