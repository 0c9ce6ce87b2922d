"""The syntax tree of a bash script: what :mod:`.bash_syntax` builds and :mod:`.bash_run` walks.

Every node carries offsets into the source, so that an argument can be named, and changed, where it is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an expansion stands for."""

    PARAMETER = "parameter"
    COMMAND = "command"
    ARITHMETIC = "arithmetic"


@dataclass(frozen=True, slots=True)
class Literal:
    """Characters as they are written; ``end - start == len(text)`` unless an escape was removed."""

    text: str
    start: int
    end: int
    quoted: bool


@dataclass(frozen=True, slots=True)
class Expansion:
    """``$name``, ``${…}``, ``$(…)`` or ``$((…))``; ``body`` is what is inside."""

    kind: Kind
    body: str
    start: int
    end: int
    quoted: bool
    body_start: int


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a command."""

    parts: tuple[Literal | Expansion, ...]
    start: int
    end: int

    @property
    def bare(self) -> str | None:
        """The text of a word without quotes and expansions, else ``None``."""
        if all(isinstance(part, Literal) and not part.quoted for part in self.parts):
            return "".join(part.text for part in self.parts if isinstance(part, Literal))
        return None


@dataclass(frozen=True, slots=True)
class Assign:
    """``name=word``, ``name+=word`` or ``name=(words)``; ``indexed``: one element of an array is set."""

    name: str
    append: bool
    value: Word | tuple[Word, ...]
    indexed: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Simple:
    """A simple command; ``assigns`` stand before it (or alone)."""

    assigns: tuple[Assign, ...]
    words: tuple[Word, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``((…))``."""

    body: str
    start: int


@dataclass(frozen=True, slots=True)
class AndOr:
    """Commands joined by ``&&``, ``||`` or ``|``; the first has the operator ``""``; ``!`` negates the pipeline."""

    items: tuple[tuple[str, bool, Command], ...]


@dataclass(frozen=True, slots=True)
class If:
    """``branches`` are (condition, body); an ``else`` has an empty condition."""

    branches: tuple[tuple[Body, Body], ...]
    start: int


@dataclass(frozen=True, slots=True)
class For:
    """``for name in words``; ``words`` is ``None`` for the arithmetic form and for the arguments of the script."""

    name: str
    words: tuple[Word, ...] | None
    body: Body
    start: int


@dataclass(frozen=True, slots=True)
class While:
    """``while`` and ``until`` (``negated``)."""

    condition: Body
    body: Body
    negated: bool
    start: int


@dataclass(frozen=True, slots=True)
class Case:
    """``case word in`` with (patterns, body)."""

    word: Word
    arms: tuple[tuple[tuple[Word, ...], Body], ...]
    start: int


@dataclass(frozen=True, slots=True)
class Function:
    """A function's definition."""

    name: str
    body: Body


@dataclass(frozen=True, slots=True)
class Group:
    """``{ … }`` or ``( … )``."""

    body: Body


Command = Simple | Arithmetic | AndOr | If | For | While | Case | Function | Group
Body = tuple[Command, ...]
