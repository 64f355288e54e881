import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import tiny_llama, tiny_mixtral
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from wanda_lightning.evaluation import Perplexity


def reference(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Token by token in float64."""
    total, count = 0.0, 0
    for row, targets in zip(logits.double(), labels, strict=True):
        for scores, target in zip(row[:-1], targets[1:], strict=True):
            if target != -100:
                total += (scores.logsumexp(0) - scores[target]).item()
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 150, 40, generator=generator)).to(dtype)
    labels = torch.randint(0, 40, (2, 150), generator=generator)
    labels[1, :20] = -100
    metric = Perplexity()
    metric.update(logits[:1], labels[:1])
    metric.update(logits[1:], labels[1:])
    assert metric.compute().item() == pytest.approx(reference(logits, labels), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_that_is_converted_to_half_precision_sums_as_before(dtype):
    """As Lightning's ``bf16-true`` and ``16-true`` do with the whole LightningModule."""
    module = torch.nn.ModuleList([Perplexity()]).to(dtype)
    module[0].update(torch.zeros(1, 40_000, 8), torch.zeros(1, 40_000, dtype=torch.long))
    assert module[0].compute().item() == pytest.approx(8, rel=1e-6)


def test_a_confident_wrong_token_is_not_infinite():
    logits = torch.tensor([[[60.0, 0.0], [0.0, 0.0]]], dtype=torch.float16)
    metric = Perplexity()
    metric.update(logits, torch.tensor([[0, 1]]))
    assert metric.compute().item() == pytest.approx(math.exp(60), rel=1e-6)


def test_equals_the_loss_of_transformers(llama, batches):
    with torch.no_grad():
        out = llama(batches[0], labels=batches[0])
    metric = Perplexity()
    metric.update(out.logits, batches[0])
    assert metric.compute().item() == pytest.approx(out.loss.exp().item(), rel=1e-5)


class LargestNew(TorchDispatchMode):
    """Notes the size of the largest tensor that was made while it is on; views make none."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_the_logits_is_made(dtype):
    logits, labels = torch.randn(4, 512, 300).to(dtype), torch.randint(0, 300, (4, 512))
    metric = Perplexity()
    with LargestNew() as largest:
        metric.update(logits, labels)
    assert largest.numel == 128 * 300  # of the log-probabilities of 128 tokens


def small(**settings):
    return {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0,
    } | settings  # fmt: skip


FAMILIES = {  # and whether the head is the last that they do
    "Llama": (tiny_llama, True),
    "Mixtral": (tiny_mixtral, True),
    "GPT2": (lambda: build("GPT2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=400), True),
    "GPTNeoX": (lambda: build("GPTNeoX", **small()), True),
    "Mamba": (lambda: build("Mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2), True),
    "Gemma2, capped": (lambda: build("Gemma2", **small(final_logit_softcapping=3.0)), False),
    "Gemma2": (lambda: build("Gemma2", **small(final_logit_softcapping=None)), True),
    "Cohere, scaled": (lambda: build("Cohere", **small(logit_scale=0.25)), False),
    "Granite, scaled": (lambda: build("Granite", **small(logits_scaling=4.0)), False),
}


def build(family, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_a_chunk_at_a_time_give_the_same(family):
    """Against the plain logits in float64, with padding, over two batches of windows that are no whole chunks."""
    make, head_is_last = FAMILIES[family]
    model, metric = make(), Perplexity()
    total, count = 0.0, 0
    for length in (300, 128):
        ids = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, -20:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        metric.update_from(model, {"input_ids": ids, "attention_mask": mask}, labels)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits.double()
        nll = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        total, count = total + nll.sum().item(), count + mask[:, 1:].sum().item()
    assert metric.nll.item() == pytest.approx(total, rel=1e-6)
    assert metric.tokens.item() == count
    assert metric.head_ends_model == head_is_last
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("length", [1, 2, 128, 129, 130])
def test_windows_of_any_length(llama, length):
    ids = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(0))
    metric, plain = Perplexity(), Perplexity()
    metric.update_from(llama, {"input_ids": ids}, ids)
    with torch.no_grad():
        plain.update(llama(ids).logits, ids)
    assert metric.nll.item() == pytest.approx(plain.nll.item(), rel=1e-6)
    assert metric.tokens == plain.tokens == 2 * (length - 1)


def test_the_logits_of_a_batch_are_never_held():
    llama = tiny_llama(max_position_embeddings=512, vocab_size=2000)
    ids = torch.randint(0, 2000, (4, 512))
    with LargestNew() as largest:
        Perplexity().update_from(llama, {"input_ids": ids}, ids)
    assert largest.numel == 128 * 2000  # plain they would be 16 times as many


class Cut(torch.nn.Module):
    """A model that hides its head, or calls it twice or by name."""

    def __init__(self, how):
        super().__init__()
        self.model, self.how = tiny_llama(), how

    def get_output_embeddings(self):
        return None if self.how == "hidden" else self.model.lm_head

    def forward(self, **inputs):
        hidden = self.model.model(**inputs).last_hidden_state
        if self.how == "twice":
            self.model.lm_head(hidden)
        head = self.model.lm_head
        return SimpleNamespace(logits=head(input=hidden) if self.how == "by name" else head(hidden))


@pytest.mark.parametrize("how", ["hidden", "twice", "by name"])
def test_heads_that_cannot_be_seen_are_run_whole(how):
    model, metric, plain = Cut(how), Perplexity(), Perplexity()
    ids = torch.randint(0, 300, (2, 60))
    metric.update_from(model, {"input_ids": ids}, ids)
    with torch.no_grad():
        plain.update(model(input_ids=ids).logits, ids)
    assert metric.nll == plain.nll
    assert not metric.head_ends_model


def test_a_set_without_labels_is_named(caplog):
    metric = Perplexity()
    metric.update(torch.zeros(1, 3, 8), torch.full((1, 3), -100))
    assert metric.compute().isnan()
    assert "no token was predicted" in caplog.text
