import pytest
import torch
from brute_force import brute_force

from wanda_lightning.methods import Ablate, Magnitude, Wanda
from wanda_lightning.solvers import prune_with_mask
from wanda_lightning.sparsity import SemiStructured, Unstructured, parse_pattern
from wanda_lightning.statistics import InputHessian, InputNorm

VARIANTS = [(selection, schedule) for selection in ("wanda", "magnitude") for schedule in ("sequential", "iterative")]
PATTERNS = [Unstructured(0.5), Unstructured(0.7), SemiStructured(2, 4), SemiStructured(4, 8)]


def layer(dead: tuple[int, ...] = ()) -> tuple[torch.Tensor, InputHessian, InputNorm]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 40, generator=generator)
    x, weight = torch.randn(200, 40, generator=generator) @ mixing, torch.randn(12, 40, generator=generator)
    x[:, list(dead)] = 0
    hessian, norm = InputHessian(40), InputNorm(40)
    hessian.update(x)
    norm.update(x)
    return weight, hessian, norm


@pytest.mark.parametrize(("selection", "schedule"), VARIANTS)
@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "4:8"])
def test_golden_vectors_of_the_reference(golden, selection, schedule, pattern):
    name = f"ablate_{'mag' if selection == 'magnitude' else selection}_{schedule[: 3 if schedule[0] == 's' else 4]}"
    expected = golden[f"case1.{name}.weight.{pattern}.block128"]
    hessian = InputHessian(96)
    hessian.update(golden["case1.inputs"])
    weight = golden["case1.weight"].clone()
    asked = parse_pattern(pattern) if ":" in pattern else Unstructured(float(pattern))
    mask = Ablate(selection, schedule).prune(weight, hessian, asked)
    agreement = (mask == (expected != 0)).double().mean()
    assert agreement == 1 if ":" in pattern else agreement >= 0.99
    if agreement == 1:
        assert (weight - expected).norm() < 1e-4 * expected.norm()
    given = golden["case1.weight"].clone()
    prune_with_mask(given, hessian.factor(), expected != 0)
    assert (given - expected).norm() < 1e-4 * expected.norm()


def lowest(score: torch.Tensor, pattern, whole: bool) -> torch.Tensor:
    """Mark (True) what a pattern removes, by sorting in Python: of each row, or of the whole matrix."""
    removed = torch.zeros_like(score, dtype=torch.bool)
    rows, columns = score.shape
    if isinstance(pattern, SemiStructured):
        count = pattern.m - pattern.n
        groups = [[(i, j + k) for k in range(pattern.m)] for i in range(rows) for j in range(0, columns, pattern.m)]
    else:
        groups = [[(i, j) for j in range(columns)] for i in range(rows)]
        groups = [[place for group in groups for place in group]] if whole else groups
        count = int(pattern.sparsity * len(groups[0]))
    for group in groups:
        for place in sorted(group, key=lambda place: float(score[place]))[:count]:
            removed[place] = True
    return removed


@pytest.mark.parametrize(("selection", "schedule"), VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "dead inputs"])
def test_equals_brute_force_in_float64(selection, schedule, pattern, block_size, kind):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 72, generator=generator) @ torch.randn(72, 72, generator=generator)
    stored = torch.randn(72, 4, generator=generator).double()
    weight = stored.t() if kind == "Conv1D" else stored.t().contiguous()
    if kind == "dead inputs":
        x[:, [0, 5, 40]] = 0
    x = x.double()
    hessian = InputHessian(72, dtype=torch.float64)
    hessian.update(x)
    importance = x.norm(dim=0) if selection == "wanda" else (x != 0).any(0).double()
    group = pattern.m if isinstance(pattern, SemiStructured) else block_size

    def choose(w, _, j):
        if schedule == "sequential":
            return (0, 72, lowest(w.abs() * importance, pattern, selection == "magnitude")) if j == 0 else None
        near = slice(j, min(j + group, 72))
        return None if j % group else (j, near.stop, lowest((w.abs() * importance)[:, near], pattern, True))

    expected, expected_mask = brute_force(weight, x.t() @ x, choose)
    mask = Ablate(selection, schedule, block_size).prune(weight, hessian, pattern)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sequential_masks_are_those_of_the_methods_without_updates(pattern):
    weight, hessian, norm = layer()
    for selection, method, statistic in (("wanda", Wanda(), norm), ("magnitude", Magnitude(), None)):
        expected = method.prune(weight.clone(), statistic, pattern)
        updated = weight.clone()
        assert torch.equal(Ablate(selection, block_size=16).prune(updated, hessian, pattern), expected)
        assert not torch.equal(updated, weight * expected)
        assert hessian.output_energy(updated - weight).sum() < hessian.output_energy(weight * expected - weight).sum()


@pytest.mark.parametrize(("selection", "schedule"), VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_are_exact_and_dead_inputs_go_first(selection, schedule, pattern):
    dead = (0, 1, 7)
    weight, hessian, _ = layer(dead)
    method = Ablate(selection, schedule, block_size=16)
    mask = method.prune(weight, hessian, pattern)
    pattern.check_mask(mask, method.tolerance((12, 40)))
    assert weight.isfinite().all()
    assert not weight[~mask].any()
    assert not mask[:, dead].any()


@pytest.mark.parametrize(("selection", "schedule"), VARIANTS)
def test_zero_sparsity_changes_nothing(selection, schedule):
    weight, hessian, _ = layer()
    before = weight.clone()
    assert Ablate(selection, schedule).prune(weight, hessian, Unstructured(0.0)).all()
    assert torch.equal(weight, before)


def test_iterative_sees_updated_weights():
    weight, hessian, _ = layer()
    masks = [
        Ablate("wanda", s, block_size=8).prune(weight.clone(), hessian, SemiStructured(2, 4))
        for s in ("sequential", "iterative")
    ]
    assert torch.equal(masks[0][:, :4], masks[1][:, :4])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_transposed_weights(dtype):
    weight, hessian, _ = layer()
    stored = weight.t().contiguous().to(dtype)
    mask = Ablate().prune(stored.t(), hessian, SemiStructured(2, 4))
    assert torch.equal(stored.t() != 0, mask)


def test_tolerance():
    assert Ablate("wanda", "sequential").tolerance((10, 40)) == 1 / 40
    assert Ablate("magnitude", "sequential").tolerance((10, 40)) == 1 / 400
    assert Ablate("wanda", "iterative", block_size=16).tolerance((10, 40)) == 3 / 400


@pytest.mark.parametrize(("setting", "value"), [("selection", "sparsegpt"), ("schedule", "seq"), ("selection", None)])
def test_bad_names(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be one of .*, got {value!r}"):
        Ablate(**{setting: value})


@pytest.mark.parametrize("settings", [{"block_size": 0}, {"damping": 0.0}])
def test_bad_numbers(settings):
    with pytest.raises(ValueError, match="must be"):
        Ablate(**settings)


def test_blocks_must_hold_whole_groups():
    with pytest.raises(ValueError, match="multiple of 8"):
        Ablate(block_size=12).check(SemiStructured(4, 8))


def test_prints_its_settings():
    assert str(Ablate()) == "Ablate(selection='wanda', schedule='sequential', block_size=128, damping=0.01)"
