"""Show the docstrings' doctests as code, and their references as links, on the page of the API.

The docstrings write both as Sphinx reads them: an ``Example:`` section, which Griffe takes for prose, and roles such as
``:func:`tying.tie```, which Markdown does not know.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|meth|class|attr|data|mod|exc):`([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrite each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Name the sections of examples as Griffe does, and link what a role names where the page has it."""
        if not obj.docstring:
            return

        def link(role: re.Match[str]) -> str:
            try:
                target = obj.resolve(role[1])
            except griffe.NameResolutionError:  # a full name, or one of another package
                target = role[1]
            return f'<autoref optional identifier="{target}"><code>{role[1]}</code></autoref>'

        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = ROLE.sub(link, text)
