"""``wanda-lightning compress`` and ``decompress``."""

from wanda_lightning.cli.commands import run_function
from wanda_lightning.export.compression import compress, decompress


def compress_command(arguments: list[str]) -> None:
    """Run ``wanda-lightning compress``."""
    print(run_function("compress", compress, arguments))


def decompress_command(arguments: list[str]) -> None:
    """Run ``wanda-lightning decompress``."""
    print(run_function("decompress", decompress, arguments))
