import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
