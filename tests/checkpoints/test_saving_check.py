"""What cannot be saved is told before pruning; what can be is not refused."""

import importlib.util
import sys
from contextlib import ExitStack

import pytest
import torch
from helpers import (
    TWO_PROCESSES,
    SomebodysData,
    SomebodysModule,
    sparsities,
    tiny_llama,
    tiny_mixtral,
    token_batches,
    trainer,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from wanda_lightning.callbacks import WandaPruning
from wanda_lightning.checkpoints.loading import load_model, load_streamed
from wanda_lightning.checkpoints.saving import save_pretrained
from wanda_lightning.checkpoints.saving_check import check_can_be_saved
from wanda_lightning.runs.one_shot import whole_run
from wanda_lightning.runs.trainer import PruningTrainer


class WithExtra(LlamaForCausalLM):
    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def undeclared():
    model = tiny_llama()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    return model


def undeclared_storage():
    model = tiny_llama()
    model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[1].mlp.up_proj.weight.data)
    return model


def generation():
    model = tiny_llama()
    model.generation_config.temperature = 0.6  # without do_sample
    return model


def subclass():
    return WithExtra(tiny_llama().config, extra=3)


def wide_part():
    model = tiny_llama().bfloat16()
    model.lm_head.float()
    return model


def dropped_layer():
    model = tiny_llama()
    del model.model.layers[1]
    return model


def longer_vocabulary():
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 310, bias=False)
    return model


def new_part():
    model = tiny_llama()
    model.model.layers[0].adapter = torch.nn.Linear(32, 32)
    return model


def new_buffer():
    model = tiny_llama()
    model.register_buffer("temperature", torch.ones(1))
    return model


def compiled_part():
    model = tiny_llama()
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    return model


UNSAVEABLE = {
    compiled_part: r"gave the weights of model.layers.1.mlp other names: compile it in place, as by module.compile\(\)",
    undeclared: "layers.1.mlp.up_proj.weight and model.layers.2.mlp.up_proj.weight share one weight",
    undeclared_storage: "layers.1.mlp.up_proj.weight and model.layers.2.mlp.up_proj.weight share one weight",
    generation: "`temperature`: `do_sample` is not set",
    subclass: "missing 1 required positional argument: 'extra'",
    wide_part: "lm_head.weight is torch.float32, and would load as torch.bfloat16",
    dropped_layer: r"config describes model.layers.2.* and 8 more weights that it does not have",
    longer_vocabulary: r"lm_head.weight is \(310, 32\), and its config says \(300, 32\)",
    new_part: "do not describe model.layers.0.adapter.weight and 1 more weights",
    new_buffer: "do not describe temperature",
}


@pytest.mark.parametrize("make", UNSAVEABLE)
def test_refused_before_anything_changes(make, tmp_path):
    module = SomebodysModule()
    module.net = make()
    before = {name: weight.clone() for name, weight in module.net.state_dict().items()}
    pruning = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer)
    with pytest.raises(ValueError, match=UNSAVEABLE[make]):
        pruning.prune(module, SomebodysData(), evaluate=False)
    assert all(torch.equal(weight, before[name]) for name, weight in module.net.state_dict().items())
    with pytest.raises(ValueError, match=UNSAVEABLE[make]):
        save_pretrained(module.net, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_that_cannot_be_saved_is_told_of_too(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda self, folder: 1 / 0)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be saved: division by zero"):
        check_can_be_saved(llama, tokenizer)


@pytest.mark.parametrize("make", [tiny_llama, dropped_layer])
def test_the_first_of_two_processes_checks_for_both(make, tmp_path):
    """In the second one transformers saves nothing, and a model of default size would be read back."""
    module = SomebodysModule()
    module.net = make()
    settings = {"max_steps": 0, **TWO_PROCESSES, "use_distributed_sampler": False}
    pruning = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer, **settings)
    with ExitStack() as stack:
        if make in UNSAVEABLE:
            stack.enter_context(pytest.raises(Exception, match=UNSAVEABLE[make]))
        stack.enter_context(whole_run(pruning, module, will_save=True))
        pruning.fit(module, datamodule=SomebodysData())
    assert sparsities(module) == {0.0 if make in UNSAVEABLE else 0.5}


