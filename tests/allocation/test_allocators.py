"""OWL, ATP and the least loss: shares against plain computations, totals to one weight a row, what is refused."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny_llama, tiny_mixtral, token_batches
from transformers import BertForMaskedLM, LlamaForTokenClassification, LlamaModel, MambaConfig, MambaForCausalLM

from wanda_lightning.allocation.allocator import Task, exact
from wanda_lightning.allocation.atp import ATP
from wanda_lightning.allocation.least_loss import LeastLoss
from wanda_lightning.allocation.owl import OWL
from wanda_lightning.allocation.selection import Selection
from wanda_lightning.allocation.trial import Trials, parted
from wanda_lightning.engine.measured_sparsity import report_as_found
from wanda_lightning.engine.processes import Processes
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import RIA, Magnitude, SparseGPT, Wanda
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.report.html.page import to_html
from wanda_lightning.report.pruning_report import PruningReport
from wanda_lightning.sparsity import SemiStructured, Unstructured
from wanda_lightning.statistics import InputNorm

ALLOCATORS = [OWL(spread=0.1), ATP(0.05), ATP(), LeastLoss(rounds=2)]


def task_of(model, batches=(), sparsity=0.5, method=None):
    pattern = Unstructured(sparsity)
    return Task(model, decoder_layers(model), method or Wanda(), pattern, batches, Processes.alone())


def inputs_of(model, batches):
    """What enters every linear in the dense model, by name, in float64."""
    seen = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for batch in batches:
            model(batch)
    return {name: torch.cat([x.flatten(0, 1) for x in inputs]).double() for name, inputs in seen.items()}


def test_the_shares_of_owl_are_those_of_a_plain_computation():
    model, batches = tiny_llama(layers=4), token_batches()
    report = prune_model(model, batches, "wanda", 0.6, allocation=OWL(factor=3, spread=0.1))
    dense = tiny_llama(layers=4)
    inputs = inputs_of(dense, batches)
    outliers = []
    for number in range(4):
        scores = torch.cat([
            (dense.get_parameter(f"{name}.weight").double().abs() * x.square().sum(0).sqrt()).flatten()
            for name, x in inputs.items() if f".{number}." in name
        ])  # fmt: skip
        outliers.append(100 * float((scores > 3 * scores.mean()).double().mean()))
    kept = [0.2 * (share - min(outliers)) / (max(outliers) - min(outliers)) for share in outliers]
    for row in report.linears:
        number = int(row.layer.rpartition(".")[2])
        assert report.allocation.reasons[row.name] == pytest.approx(outliers[number])
        share = 1 - (kept[number] - sum(kept) / 4 + 0.4)
        assert abs(row.sparsity - share) < 1 / row.shape[1]
    assert len({row.sparsity for row in report.linears}) > 1


@pytest.mark.parametrize("sparsity", [0.2, 0.7])
@pytest.mark.parametrize("small", [(1, 2), (0, 1)])
def test_every_beta_that_atp_tries_suits_layers_of_different_sizes(sparsity, small):
    """Two of three layers have one small matrix that is pruned."""
    ignore = [f"*layers.{layer}.{part}*" for layer in small for part in ("mlp", "self_attn.[qko]")]
    report = prune_model(tiny_llama(), token_batches(), "wanda", sparsity, ignore=ignore, allocation=ATP())
    assert report.sparsity == pytest.approx(sparsity, abs=0.01)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
def test_more_is_asked_of_an_allocator_than_there_is(method):
    """However few inputs one of the linears has."""
    model = MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, state_size=16, time_step_rank=8)
    )
    prune_model(model, None, "magnitude", 0.5)
    found, is_pruned = report_as_found(model, method, Unstructured(0.6), Selection(allocation=OWL()))
    assert (found.sparsity, is_pruned) == (pytest.approx(0.5, abs=0.01), False)


@pytest.mark.parametrize("split", [ATP(), LeastLoss(rounds=2)], ids=str)
def test_losses_do_not_depend_on_the_default_dtype(split):
    """Which is half precision within Lightning's bf16-true."""
    stories = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama()
        torch.set_default_dtype(dtype)
        try:
            stories.append(prune_model(model, token_batches(), "wanda", 0.5, allocation=split).allocation.story)
        finally:
            torch.set_default_dtype(torch.float32)
    assert stories[0] == stories[1]


