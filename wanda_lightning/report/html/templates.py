"""The templates of pages: all are one file without scripts that needs no network."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from wanda_lightning.report.html.charts import breakable

_PAGES = Environment(
    loader=PackageLoader("wanda_lightning.report", "html"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_PAGES.filters["breakable"] = breakable


def render(template: str, settings: Mapping[str, Any], **values: Any) -> str:
    """Fill in a page.

    Args:
        template: File name of its template, which extends ``layout.html``.
        settings: What stands at its end, by name.
        **values: What the template names.

    Returns:
        The page, self-contained.
    """
    words = {name.replace("_", " "): str(value) for name, value in settings.items()}
    return _PAGES.get_template(template).render(values, settings=words).lstrip() + "\n"
