"""Width pruning: the model is an ordinary, narrower one, and is chosen and fitted as it says."""

import copy

import numpy as np
import pytest
import torch
from helpers import mixtral, tiny_llama, token_batches
from sizes import VOCABULARY
from test_families import build

from wanda_lightning.calibration.walk import walk
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.narrowing import kept_of
from wanda_lightning.engine.neuron_removal import Columns, NeuronRemoval
from wanda_lightning.engine.width import prune_width
from wanda_lightning.model.coupling import find_neurons
from wanda_lightning.model.decoder import decoder_layers
from wanda_lightning.statistics import InputHessian, InputNorm

FAMILIES = ["LLaMA", "GPT-2", "OPT", "GPT-NeoX (Pythia)", "Gemma 3", "Phi-3", "Qwen3-MoE"]
MORE = ["GPT-OSS", "Qwen3-Next", "ERNIE 4.5 (MoE)", "Gemma 4 (MoE)", "Falcon", "Nemotron-H"]
BATCHES = token_batches(batches=3, length=12, vocab=VOCABULARY)


@torch.no_grad()
def with_unread_neurons(name: str):
    """A model in which nothing reads half of the neurons, here and there."""
    model = build(name)
    random = torch.Generator().manual_seed(1)
    groups = find_neurons(model, decoder_layers(model, targets=["*"]))
    for neurons in (neurons for layer in groups.values() for neurons in layer):
        gone = torch.randperm(neurons.width, generator=random)[: neurons.width // 2]
        neurons.reader.weight_OI[:, gone] = 0
    return model


@pytest.mark.parametrize(("choice", "refit"), [("obs", True), ("magnitude", False)])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_neurons_that_nothing_reads_can_go(name, choice, refit, tmp_path):
    model = with_unread_neurons(name)
    logits, before = model(BATCHES[0]).logits, sum(p.numel() for p in model.parameters())
    report = prune_width(model, BATCHES, 0.5, choice=choice, refit=refit)
    assert torch.equal(model(BATCHES[0]).logits, logits)
    assert report.parameters == (before, sum(p.numel() for p in model.parameters()))
    assert report.parameters[1] < 0.9 * before
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(BATCHES[0]).logits, logits)
    assert again.config.to_dict() == type(model).from_pretrained(tmp_path).config.to_dict()


@pytest.mark.parametrize("name", MORE)
@torch.no_grad()
def test_others_that_are_peculiar_can_be_narrowed(name, tmp_path):
    """Transposed experts, shared ones, several widths, a config that does not say the width, layers without MLP."""
    model = with_unread_neurons(name)
    logits = model(BATCHES[0]).logits
    prune_width(model, BATCHES, 0.5)
    torch.testing.assert_close(model(BATCHES[0]).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(BATCHES[0]).logits, model(BATCHES[0]).logits)


@torch.no_grad()
def by_hand(model, choice: str, refit: bool, kept: int):
    """The same with down_proj zeroed in place of narrower, in float64, by what the papers say."""
    from wanda_lightning.solvers.factor import factorize
    from wanda_lightning.solvers.neurons import remove_inputs

    for step in walk(model, decoder_layers(model, ["down_proj"]), BATCHES):
        (linear,) = step.layer.linears
        weight, hessian = linear.weight_OI.double(), step.collect(InputHessian)[linear.name]
        norm = step.collect(InputNorm)[linear.name].compute().double()
        if choice == "obs":
            mask = remove_inputs(linear.weight_OI, factorize(hessian.total, 0.01, 0.1), weight.shape[1] - kept)
        else:
            score = (weight.abs() * (norm if choice == "wanda" else 1)).mean(0)
            mask = torch.zeros(len(score), dtype=torch.bool).index_fill_(0, score.argsort()[-kept:], 1)
        new = weight * mask
        if refit:
            h = hessian.compute().double()
            diagonal = h.diagonal()[mask]
            added = (0.01 * diagonal.mean() + 0.1 * diagonal).diag()
            change = torch.linalg.solve(h[mask][:, mask] + added, h[mask][:, ~mask] @ weight[:, ~mask].t()).t()
            new[:, mask] += change
        linear.weight_OI.copy_(new)
    return model


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("choice", ["obs", "wanda", "magnitude"])
@torch.no_grad()
def test_each_layer_is_narrowed_with_what_the_narrower_ones_before_it_give(choice, refit):
    model = tiny_llama(vocab_size=VOCABULARY)
    expected = by_hand(copy.deepcopy(model), choice, refit, 40)
    report = prune_width(model, BATCHES, 0.6, choice=choice, refit=refit, multiple=8)
    assert model.config.intermediate_size == model.model.layers[1].mlp.intermediate_size == 40
    assert model.model.layers[0].mlp.up_proj.out_features == model.model.layers[0].mlp.down_proj.in_features == 40
    torch.testing.assert_close(model(BATCHES[0]).logits, expected(BATCHES[0]).logits, rtol=1e-3, atol=1e-3)
    known = refit or choice != "magnitude"
    assert report.tokens == (72 if known else None)
    assert len(report.figures) == 3 * known
    assert all(0 < error < 1 for error in report.figures.values())