def test_the_progression_of_atp():
    model = tiny_llama(layers=4)
    report = prune_model(model, token_batches(), "wanda", 0.5, allocation=ATP(0.08))
    for row in report.linears:
        place = int(row.layer.rpartition(".")[2])
        assert abs(row.sparsity - (0.5 - 0.08 * 1.5 + 0.08 * place)) < 1 / row.shape[1]


def test_atp_takes_the_beta_with_the_least_held_out_loss():
    model, batches = tiny_llama(), token_batches()
    task = task_of(model, batches)
    allotment = ATP().allocate(task)
    betas = [0.5 * share for share in (0, 0.125, 0.25, 0.375, 0.5, 0.625)]
    losses = []
    norms = {name: x.square().sum(0).sqrt() for name, x in inputs_of(tiny_llama(), batches[:3]).items()}
    for beta in betas:
        pruned, patterns = tiny_llama(), ATP(beta).allocate(task).patterns
        for name, sparsity in patterns.items():
            weight = pruned.get_parameter(f"{name}.weight").data
            count = math.floor(sparsity * weight.shape[1])
            order = (weight.double().abs() * norms[name]).argsort(dim=1, stable=True)
            weight.scatter_(1, order[:, :count], 0)
        with torch.no_grad():
            losses.append(float(pruned(batches[3], labels=batches[3]).loss))
    best = betas[losses.index(min(losses))]
    assert allotment.patterns == ATP(best).allocate(task).patterns
    assert all(f"{loss:.3f} with {beta:.4f}" in allotment.story for loss, beta in zip(losses, betas, strict=True))


@pytest.mark.parametrize("allocator", [ATP(), LeastLoss(rounds=2)], ids=str)
def test_sequences_of_a_batch_that_is_alone_are_held_out(allocator):
    """Not those that masks are chosen on."""
    (batch,) = token_batches(1, batch_size=8)
    one, many = (
        prune_model(tiny_llama(), batches, "magnitude", 0.5, allocation=allocator).allocation
        for batches in ([batch], batch.split(1))
    )
    assert (one.story, one.patterns) == (many.story, many.patterns)


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), Magnitude(), RIA()], ids=lambda method: type(method).__name__)
def test_totals_are_exact(allocator, method):
    """Pruned weights differ from what was asked for by less than one in each row of one linear."""
    model = tiny_llama(layers=4, hidden_size=40, intermediate_size=72)
    report = prune_model(model, token_batches(), method, 0.55, allocation=allocator)
    sizes = [row.shape[0] * row.shape[1] for row in report.linears]
    pruned = sum(int((model.get_parameter(f"{row.name}.weight") == 0).sum()) for row in report.linears)
    tolerance = sum(method.tolerance(row.shape) * size for row, size in zip(report.linears, sizes, strict=True))
    rows = max(row.shape[0] for row in report.linears)
    assert abs(pruned - 0.55 * sum(sizes)) <= (rows / 2 if isinstance(method, Wanda) else tolerance)
    assert len({round(row.sparsity, 2) for row in report.linears}) > 1 or "LeastLoss" in str(allocator)


def test_rounding_is_exact_over_shapes_of_all_kinds():
    class Linear:
        def __init__(self, name, rows, columns):
            self.name, self.weight_OI = name, torch.empty(rows, columns, device="meta")

    assert exact([Linear("narrow", 5, 4)], {"narrow": 0.95}) == {"narrow": Unstructured(3 / 4)}  # a row keeps one
    generator = torch.Generator().manual_seed(0)
    linears = [Linear(str(n), 7 + 13 * n, 577 - 9 * n) for n in range(40)]
    shares = {linear.name: float(torch.rand((), generator=generator)) * 0.98 for linear in linears}
    patterns = exact(linears, shares)
    total = 0
    for linear in linears:
        rows, columns = linear.weight_OI.shape
        count = patterns[linear.name].count(columns)
        assert count / columns == patterns[linear.name].sparsity  # nothing to be rounded
        assert abs(count - shares[linear.name] * columns) < 1
        total += count * rows
    wanted = sum(shares[linear.name] * linear.weight_OI.numel() for linear in linears)
    assert abs(total - wanted) <= min(len(linear.weight_OI) for linear in linears) / 2


