"""Models that see images, or hear, too are loaded whole; their language decoder is pruned, on text."""

from copy import deepcopy

import pytest
import torch
from sizes import LAYER_TYPES, LINEAR_ATTENTION, SIZE, VOCABULARY

from wanda_lightning.checkpoints.loading import load_model, load_streamed
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.inspection.inspect_model import inspect_model
from wanda_lightning.methods import Wanda
from wanda_lightning.model.offload import stored_parameters
from wanda_lightning.sparsity import SemiStructured

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 14,
}

# What transformers calls them, and the configs of their two parts. To AutoModelForCausalLM the first is unknown, the
# second is what it is here, and of the third it would load the language model alone. The fourth has shorter names for
# its layers in files. The last one hears.
MODELS = {
    "Mistral3": ({"model_type": "mistral", **SIZE}, {"model_type": "pixtral", **TOWER}),
    "Gemma3": ({**SIZE, **LAYER_TYPES}, TOWER),
    "Qwen3_5": (
        {**SIZE, **LINEAR_ATTENTION},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
    ),
    "Qwen2_5_VL": (
        {**SIZE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
    ),
    "Voxtral": (
        {"model_type": "llama", **SIZE, "head_dim": 8},
        {name: TOWER[name] for name in TOWER if "size" not in name} | {"hidden_size": 32, "intermediate_size": 64},
    ),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A tiny model of each kind, and its folder."""
    import transformers

    text, other = MODELS[request.param]
    sense = "audio_config" if request.param == "Voxtral" else "vision_config"
    config = getattr(transformers, f"{request.param}Config")(text_config=text, **{sense: other})
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForConditionalGeneration")(config).eval()
    save_pretrained(model, None, tmp_path / "dense")
    return model, tmp_path / "dense"


@pytest.fixture
def batches():
    return list(torch.randint(3, VOCABULARY, (2, 2, 12), generator=torch.Generator().manual_seed(1)))


def test_the_language_decoder_is_pruned_and_nothing_else(saved, batches, tmp_path):
    dense, folder = saved
    model = load_model(str(folder))
    assert type(model) is type(dense)
    report = prune_model(model, batches, Wanda(), SemiStructured(2, 4))
    pruned = {f"{row.name}.weight" for row in report.linears}
    assert len(pruned) > 12
    before = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        zeros = (parameter == 0).sum() * 2 == parameter.numel()
        assert zeros if name in pruned else torch.equal(parameter, before[name]), name
    save_pretrained(model, None, tmp_path / "pruned")
    with torch.no_grad():
        reloaded = load_model(str(tmp_path / "pruned"))
        assert torch.equal(reloaded(batches[0]).logits, model(batches[0]).logits)
    weights = inspect_model(str(tmp_path / "pruned")).weights
    assert len(weights.linears) == len(pruned)
    assert (weights.sparsity, weights.pattern, weights.exceptions) == (0.5, "2:4", [])
    assert weights.check.loads_whole


@pytest.mark.parametrize("saved", ["Gemma3"], indirect=True)
@pytest.mark.parametrize("load", [load_model, load_streamed])
def test_how_images_are_prepared_is_saved_too(saved, tmp_path, load):
    _, folder = saved
    prepared = {"processor_config.json": '{"image_seq_length": 4}', "preprocessor_config.json": '{"do_resize": true}'}
    for name, content in prepared.items():
        (folder / name).write_text(content)
    pruned = save_pretrained(load(folder), None, tmp_path / "pruned")
    assert {name: (pruned / name).read_text() for name in prepared} == prepared


@pytest.mark.parametrize("saved", ["Gemma3"], indirect=True)
def test_how_images_are_prepared_comes_from_the_hub_as_the_model_did(saved, tmp_path, monkeypatch):
    import huggingface_hub

    model, folder = saved
    (folder / "preprocessor_config.json").write_text("{}")
    model.name_or_path, model.config._commit_hash = "somebody/model", "0" * 40
    at = {"somebody/model": {"0" * 40: str(folder)}}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision, allow_patterns: at[name][revision])
    assert (save_pretrained(model, None, tmp_path / "pruned") / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("saved", ["Gemma3"], indirect=True)
def test_a_model_is_saved_where_there_is_no_hub_to_ask(saved, tmp_path, caplog):
    saved[0].name_or_path = "somebody/model"
    assert (save_pretrained(saved[0], None, tmp_path / "pruned") / "config.json").is_file()
    assert "settings of processors, if somebody/model has any, are not saved" in caplog.text


def test_streamed_it_is_the_same(saved, batches, tmp_path):
    whole, folder = saved
    streamed = load_streamed(str(folder))
    for model in (whole, streamed):
        prune_model(model, batches, Wanda(), SemiStructured(2, 4), journal=Journal(tmp_path / f"{model is whole}"))
    after = dict(stored_parameters(streamed))
    assert all(torch.equal(after[name], parameter) for name, parameter in whole.named_parameters())


@pytest.mark.parametrize("saved", ["Gemma3"], indirect=True)
def test_images_that_are_left_out_are_named_once(saved, batches, caplog):
    with_images = [{"input_ids": ids, "pixel_values": torch.zeros(2, 3, 28, 28)} for ids in batches]
    prune_model(saved[0], with_images, Wanda(), SemiStructured(2, 4))
    assert caplog.text.count("calibrated on token ids alone, and not on pixel_values") == 1


def qwen3_vl():
    """What its tower sees is added to the hidden states of image tokens behind the first two decoder layers, too."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {**SIZE, "num_hidden_layers": 3, "head_dim": 8, "rope_parameters": rope}
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    tower |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62}
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=tower, **ids)).eval()


