"""The model card that lies beside a saved model."""

import yaml
from transformers import AutoModelForCausalLM

from wanda_lightning import CausalLM, PruningTrainer, TextDataModule, WandaPruning


def test_the_card_says_what_was_done(tiny_model_folder, tmp_path):
    trainer = PruningTrainer(
        default_root_dir=tmp_path, callbacks=[WandaPruning(pattern="2:4", targets=["mlp.*"])], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, max_epochs=1,
    )  # fmt: skip
    data = TextDataModule(num_samples=4, sequence_length=16, max_evaluation_windows=4)
    report = trainer.prune(CausalLM(tiny_model_folder), data)
    card = (tmp_path / "model/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "transformers", "tags": ["pruned", "sparse"]}
    for fact in (
        "# Wanda(variant=False), 2:4, sparsity 0.5",
        f"Made from `{tiny_model_folder}`",
        "50.00% of the weights of 9 linears are zero",
        "| evaluation | dense | pruned |",
        f"{report.evaluations['pruned']['val/perplexity']:.4g} |",
        "| mlp.* | 9 |",
        "| no target | 12 |",
        "| source | builtin |",
        "| sequence_length | 16 |",
    ):
        assert fact in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 3