def test_slopes_share_out_what_the_loss_grows_by():
    """Each part against a finite difference in the middle of the line; their sum against the losses at its ends."""
    model, batches = tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.08).double(), token_batches()
    batches[0] = {"input_ids": batches[0], "attention_mask": torch.ones_like(batches[0])}
    batches[0]["attention_mask"][0, -5:] = 0
    task = task_of(model, batches)
    less, more = ({linear.name: Unstructured(s) for linear in task.linears} for s in (0.45, 0.5))
    before = [parameter.clone() for parameter in model.parameters()]
    model.lm_head.weight.requires_grad = False
    required = [parameter.requires_grad for parameter in model.parameters()]

    def loss():
        total = tokens = 0
        for batch in map(lambda batch: batch if isinstance(batch, dict) else {"input_ids": batch}, batches):
            labels = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(1)) == 0, -100)
            here = int((labels[:, 1:] != -100).sum())
            logits = model(**batch).logits[:, :-1].double()  # the model itself would round them to single precision
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            )
            tokens += here
        return total / tokens

    with torch.no_grad(), Trials(task, task.input_norms()) as trials:
        parts = trials.slopes(less, more, batches)
        for linear in task.linears:
            step = 0.02 * (
                trials.pruned(linear.name, more[linear.name]) - trials.pruned(linear.name, less[linear.name])
            )
            ends = []
            for sign in (1, -1):
                linear.weight_OI.add_(step, alpha=sign)
                ends.append(loss())
                linear.weight_OI.add_(step, alpha=-sign)
            assert parts[linear.name] == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.01, abs=3e-6)
        ends = [trials.loss(patterns, batches) for patterns in (less, more)]
        assert ends[1] == pytest.approx(loss(), rel=1e-5)
    assert sum(parts.values()) == pytest.approx(ends[1] - ends[0], rel=0.05)
    assert all(map(torch.equal, model.parameters(), before))
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("choices", [None, ["dense", "4:8", "2:4", "1:4"]])
def test_the_least_sum_of_errors_is_found(choices, monkeypatch):
    """A split of six linears, against all that there are: the measured errors, and the shares that come of them."""
    seen = {}
    from wanda_lightning.allocation import least_loss

    def noted(costs, gains, total, over=False):
        picked = seen["inner"](costs, gains, total, over)
        seen["call"] = costs, gains, total, over, picked
        return picked

    seen["inner"] = least_loss.cheapest_split
    monkeypatch.setattr(least_loss, "cheapest_split", noted)
    model, batches = tiny_llama(layers=2), token_batches()
    allocator = LeastLoss(choices=choices, step=0.15, rounds=1)
    layers = decoder_layers(model, targets=["q_proj", "up_proj", "down_proj"])
    with torch.no_grad():
        allocator.allocate(Task(model, layers, Wanda(), Unstructured(0.5), batches, Processes.alone()))
    costs, gains, total, over, picked = seen["call"]
    assert len(costs) == 6
    assert total >= 0.5 * sum(max(gain) for gain in gains) * (0.5 if choices is None else 1)

    def cost(choice):
        return sum(cost[option] for cost, option in zip(costs, choice, strict=True))

    def reaches(choice):
        gained = sum(gain[option] for gain, option in zip(gains, choice, strict=True))
        return gained >= total if over else gained == total

    least = min(cost(choice) for choice in itertools.product(*(range(len(each)) for each in costs)) if reaches(choice))
    assert cost(picked) == pytest.approx(least)
    assert math.isfinite(least)


def test_rounds_go_on_as_long_as_the_loss_falls(monkeypatch):
    """With losses that are made up: the third is the least, the fourth ends it, and the third split is the result."""
    losses, tried = iter([4.0, 3.0, 2.0, 2.0, 0.0]), []
    monkeypatch.setattr(Trials, "loss", lambda self, patterns, _: tried.append(patterns) or next(losses))
    task = task_of(tiny_llama(layers=2), token_batches())
    with torch.no_grad():
        allotment = LeastLoss(rounds=9, step=0.125, reach=1).allocate(task)
    assert allotment.story.startswith("held-out loss 4.000, then 3.000, then 2.000, then 2.000; 100%")
    assert tried[2] not in (tried[1], tried[3])
    best = exact(task.linears, {name: pattern.sparsity for name, pattern in tried[2].items()})
    assert allotment.patterns == {name: pattern.sparsity for name, pattern in best.items()}