def test_what_is_not_saved_is_not_checked(tmp_path):
    module = SomebodysModule()
    module.net = generation()
    pruning = trainer(tmp_path, WandaPruning(sparsity=0.5), cls=PruningTrainer)
    assert pruning.prune(module, SomebodysData(), evaluate=False, save=False).sparsity == 0.5


def wide_embeddings():
    """The dtype of the embeddings is that of the model: the rest loads in it, and loses nothing."""
    model = tiny_llama().bfloat16()
    model.model.embed_tokens.float()
    return model


def sampling():
    model = tiny_llama()
    model.generation_config.update(do_sample=True, temperature=0.6)
    return model


def tied():
    return tiny_llama(tie_word_embeddings=True)


def cut_to_size():
    model = dropped_layer()
    model.config.num_hidden_layers = 2
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral, tied, wide_embeddings, sampling, cut_to_size])
def test_saved_as_it_is(make, tmp_path, tokenizer):
    model = make()
    random = torch.get_rng_state()
    check_can_be_saved(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), random)
    loaded = load_model(str(save_pretrained(model, tokenizer, tmp_path / "model")))
    for (name, weight), (other, again) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, again.to(weight.dtype)), name


def test_a_streamed_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    check_can_be_saved(load_streamed(str(tmp_path / "model")))
    streamed = load_streamed(str(tmp_path / "model"))
    streamed.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="do_sample"):
        check_can_be_saved(streamed)


def test_in_shards(tmp_path, monkeypatch):
    model = tiny_llama()
    save = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder, **_: save(folder, **_, max_shard_size=20_000))
    folder = save_pretrained(model, None, tmp_path / "model")
    assert len([*folder.glob("model-*.safetensors")]) > 3
    x = token_batches()[0]
    with torch.no_grad():
        assert torch.equal(load_model(str(folder))(x).logits, model(x).logits)


CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class ScaledConfig(LlamaConfig):
    model_type = "scaled_llama"

class ScaledForCausalLM(LlamaForCausalLM):
    config_class = ScaledConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.full((1,), 2.0))
"""


def test_code_of_the_model_s_own_and_its_buffers(tmp_path, monkeypatch):
    (tmp_path / "scaled.py").write_text(CODE)
    spec = importlib.util.spec_from_file_location("scaled", tmp_path / "scaled.py")
    scaled = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "scaled", scaled)
    spec.loader.exec_module(scaled)
    scaled.ScaledConfig.register_for_auto_class()
    scaled.ScaledForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model = scaled.ScaledForCausalLM(
        scaled.ScaledConfig(**tiny_llama().config.to_diff_dict() | {"architectures": None})
    )
    model.scale.fill_(3)
    folder = save_pretrained(model, None, tmp_path / "model")
    assert (folder / "scaled.py").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert loaded.scale.item() == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_buffer_that_does_not_read_back_is_an_error(tmp_path, llama, monkeypatch):
    save = llama.save_pretrained

    def damaged(folder, **settings):
        kept = llama.model.norm.weight.detach().clone()
        if not settings:
            llama.model.norm.weight.data += 1
        save(folder, **settings)
        llama.model.norm.weight.data = kept

    monkeypatch.setattr(llama, "save_pretrained", damaged)
    with pytest.raises(RuntimeError, match=r"does not load as it was: model.norm.weight differs"):
        save_pretrained(llama, None, tmp_path / "model")
    assert not [*tmp_path.iterdir()]


def test_compressed_models_are_explained(tmp_path, llama):
    from wanda_lightning.export.compression import compress

    llama.save_pretrained(tmp_path / "model")
    compress(str(tmp_path / "model"), str(tmp_path / "small"))
    with pytest.raises(ValueError, match=r"`wanda-lightning decompress .*small OUTPUT`, .*load_compressed"):
        load_model(str(tmp_path / "small"))


def test_the_check_does_not_look_at_the_weights():
    """A model of 8 billion parameters that has none can be saved as far as its structure goes."""
    with torch.device("meta"):
        model = tiny_llama(hidden_size=4096, intermediate_size=14336, layers=32, vocab_size=128256)
    check_can_be_saved(model)


class WithEmptyParts(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.one, self.other = (torch.nn.Parameter(torch.empty(0)) for _ in range(2))


def test_parameters_without_values_share_nothing():
    check_can_be_saved(WithEmptyParts(tiny_llama(layers=1).config))
