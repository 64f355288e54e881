"""The matrices of a layer that can be pruned: linears, the slices of fused experts, and those of packed attention.

Shapes: O out features, I in features, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from torch import Tensor, nn

from wanda_lightning.model.attention import PROJECTIONS, holds_packed_projections
from wanda_lightning.model.convolutions import is_conv2d
from wanda_lightning.model.names import is_router, matches
from wanda_lightning.model.one_matrix import is_one_matrix

THIN = 4
"""A linear with this few inputs or outputs computes gates and coefficients; pruned only when a target names it."""

# The 3-D parameters that transformers' fused experts have; those of the first kind see the hidden states.
EXPERT_INPUTS = ("gate_up_proj", "up_proj")
EXPERT_OUTPUT = "down_proj"


@dataclass(frozen=True)
class PrunableLinear:
    """One matrix of a decoder layer, seen as (out_features, in_features) whatever its module stores.

    Attributes:
        name: Its name in the model; a matrix of fused experts has the expert's number behind the parameter's name.
        module: The module that holds the weight.
        experts: Name of the list or module of experts it belongs to: tokens may pass it by. None outside of such.
        parameter: The attribute of the module that holds the weight.
        expert: Which slice of a 3-D weight it is; None for a whole weight.
        projection: Which projection of an ``nn.MultiheadAttention`` it is, in the order of query, key and value; None
            elsewhere.
        is_transposed: Whether the module stores it as (in_features, out_features).
    """

    name: str
    module: nn.Module
    experts: str | None = None
    parameter: str = "weight"
    expert: int | None = None
    projection: int | None = None
    is_transposed: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is stored; the experts of a 3-D weight share it."""
        return cast(nn.Parameter, getattr(self.module, self.parameter))

    @property
    def is_stored(self) -> bool:
        """Whether the weight is a parameter of the module, and not computed from others for every call."""
        return self.parameter in self.module._parameters

    @property
    def parameter_name(self) -> str:
        """The parameter's name in the model."""
        if self.projection is not None:
            return f"{self.name.rpartition('.')[0]}.{self.parameter}"
        return f"{self.name}.weight" if self.expert is None else self.name.rpartition(".")[0]

    @property
    def weight_OI(self) -> Tensor:
        """A view of the weight, shape (out_features, in_features): writing to it changes the module."""
        return self.view(self.weight.detach())

    def view(self, weight: Tensor) -> Tensor:
        """See a tensor that is laid out as the module stores its weight as this matrix, (out_features, in_features)."""
        if self.projection is not None:
            return weight.unflatten(0, (3, -1))[self.projection] if self.parameter == "in_proj_weight" else weight
        matrix = weight.flatten(1) if self.expert is None else weight[self.expert]
        return matrix.t() if self.is_transposed else matrix

    @property
    def may_be_passed_by(self) -> bool:
        """Whether it is in a list of modules, such as experts, and a router may decide which of them are called."""
        return self.experts is not None and self.expert is None

    @property
    def is_router(self) -> bool:
        """Whether the linear chooses experts rather than transforming hidden states."""
        return is_router(self.name)

    @property
    def is_thin(self) -> bool:
        """Whether the matrix has hardly any rows or columns; what is packed into integers only looks so."""
        return min(self.weight_OI.shape) <= THIN and self.weight.is_floating_point()

    def matches(self, pattern: str) -> bool:
        """Whether a shell-style pattern fits the name."""
        return matches(self.name, pattern)