@pytest.mark.parametrize(("asked", "less", "more"), [(0.5, 0.375, 0.625), (0.1, 0, 0.225), (0.94, 0.815, 0.99)])
def test_slopes_are_measured_half_a_step_around_what_is_pruned(monkeypatch, asked, less, more):
    line = {}
    slopes = Trials.slopes
    monkeypatch.setattr(Trials, "slopes", lambda self, *ends: line.update(ends=ends) or slopes(self, *ends))
    with torch.no_grad():
        LeastLoss(rounds=1, step=0.25).allocate(task_of(tiny_llama(layers=1), token_batches(), asked))
    assert [{round(pattern.sparsity, 9) for pattern in end.values()} for end in line["ends"][:2]] == [{less}, {more}]


@torch.no_grad()
@pytest.mark.parametrize(("asked", "span"), [(0.5, 0.25), (0.1, 0.225)])
def test_the_growth_of_the_loss_is_reported_for_all_of_a_linear(monkeypatch, asked, span):
    task = task_of(tiny_llama(layers=1), token_batches(), asked)
    grows = {linear.name: number / 100 for number, linear in enumerate(task.linears)}
    monkeypatch.setattr(
        Trials, "slopes", lambda *_: grows
    )  # from half a step less to half a step more, but not below 0
    found = LeastLoss(choices=["dense", "2:4"], step=0.25).allocate(task).reasons
    assert found == pytest.approx({name: growth / span for name, growth in grows.items()})


@torch.no_grad()
def test_an_expert_that_no_token_reached_is_tried_by_size():
    task = task_of(tiny_llama(layers=1))
    name, weight = task.linears[0].name, task.linears[0].weight_OI.clone()
    with Trials(task, {name: InputNorm(weight.shape[1])}) as trials:
        pruned = trials.pruned(name, Unstructured(0.5))
    larger = weight.abs() > weight.abs().median(1, keepdim=True).values  # the lower one of the two in the middle
    assert torch.equal(pruned, weight * larger)


def test_a_beta_that_leads_too_far_is_refused_by_a_look():
    """Before the dense model is evaluated, say."""
    with pytest.raises(ValueError, match=r"gives model\.layers\.0 a sparsity of -0\.1000"):
        ATP(0.6).check(task_of(tiny_llama()))


def test_choices_become_the_patterns_of_linears():
    model = tiny_llama()
    allocation = LeastLoss(choices=["dense", "4:8", "1:4"])
    report = prune_model(model, token_batches(), "sparsegpt", 0.5, allocation=allocation)
    kinds = {"dense": 0.0, "4:8": 0.5, "1:4": 0.75}
    assert {row.sparsity for row in report.linears} <= {*kinds.values()}
    assert report.sparsity >= 0.5
    for name, value in report.allocation.patterns.items():
        weight = model.get_parameter(f"{name}.weight")
        if value == "4:8":
            assert ((weight.view(-1, 8) != 0).sum(1) == 4).all()
        assert float((weight == 0).float().mean()) == kinds.get(value, value)


def with_an_idle_layer():
    """Layer 1 adds next to nothing to the hidden states, so it is layer 0 that is to be kept; and what it predicts."""
    model = tiny_llama(layers=2)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_parameter(f"model.layers.1.{name}.weight").data *= 1e-3
    return model, [model.generate(torch.arange(4)[:, None] + n, max_length=32, do_sample=False) for n in range(4)]


def test_a_linear_that_the_loss_depends_on_keeps_more():
    model, batches = with_an_idle_layer()
    report = prune_model(model, batches, "wanda", 0.6, allocation=LeastLoss(rounds=3))
    means = [
        sum(row.sparsity * row.shape[0] * row.shape[1] for row in report.linears if f".{n}." in row.name)
        for n in range(2)
    ]
    assert means[0] < means[1]
    story = report.allocation.story.partition(";")[0].removeprefix("held-out loss ")
    losses = [float(loss) for loss in story.split(", then ")]
    assert min(losses) < losses[0]


