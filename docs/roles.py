"""What mkdocstrings calls for every docstring: names that are written as for Sphinx become links of the site."""

import re
from typing import Any

import griffe

LINKED = re.compile(r":(?:func|class|meth):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^Example::$", re.MULTILINE)
NAMED = re.compile(r":attr:(`[\w.]+`)")  # attributes are listed in their class's docstring and have no anchor


class Roles(griffe.Extension):
    """Rewrites the roles of Sphinx for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            linked = NAMED.sub(r"\1", LINKED.sub(r"[`\1`][\1]", obj.docstring.value))
            obj.docstring.value = EXAMPLE.sub("**Example:**", linked)
