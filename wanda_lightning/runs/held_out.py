"""A datamodule as the trials of a search see it: its calibration set, and held-out windows in place of the others."""

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from wanda_lightning.callbacks.plumbing.module_step import TRANSFERS


class HeldOut(LightningDataModule):
    """Calibrates as a datamodule does, and evaluates on its ``held_out_dataloader``; its evaluation set is not read.

    Args:
        datamodule: The datamodule.
        max_windows: How many windows are held out, at most.

    Raises:
        ValueError: If it holds nothing out.
    """

    evaluation_names = ("",)

    def __init__(self, datamodule: Any, max_windows: int) -> None:
        super().__init__()
        if not hasattr(datamodule, "held_out_dataloader"):
            raise ValueError(
                "a search chooses by windows that are not reported: give the datamodule a held_out_dataloader("
                f"max_windows), as TextDataModule has, got {type(datamodule).__name__}"
            )
        self.datamodule, self.max_windows = datamodule, max_windows
        for hook in TRANSFERS:
            if is_overridden(hook, datamodule):  # else Lightning asks the module
                setattr(self, hook, getattr(datamodule, hook))
        self._loader: Any = None

    def __getattr__(self, name: str) -> Any:
        """Be the datamodule in all else: its calibration set, its tokenizer, and whatever its module asks it for."""
        if name == "datamodule" or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.datamodule, name)

    @override
    def prepare_data(self) -> None:
        """Let the datamodule prepare its data."""
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        """Let the datamodule set itself up."""
        self.datamodule.trainer = self.trainer
        self.datamodule.setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        """Let the datamodule tear itself down."""
        self.datamodule.teardown(stage)

    @override
    def train_dataloader(self) -> Any:
        """Return the datamodule's; calibration may need it."""
        return self.datamodule.train_dataloader()

    @override
    def val_dataloader(self) -> Any:
        """Return the held-out windows, read once."""
        if self._loader is None:
            self._loader = self.datamodule.held_out_dataloader(self.max_windows)
        return self._loader

    def describe(self) -> dict[str, Any]:
        """Say what the datamodule says of its calibration set, and that evaluation is on held-out windows."""
        describe = getattr(self.datamodule, "describe", None)
        told = describe() if describe else {}
        return {**told, "evaluation": f"held-out windows of {told.get('source', type(self.datamodule).__name__)}"}
