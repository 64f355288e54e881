"""lm-eval's own model class on a model in memory. Imports lm-eval, so nothing imports this before it is needed."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, distributed
from typing_extensions import override

from wanda_lightning import terminal
from wanda_lightning.checkpoints.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class InMemoryLM(HFLM):
    """HFLM that splits the questions over the processes of ``torch.distributed``, without accelerate.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        batch_size: Sequences in a batch.
        max_length: Tokens in a sequence. Default: the model's limit.
        add_special_tokens: Whether the tokenizer may add its special tokens.
        ranks: How many processes share the questions; 1 lets each do all of them.
        progress: Show progress bars, on the first process.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
        max_length: int | None,
        add_special_tokens: bool,
        ranks: int,
        progress: bool,
    ) -> None:
        with quiet("lm_eval.models.huggingface"):  # it warns that the model is already loaded
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                add_bos_token=add_special_tokens,
            )
        self._world_size = ranks
        self._rank = distributed.get_rank() if ranks > 1 else 0
        first = not distributed.is_initialized() or distributed.get_rank() == 0
        self._silent = not (progress and first)

    @override
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return one number of every process, shape (processes,)."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(gathered, tensor)
        return torch.stack(gathered)

    @override
    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world_size > 1:
            distributed.barrier()

    @override
    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, with or without a progress bar."""
        return super().loglikelihood(requests, disable_tqdm or self._silent)

    @override
    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, with or without a progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm or self._silent)

    @override
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As HFLM, with or without a progress bar."""
        return super().generate_until(requests, disable_tqdm or self._silent)

    @override
    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:  # lm-eval asserts it, without a word
            raise ValueError(
                f"an answer of {longest} tokens does not fit into sequences of {self.max_length}: give max_length at "
                "least so many, a model that takes longer sequences, or another task"
            )
        # For whole texts, lm-eval calls this once a batch and asks for a bar each time.
        return super()._loglikelihood_tokens(requests, disable_tqdm or self._silent or bool(override_bs), override_bs)

    @override
    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        with torch.no_grad():
            return self.model(inps, use_cache=False).logits  # nothing is generated: a cache would only take memory


class Tqdm:
    """What lm-eval uses of tqdm, shown as one of our bars.

    Args:
        steps: What to iterate over.
        total: How many steps there are.
        disable: Show nothing.
        settings: What is left to us.
    """

    def __init__(
        self, steps: Iterable[Any] = (), total: int | None = None, disable: bool = False, **settings: Any
    ) -> None:
        self.steps = [*steps]
        self._bars = None if disable else terminal.progress("Zero-shot", total or len(self.steps))
        if self._bars is not None:
            self._bars.start()

    def __iter__(self) -> Iterator[Any]:
        """Pass the steps on."""
        for step in self.steps:
            yield step
            self.update()
        self.close()

    def update(self, steps: int = 1) -> None:
        """Count steps."""
        if self._bars is not None:
            self._bars.advance(self._bars.task_ids[0], steps)

    def close(self) -> None:
        """End the bar."""
        if self._bars is not None:
            self._bars.stop()
