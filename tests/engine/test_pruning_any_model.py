"""``prune_model`` on models of every kind."""

from copy import deepcopy

import pytest
import torch
from helpers import SomebodysModule, token_batches
from kinds_of_models import STACKS, Keywords, build, convnext, swin, t5, transformer_encoder, vit
from torch import nn

from wanda_lightning import SemiStructured, SparseGPT, Wanda, prune_model
from wanda_lightning.calibration.feed import call_with
from wanda_lightning.checkpoints.saving import save_pretrained, save_weights
from wanda_lightning.engine.journal import Journal
from wanda_lightning.model.decoder import every_linear


def output(model, batch):
    """Run a model; return the first of what it gives that is no loss."""
    with torch.no_grad():
        out = call_with(model, batch)
    values = out.values() if isinstance(out, dict) else [out]
    return next(x for x in values if isinstance(x, torch.Tensor) and x.dim())


@pytest.mark.parametrize("kind", STACKS, ids=lambda kind: kind.__name__)
def test_every_linear_of_every_list_has_the_zeros_asked_for_and_a_copy_loads(kind, tmp_path):
    model, batches = build(kind)
    dense, fresh = deepcopy(model.state_dict()), deepcopy(model)
    report = prune_model(model, batches, Wanda(), 0.5)
    layers = dict.fromkeys(row.layer.rpartition(".")[0] for row in report.linears)
    assert [*layers] == STACKS[kind]
    names = {row.name for row in report.linears}
    pruned = {linear.name: linear for linear in every_linear(model, ["of any model"]) if linear.name in names}
    assert pruned.keys() == names
    for name, linear in pruned.items():
        zeros_O = (linear.weight_OI == 0).sum(1)
        assert (zeros_O == linear.weight_OI.shape[1] // 2).all(), name
    changed = {linear.parameter_name for linear in pruned.values()}
    for name, weight in model.state_dict().items():
        assert name in changed or torch.equal(weight, dense[name]), name
    assert all(reason for reason in report.not_pruned.values())

    if hasattr(model, "save_pretrained"):
        save_pretrained(model, None, tmp_path)
        fresh = type(model).from_pretrained(tmp_path)
    else:
        from safetensors.torch import load_model

        save_weights(model, tmp_path)
        load_model(fresh, str(tmp_path / "model.safetensors"))
    assert torch.equal(output(fresh.eval(), batches[0]), output(model, batches[0]))


class WithNames(SomebodysModule):
    """Is called with names alone, as a CausalLM is."""

    def forward(self, **inputs):
        return self.net(**inputs)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(SomebodysModule, "has no forward to be called with a batch"), (WithNames, "too many positional arguments")],
)
def test_what_to_do_with_a_module_that_no_batch_fits_is_said(kind, why):
    module = kind()
    before = deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=rf"{kind.__name__}.*{why}.*prune the model that it holds"):
        prune_model(module, token_batches(), Wanda(), 0.5)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_an_error_within_a_model_is_not_taken_for_one_of_its_call():
    model, batches = transformer_encoder()
    model.register_forward_pre_hook(lambda *_: torch.ones(1).sum("no dimension"))
    with pytest.raises(TypeError, match="sum"):
        prune_model(model, batches, Wanda(), 0.5)


@pytest.mark.parametrize("kind", [t5, swin, convnext, transformer_encoder], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("true_sequential", [False, True])
def test_second_order_and_n_of_m(kind, true_sequential):
    model, batches = build(kind)
    report = prune_model(model, batches, SparseGPT(), SemiStructured(2, 4), true_sequential=true_sequential)
    assert {row.sparsity for row in report.linears} == {0.5}
    for linear in every_linear(model, ["of any model"]):
        if linear.name in {row.name for row in report.linears}:
            assert ((linear.weight_OI != 0).reshape(-1, 4).sum(1) == 2).all()


def test_a_later_list_is_pruned_with_what_the_pruned_earlier_one_gives():
    """The decoder alone, behind an encoder that is pruned already, is pruned to the same weights."""
    model, batches = build(t5)
    in_turn = deepcopy(model)
    prune_model(model, batches, SparseGPT(), 0.5)
    prune_model(in_turn, batches, SparseGPT(), 0.5, layers="encoder.block")
    prune_model(in_turn, batches, SparseGPT(), 0.5, layers=["decoder.block"])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, in_turn.state_dict()[name]), name


