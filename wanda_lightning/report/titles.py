"""What a method is called in titles: by its name, and by the settings that are not the usual ones."""

import re

USUAL = {
    "ADMM": "steps=40, rho=1.0, damping=0.01, refine=10",
    "ATP": "beta=None",
    "Ablate": "selection='wanda', schedule='sequential', block_size=128, damping=0.01",
    "LeastLoss": "choices=None, step=0.05, rounds=4, sequences=8, reach=None",
    "Magnitude": "",
    "OWL": "factor=5.0, spread=0.08",
    "RIA": "power=0.5",
    "SparseGPT": "block_size=128, damping=0.01",
    "Wanda": "variant=False",
}
"""The settings that our methods and allocations have by default, as they are written."""


def title_of(method: str) -> str:
    """Shorten a method, as reports and journals write it, for titles.

    Args:
        method: Such as ``Wanda(variant=False)``; other words around it stay.

    Returns:
        Without the settings that are the default ones.

    Example:
        >>> title_of("Wanda(variant=False)"), title_of("SparseGPT(block_size=64, damping=0.01)")
        ('Wanda', 'SparseGPT(block_size=64)')
    """
    return re.sub(r"\b(\w+)\((.*?)\)", _shortened, method)


def _shortened(found: re.Match[str]) -> str:
    name, settings = found.groups()
    if name not in USUAL:
        return found[0]
    others = [setting for setting in settings.split(", ") if setting not in USUAL[name].split(", ")]
    return f"{name}({', '.join(others)})" if others else name
