"""A vision transformer on scikit-learn's digits: trained, pruned to 50 % and to 2:4, fine-tuned with its zeros kept.

    pip install wanda-lightning scikit-learn
    python examples/digits_vit.py

1,797 images of 8 x 8 pixels come with scikit-learn; nothing is downloaded. A table of the accuracies on the 360 test
images ends it, after half a minute of processor time. The LightningModule knows nothing of pruning: calibration runs
its own validation_step on batches of its train dataloader.
"""

import copy
import tempfile

import torch
from lightning.pytorch import LightningModule, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTForImageClassification

from wanda_lightning import PruningTrainer, WandaPruning

EPOCHS, FINE_TUNING_EPOCHS = 12, 3


class Digits(LightningModule):
    """A small ViT of transformers that reads digits."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=64, intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=4, hidden_dropout_prob=0.1,
        )  # fmt: skip
        self.model = ViTForImageClassification(config)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        parts = train_test_split(images, torch.tensor(labels), test_size=360, stratify=labels, random_state=0)
        self.train_images, self.test_images, self.train_labels, self.test_labels = parts

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        images, labels = batch
        return self.model(pixel_values=images, labels=labels).loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Measure the accuracy; calibration runs this, too."""
        images, labels = batch
        self.accuracy.update(self.model(pixel_values=images).logits, labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train everything."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        """Give images to train with, and to calibrate with."""
        return DataLoader(TensorDataset(self.train_images, self.train_labels), batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Give images to evaluate with, in one batch."""
        return DataLoader(TensorDataset(self.test_images, self.test_labels), batch_size=360)


def trainer(folder: str, *callbacks: WandaPruning, epochs: int) -> PruningTrainer:
    """Make a quiet Trainer."""
    return PruningTrainer(
        max_epochs=epochs, callbacks=[*callbacks], default_root_dir=folder, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main() -> list[dict[str, float | str]]:
    """Train, prune in two ways, fine-tune; return and print the accuracies."""
    seed_everything(0)
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Digits()
        trainer(folder, epochs=EPOCHS).fit(dense)
        for number, pattern in enumerate(("unstructured", "2:4")):
            module = copy.deepcopy(dense)
            callback = WandaPruning(sparsity=0.5, pattern=pattern, num_samples=512)
            run = trainer(f"{folder}/{number}", callback, epochs=FINE_TUNING_EPOCHS)
            run.prune(module, save=False)  # evaluates before and after
            run.fit(module)
            run.validate(module, verbose=False)
            stages = {stage: metrics["accuracy"] for stage, metrics in callback.evaluations.items()}
            rows.append({"pattern": pattern, **stages, "zeros": run.callback_metrics["sparsity"].item()})
    print("\n| pattern | dense | pruned | fine-tuned | zeros in the layers' linears |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(f"{value:.1%}" if isinstance(value, float) else value for value in row.values()) + " |")
    return rows


if __name__ == "__main__":
    main()