def test_a_function_runs_the_model_and_batches_may_be_anything():
    model, batches = build(vit)
    plain = deepcopy(model)
    prune_model(plain, batches, "wanda", 0.5)
    wrapped = [("an image", {"deep": [batch["pixel_values"]]}) for batch in batches]
    report = prune_model(
        model, iter(wrapped), "wanda", 0.5, forward=lambda model, batch: model(pixel_values=batch[1]["deep"][0])
    )
    assert report.sparsity == 0.5
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_layers_with_keywords_and_second_outputs():
    model, batches = build(lambda: (Keywords(), [torch.randn(2, 5, 16)]))
    assert prune_model(model, batches, "wanda", 0.5).sparsity == 0.5


def test_a_patch_embedding_is_pruned_when_a_target_names_it():
    model, batches = build(vit)
    report = prune_model(model, batches, "wanda", 0.5, targets=["patch_embeddings.projection", "attention.*"])
    first = report.linears[0]
    assert first.name == "vit.embeddings.patch_embeddings.projection"
    assert (first.shape, first.sparsity, first.tokens) == ((32, 48), 0.5, 2 * 2 * 16)
    assert {row.name.split(".")[3] for row in report.linears[1:]} == {"attention"}
    with pytest.raises(ValueError, match="'nothing' matches no linear"):
        prune_model(model, batches, "wanda", 0.5, targets=["nothing"])


def test_what_stays_dense_is_named_with_its_share(caplog):
    model, batches = build(convnext)
    report = prune_model(model, batches, "wanda", 0.5)
    assert report.not_pruned["convnext.encoder.stages.0.layers.0.dwconv.weight"] == "not in a linear"
    assert report.not_pruned["convnext.encoder.stages.1.downsampling_layer.1.weight"] == "outside of the layers"
    assert "% of the matrix weights lie outside of the layers and stay dense" in caplog.text


class MostlyOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 200)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.body(x)


def test_a_model_that_is_mostly_outside_of_layers_is_refused_unless_they_are_named():
    model, batches = MostlyOutside(), [torch.randn(4, 8)]
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"93% of the matrix weights lie outside.*body\.weight \(1,600\).*name them"):
        prune_model(model, batches, "wanda", 0.5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert prune_model(model, batches, "wanda", 0.5, layers="layers").sparsity == 0.5


def test_magnitude_needs_no_batches():
    model, batches = build(swin)
    with_batches = deepcopy(model)
    report = prune_model(model, None, "magnitude", 0.5)
    assert [*dict.fromkeys(row.layer.rpartition(".")[0] for row in report.linears)] == STACKS[swin]
    prune_model(with_batches, batches, "magnitude", 0.5)
    assert all(map(torch.equal, model.parameters(), with_batches.parameters()))
    with pytest.raises(ValueError, match="no ModuleList or Sequential"):
        prune_model(nn.Linear(4, 4), None, "magnitude", 0.5)


@pytest.mark.parametrize("given", [[torch.zeros(1, 4)], None])
def test_of_a_module_that_has_not_loaded_its_model_it_is_said_what_does(given):
    with pytest.raises(ValueError, match=r"holds no weights yet; call its configure_model\(\) first"):
        prune_model(SomebodysModule(lazy=True), given, "magnitude", 0.5)


def test_a_run_goes_on_behind_the_layers_that_are_finished(tmp_path):
    model, batches = build(t5)
    whole, again = deepcopy(model), deepcopy(model)
    prune_model(whole, batches, "wanda", 0.5)

    class CutOffError(Exception):
        pass

    def until_the_decoder(visits, number):
        for count, visit in enumerate(visits):
            if count == 3:
                raise CutOffError
            yield visit

    with pytest.raises(CutOffError):
        prune_model(model, batches, "wanda", 0.5, journal=(first := Journal(tmp_path)), progress=until_the_decoder)
    first.release()
    prune_model(again, batches, "wanda", 0.5, journal=Journal(tmp_path))
    assert all(map(torch.equal, again.parameters(), whole.parameters()))


def test_the_model_is_left_as_it_was_found():
    model, batches = build(t5)
    model.train()
    assert model.config.use_cache
    fast = torch.backends.mha.get_fastpath_enabled()
    prune_model(model, batches, "wanda", 0.5)
    assert model.training
    assert model.config.use_cache
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_language_model_beside_a_head_keeps_the_head(llama, batches):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.head = llama.model, nn.Linear(32, 2)

        def forward(self, input_ids):
            return self.head(self.model(input_ids).last_hidden_state[:, -1])

    alone = deepcopy(llama)
    model = Classifier()
    head = model.head.weight.clone()
    report = prune_model(model, [{"input_ids": batch} for batch in batches], "wanda", 0.5)
    assert report.not_pruned["head.weight"] == "outside of the layers"
    assert torch.equal(model.head.weight, head)
    prune_model(alone, batches, "wanda", 0.5)
    for one, other in zip(llama.model.layers.parameters(), alone.model.layers.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Attends(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **sizes)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 12}], ids=["in one", "apart"])
