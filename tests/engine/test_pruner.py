import math
import time

import pytest
import torch
from helpers import tiny_llama, token_batches

from wanda_lightning.allocation.owl import OWL
from wanda_lightning.engine.measured_sparsity import disagreements
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.engine.reconstruction import Reconstruction
from wanda_lightning.methods import Ablate, Magnitude, SparseGPT, Wanda
from wanda_lightning.methods.named import METHODS
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.solvers import factor
from wanda_lightning.sparsity import SemiStructured, Unstructured
from wanda_lightning.statistics import InputHessian

UNSTRUCTURED = [Unstructured(0.5), Unstructured(0.3)]
PATTERNS = [*UNSTRUCTURED, SemiStructured(2, 4), SemiStructured(1, 4), SemiStructured(4, 8)]
RUNS = [(method, pattern) for method in (Magnitude(), Wanda()) for pattern in PATTERNS]
RUNS += [(Wanda(variant=True), pattern) for pattern in UNSTRUCTURED]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def prune_the_plain_way(model, batches, sparsity):
    """Wanda without any of our machinery: full forwards of the whole model, one hook, one linear after another."""
    for layer in decoder_layers(model):
        norms = {}
        for linear in layer.linears:
            inputs = []
            hook = linear.module.register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0].double()))
            with torch.no_grad():
                for batch in batches:
                    model(batch)
            hook.remove()
            norms[linear.name] = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).norm(dim=0)
        for linear in layer.linears:
            score = linear.weight_OI.double().abs() * norms[linear.name]
            for row, scores in enumerate(score):
                lowest = scores.argsort()[: math.floor(sparsity * len(scores))]
                linear.weight_OI[row, lowest] = 0


def test_equals_wanda_done_the_plain_way(batches):
    ours, plain = tiny_llama(), tiny_llama()
    prune_model(ours, batches, Wanda(), Unstructured(0.5), true_sequential=False)
    prune_the_plain_way(plain, batches, 0.5)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("method", "pattern"), RUNS, ids=str)
def test_every_linear_reaches_the_target(llama, batches, method, pattern):
    before = weights(llama)
    report = prune_model(llama, batches, method, pattern)
    assert len(report.linears) == 21
    for row in report.linears:
        weight = llama.get_parameter(f"{row.name}.weight")
        zeros = (weight == 0).sum().item()
        assert row.sparsity == zeros / weight.numel()
        assert abs(row.sparsity - pattern.sparsity) <= 1 / weight.shape[1]
        kept = weight != 0
        assert torch.equal(weight[kept], before[f"{row.name}.weight"][kept])
        if isinstance(pattern, SemiStructured):
            assert (kept.view(-1, pattern.m).sum(1) == pattern.n).all()
    untouched = before.keys() - {f"{row.name}.weight" for row in report.linears}
    assert all(torch.equal(llama.get_parameter(name), before[name]) for name in untouched)


