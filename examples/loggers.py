"""Prune and fine-tune while TensorBoard and Weights & Biases look on.

What they show: ``sparsity`` and ``val/perplexity`` over time, ``train/loss``; ``pruning/dense/...`` and
``pruning/pruned/...``, what was measured before and after; ``pruning/layer/error/...`` and ``.../sparsity/...`` of each
kind of linear, with the layer as the step; and the report itself, as text or as a page.

    tensorboard --logdir results/logs          wandb sync results/logs/wandb/offline-run-*
"""

from importlib.util import find_spec

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from wanda_lightning import CausalLM, PruningTrainer, TextDataModule, WandaPruning

MODEL = "HuggingFaceTB/SmolLM2-135M"

loggers = [TensorBoardLogger("results/logs", name="tensorboard")]
if find_spec("wandb"):
    loggers.append(WandbLogger(project="pruning", save_dir="results/logs", offline=True))

module, data = CausalLM(MODEL), TextDataModule(sequence_length=512, num_samples=64)
trainer = PruningTrainer(
    callbacks=[WandaPruning(sparsity=0.5, output_dir="results/logs")],
    logger=loggers,
    max_steps=100,
    log_every_n_steps=10,
)
trainer.prune(module, data, save=False)
trainer.fit(module, data)
