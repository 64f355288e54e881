"""The processes that share a pruning: each sees a part of the calibration set, and each linear is solved once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from wanda_lightning.model.linears import PrunableLinear
from wanda_lightning.statistics import InputHessian, InputStatistic, sum_norms

Step = TypeVar("Step")


class Processes:
    """Those of ``torch.distributed``, started by Lightning, torchrun or anything else; without it this one alone.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.size = distributed.get_world_size() if together else 1

    @classmethod
    def alone(cls) -> "Processes":
        """Return this process alone, whatever others there are."""
        processes = cls()
        processes.rank, processes.size = 0, 1
        return processes

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, in one message."""
        if self.size > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            distributed.all_reduce(flat)
            for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def sum_to(self, owner: int, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, in one of them; in the others it is worth nothing then."""
        if self.size > 1:
            distributed.reduce(tensor, owner)

    def send(self, source: int, tensor: Tensor) -> Tensor:
        """Return the tensor that one process has, in all of them."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        distributed.broadcast(tensor, source)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return what each process has, by rank."""
        gathered = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(gathered, value)
        return gathered

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise in every process what one of them raises: the others would wait for it for ever."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        if found := [error for error in self.gather(failure) if error is not None]:
            # Of one kind in all processes, as who calls may go on after some kinds.
            raise failure if failure is not None and type(failure) is type(found[0]) else found[0]

    def first_together(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Take the first step in all processes, or in none: it reads the batches, and tries the model with them."""
        with self.together():
            first = next(steps)
        return chain([first], steps)


def share_statistics(
    statistics: dict[str, InputStatistic], linears: Sequence[PrunableLinear], processes: Processes
) -> dict[str, int]:
    """Add statistics up over all processes, and say who is to prune which linear.

    Norms are small: every process gets all of them, and prunes everything. Each Hessian goes to one process only, which
    solves the linears that share it; the work is balanced by its cost, about I^3 / 3 for the factor of I inputs and
    O I^2 for each weight with O outputs.

    Args:
        statistics: By linear name; replaced by their sums, where this process is the one that needs them. Those that
            have been added up before stay as they are.
        linears: The linears that the statistics are of.
        processes: All of them have the same linears, and the same ones share a statistic.

    Returns:
        The rank of the owner of each linear; empty if every process is to prune them all.
    """
    if processes.size == 1 or not statistics:
        return {}
    groups: dict[int, list[PrunableLinear]] = {}
    for linear in linears:
        if not statistics[linear.name].is_summed:
            groups.setdefault(id(statistics[linear.name]), []).append(linear)
    _sum([statistics[group[0].name] for group in groups.values()], [*groups.values()], processes)
    owners = {linear.name: statistics[linear.name].owner for linear in linears}
    return {name: owner for name, owner in owners.items() if owner is not None}


def _sum(statistics: list[InputStatistic], groups: list[list[PrunableLinear]], processes: Processes) -> None:
    """Add statistics up, each for the linears of a group."""
    if not statistics:
        return
    if not isinstance(statistics[0], InputHessian):
        sum_norms(statistics, processes.sum)
        return
    counts = torch.tensor([statistic.tokens for statistic in statistics], device=statistics[0].total.device)
    processes.sum([counts])
    owners = balanced([_cost(group) for group in groups], processes.size)
    for statistic, count, owner in zip(statistics, counts.tolist(), owners, strict=True):
        for tensor in statistic.sums:
            processes.sum_to(owner, tensor)
        statistic.summed(count, owner, processes.rank)


def _cost(linears: Sequence[PrunableLinear]) -> float:
    in_features = linears[0].weight_OI.shape[1]
    return in_features**3 / 3 + sum(linear.weight_OI.shape[0] for linear in linears) * in_features**2


def balanced(costs: Sequence[float], processes: int) -> list[int]:
    """Give the most costly piece of work first, each to the process that has the least so far."""
    load, owners = [0.0] * processes, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = load.index(min(load))
        load[owners[piece]] += costs[piece]
    return owners