def test_each_matrix_of_packed_attention_loses_half_of_its_own_weights(sizes):
    model = nn.ModuleDict({"layers": nn.ModuleList([Attends(**sizes), Attends(**sizes)])})

    def projections():
        attention = model["layers"][1].attention
        apart = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
        return [each.detach().clone() for each in (apart if sizes else attention.in_proj_weight.chunk(3))]

    expected = [torch.where(w.abs() > w.abs().flatten().sort()[0][w.numel() // 2 - 1], w, 0) for w in projections()]
    prune_model(model, None, "magnitude", 0.5)
    assert all(map(torch.equal, projections(), expected))


@pytest.mark.parametrize("batch", [(), {}, torch.empty(0, 8)], ids=str)
def test_a_first_batch_without_numbers_is_refused(batch):
    with pytest.raises(ValueError, match="a calibration batch must hold tensors that are not empty"):
        prune_model(nn.Sequential(Block(), Block()), [batch], "wanda", 0.5)


class Head(Block):
    def forward(self, x):
        return {"score": super().forward(x)}


def test_a_list_of_heads_that_give_no_hidden_states_stays_dense():
    model = nn.ModuleDict({"layers": nn.Sequential(Block(), Block()), "heads": nn.ModuleList([Head(), Head()])})

    def forward(model, batch):
        x = model["layers"](batch)
        return [head(x) for head in model["heads"]]

    report = prune_model(model, [torch.randn(6, 8)], "wanda", 0.5, forward=forward)
    assert {row.layer for row in report.linears} == {"layers.0", "layers.1"}
    model["layers"] = nn.Identity()
    with pytest.raises(ValueError, match="heads: a layer gives dict"):
        prune_model(model, [torch.randn(6, 8)], "wanda", 0.5, forward=forward)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_sequential_may_be_the_whole_model(true_sequential):
    torch.manual_seed(0)
    whole, batches = nn.Sequential(Block(), Block(), Block()), list(torch.randn(3, 2, 5, 8))
    within = nn.ModuleDict({"blocks": deepcopy(whole)})
    report = prune_model(whole, batches, SparseGPT(), 0.5, true_sequential=true_sequential)
    prune_model(
        within, batches, SparseGPT(), 0.5, true_sequential=true_sequential, forward=lambda model, x: model["blocks"](x)
    )
    assert [row.name for row in report.linears] == [f"{layer}.{name}" for layer in range(3) for name in ("up", "down")]
    assert all(map(torch.equal, whole.parameters(), within.parameters()))


def test_of_a_sequential_of_stages_the_lists_within_are_pruned():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.blocks(x).tanh()

    report = prune_model(nn.Sequential(Stage(), Stage()), list(torch.randn(3, 2, 5, 8)), Wanda(), 0.5)
    assert [*dict.fromkeys(row.layer for row in report.linears)] == [f"{n}.blocks.{k}" for n in (0, 1) for k in (0, 1)]
    assert report.sparsity == 0.5
