import math

import pytest
import torch

from wanda_lightning.sparsity import (
    SemiStructured,
    Unstructured,
    as_pattern,
    max_kept_per_group,
    parse_pattern,
    sparsity_of,
    zero_where_pruned,
)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("width", [1, 3, 64, 100])
def test_unstructured_prunes_the_lowest_of_every_row(sparsity, width):
    score = torch.rand(7, width, generator=torch.Generator().manual_seed(0))
    mask = Unstructured(sparsity).mask(score)
    count = math.floor(sparsity * width)
    assert mask.dtype == torch.bool
    for scores, kept in zip(score.tolist(), mask.tolist(), strict=True):
        pruned = sorted(range(width), key=lambda i: scores[i])[:count]
        assert [not k for k in kept] == [i in pruned for i in range(width)]


@pytest.mark.parametrize("weights", [7, 100, 576, 4096, 24576, 11008 * 4096])
def test_a_fraction_of_whole_numbers_prunes_whole_numbers(weights):
    for asked in {*range(min(weights, 4097)), *range(0, weights, weights // 7)}:
        for sparsity in (asked / weights, math.nextafter(asked / weights, 0)):
            assert Unstructured(sparsity).count(weights) == asked
        assert Unstructured((asked + 0.99) / weights).count(weights) == asked
        assert Unstructured(asked / weights).count(weights * 576) == asked * 576  # of a whole matrix, as ADMM has it


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 5), (1, 2)])
def test_semi_structured_keeps_the_n_highest_of_every_m(n, m):
    score = torch.rand(6, 4 * m, generator=torch.Generator().manual_seed(0))
    mask = SemiStructured(n, m).mask(score)
    for scores, kept in zip(score.view(-1, m).tolist(), mask.view(-1, m).tolist(), strict=True):
        highest = sorted(range(m), key=lambda i: -scores[i])[:n]
        assert kept == [i in highest for i in range(m)]
    SemiStructured(n, m).check_mask(mask)
    assert sparsity_of(mask) == pytest.approx(1 - n / m)


def test_ties_are_broken_by_position():
    assert Unstructured(0.5).mask(torch.zeros(2, 4)).tolist() == [[False, False, True, True]] * 2
    assert SemiStructured(1, 4).mask(torch.ones(1, 8)).tolist() == [[False, False, False, True] * 2]
    # Many equal scores at a threshold, as bfloat16 weights give: the count is exact all the same.
    score = torch.randint(0, 3, (5, 1000), generator=torch.Generator().manual_seed(0)).float()
    mask = Unstructured(0.5).mask(score)
    assert mask.sum(1).tolist() == [500] * 5
    for scores, kept in zip(score.tolist(), mask.tolist(), strict=True):
        order = sorted(range(1000), key=lambda i: (scores[i], i))
        assert {i for i in range(1000) if not kept[i]} == set(order[:500])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_pruned_is_plus_0_and_what_is_kept_stays_as_it_was(dtype):
    weight = torch.tensor([-1.5, 2.0, -0.0, math.nan, -math.inf, 3.0], dtype=dtype)
    mask = torch.tensor([False, True, False, False, False, True])
    by_hand = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    zero_where_pruned(weight, mask)
    assert weight.tolist() == by_hand.tolist()
    assert not weight.signbit().any()


@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_of_any_sign_are_sorted(low, rows, dtype):
    torch.manual_seed(0)
    score = (low + torch.stack([torch.randperm(300) for _ in range(rows)])).to(dtype)
    score[:, 7] = torch.inf
    mask = Unstructured(0.4).mask(score)
    for scores, kept in zip(score.tolist(), mask.tolist(), strict=True):
        assert {i for i in range(300) if not kept[i]} == {*sorted(range(300), key=lambda i: scores[i])[:120]}