@pytest.mark.parametrize("allocation", [LeastLoss(step=0.1, reach=1), LeastLoss(choices=["dense", "2:4"])], ids=str)
def test_a_linear_whose_errors_cost_all_stays_dense(allocation, monkeypatch):
    """Also where the sparsity is a multiple of the step but for rounding, as 0.3 is of 0.1."""
    needed = "model.layers.1.mlp.up_proj"

    def measure(self, trials, units, now, batches):
        weights = [1e6 if unit[0].name == needed else 1.0 for unit in units]
        return [0.0] * len(units), weights

    monkeypatch.setattr(LeastLoss, "_measure", measure)
    losses = iter(range(0, -99, -1))
    monkeypatch.setattr(Trials, "loss", lambda *_: float(next(losses)))
    report = prune_model(tiny_llama(), token_batches(), "wanda", 0.3, allocation=allocation)
    assert report.allocation.patterns[needed] == 0.0


def test_reach_goes_part_of_the_way_from_an_even_split():
    def patterns(reach):
        report = prune_model(*with_an_idle_layer(), "wanda", 0.6, allocation=LeastLoss(rounds=3, reach=reach))
        assert report.sparsity == pytest.approx(0.6, abs=1 / 32)
        return report.allocation.patterns

    half, whole = patterns(0.5), patterns(1.0)
    assert max(abs(sparsity - 0.6) for sparsity in whole.values()) > 0.1
    for name, sparsity in whole.items():
        assert half[name] - 0.6 == pytest.approx((sparsity - 0.6) / 2, abs=1 / 16), name


@pytest.mark.parametrize(("dense_target", "usual", "other"), [(False, 0.75, 0.5), (True, 0.5, 0.75)])
def test_how_far_it_goes_depends_on_whether_later_linears_make_up_for_earlier_ones(dense_target, usual, other):
    def allotment(**reach):
        allocation, model, batches = LeastLoss(rounds=2, **reach), *with_an_idle_layer()
        report = prune_model(model, batches, "sparsegpt", 0.6, allocation=allocation, dense_target=dense_target)
        return report.allocation

    assert allotment().patterns == allotment(reach=usual).patterns != allotment(reach=other).patterns
    assert allotment().story.endswith(f"; {usual:.0%} of the way to the best split")


def test_experts_of_a_kind_are_pruned_alike():
    report = prune_model(tiny_mixtral(), token_batches(), "wanda", 0.5, allocation=LeastLoss(rounds=1))
    for kind in ("gate_up_proj", "down_proj"):
        for layer in range(2):
            found = [row.sparsity for row in report.linears if f".{layer}." in row.name and kind in row.name]
            assert len(found) == 4
            assert max(found) - min(found) <= 1 / 32


def test_the_report_says_why(tmp_path):
    report = prune_model(tiny_llama(), token_batches(), "wanda", 0.5, allocation=OWL())
    report.save(tmp_path)
    plain = json.loads((tmp_path / "pruning.json").read_text())
    assert plain["allocation"]["allocator"] == "OWL(factor=5.0, spread=0.08)"
    assert PruningReport.from_dict(plain).allocation == report.allocation
    page, text = to_html(report), report.to_markdown()
    assert "Why: outliers (%)" in page
    assert "| outliers (%) |" in text
    assert "OWL(factor=5.0" in text
    without = prune_model(tiny_llama(), token_batches(), "wanda", 0.5)
    assert "Allocation" not in without.to_markdown()
    assert "Why" not in to_html(without)
    assert "allocation" not in without.seconds_by_phase


@pytest.mark.parametrize(
    ("allocation", "asked", "method", "message"),
    [
        (OWL(), "2:4", Wanda(), r"OWL\(.*splits an unstructured sparsity among linears, and 2:4"),
        (ATP(0.01), SemiStructured(1, 4), Wanda(), r"ATP\(beta=0\.01\) splits an unstructured"),
        (LeastLoss(), "2:4", Wanda(), "LeastLoss.*splits an unstructured"),
        (OWL(spread=0.6), 0.9, Wanda(), r"gives model\.layers\.\d a sparsity of .*outside of \[0, 1\)"),
        (ATP(0.6), 0.5, Wanda(), r"ATP\(beta=0\.6\) gives model\.layers\.0 a sparsity of -0\.1000"),
        (ATP(-0.6), 0.5, Wanda(), r"gives model\.layers\.0 a sparsity of 1\.1000"),
        (LeastLoss(), 0.96, Wanda(), "prunes no linear more than 0.95, got a sparsity of 0.96"),
        (LeastLoss(choices=["dense", "2:4"]), 0.6, Wanda(), "prunes no linear more than 0.5, got a sparsity of 0.6"),
        (LeastLoss(choices=["dense", "3:7"]), 0.2, Wanda(), "32 input features.*groups of 7"),
        (LeastLoss(choices=["dense", "3:6"]), 0.2, SparseGPT(), "block_size must be a multiple of 6"),
    ],
)
def test_what_cannot_be_split_is_refused_before_any_weight_changes(llama, batches, allocation, asked, method, message):
    before = [parameter.clone() for parameter in llama.parameters()]
    with pytest.raises(ValueError, match=message):
        prune_model(llama, batches, method, asked, allocation=allocation)
    assert all(map(torch.equal, llama.parameters(), before))


