"""What jsonargparse says: its help, and its messages cut down to the mistake."""

import inspect
import re
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Iterable
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from typing_extensions import override

from wanda_lightning.cli.first_look import NO_MODEL
from wanda_lightning.cli.short_options import closest, no_method

# jsonargparse tells every type it tried in turn; only the lines that name the user's mistake are of use.
NOISE = re.compile(
    r"\s*($|(- )?Does not validate against|Subtypes: |Errors:|- Expected a path but (?!\S*(/|\.ya?ml))|"
    r"- Expected a (<class 'NoneType'>|typing.Literal\['magn)|"
    r"- Not a valid subclass of|Subclass types expect|- a (class path|dict)|Given value type|"
    r"Given value: (\S*[\[({]|.{60}))"
)
UNKNOWN_OPTION = re.compile(
    r"Parser key \"(\S+)\":.*?class_path '\S*?(\w+)':\s+Option '\w+' is not accepted", re.DOTALL
)
OPTIONS_OF = {
    "data": ["TextDataModule"],
    "model": ["CausalLM"],
    "trainer.callbacks": ["PruningCallback", "WandaPruning", "SparseGPTPruning", "AblatePruning", "ZeroShotEvaluation"],
}
"""The classes whose arguments are options, by the part of the command line that they are under."""
OTHER_TYPE = re.compile(r"\s*- Problem with given class_path 'lightning\.")
NO_CLASS = re.compile(r"Expected a dot import path string: (\w+)$", re.MULTILINE)
UNRECOGNIZED = r"unrecognized arguments: (-\S*?)(=| |$)"
LISTS = {
    "methods": "such as '[wanda, sparsegpt]'",
    "sparsities": "such as '[0.4, 0.6]'",
    "patterns": "such as '[\"2:4\"]', with these quotes: a bare 2:4 is the number 124 in YAML",
    "allocations": "such as '[OWL]'",
    "batch_sizes": "such as '[1, 8]'",
}
"""The options that take lists."""
NO_LIST = re.compile(rf"Parser key \"({'|'.join(LISTS)})\":\s+Expected a <class '[\w.]+'>. Got value: (.*)")
ONE_OF = re.compile(r"Parser key \"(\S+)\":\s+Expected a typing.Literal\[(.*)\]. Got value: (.*)")
NO_METHOD = re.compile(
    r'Parser key "methods":(?!.*Problem with given class_path).*?(?:path string|Given value): (\S+)', re.DOTALL
)


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the lines of descriptions as they are, and names types as users do."""

    @override
    def _expand_help(self, action: Action) -> str:
        return re.sub(r"<class '([\w.]+)'>", r"\1", super()._expand_help(action))


class FunctionParser(ArgumentParser):
    """A parser of the options of one function, whose errors name the one that was meant."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = re.search(UNRECOGNIZED, message)
        meant = _meant(message, unknown[1], self._option_string_actions) if unknown else shortened(message)
        super().error(meant, ex)


def shortened(message: str) -> str:
    """Cut a message of the argument parser down to the mistake; other messages stay as they are.

    Args:
        message: The message, over several lines.

    Returns:
        The lines that name the option, the value and what is accepted.
    """
    if 'Parser key "model"' in message and "arguments are required: pretrained" in message:
        return NO_MODEL
    if no_list := NO_LIST.search(message):
        return f"--{no_list[1]} must be a list {LISTS[no_list[1]]}; got {no_list[2]}"
    if one_of := ONE_OF.fullmatch(message):
        accepted = one_of[2].replace("'", "")
        return f"{one_of[1]} must be one of {accepted}, got {one_of[3]!r}"
    if found := NO_METHOD.search(message):
        return no_method("--methods", found[1])
    if "Does not validate against" in message:
        option, message = re.search(r"NestedArg\(key='(\w+)'", message), _without_noise(message)
        if option and "\n" not in message:  # it was held against no class but that of all callbacks
            message = (
                f"there is no callback that {option[1]} is an option of: name one, --trainer.callbacks+=WandaPruning"
            )
    if unknown := UNKNOWN_OPTION.search(message):
        message += f"\n  what is accepted: --{unknown[1]}.help {unknown[2]}"
    return message


def with_hint(message: str, options: Iterable[str]) -> str:
    """Name the option that was meant, where an unknown one is spelled like it.

    Args:
        message: What the argument parser says.
        options: The options of the command; those of the classes behind them are found here.

    Returns:
        The message, with a line more where there is a hint.
    """
    import wanda_lightning

    if no_class := NO_CLASS.search(message):
        return _meant(message, no_class[1], wanda_lightning.__all__)
    part = re.search(r'Parser key "(\S+)"', message)
    unknown = re.search(rf"{UNRECOGNIZED}|Option '(\w+)' is not accepted", message)
    if not unknown or (part is None and unknown[3]):  # the parser within says this first, the one around it then where
        return message
    known = [*options] if unknown[1] else []
    for name, owners in OPTIONS_OF.items():
        if part is None or name == part[1]:
            signatures = [inspect.signature(getattr(wanda_lightning, owner)) for owner in owners]
            known += [f"--{name}.{each}" for signature in signatures for each in signature.parameters]
            known += ["--model.optimizer.lr"] if name == "model" else []
    return _meant(message, unknown[1] or f".{unknown[3]}", known)


def _meant(message: str, unknown: str, known: Iterable[str]) -> str:
    meant = closest(unknown, known)
    hint = f"did you mean {meant}?"
    return f"{message}\n  {hint}" if meant and hint not in message else message


def _without_noise(message: str) -> str:
    lines = [line for line in _without_other_types(message.splitlines()) if not NOISE.match(line)]
    lines = [re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"^(\s*)- ", r"\1", line)) for line in lines]
    if number := re.search(r'"pattern":\s+Expected a .*str.* Got value: (\d+)', message):
        from wanda_lightning.sparsity import parse_pattern  # and with it torch

        try:
            parse_pattern(number[1])
        except ValueError as error:
            lines = [*lines[:-1], f"  {error}"]
    return "\n".join(dict.fromkeys(lines)).strip()


def _without_other_types(lines: list[str]) -> list[str]:
    """Leave out what is wrong with the value as another type than the one that the user named."""
    kept: list[str] = []
    other = None  # how far the block to leave out is indented
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if other is not None and depth <= other:
            other = None
        if other is None and OTHER_TYPE.match(line):
            other = depth
        if other is None:
            kept.append(line)
    return kept
