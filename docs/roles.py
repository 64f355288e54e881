"""What mkdocstrings calls for every docstring: names that are written as for Sphinx become links of the site."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites :func:`name` to a link of mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"[`\1`][\1]", obj.docstring.value)