def test_the_refit_lowers_the_error():
    errors = [
        sum(prune_width(tiny_llama(vocab_size=VOCABULARY), BATCHES, 0.5, refit=refit).figures.values())
        for refit in (True, False)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_experts_lose_as_many_neurons_each_and_not_the_same():
    model = mixtral()
    prune_width(model, BATCHES, 0.5)
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj.shape == (4, 32, 8)
    assert experts.gate_up_proj.shape == (4, 16, 32)
    dense = mixtral().model.layers[0].mlp.experts.gate_up_proj
    stayed = [
        [(row == one).all(1).nonzero().item() for one in rows]
        for row, rows in zip(dense, experts.gate_up_proj, strict=True)
    ]
    assert all([16 + j for j in each[:8]] == each[8:] for each in stayed)
    assert len({tuple(each) for each in stayed}) > 1


def test_nothing_is_removed_if_all_is_kept(llama):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    report = prune_width(llama, BATCHES, 1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert report.title == "unchanged"


def test_the_model_is_left_as_found(llama):
    llama.train()
    llama.model.layers[0].eval()
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    state = torch.get_rng_state()
    prune_width(llama, BATCHES, 0.5)
    assert llama.training
    assert not llama.model.layers[0].training
    assert not llama.model.layers[0].mlp.up_proj.weight.requires_grad
    assert llama.model.layers[0].mlp.down_proj.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    llama(BATCHES[0], labels=BATCHES[0]).loss.backward()


@pytest.mark.parametrize(
    ("width", "keep", "expected"),
    [
        (14336, 0.8, 11520),  # of 256
        (1536, 0.8, 1216),  # of 64
        (1000, 0.8, 800),  # of 16
        (128, 0.8, 104),  # of 8
        (64, 0.8, 51),
        (1536, 1.0, 1536),
        (1000, 1.0, 1000),
    ],
)
def test_how_many_neurons_stay(width, keep, expected):
    assert kept_of(width, keep) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, r"keep must be a fraction of the neurons in \(0, 1\], got 0"),
        ({"keep": 1.2}, "keep must be"),
        ({"keep": float("nan")}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"keep": 0.2, "multiple": 64}, "keep=0.2 of 64 neurons, rounded to a multiple of 64, leaves none"),
        ({"multiple": 0}, "multiple must be a whole number of at least 1, got 0"),
        ({"choice": "random"}, "choice must be one of obs, wanda, magnitude, got 'random'"),
        ({"shrinkage": -1}, "shrinkage must be a finite number of at least 0, got -1"),
        ({"calibration": None}, "need calibration batches"),
        ({"calibration": []}, "the calibration set is empty"),
        ({"layers": "model.blocks"}, "has no list of layers 'model.blocks'"),
        ({"journal": "folder"}, r"journal must be something like Journal\(.*, got 'folder'"),
    ],
)
def test_bad_input_is_refused(llama, settings, message):
    before = [parameter.clone() for parameter in llama.parameters()]
    with pytest.raises(ValueError, match=message):
        prune_width(llama, **{"calibration": BATCHES, **settings})
    assert all(map(torch.equal, llama.parameters(), before))
    assert llama.config.intermediate_size == 64