@pytest.mark.parametrize("shape", [(5, 40), (1, 400), (7, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_scores_go_where_only_deterministic_operators_are_allowed(monkeypatch, shape, dtype):
    """On CUDA kthvalue is none of them, whatever its indices are used for."""
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = Unstructured(0.5).mask(score)
    monkeypatch.setattr(torch.Tensor, "kthvalue", None, raising=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(Unstructured(0.5).mask(score), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_checks_find_a_wrong_mask():
    mask = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"sparsity 0\.0 is not 0\.5 \+- 0\.1"):
        Unstructured(0.5).check_mask(mask, tolerance=0.1)
    mask[:, :4] = False  # half is pruned, but not two of every four
    Unstructured(0.5).check_mask(mask, tolerance=0.0)
    with pytest.raises(ValueError, match="a group of 4 does not keep exactly 2"):
        SemiStructured(2, 4).check_mask(mask)


def test_a_single_group_that_is_wrong_is_found():
    mask = torch.tensor([[True, False, False, True], [True, False, True, True], [False, True, True, False]])
    with pytest.raises(ValueError, match="a group of 4 does not keep exactly 2"):
        SemiStructured(2, 4).check_mask(mask)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.5, float("nan"), float("inf"), "0.5", True, None])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\)"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (2.0, 4), (True, 4)])
def test_impossible_semi_structured(n, m):
    with pytest.raises(ValueError, match="1 <= n < m"):
        SemiStructured(n, m)


def test_in_features_must_divide():
    SemiStructured(2, 4).check_in_features(64, "q_proj")
    Unstructured(0.5).check_in_features(63, "q_proj")
    with pytest.raises(ValueError, match=r"q_proj has 63 input features.*multiple of 4"):
        SemiStructured(2, 4).check_in_features(63, "q_proj")


def test_parse_pattern():
    assert parse_pattern("unstructured") == Unstructured(0.5)
    assert parse_pattern("unstructured", 0.7) == Unstructured(0.7)
    assert parse_pattern("2:4") == parse_pattern("2:4", 0.5) == SemiStructured(2, 4)
    assert parse_pattern("1:4") == SemiStructured(1, 4)
    assert parse_pattern("1:4").sparsity == 0.75
    for pattern in ("2:4", "4:8", "unstructured"):
        assert str(parse_pattern(pattern)) == pattern


@pytest.mark.parametrize("m", range(2, 17))
def test_an_n_of_m_pattern_agrees_with_its_own_sparsity(m):
    for n in range(1, m):
        for sparsity in ((m - n) / m, 1 - n / m):
            assert parse_pattern(f"{n}:{m}", sparsity) == SemiStructured(n, m)


def test_parse_pattern_refuses_a_contradiction():
    with pytest.raises(ValueError, match=r"2:4.*sparsity of 0\.5, got sparsity=0\.7"):
        parse_pattern("2:4", 0.7)


@pytest.mark.parametrize("pattern", ["2-4", "half", "", "2:", ":4", "a:b", "2:4:8", None, 0.5])
def test_parse_pattern_refuses_what_it_cannot_read(pattern):
    with pytest.raises(ValueError, match='"unstructured" or "n:m"'):
        parse_pattern(pattern)


@pytest.mark.parametrize(("number", "meant"), [(124, "2:4"), ("124", "2:4"), (248, "4:8"), (64, "1:4")])
def test_an_unquoted_pattern_in_yaml_is_explained(number, meant):
    with pytest.raises(ValueError, match=f'write pattern: "{meant}"'):
        parse_pattern(number)


def test_most_kept_in_a_group():
    mask = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 0, 0, 0]]).bool()
    assert [max_kept_per_group(mask, m) for m in (1, 2, 4, 8)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        (0.5, Unstructured(0.5)),
        (0, Unstructured(0)),
        ("2:4", SemiStructured(2, 4)),
        ("unstructured", Unstructured(0.5)),
        (Unstructured(0.3), Unstructured(0.3)),
        (SemiStructured(1, 4), SemiStructured(1, 4)),
    ],
)
def test_a_pattern_in_every_form(given, pattern):
    assert as_pattern(given) == pattern


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (50, "got 50; write 0.5 to prune 50 %"),
        (70, "write 0.7 to prune 70 %"),
        (62.5, "write 0.625 to prune 62.5 %"),
        ("0.5", "got '0.5'; write 0.5 to prune 50 %"),
        (124, 'write pattern: "2:4"'),
        (1, r"must be a number in \[0, 1\), got 1$"),
        (-0.5, "got -0.5$"),
        (float("nan"), "got nan$"),
        ("-1", "got '-1'$"),
        ("nan", "got 'nan'$"),
        ("150", 'YAML reads an unquoted 2:30 as this number, write pattern: "2:30"$'),
        ("1", "got '1'$"),
        ("half", '"unstructured" or "n:m" such as "2:4", got \'half\'$'),
        (None, r"a sparsity such as 0.5, .* or SemiStructured\(2, 4\), got None"),
        (True, "got True$"),
    ],
)
def test_what_was_meant(given, message):
    with pytest.raises(ValueError, match=message):
        as_pattern(given)


def test_a_pattern_in_the_place_of_the_sparsity():
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got '2:4'; write pattern=\"2:4\""):
        parse_pattern("unstructured", "2:4")
