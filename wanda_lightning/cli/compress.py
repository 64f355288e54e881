"""``wanda-lightning compress`` and ``decompress``."""

from wanda_lightning.cli.commands import run_function

# Not named as our public functions: jsonargparse looks for a name in the package too, which would import torch.


def compress_folder(folder: str, output: str) -> None:
    """Write a copy of a pruned model without its zeros.

    Args:
        folder: A model with safetensors weights, or the run that saved one.
        output: Folder of the compressed model; must not exist.
    """
    from wanda_lightning.export import compression

    print(compression.compress(folder, output))


def decompress_folder(folder: str, output: str) -> None:
    """Restore the model that was compressed.

    Args:
        folder: A compressed model.
        output: Folder of the restored model; must not exist.
    """
    from wanda_lightning.export import compression

    print(compression.decompress(folder, output))


def compress_command(arguments: list[str]) -> None:
    """Run ``wanda-lightning compress``."""
    run_function("compress", compress_folder, arguments)


def decompress_command(arguments: list[str]) -> None:
    """Run ``wanda-lightning decompress``."""
    run_function("decompress", decompress_folder, arguments)