def of_images(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (2, 12), generator=generator)
    ids[:, 1], ids[:, 2:6] = 62, 60
    pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
    types = (ids == 60).long()
    return {"input_ids": ids, "pixel_values": pixels, "mm_token_type_ids": types} | {
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)
    }


def test_what_is_seen_may_be_added_between_decoder_layers():
    """Wanda by hand for the last layer: with what enters it in the model whose first layers are pruned."""
    model, batches, inputs = qwen3_vl(), [of_images(1), of_images(2)], []
    prune_model(model, batches, Wanda(), SemiStructured(2, 4), forward=lambda m, batch: m(**batch, use_cache=False))
    by_hand = qwen3_vl()
    by_hand.load_state_dict(
        {n: w for n, w in model.state_dict().items() if "layers.2" not in n}, strict=False, assign=True
    )
    last = by_hand.model.language_model.layers[2].self_attn.q_proj
    last.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            by_hand(**batch)
    score = (last.weight.detach().double().abs() * torch.cat(inputs).norm(dim=0)).unflatten(-1, (-1, 4))
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(2).indices, value=True).flatten(1)
    assert torch.equal(model.model.language_model.layers[2].self_attn.q_proj.weight != 0, kept)


@pytest.fixture
def mllama():
    """Of its four layers two attend to an image, and are passed by where there is none."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**SIZE, "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "rope_parameters": rope}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
    sizes = {"attention_heads": 4, "image_size": 28, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96}
    torch.manual_seed(0)
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision | sizes)).eval()


def test_layers_that_need_an_image_are_named_where_there_is_none(mllama, batches):
    before = [parameter.clone() for parameter in mllama.parameters()]
    with pytest.raises(
        ValueError, match=r"passes by 2 of its 4 .*ignore=\['model.language_model.layers.1.\*', .*3.\*'\]"
    ):
        prune_model(mllama, batches, Wanda(), SemiStructured(2, 4))
    assert all(map(torch.equal, mllama.parameters(), before))


def test_layers_that_are_passed_by_can_be_left_out(mllama, batches):
    without = deepcopy(mllama)
    text = without.model.language_model
    text.layers, text.cross_attention_layers = torch.nn.ModuleList([text.layers[0], text.layers[2]]), []
    report = prune_model(mllama, iter(batches), Wanda(), SemiStructured(2, 4), ignore=["layers.1.*", "layers.3.*"])
    prune_model(without, batches, Wanda(), SemiStructured(2, 4))
    layers = mllama.model.language_model.layers
    assert all(map(torch.equal, [*layers[0].parameters(), *layers[2].parameters()], text.layers.parameters()))
    assert report.matches == {"layers.1.*": 7, "layers.3.*": 7}
    assert len(report.not_pruned) == 14


@pytest.mark.parametrize("kind", ["vit", "bart", "blip-2", "kosmos-2", "qwen3_omni_moe"])
def test_a_model_that_does_not_take_text_alone_is_refused(kind, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    for load in (load_model, load_streamed, inspect_model):
        with pytest.raises(
            ValueError, match=f"a model of type '{kind}' is no causal language model .* takes text alone"
        ):
            load(str(tmp_path))
