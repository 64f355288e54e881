"""``wanda-lightning generate``."""

from wanda_lightning.arguments import Dtype
from wanda_lightning.cli.commands import run_function


def generate(
    pretrained: str,
    prompts: list[str],
    tokens: int = 40,
    dtype: Dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Let a model continue texts, always with its most likely next token.

    Args:
        pretrained: The folder of a run or of a model, a hub name, or a .gguf file.
        prompts: Texts, in quotes. Default: the three of the reports.
        tokens: Tokens to add to each, at most.
        dtype: Data type of the weights. Default: the checkpoint's.
        device: Where it computes, such as cpu or cuda:0. Default: the GPU, if there is one.
        trust_remote_code: Run code that the model's author put beside it.
    """
    from wanda_lightning.runs import generation

    said_by = generation.generate(pretrained, prompts, tokens, dtype, device, trust_remote_code)
    for prompt, said in said_by.items():
        print(f"{prompt}{said}\n")


def main(arguments: list[str]) -> None:
    """Run ``wanda-lightning generate``."""
    run_function(
        "generate",
        generate,
        arguments,
        pretrained={"type": str, "metavar": "MODEL", "help": "Folder of a run or of a model, hub name, or .gguf file."},
        prompts={
            "nargs": "*",
            "type": str,
            "default": [],
            "metavar": "PROMPT",
            "help": "A text to continue; without any, the three of the reports.",
        },
    )
