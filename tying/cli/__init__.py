"""The command line ``tying``."""

from tying.cli.main import TyingCLI, main, newest_checkpoint, parse

__all__ = ["TyingCLI", "main", "newest_checkpoint", "parse"]
