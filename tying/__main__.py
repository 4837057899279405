"""``python -m tying``."""

from tying.cli import main

main()
