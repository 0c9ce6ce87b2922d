"""Text that remembers where it was written: what the static evaluation of a script computes with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

_FIELD = re.compile(r"[^ \t\r\n]+")


@dataclass(frozen=True, slots=True)
class Origin:
    """A stretch of a source file, by its number in the order of reading."""

    file: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an expanded text.

    ``origin`` is where exactly these characters are written (``None``: computed); ``unknown`` says why they are not
    known; ``split``: blanks in it end a word, because it was expanded outside of quotes.
    """

    text: str
    origin: Origin | None = None
    unknown: str = ""
    split: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A word or value after expansion."""

    pieces: tuple[Piece, ...] = ()
    quoted: bool = False

    @property
    def text(self) -> str:
        """All characters that are known."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def unknown(self) -> str:
        """Why some of it is not known; empty: all of it is."""
        return next((piece.unknown for piece in self.pieces if piece.unknown), "")

    @property
    def origin(self) -> Origin | None:
        """Where it is written, if it is written in one stretch and nothing was escaped or computed."""
        written = [piece for piece in self.pieces if piece.text]
        first = written[0].origin if written else None
        if first is None:
            return None
        end = first.start
        for piece in written:
            if piece.origin is None or piece.origin.file != first.file or piece.origin.start != end:
                return None
            end = piece.origin.end
        return Origin(first.file, first.start, end) if end - first.start == len(self.text) else None

    @property
    def place(self) -> Origin | None:
        """Where its first character with a place is written."""
        return next((piece.origin for piece in self.pieces if piece.origin is not None), None)

    def marked(self, *, split: bool) -> Iterator[Piece]:
        """Its pieces as the expansion of a variable."""
        return (replace(piece, split=split) for piece in self.pieces)


def known(text: str, origin: Origin | None = None) -> Text:
    """A text without anything unknown."""
    return Text((Piece(text, origin),))


def unknown(reason: str) -> Text:
    """A text nobody knows without running the script."""
    return Text((Piece("", unknown=reason, split=True),))


@dataclass(slots=True)
class Variable:
    """A variable's values: one, or those of an array."""

    values: list[Text]
    is_array: bool = False
    exported: bool = False

    @classmethod
    def of(cls, text: str) -> Variable:
        """A variable of the environment."""
        return cls([known(text)], exported=True)


def fields(pieces: Iterable[Piece], *, quoted: bool) -> list[Text]:
    """Words out of the pieces of one source word; ``quoted``: it had quotes, so that it is a word even if empty."""
    words: list[list[Piece]] = []
    open_word = False
    for piece in pieces:
        if piece.unknown or not piece.split:
            if piece.text or piece.unknown:
                if not open_word:
                    words.append([])
                words[-1].append(piece)
                open_word = True
            continue
        for number, match in enumerate(_FIELD.finditer(piece.text)):
            if number or match.start() or not open_word:
                words.append([])
            words[-1].append(_slice(piece, match.start(), match.end()))
        if piece.text:
            open_word = not piece.text[-1].isspace()
    if not words and quoted:
        return [Text((), True)]
    return [Text(tuple(word), quoted) for word in words]


def _slice(piece: Piece, start: int, end: int) -> Piece:
    origin = piece.origin
    if origin is not None and origin.end - origin.start == len(piece.text):
        origin = Origin(origin.file, origin.start + start, origin.start + end)
    return Piece(piece.text[start:end], origin)


def command_words(text: Text) -> list[list[Text]]:
    """The commands in a text that a shell will read again (``bash -c``, ``eval``), each as its words.

    Quotes are removed and ``;``, ``&&``, ``||``, ``|``, ``&`` and newlines end a command; nothing is expanded again.
    """
    commands: list[list[Text]] = [[]]
    word: list[Piece] = []
    open_word, quote = False, ""
    characters = [(piece, index) for piece in text.pieces for index in range(max(1, len(piece.text)))]
    for piece, index in characters:
        char = piece.text[index : index + 1]
        if not char:
            if piece.unknown:
                word.append(piece)
                open_word = True
        elif quote:
            if char == quote:
                quote = ""
            else:
                _append(word, piece, index)
        elif char in "'\"":
            quote, open_word = char, True
        elif char in " \t\r\n;&|":
            if open_word:
                commands[-1].append(Text(tuple(word)))
            word, open_word = [], False
            if char in "\n;&|" and commands[-1]:
                commands.append([])
        else:
            _append(word, piece, index)
            open_word = True
    if open_word:
        commands[-1].append(Text(tuple(word)))
    return [command for command in commands if command]


def _append(word: list[Piece], piece: Piece, index: int) -> None:
    """One more character; characters that are written side by side stay one piece."""
    one = _slice(piece, index, index + 1)
    last = word[-1] if word else None
    if last is not None and last.origin and one.origin and not last.unknown and last.origin.end == one.origin.start:
        joined = Origin(one.origin.file, last.origin.start, one.origin.end)
        word[-1] = Piece(last.text + one.text, joined)
    else:
        word.append(one)


def joined(texts: Sequence[Text], separator: str = " ") -> Text:
    """Texts as one, with a separator between them."""
    pieces: list[Piece] = []
    for number, text in enumerate(texts):
        if number:
            pieces.append(Piece(separator))
        pieces += text.pieces
    return Text(tuple(pieces))
