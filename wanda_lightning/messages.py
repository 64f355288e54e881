"""Error messages of the command line: what was wrong, without how the parser came to see it."""

import re

from wanda_lightning.sparsity import parse_pattern

# jsonargparse tells every type it tried in turn; only the lines that name the user's mistake are of use.
NOISE = re.compile(
    r"\s*(Does not validate against|Subtypes: |Errors:|- Expected a <class 'NoneType'>|- Not a valid subclass of|"
    r"Subclass types expect|- a (class path|dict)|Given value|- Problem with given class_path 'lightning\.)"
)


def shortened(message: str) -> str:
    """Cut a message of the argument parser down to the mistake; other messages stay as they are.

    Args:
        message: The message, over several lines.

    Returns:
        The lines that name the option, the value and what is accepted.
    """
    if "Does not validate against" not in message:
        return message
    lines = [line for line in message.splitlines() if not NOISE.match(line)]
    if number := re.search(r'"pattern":\s+Expected a .*str.* Got value: (\d+)', message):
        try:
            parse_pattern(number[1])
        except ValueError as error:
            lines = [*lines[:-1], f"  {error}"]
    return "\n".join(dict.fromkeys(re.sub(r"^(\s*)- ", r"\1", line) for line in lines)).strip()
