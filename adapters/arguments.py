"""A list of Megatron arguments, as words with their places: on a command line, in a file, or captured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from uniap_tune.recipe import Argument

from .bash_text import Origin, Piece, Text
from .megatron_flags import CHOICES, COUNTS, COUNTS_FROM_ZERO, NUMBERS, SWITCHES

_ONE_VALUE = COUNTS | COUNTS_FROM_ZERO | NUMBERS | CHOICES.keys()
_FLAG = re.compile(r"--[A-Za-z][\w-]*\Z")


@dataclass(frozen=True, slots=True)
class Occurrence:
    """An argument where it stands, with the words that follow it. ``joined``: written ``--name=value``."""

    name: str
    flag: Text
    values: tuple[Text, ...]
    joined: bool = False

    @property
    def unknown(self) -> str:
        """Why a value is not known; empty: all are."""
        return next((value.unknown for value in self.values if value.unknown), "")


def occurrences(words: Sequence[Text]) -> list[Occurrence]:
    """The arguments among words, in order. Words before the first argument belong to none, and words that are not known
    to no argument that has its one value already."""
    found: list[Occurrence] = []
    for word in words:
        name, equals, _ = word.text.partition("=")
        if _FLAG.match(name):
            values = (_after(word, len(name) + 1),) if equals else ()
            found.append(Occurrence(name[2:], word, values, bool(equals)))
        elif found and not found[-1].joined and found[-1].name not in SWITCHES and word.text != "\\":
            last = found[-1]
            if not (word.unknown and last.values and last.name in _ONE_VALUE):
                found[-1] = Occurrence(last.name, last.flag, (*last.values, word))
    return found


def _after(word: Text, length: int) -> Text:
    """The rest of a word after so many characters."""
    origin = word.origin
    place = Origin(origin.file, origin.start + length, origin.end) if origin is not None else None
    return Text((Piece(word.text[length:], place, word.unknown),))


def winning(found: Sequence[Occurrence], where: Callable[[Origin | None], str]) -> dict[str, Argument]:
    """By name the occurrence that wins: argparse takes the last one."""
    return {
        item.name: Argument(item.name, tuple(value.text for value in item.values), where(item.flag.place), item.unknown)
        for item in found
    }


def shown(values: Mapping[str, str | bool]) -> list[list[str]]:
    """Arguments as lists of words: the name with dashes, then its values. Layouts stay one word."""
    lines = []
    for name, value in values.items():
        lines.append([f"--{name}"] if value is True else [f"--{name}", str(value)])
    return lines