def own_modules(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all it holds by name, as ``named_modules`` does, but look through wrappers.

    A module that torch.compile wraps keeps the name it had before. If a layer has adapters (peft), only the layer
    itself is visited: the matrices of an adapter are small, and they are trained.
    """
    seen = set() if seen is None else seen
    children = module._modules
    if "_orig_mod" in children:
        yield from own_modules(cast(nn.Module, children["_orig_mod"]), name, seen)
    elif module not in seen:
        seen.add(module)
        yield name, module
        inside = {"base_layer": children["base_layer"]} if "base_layer" in children else children
        for child_name, child in inside.items():
            if child is not None:
                yield from own_modules(child, f"{name}.{child_name}" if name else child_name, seen)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module, each once, without those of adapters."""
    return [*dict.fromkeys(p for _, part in own_modules(module) for p in part.parameters(recurse=False))]


def prunable_linears(layer: nn.Module, prefix: str) -> list[PrunableLinear]:
    """List every ``nn.Linear``, ``transformers.Conv1D``, ``Conv2d``, expert and attention matrix of a layer."""
    linears = []
    lists: list[str] = []  # of modules within the layer, such as experts that are modules of their own
    for name, module in own_modules(layer, prefix):
        experts = next((outer for outer in lists if name.startswith(f"{outer}.")), None)
        if experts is None and _holds_layers_alike(module):
            lists.append(name)
        elif is_linear(module):
            linears.append(PrunableLinear(name, module, experts, is_transposed=_is_conv1d(module)))
        elif (transposed := _experts_are_transposed(module)) is not None:
            for parameter in (*EXPERT_INPUTS, EXPERT_OUTPUT):
                weight = getattr(module, parameter, None)
                linears += [
                    PrunableLinear(
                        f"{name}.{parameter}.{expert}", module, name, parameter, expert, is_transposed=transposed
                    )
                    for expert in range(0 if weight is None else len(weight))
                ]
        elif holds_packed_projections(module):
            packed = module.in_proj_weight is not None
            linears += [
                PrunableLinear(
                    f"{name}.{projection}", module, experts, "in_proj_weight" if packed else f"{projection}_weight",
                    projection=number,
                )
                for number, projection in enumerate(PROJECTIONS)
            ]  # fmt: skip
    return linears


def matrix_parameters(layer: nn.Module, prefix: str) -> dict[nn.Parameter, str]:
    """Return the names of a layer's parameters with two or more dimensions, without biases and adapters."""
    return {
        parameter: f"{name}.{parameter_name}"
        for name, module in own_modules(layer, prefix)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and not parameter_name.endswith("bias")
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear``, a ``transformers.Conv1D`` or a ``Conv2d`` that can be seen as one matrix.

    One of no weights is none.
    """
    if isinstance(module, nn.Linear):
        return min(module.in_features, module.out_features) > 0 and is_one_matrix(module)
    return _is_conv1d(module) or is_conv2d(module)


def _experts_are_transposed(module: nn.Module) -> bool | None:
    """Whether the many experts that a module holds as 3-D parameters are (in, out) each; None if it holds none.

    The modules of transformers' experts interface say so themselves. Of others the shapes tell: gate and up in one
    matrix have twice as many outputs as the matrix behind them has inputs.
    """
    down, both = getattr(module, EXPERT_OUTPUT, None), getattr(module, EXPERT_INPUTS[0], None)
    if not _is_of_experts(down):
        return None
    if in_experts_interface(module):
        return bool(module.is_transposed)
    if not _is_of_experts(both):
        return None
    rows, columns = both.shape[1:]
    return {(columns // 2, rows): True, (columns, rows // 2): False}.get((*down.shape[1:],))


def in_experts_interface(module: nn.Module) -> bool:
    """Whether fused experts are called as ``experts(hidden_states, top_k_index, top_k_weights)``."""
    return hasattr(module, "is_transposed")


def _is_of_experts(weight: Any) -> TypeGuard[nn.Parameter]:
    return isinstance(weight, nn.Parameter) and weight.dim() == 3


def _holds_layers_alike(module: nn.Module) -> bool:
    """Whether a module is a list, or a dictionary, of modules that tokens may pass by, such as experts.

    The parts of a layer may be in one, too: each is of a class of its own, and in a dictionary a linear by itself.
    """
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    parts = [*module.children()]
    if isinstance(module, nn.ModuleDict) and any(map(is_linear, parts)):
        return False
    return not 1 < len(module) == len({type(part) for part in parts})


def _is_conv1d(module: nn.Module) -> bool:
    # transformers.pytorch_utils.Conv1D (GPT-2), recognised without importing transformers; its weight is (in, out).
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
