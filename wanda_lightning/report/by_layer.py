"""What a report says of each kind of linear in each layer; the experts of a mixture are one kind."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from wanda_lightning.model.names import list_of, number_of
from wanda_lightning.report.linear_report import LinearReport

if TYPE_CHECKING:
    from wanda_lightning.report.pruning_report import PruningReport

Values = list[float | None]


def by_kind(report: "PruningReport", value: Callable[[list[LinearReport]], float | None]) -> dict[str, Values]:
    """Compute a value for every kind of linear in every layer.

    Args:
        report: What a pruning did.
        value: Computes it from the rows of one kind and layer, as ``mean_error`` does.

    Returns:
        Values by kind, one a layer of :func:`layers`; None where nothing was pruned.
    """
    cells: dict[tuple[str, str], list[LinearReport]] = {}
    for row in report.linears:
        cells.setdefault((row.kind, row.layer), []).append(row)
    kinds = dict.fromkeys(row.kind for row in report.linears)
    names = layers(report)
    return {kind: [value(cells[kind, layer]) if (kind, layer) in cells else None for layer in names] for kind in kinds}


def layers(report: "PruningReport") -> list[str]:
    """List the names of the decoder layers, list by list and in order, those that were left dense too."""
    lists = [*dict.fromkeys(list_of(row.layer) for row in report.linears)]
    dense = [
        f"{each}.{name.removeprefix(f'{each}.').partition('.')[0]}"
        for each in filter(None, lists)
        for name in report.not_pruned
        if name.startswith(f"{each}.")
    ]
    names = dict.fromkeys([row.layer for row in report.linears] + dense)
    return sorted(names, key=lambda name: (lists.index(list_of(name)), -1 if (n := number_of(name)) is None else n))


def labels(report: "PruningReport") -> list[str]:
    """Say what tells the layers from each other: their numbers, or their names where they are of several lists."""
    names = layers(report)
    return names if len({*map(list_of, names)}) > 1 else [name.rpartition(".")[2] for name in names]
