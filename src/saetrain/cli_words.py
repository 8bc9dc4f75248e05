"""Words of the command line before they are parsed: spellings of flags, lists of values, and positionals."""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from saetrain.activations.hookpoints import LAYER_WORD
from saetrain.cli_suggestions import describe_unknown_flag
from saetrain.coders import CODERS, INFERENCE_CODERS
from saetrain.config import config_class, flag_types
from saetrain.errors import SaetrainError

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "1"), ("false", "no", "0")


AXES = ("architecture", "num_latents", "expansion_factor", "k", "lr")
"""Flags of which training takes several values, each for other SAEs. --init_seeds takes several values anyway."""


def find_value(words: Sequence[str], flag: str) -> str | None:
    """Return the word that follows a flag, before the words are parsed; None without the flag."""
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == f"--{flag}":
            return value if equals else "".join(words[position + 1 : position + 2])
    return None


def find_values(words: Sequence[str], flag: str) -> list[str]:
    """Return the words that belong to the last flag of this name; an empty list without the flag."""
    for position, word in reversed([*enumerate(words)]):
        name, equals, value = word.partition("=")
        if name == f"--{flag}":
            following, has_positionals = _words_until_flag(words[position + 1 :]), len(_words_until_flag(words)) > 1
            return [value] if equals else _take_axis_values(flag, following, has_positionals)
    return []


def _take_axis_values(flag: str, words: list[str], has_positionals: bool) -> list[str]:
    """Return those of the words after a flag that are its values, and not MODEL or DATASET.

    ``has_positionals``: MODEL and DATASET precede the flag.
    """

    def is_value(word: str) -> bool:
        if flag == "architecture":
            return has_positionals or ":" in word or word in CODERS or word in INFERENCE_CODERS
        return word == "auto" or is_number(word)

    return [*words[:1], *(takewhile(is_value, words[1:]) if flag in AXES else ())]


def list_combinations(words: list[str]) -> list[list[str]]:
    """Return the words of each combination of values, given normalized words in which the flags of AXES may have many.

    With several architectures, a combination has the flags that its architecture has.
    """
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    # Of a flag that is given twice, the last one counts.
    last = {group[0]: number for number, group in enumerate(groups) if group and group[0][2:] in AXES}
    groups = [group for number, group in enumerate(groups) if not group or last.get(group[0], number) == number]
    choices = []
    for group in groups:
        is_axis = len(group) > 2 and group[0][2:] in AXES
        if is_axis and len(set(group[1:])) < len(group) - 1:
            raise SaetrainError(f"{' '.join(group)}: has a value twice; give different values")
        choices.append([[group[0], value] for value in group[1:]] if is_axis else [group])
    combinations = list(itertools.product(*choices))
    out = []
    for chosen in combinations:
        architecture = next((group[1] for group in chosen if group[:1] == ["--architecture"]), None)
        if architecture is not None and len(combinations) > 1:
            own = flag_types(config_class(architecture))
            positionals, *flags = chosen
            chosen = (positionals, *(group for group in flags if group[0][2:].partition("=")[0] in own))
        out.append([word for group in chosen for word in group])
    return out


def given_flags(words: Sequence[str]) -> set[str]:
    """Return the flags in the words, without dashes."""
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


def normalize_flags(
    words: list[str], types_by_flag: dict[str, Any], help_command: str, *, has_grid: bool = False
) -> list[str]:
    """Replace dashes in flags by underscores, give booleans a value, and move positionals to the front.

    ``has_grid``: the flags of AXES take several values.
    Raises SaetrainError for flags that are not in ``types_by_flag``.
    """
    known = [*types_by_flag, "help"]
    out: list[str] = []
    for position, word in enumerate(words):
        if not word.startswith("--") or word == "--":
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise SaetrainError(describe_unknown_flag(name, known, help_command))
        out.append(f"--{name}{equals}{value}")
        following = words[position + 1].lower() if position + 1 < len(words) else ""
        if types_by_flag.get(name) is bool and not equals:
            if following in TRUE_WORDS + FALSE_WORDS:
                continue
            out.append("true")
    axes = AXES if has_grid else ()
    _refuse_several_numbers(out, {name: hint for name, hint in types_by_flag.items() if name not in axes})
    return _move_positionals_first(_normalize_booleans(out, types_by_flag), types_by_flag, axes)


