"""Every family of decoder models that is promised to work, as a tiny random model built from its config.

``python tests/model/test_families.py`` writes the list of families into docs/models.md.
"""

import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from sizes import LAYER_TYPES, LINEAR_ATTENTION, SIZE, VOCABULARY

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import token_batches

from wanda_lightning.calibration.walk import walk
from wanda_lightning.checkpoints.loading import load_streamed
from wanda_lightning.engine.journal import Journal
from wanda_lightning.engine.pruner import prune_model
from wanda_lightning.methods import SparseGPT, Wanda
from wanda_lightning.model.decoder import coverage, decoder_layers
from wanda_lightning.model.offload import stored_parameters
from wanda_lightning.sparsity import SemiStructured, Unstructured
from wanda_lightning.statistics import InputNorm

LENGTH = 12

NO_GROUPS = {"num_key_value_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
GEMMA3N = {
    **LAYER_TYPES,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
DEEPSEEK = {
    **NO_GROUPS,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}

# The name in docs/models.md, the config's class, and what it needs beyond SIZE.
FAMILIES = {
    "OPT": ("OPTConfig", OPT),
    "OPT (post-norm, projected embeddings)": (
        "OPTConfig",
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "GPT-2": ("GPT2Config", GPT2),
    "GPT-Neo": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "GPT-J": ("GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "GPT-NeoX (Pythia)": ("GPTNeoXConfig", {}),
    "BLOOM": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "Falcon": ("FalconConfig", {"new_decoder_architecture": False, "multi_query": True}),
    "Falcon (ALiBi)": ("FalconConfig", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "LLaMA": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": 4}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {"head_dim": 8}),
    "Qwen3-MoE": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 8}),
    "Gemma 2": ("Gemma2Config", LAYER_TYPES),
    "Gemma 3": ("Gemma3TextConfig", LAYER_TYPES),
    "Gemma 3n": ("Gemma3nTextConfig", GEMMA3N),
    "Gemma 4": ("Gemma4TextConfig", {**GEMMA3N, "global_head_dim": 16}),
    "Gemma 4 (MoE)": (
        "Gemma4TextConfig",
        {**LAYER_TYPES, **EXPERTS, "enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 16}
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    "Phi": ("PhiConfig", NO_GROUPS),
    "Phi-3": ("Phi3Config", {}),
    "OLMo 2": ("Olmo2Config", {}),
    "StableLM": ("StableLmConfig", {}),
    "Cohere": ("CohereConfig", {}),
    "Cohere 2": ("Cohere2Config", LAYER_TYPES),
    "DeepSeek-V3": ("DeepseekV3Config", DEEPSEEK),
    "GPT-OSS": ("GptOssConfig", {**LAYER_TYPES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite": ("GraniteConfig", {}),
    "SmolLM3": ("SmolLM3Config", {}),
    "MPT": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "StarCoder": ("GPTBigCodeConfig", GPT2),
    "StarCoder 2": ("Starcoder2Config", {}),
    "OLMo 3": ("Olmo3Config", {"layer_types": LAYER_TYPES["layer_types"], "sliding_window": 4}),
    "OLMoE": ("OlmoeConfig", EXPERTS),
    "Phi-3.5-MoE": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GLM-4": ("Glm4Config", {"head_dim": 8}),
    "GLM-4-MoE": (
        "Glm4MoeConfig",
        {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    ),
    "GLM-MoE-DSA": (  # every second layer attends to the tokens that the one before it has chosen
        "GlmMoeDsaConfig",
        {**DEEPSEEK, "mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention"] * 2}
        | {"indexer_types": ["full", "shared"], "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    ),
    "ERNIE 4.5": ("Ernie4_5Config", {"head_dim": 8}),
    "ERNIE 4.5 (MoE)": ("Ernie4_5_MoeConfig", {"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2}),
    "Seed-OSS": ("SeedOssConfig", {"head_dim": 8}),
    "Hunyuan": ("HunYuanDenseV1Config", {"head_dim": 8}),
    "Nemotron": ("NemotronConfig", {"head_dim": 8}),
    "MiniMax-M2": ("MiniMaxM2Config", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite MoE": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite 4 (hybrid)": (
        "GraniteMoeHybridConfig",
        {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32, "num_local_experts": 4}
        | {"num_experts_per_tok": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "Qwen3-Next": ("Qwen3NextConfig", {**LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3.5": ("Qwen3_5TextConfig", LINEAR_ATTENTION),
    "Qwen3.5 (MoE)": ("Qwen3_5MoeTextConfig", {**LINEAR_ATTENTION, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "Mamba": ("MambaConfig", {"state_size": 8}),
    "Mamba 2": ("Mamba2Config", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    "Jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "Falcon-H1": (
        "FalconH1Config",
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "head_dim": 8},
    ),
    "Nemotron-H": (
        "NemotronHConfig",
        {"head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
        | {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    ),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8, "head_dim": 8},
    ),
    "MiniMax": ("MiniMaxConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "Kimi Linear": (
        "KimiLinearConfig",
        {**DEEPSEEK, "num_experts": 4, "num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1}
        | {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "DeepSeek-V4": (  # several streams of hidden states, and a matrix of blocks that stays dense
        "DeepseekV4Config",
        {"head_dim": 8, "q_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {
            "sliding_window": 4,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
        }
        | {"hc_mult": 2, "num_nextn_predict_layers": 0, "mlp_layer_types": ["moe"] * 2},
    ),
    "Llama 4": (  # each expert multiplies all tokens, by zeros where it was not chosen
        "Llama4TextConfig",
        {**NO_GROUPS, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "LongCat-Flash": (  # two attentions and MLPs a layer, in lists
        "LongcatFlashConfig",
        {**DEEPSEEK, "num_layers": 2, "ffn_hidden_size": 32, "moe_intermediate_size": 64, "moe_topk": 2}
        | {"zero_expert_num": 0, "topk_group": 1, "n_group": 1},
    ),
    "HRM-Text": (  # two lists of layers, which it goes through several times
        "HrmTextConfig",
        {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 12},
    ),
}

# Models that cannot be pruned yet: what they need, the reason for docs/models.md, and what the error says.
REFUSED = {
    "JetMoE": (
        "JetMoeConfig",
        {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "its experts are fused in a way of its own",
        r"of the decoder's matrix weights are not in linears.*mlp\.input_linear\.weight",
    ),
    "DBRX": (
        "DbrxConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
        | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}
        | {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
        "all its experts are one matrix",
        r"of the decoder's matrix weights are not in linears.*ffn\.experts\.mlp\.w1 \(256, 32\)",
    ),
}

# What is peculiar about streaming them: Conv1D, projected embeddings, two layer types, keys and values that layers
# share, embeddings a layer, fused experts, transposed ones, layers of other kinds than attention.
STREAMED = [
    "OPT (post-norm, projected embeddings)",
    "GPT-2",
    "Gemma 3",
    "Gemma 3n",
    "Gemma 4",
    "Gemma 4 (MoE)",
    "Qwen3-MoE",
    "DeepSeek-V3",
    "GPT-OSS",
    "Llama 4",
    "Qwen3-Next",
    "Jamba",
    "Mamba",
    "Falcon-H1",
]

# Not matrices of linears: what state-space models and their like multiply with channel by channel, or head by head;
# DeepSeek-V4's output projection, group by group, and what mixes its streams.
NO_LINEARS = (
    "conv1d.weight",
    "conv_1d.weight",
    "conv.conv.weight",
    "A_log",
    "_gate_weight",
    "o_a_proj.weight",
    "hc.fn",
)

PRUNINGS = [
    (method, pattern) for method in (Wanda(), SparseGPT()) for pattern in (Unstructured(0.5), SemiStructured(2, 4))
]


def config_of(name: str):
    import transformers

    kind, settings, *_ = (FAMILIES | REFUSED)[name]
    return getattr(transformers, kind)(**SIZE | settings)


def build(name: str):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=list(FAMILIES))
def dense(request):
    """A model of each family; the tests that change it put it back."""
    return build(request.param)


@pytest.fixture
def model(dense):
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    yield dense
    dense.load_state_dict(before)


@pytest.fixture
def batches():
    return token_batches(batches=2, length=LENGTH, vocab=VOCABULARY)


def left_padded(ids_BT):
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :5] = 0
    return {"input_ids": ids_BT.masked_fill(mask_BT == 0, 0), "attention_mask": mask_BT}


@torch.no_grad()
def logits_with(model, batch, last_layer, hidden_BTD):
    """The model's logits, with other hidden states in place of what the last call of its last layer gives."""
    calls = []
    hook = last_layer.register_forward_hook(lambda *_: calls.append(None))
    model(**batch)
    hook.remove()

    def replace(_, args, out):
        calls.pop()
        if calls:
            return out
        return type(out)((hidden_BTD, *out[1:])) if isinstance(out, tuple | list) else hidden_BTD

    hook = last_layer.register_forward_hook(replace)
    logits = model(**batch).logits
    hook.remove()
    return logits


@pytest.mark.parametrize("padding", [False, True])
@torch.no_grad()
def test_the_walk_reproduces_the_logits_exactly(dense, batches, padding):
    batches = [left_padded(batch) if padding else {"input_ids": batch} for batch in batches]
    layers = decoder_layers(dense)
    *_, last = walk(dense, layers, batches)
    outputs = list(last.outputs())
    for batch, hidden_BTD in zip(batches, outputs, strict=True):
        logits = dense(**batch).logits
        assert torch.equal(logits_with(dense, batch, layers[-1].module, hidden_BTD), logits)
        assert not torch.equal(logits_with(dense, batch, layers[-1].module, hidden_BTD + 1e-2), logits)


@torch.no_grad()
def test_statistics_of_the_last_layer_equal_those_of_a_plain_forward(dense, batches):
    layers = decoder_layers(dense)
    for step in walk(dense, layers, batches, statistic=InputNorm):
        norms = step.collect(InputNorm)
    linears = [linear for linear in layers[-1].linears if linear.expert is None]
    inputs = {linear.name: [] for linear in linears}
    hooks = [
        linear.module.register_forward_pre_hook(lambda _, args, seen=inputs[linear.name]: seen.append(args[0].double()))
        for linear in linears
    ]
    for batch in batches:
        dense(batch)
    for hook in hooks:
        hook.remove()
    assert norms.keys() == {linear.name for linear in layers[-1].linears}
    for name, seen in inputs.items():
        x_TI = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
        assert norms[name].tokens == len(x_TI) == 2 * 2 * LENGTH * getattr(dense.config, "H_cycles", 1)
        torch.testing.assert_close(norms[name].compute().double(), x_TI.norm(dim=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("method", "pattern"), PRUNINGS, ids=str)
def test_every_prunable_weight_reaches_the_target(model, batches, method, pattern):
    layers = decoder_layers(model)
    report = prune_model(model, batches, method, pattern)
    linears = [linear for layer in layers for linear in layer.linears]
    assert [row.name for row in report.linears] == [linear.name for linear in linears]
    assert {row.sparsity for row in report.linears} == {0.5}
    assert all(row.tokens for row in report.linears)
    for linear in linears:
        assert (linear.weight_OI == 0).sum() * 2 == linear.weight_OI.numel()
        if isinstance(pattern, SemiStructured):
            assert ((linear.weight_OI != 0).reshape(-1, 4).sum(1) == 2).all()
    assert coverage(layers) > 0.88
    left = {name for name, reason in report.not_pruned.items() if reason not in ("router", "thin")}
    assert all(name.endswith(NO_LINEARS) for name in left), left


def test_one_pass_is_enough(model, batches):
    layers = decoder_layers(model)
    report = prune_model(model, batches, Wanda(), SemiStructured(2, 4), true_sequential=True, exact_error=True)
    linears = [linear for layer in layers for linear in layer.linears]
    assert [row.name for row in report.linears] == [linear.name for linear in linears]
    for linear in linears:
        assert ((linear.weight_OI != 0).reshape(-1, 4).sum(1) == 2).all()
    assert all(row.error_is_exact and 0 <= row.error < 1 for row in report.linears)  # 0: Gemma 3n begins with zeros
    may_be_experts = any(linear.may_be_passed_by for linear in linears)  # in a list, as LongCat's are
    assert report.order == ("two passes" if may_be_experts else "one pass")


@torch.no_grad()
def test_a_saved_model_gives_the_same_logits(model, batches, tmp_path):
    prune_model(model, batches, Wanda(), Unstructured(0.5))
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(reloaded(batches[0]).logits, model(batches[0]).logits)


@pytest.mark.parametrize("name", STREAMED)
def test_streaming_from_disk_gives_the_same_weights(name, batches, tmp_path):
    whole = build(name)
    whole.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    streamed = load_streamed(str(tmp_path / "dense"))
    assert all(parameter.is_meta for layer in decoder_layers(streamed) for parameter in layer.module.parameters())
    before = {name: values.clone() for name, values in stored_parameters(streamed)}
    for model in (whole, streamed):
        prune_model(model, batches, Wanda(), Unstructured(0.5), journal=Journal(tmp_path / f"{model is whole}"))
    assert not all(torch.equal(before[name], parameter) for name, parameter in whole.named_parameters())
    after = dict(stored_parameters(streamed))
    assert all(torch.equal(after[name], parameter) for name, parameter in whole.named_parameters())
    with torch.no_grad():
        assert torch.equal(streamed(batches[0]).logits, whole(batches[0]).logits)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name, batches):
    model = build(name)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=REFUSED[name][-1]):
        prune_model(model, batches, Wanda(), Unstructured(0.5))
    assert all(map(torch.equal, model.parameters(), before))


ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- /families -->)", re.DOTALL)


def as_a_table() -> str:
    """The part of docs/models.md between its marks."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    classes = {name: MODEL_FOR_CAUSAL_LM_MAPPING[type(config_of(name))].__name__ for name in FAMILIES | REFUSED}
    lines = ["| Tested family | transformers class |", "| --- | --- |"]
    lines += [f"| {name} | `{classes[name]}` |" for name in FAMILIES]
    lines += ["", "Refused with an error, before anything changes:", ""]
    lines += [f"- {name} (`{classes[name]}`): {reason}" for name, (_, _, reason, _) in REFUSED.items()]
    return "\n".join(lines) + "\n"


def as_sentences() -> str:
    """The part of the README between its marks."""
    refused = "; ".join(f"{name} ({reason})" for name, (_, _, reason, _) in REFUSED.items())
    sentences = f"Tested: {', '.join(FAMILIES)}. Refused with an error, before anything changes: {refused}."
    return textwrap.fill(sentences, 120, break_long_words=False, break_on_hyphens=False) + "\n"


PAGES = {ROOT / "docs/models.md": as_a_table, ROOT / "README.md": as_sentences}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_list_the_families(page):
    (listed,) = MARKED.findall(page.read_text(encoding="utf-8"))
    assert listed == PAGES[page](), "run python tests/model/test_families.py"


if __name__ == "__main__":
    for page, listed in PAGES.items():
        text = listed()
        page.write_text(MARKED.sub(lambda _, text=text: text, page.read_text(encoding="utf-8")), encoding="utf-8")
        print(text)