def test_matrices_too_thin_to_prune_are_said_to_be_so(batches):
    model = tiny_llama(hidden_size=4, intermediate_size=6)
    with pytest.raises(ValueError, match=r"nothing is left to prune of the decoder's matrices \(21 thin\)"):
        prune_model(model, batches, Wanda(), Unstructured(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_changes_nothing(llama, batches, method, dtype):
    llama.to(dtype)
    for parameter in llama.parameters():
        parameter.data /= 3  # which takes all bits
    before = weights(llama)
    report = prune_model(llama, batches, method, Unstructured(0))
    assert report.sparsity == 0
    assert all(torch.equal(llama.get_parameter(name), weight) for name, weight in before.items())


def test_same_inputs_give_the_same_bytes(batches):
    first, second = tiny_llama(), tiny_llama()
    for model in (first, second):
        prune_model(model, batches, Wanda(), Unstructured(0.5))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_batch_size_does_not_matter():
    (batch,) = token_batches(1, batch_size=8)
    one, many = tiny_llama(), tiny_llama()
    prune_model(one, batch.split(1), Wanda(), Unstructured(0.5))
    prune_model(many, [batch], Wanda(), Unstructured(0.5))
    differ = sum((a != b).sum().item() for a, b in zip(one.parameters(), many.parameters(), strict=True))
    assert differ <= 4  # rounding may swap a pair of near-equal scores


def test_only_targets_are_pruned(llama, batches):
    before = weights(llama)
    report = prune_model(llama, batches, Wanda(), Unstructured(0.5), targets=["*.mlp.*"], ignore=["layers.1.*"])
    expected = {f"model.layers.{i}.mlp.{n}_proj" for i in (0, 2) for n in ("gate", "up", "down")}
    assert {row.name for row in report.linears} == expected
    assert (
        report.not_pruned.keys()
        == {linear.name for layer in decoder_layers(llama) for linear in layer.linears} - expected
    )
    for name, weight in before.items():
        assert torch.equal(llama.get_parameter(name), weight) == (name.removesuffix(".weight") not in expected)


def test_the_model_is_left_as_found(llama, batches):
    llama.train()
    llama.model.layers[1].eval()
    modes = [module.training for module in llama.modules()]
    hooks = [len(module._forward_pre_hooks) for module in llama.modules()]
    storage = [parameter.data_ptr() for parameter in llama.parameters()]
    random = torch.get_rng_state()
    cache = llama.config.use_cache
    prune_model(llama, batches, Wanda(), Unstructured(0.5))
    assert [module.training for module in llama.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in llama.modules()] == hooks
    assert [parameter.data_ptr() for parameter in llama.parameters()] == storage
    assert all(parameter.requires_grad for parameter in llama.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert llama.config.use_cache == cache


def test_pruning_under_inference_mode_leaves_a_model_that_trains(llama, batches):
    with torch.inference_mode():
        prune_model(llama, batches, Wanda(), Unstructured(0.5))
    llama(batches[0], labels=batches[0]).loss.backward()


def test_half_precision(batches):
    model = tiny_llama().bfloat16()
    report = prune_model(model, batches, Wanda(), Unstructured(0.5))
    assert {row.sparsity for row in report.linears} == {0.5}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_name_of_a_model_is_none(batches):
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module.* got 'me/model'"):
        prune_model("me/model", batches, Wanda(), Unstructured(0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": None}, "needs calibration batches, got None"),
        ({"calibration": None, "method": Magnitude(), "exact_error": True}, "^exact_error needs calibration batches"),
        ({"calibration": []}, "the calibration set is empty"),
        ({"calibration": token_batches(length=0)}, r"hold input_ids, .* got a torch.int64 tensor of shape \(2, 0\)"),
        ({"calibration": token_batches(length=129)}, "129 tokens, the model takes at most 128"),
        ({"targets": ["nothing"]}, "'nothing' matches no linear"),
        ({"targets": ["q_proj"], "ignore": ["*_proj"]}, r"nothing is left to prune .* \(21 ignored\): say"),
        ({"pattern": SemiStructured(3, 7)}, "32 input features.*groups of 7"),
        ({"pattern": SemiStructured(2, 4), "method": Wanda(variant=True)}, "variant prunes unstructured"),
        ({"targets": "q_proj"}, r'targets must be a list of name patterns such as \["q_proj"\], got \'q_proj\''),
        ({"ignore": "q_proj"}, "ignore must be a list of name patterns"),
        ({"layers": 5}, r'layers must be the name of a list of layers such as "model\.layers", got 5'),
        ({"layers": [5]}, r"layers must be the name of a list of layers.* got \[5\]"),
        ({"allocation": {0: 0.5}}, r"allocation must be something like OWL\(\) or \{.*, got \{0: 0\.5\}"),
        ({"ignore": [3]}, r"ignore must be a list of name patterns.* got \[3\]"),
        ({"allocation": OWL}, r"allocation must be something like OWL\(\) or .* got <class"),
        ({"allocation": "owl"}, "allocation must be something like .* got 'owl'"),
        ({"reconstruction": {"epochs": 1}}, r"reconstruction must be something like Reconstruction\(epochs=3\), got {"),
        ({"journal": "folder"}, r"journal must be something like Journal\(.*, got 'folder'"),
        ({"method": Magnitude(), "activations": "gpu"}, "activations must be one of device, cpu, disk, got 'gpu'"),
    ],
)
def test_bad_arguments_are_refused_before_any_weight_changes(llama, batches, arguments, message):
    before = weights(llama)
    arguments = {"calibration": batches, "method": Wanda(), "pattern": Unstructured(0.5)} | arguments
    with pytest.raises(ValueError, match=message):
        prune_model(llama, **arguments)
    assert all(torch.equal(llama.get_parameter(name), weight) for name, weight in before.items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_are_refused(llama, batches, value):
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight[3, 4] = value
    before = weights(llama)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj has NaN or infinite weights"):
        prune_model(llama, batches, Wanda(), Unstructured(0.5))
    assert all(torch.equal(a.nan_to_num(), before[n].nan_to_num()) for n, a in llama.named_parameters())


@torch.no_grad()
def output_errors(dense, pruned, batches):
    """||(W - W') X||^2 / ||W X||^2 of the linears of layer 0 in float64, from the dense model's own forward."""
    inputs = {linear.name: [] for linear in decoder_layers(dense)[0].linears}
    for name, seen in inputs.items():
        dense.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
    for batch in batches:
        dense(batch)
    errors, estimates = {}, {}
    for name, seen in inputs.items():
        x_TI = torch.cat([x.flatten(0, 1) for x in seen])
        weight_OI, left_OI = (model.get_submodule(name).weight.double() for model in (dense, pruned))
        errors[name] = (
            (x_TI @ (weight_OI - left_OI).t()).square().sum() / (x_TI @ weight_OI.t()).square().sum()
        ).item()
        scale_I = x_TI.square().sum(0)
        estimates[name] = (
            ((weight_OI - left_OI).square() @ scale_I).sum() / (weight_OI.square() @ scale_I).sum()
        ).item()
    return errors, estimates


@pytest.mark.parametrize(
    "method", [Magnitude(), Wanda(), SparseGPT(), Ablate()], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize("exact_error", [False, True])
def test_the_reports_reconstruction_errors(llama, batches, method, exact_error):
    settings = {"targets": ["layers.0.*"], "exact_error": exact_error, "true_sequential": False}
    report = prune_model(llama, batches, method, Unstructured(0.5), **settings)
    errors, estimates = output_errors(tiny_llama(), llama, batches)
    exact = exact_error or method.statistic is InputHessian
    assert [row.name for row in report.linears] == list(errors)
    for row in report.linears:
        if isinstance(method, Magnitude) and not exact_error:
            assert row.error is None
        else:
            assert row.error == pytest.approx((errors if exact else estimates)[row.name], rel=1e-4)
            assert row.error_is_exact == exact
    if not isinstance(method, Magnitude) or exact_error:
        assert any(abs(errors[name] - estimates[name]) > 0.01 * errors[name] for name in errors)


def test_a_report_of_a_deeper_model_disagrees(llama):
    report = prune_model(llama, None, Magnitude(), Unstructured(0.5))
    smaller = tiny_llama(layers=2)
    prune_model(smaller, None, Magnitude(), Unstructured(0.5))
    missing = [row.name for row in report.linears if row.layer == "model.layers.2"]
    assert disagreements(smaller, report) == dict.fromkeys(missing, "the model has no such linear")


@pytest.mark.parametrize(
    ("rows", "value", "wrong"),
    [
        (2, 0.0, None),  # 51.56 %: some more by chance
        (8, 0.0, "56.25% of its weights are zero, the report says 50.00%"),
        (1, 1.0, "49.22% of its weights are zero, the report says 50.00%"),
    ],
)
@torch.no_grad()
def test_a_report_is_wrong_where_other_weights_are_zero(llama, batches, rows, value, wrong):
    report = prune_model(llama, batches, Wanda(), Unstructured(0.5))
    llama.model.layers[1].mlp.up_proj.weight[:rows] = value
    assert disagreements(llama, report) == ({"model.layers.1.mlp.up_proj": wrong} if wrong else {})


def test_a_report_is_wrong_where_a_matrix_has_another_shape(llama):
    report = prune_model(llama, None, Magnitude(), Unstructured(0.5))
    llama.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 60)
    wrong = {"model.layers.1.mlp.up_proj": "its shape is (60, 32), the report says (64, 32)"}
    assert disagreements(llama, report) == wrong


@pytest.mark.parametrize("exact_error", [False, True])
def test_a_matrix_of_zeros_loses_nothing(llama, batches, exact_error):
    llama.model.layers[1].mlp.down_proj.weight.data.zero_()
    report = prune_model(llama, batches, Wanda(), Unstructured(0.5), exact_error=exact_error)
    assert {row.error for row in report.linears if row.name == "model.layers.1.mlp.down_proj"} == {0}


def test_seconds_are_of_the_time_that_passed(llama, batches):
    started = time.perf_counter()
    report = prune_model(llama, batches, Wanda(), Unstructured(0.5), reconstruction=Reconstruction(epochs=1))
    rows = [*report.linears, *report.reconstruction.values()]
    assert 0 < sum(row.seconds for row in rows) < time.perf_counter() - started


def test_exact_errors_change_no_mask(batches):
    plain, exact = tiny_llama(), tiny_llama()
    prune_model(plain, batches, Wanda(), Unstructured(0.5))
    prune_model(exact, batches, Wanda(), Unstructured(0.5), exact_error=True)
    assert all(map(torch.equal, plain.parameters(), exact.parameters()))


def test_raised_damping_is_in_the_report_and_a_hopeless_factor_names_its_linear(batches, monkeypatch):
    reverse_cholesky, failures = factor._reverse_cholesky, iter([True])

    def fails_once(*arguments):
        return None if next(failures, False) else reverse_cholesky(*arguments)

    monkeypatch.setattr(factor, "_reverse_cholesky", fails_once)
    report = prune_model(tiny_llama(), batches, SparseGPT(), Unstructured(0.5))
    assert [row.damping for row in report.linears] == pytest.approx([0.1] * 3 + [0.01] * 18)  # q, k, v share a factor
    monkeypatch.setattr(factor, "_reverse_cholesky", lambda *_: None)
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj cannot be pruned: .*damping up to 1 "):
        prune_model(model, batches, SparseGPT(), Unstructured(0.5))
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
@pytest.mark.parametrize("layer", [0, 2])
def test_infinite_activations_are_refused(llama, batches, method, layer):
    with torch.no_grad():
        llama.model.layers[layer].input_layernorm.weight.fill_(torch.inf)
    before = weights(llama)
    with pytest.raises(ValueError, match=rf"the activations of model\.layers\.{layer} are NaN or infinite"):
        prune_model(llama, batches, method, Unstructured(0.5))
    assert all(torch.equal(llama.get_parameter(name), weight) for name, weight in before.items())


def test_magnitude_needs_no_calibration(llama):
    assert prune_model(llama, None, Magnitude(), Unstructured(0.5)).sparsity == 0.5


def test_tied_embeddings_stay_dense(batches):
    model = tiny_llama(tie_word_embeddings=True)
    prune_model(model, batches, Wanda(), Unstructured(0.5))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.weight != 0).all()


def test_progress_sees_every_layer(llama, batches):
    seen = []

    def progress(layers, total):
        for layer in layers:
            seen.append(total)
            yield layer

    prune_model(llama, batches, Wanda(), Unstructured(0.5), progress=progress)
    assert seen == [3, 3, 3]


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(block_size=16)], ids=str)
def test_under_autocast_the_next_layer_sees_the_pruned_weights(batches, method):
    """autocast keeps copies of weights in half precision, which must not outlive a pruning."""

    def pruned(**autocast):
        model = tiny_llama()
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            prune_model(model, batches, method, Unstructured(0.5))
        return model

    with_cache, without = pruned(), pruned(cache_enabled=False)
    assert all(map(torch.equal, with_cache.parameters(), without.parameters()))


@pytest.mark.parametrize(
    ("short", "long"),
    [(("wanda", 0.5), (Wanda(), Unstructured(0.5))), (("magnitude", "2:4"), (Magnitude(), SemiStructured(2, 4)))],
)
def test_names_and_numbers_do_the_same_as_objects(batches, short, long):
    by_name, by_object = tiny_llama(), tiny_llama()
    assert prune_model(by_name, batches, *short).method == prune_model(by_object, batches, *long).method
    assert all(torch.equal(weight, weights(by_object)[name]) for name, weight in weights(by_name).items())


@pytest.mark.parametrize(
    ("method", "pattern", "message"),
    [("wonda", 0.5, "got 'wonda'"), ("wanda", 50, "write 0.5"), (0.5, "wanda", "method must be .* got 0.5")],
)
def test_wrong_arguments_change_nothing(batches, method, pattern, message):
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        prune_model(model, batches, method, pattern)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