def _move_positionals_first(words: list[str], types_by_flag: dict[str, Any], axes: Sequence[str]) -> list[str]:
    """Move words that follow a list of numbers but are not numbers to the positionals at the front.

    ``axes``: flags that take several values. Raises SaetrainError for words such as ``1,2``, which are neither a number
    nor a positional.
    """
    first: list[str] = []
    rest: list[str] = []
    flag, in_number_list, n_values = "", False, 0
    for position, word in enumerate(words):
        if word.startswith("--"):
            flag, in_number_list = word[2:], "=" not in word and _is_number_list(types_by_flag.get(word[2:]))
            rest.append(word)
            n_values = len(_take_axis_values(flag, _words_until_flag(words[position + 1 :]), len(first) > 1))
        elif flag in axes and n_values > 0:
            n_values -= 1
            rest.append(word)
        elif in_number_list or flag in axes:
            if in_number_list and (is_number(word) or (flag == "layers" and LAYER_WORD.fullmatch(word))):
                rest.append(word)
                continue
            if re.fullmatch(r"[-\d.,:]+", word):
                raise SaetrainError(f"--{flag} {word}: not a number; pass numbers that are separated by spaces")
            first.append(word)
        else:
            (rest if flag else first).append(word)
    return [*first, *rest]


def _words_until_flag(words: Sequence[str]) -> list[str]:
    return list(takewhile(lambda each: not each.startswith("--"), words))


def _refuse_several_numbers(words: list[str], types_by_flag: dict[str, Any]) -> None:
    """Raise SaetrainError if several numbers follow a flag that takes one."""
    for position, word in enumerate(words):
        hint = types_by_flag.get(word[2:]) if word.startswith("--") else None
        values = list(takewhile(is_number, words[position + 1 :]))
        if len(values) > 1 and {int, float} & {hint, *typing.get_args(hint)} and not _is_number_list(hint):
            raise SaetrainError(
                f"{word} {' '.join(values)}: takes one number; start one run per value, and show all with "
                "'saetrain compare' (several values of --k, --num_latents, --lr or --architecture train in one run)"
            )


def _is_number_list(hint: Any) -> bool:
    """Return whether a setting is a list of numbers."""
    tuples = [option for option in (hint, *typing.get_args(hint)) if typing.get_origin(option) is tuple]
    return any({int, float} & {item, *typing.get_args(item)} for each in tuples for item in typing.get_args(each)[:1])


def is_number(word: str) -> bool:
    """Return whether a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def _normalize_booleans(words: list[str], types_by_flag: dict[str, Any]) -> list[str]:
    """Replace every spelling of a boolean by the one that tyro accepts, ``true`` or ``false``."""
    out: list[str] = []
    for word in words:
        name, equals, value = word[2:].partition("=") if word.startswith("--") else ("", "", "")
        if types_by_flag.get(name) is bool and equals:
            out.extend([f"--{name}", _normalize_boolean(value)])
        elif out and out[-1].startswith("--") and types_by_flag.get(out[-1][2:]) is bool:
            out.append(_normalize_boolean(word))
        else:
            out.append(word)
    return out


def _normalize_boolean(word: str) -> str:
    return "true" if word.lower() in TRUE_WORDS else "false" if word.lower() in FALSE_WORDS else word


def split_off_file(words: list[str], flag: str) -> tuple[list[str], str | None]:
    """Return the words without ``--FLAG FILE``, and the file if there is one."""
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == f"--{flag}":
            rest = words[position + 1 :]
            if not equals and not rest:
                raise SaetrainError(f"--{flag}: the file is missing; pass --{flag} FILE.yaml")
            file = value if equals else rest[0]
            return words[:position] + (rest if equals else rest[1:]), file
    return words, None