@pytest.mark.parametrize("allocation", [ATP(), LeastLoss()], ids=str)
@pytest.mark.parametrize("kind", [BertForMaskedLM, LlamaModel, LlamaForTokenClassification])
def test_losses_of_models_that_predict_no_next_tokens_are_not_measured(allocation, kind):
    """Those of tokens that see the ones behind them would tell nothing."""
    config = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = kind(kind.config_class(**config, intermediate_size=64))
    with pytest.raises(ValueError, match=f"{kind.__name__} predicts none: use OWL, or ATP with a beta"):
        prune_model(model, token_batches(), "wanda", 0.5, allocation=allocation)
    assert prune_model(model, token_batches(), "wanda", 0.5, allocation=OWL()).sparsity == pytest.approx(0.5, abs=0.01)


def test_calibration_is_asked_for(llama):
    with pytest.raises(ValueError, match=r"OWL\(.*needs calibration batches"):
        prune_model(llama, None, "magnitude", 0.5, allocation=OWL())
    assert prune_model(llama, None, "magnitude", 0.5, allocation=ATP(0.05)).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OWL(factor=0), "factor must be a finite number above 0, got 0"),
        (lambda: OWL(spread=-1), "spread must be"),
        (lambda: ATP(math.nan), "beta must be a finite number, or left out to be chosen, got nan"),
        (lambda: ATP(True), "beta must be"),
        (lambda: LeastLoss(step=0.3), r"step must be a number in \(0, 0\.25\], got 0\.3"),
        (lambda: LeastLoss(reach=1.5), r"reach must be a number in \(0, 1\], got 1\.5"),
        (lambda: LeastLoss(reach=0), r"reach must be a number in \(0, 1\], got 0"),
        (lambda: LeastLoss(rounds=0), "rounds must be"),
        (lambda: LeastLoss(sequences=0), "sequences must be"),
        (lambda: LeastLoss(choices=["dense", "2:4"], reach=0.5), "reach is not for choices, got reach=0.5"),
        (lambda: LeastLoss(choices=["2:4"]), "choices must be a list of two or more different patterns"),
        (lambda: LeastLoss(choices=["2:4", "2:4"]), "choices must be a list of two or more different patterns"),
        (lambda: LeastLoss(choices="2:4"), "choices must be a list of two or more different patterns, got '2:4'"),
        (lambda: LeastLoss(choices=0.5), "choices must be a list of two or more different patterns, got 0.5"),
        (lambda: LeastLoss(choices=["2:4", "half"]), "half"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("count", range(1, 9))
def test_what_judges_was_not_measured_on(count):
    batches = [torch.full((1, 2), n) for n in range(count)]
    used, held = ({int(b["input_ids"][0, 0]) for b in part} for part in parted(batches, 9))
    assert held
    assert used
    assert count == 1 or not held & used
    assert held | used == {*range(count)}


@pytest.mark.parametrize("activations", ["device", "disk"])
def test_norms_are_those_of_the_dense_model_in_one_pass(activations):
    model, batches, calls = tiny_llama(), token_batches(), []
    expected = inputs_of(model, batches)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        norms = replace(task_of(model, batches), activations=activations).input_norms()
    assert len(calls) == len(batches) + 3  # a few tokens before, see test_each_layer_runs_once
    for name, norm in norms.items():
        torch.testing.assert_close(norm.compute().double(), expected[name].norm(dim=0), rtol=1e-5, atol=1e-5)