def broken(how: str):
    model = tiny_llama()
    layers = model.model.layers
    if how == "tied":
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    elif how == "shared":
        layers[1] = layers[0]
    elif how == "nan":
        layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    elif how == "late overflow":
        layers[2].input_layernorm.weight.data[:] = float("inf")
    elif how == "resized":
        model.config.vocab_size = 20
    elif how == "coupled":

        class Normed(torch.nn.Module):
            def __init__(self, mlp):
                super().__init__()
                self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

            def forward(self, x):
                return self.down_proj(self.up_proj(x).softmax(-1))

        for layer in layers:
            layer.mlp = Normed(layer.mlp)
    return model


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("tied", r"layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight are one parameter"),
        ("shared", "are one parameter: a model that uses matrices several times keeps its shapes"),
        ("nan", "model.layers.2.mlp.up_proj has NaN or infinite weights"),
        ("late overflow", "are NaN or infinite"),
        ("resized", r"the config describes another model: model.embed_tokens.weight is \(300, 32\)"),
        ("coupled", r"no MLP of a known coupling.*mlp.up_proj \(64, 32\), model.layers.0.mlp.down_proj \(32, 64\)"),
    ],
)
def test_models_that_cannot_be_narrowed_are_refused(how, message):
    model = broken(how)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_width(model, BATCHES, 0.5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def cut_off(layers, _):
    """Ends a run before the third layer."""
    for number, layer in enumerate(layers):
        if number == 2:
            raise KeyboardInterrupt
        yield layer


def test_a_failure_on_the_way_changes_nothing(llama):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        prune_width(llama, BATCHES, 0.5, progress=cut_off)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert llama.config.intermediate_size == 64


@pytest.mark.parametrize("settings", [{}, {"choice": "magnitude", "refit": False}])
def test_a_run_that_was_cut_off_goes_on_behind_its_finished_layers(settings, tmp_path, monkeypatch):
    whole, resumed, journal = tiny_llama(), tiny_llama(), Journal(tmp_path / "unfinished")
    report = prune_width(whole, BATCHES, 0.5, **settings)
    with pytest.raises(KeyboardInterrupt):
        prune_width(resumed, BATCHES, 0.5, **settings, progress=cut_off, journal=journal)
    solved, prune = [], NeuronRemoval.prune
    monkeypatch.setattr(NeuronRemoval, "prune", lambda *args: solved.append(1) or prune(*args))
    with pytest.raises(ValueError, match=r"holds the finished layers of another run: .*keep: 0.5 there, 0.4 now"):
        prune_width(resumed, BATCHES, 0.4, **settings, journal=journal)
    again = prune_width(resumed, BATCHES, 0.5, **settings, journal=journal)
    assert len(solved) == 1
    assert again.figures == report.figures
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))


def test_a_family_whose_config_cannot_say_the_width_is_refused():
    model = build("BLOOM")
    with pytest.raises(ValueError, match=r"no number in BloomConfig makes transformer.h.0.mlp.dense_h_to_4h.weight"):
        prune_width(model, BATCHES, 0.5)
    assert model.transformer.h[0].mlp.dense_h_to_4h.weight.shape == (128, 32)


def test_columns_that_go_in_part_are_found():
    mask = torch.tensor([[True, False, True, False]] * 3)
    with pytest.raises(ValueError, match="2 columns stay, not 3"):
        Columns(0.25, kept=3).check_mask(mask, 0.0)
    Columns(0.5, kept=2).check_mask(mask, 0.0)
    mask[1, 0] = False
    with pytest.raises(ValueError, match="a column stays in some rows only"):
        Columns(0.5, kept=2).check_mask(mask, 0.0)


def test_numpys_numbers_are_those_of_python(llama):
    swept = {"multiple": np.int64(8), "shrinkage": np.float16(0.1), "attention_keep": np.int8(1)}
    report = prune_width(llama, BATCHES, np.float32(0.7), **swept)
    assert report.title == "intermediate_size 64 -> 48"
    settings = {"keep": 0.7, "choice": "obs", "refit": True, "multiple": 8, "shrinkage": 0.1, "attention_keep": 1}
    assert repr(report.settings) == repr(settings)
