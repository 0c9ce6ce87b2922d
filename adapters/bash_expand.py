"""Expansion of bash words on what is known of the variables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from uniap_tune.errors import InputError

from .bash_test import arithmetic
from .bash_text import Origin, Piece, Text, Variable, fields, joined, known, unknown
from .bash_tree import Expansion, Kind, Literal, Word
from .bash_words import parse_value
from .source_text import SourceFile

_MAX_CHARACTERS = 500_000
_MAX_DEPTH = 20
_PARAMETER = re.compile(r"(?P<name>[A-Za-z_]\w*|[0-9@*#?$!-])(?P<index>\[[^\]]*\])?(?P<op>:?[-=+?])?(?P<word>.*)", re.S)
# The folder of the script, in the ways scripts ask for it.
_OWN_FOLDER = re.compile(r"""\s*(?:cd\s+["']?\$\(\s*)?dirname\s+(?:--\s+)?["']?\$\{?(?:0|BASH_SOURCE)[^.;|]*""")


class Expander:
    """Expands words of the current file. ``not_sourced`` is a file that was not read and may set anything."""

    def __init__(self, files: Sequence[SourceFile], variables: dict[str, Variable]) -> None:
        self.files = files
        self.variables = variables
        self.positional: list[Text] | None = None
        self.file = 0
        self.not_sourced = ""
        self._written = 0
        self._depth = 0

    def fields(self, word: Word) -> list[Text]:
        """The words that one word of a command becomes."""
        if len(word.parts) == 1 and isinstance(word.parts[0], Expansion):
            elements = self._elements(word.parts[0])
            if elements is not None:
                if word.parts[0].quoted:
                    return elements
                return [f for text in elements for f in fields(text.marked(split=True), quoted=False)]
        pieces = [piece for part in word.parts for piece in self._pieces(part, unset_is_empty=False)]
        quoted = any(part.quoted for part in word.parts)
        self._count(pieces)
        return fields(pieces, quoted=quoted)

    def one(self, word: Word, *, unset_is_empty: bool = False) -> Text:
        """A word that is not split (a value, a pattern, part of a test)."""
        pieces: list[Piece] = []
        for part in word.parts:
            pieces += self._pieces(part, unset_is_empty=unset_is_empty)
        self._count(pieces)
        kept = tuple(Piece(p.text, p.origin, p.unknown) for p in pieces if p.text or p.unknown)
        return Text(kept, any(part.quoted for part in word.parts))

    def _count(self, pieces: Sequence[Piece]) -> None:
        self._written += sum(len(piece.text) + 1 for piece in pieces)
        if self._written > _MAX_CHARACTERS:
            name = self.files[0].name
            raise InputError(
                f"{name}: its variables expand to more than {_MAX_CHARACTERS} characters", fix="read it with --execute"
            )

    def _pieces(self, part: Literal | Expansion, *, unset_is_empty: bool) -> list[Piece]:
        if isinstance(part, Literal):
            return [Piece(part.text, Origin(self.file, part.start, part.end))]
        value = self._value(part, unset_is_empty=unset_is_empty)
        return list(value.marked(split=not part.quoted))

    def _value(self, part: Expansion, *, unset_is_empty: bool) -> Text:
        if part.kind is Kind.ARITHMETIC:
            return arithmetic(self.variables, part.body)
        if part.kind is Kind.COMMAND:
            if _OWN_FOLDER.match(part.body):
                return known(str(self.files[self.file].path.parent.resolve()))
            return unknown(f"the output of $({part.body.strip()[:40]}) at {self._where(part)}")
        if part.body.startswith("#"):
            return self._length(part.body[1:], part)
        match = _PARAMETER.fullmatch(part.body)
        if match is None or (match["word"] and not match["op"]):
            return self._edited(part)
        return self._parameter(part, match, unset_is_empty=unset_is_empty)

    def _parameter(self, part: Expansion, match: re.Match[str], *, unset_is_empty: bool) -> Text:
        name, sign = match["name"], match["op"] or ""
        value = self._lookup(name, match["index"])
        if value is not None and value.unknown:
            return value
        is_set = value is not None and not (sign.startswith(":") and not value.text)
        action = sign[-1:]
        if action == "+":
            return self._word(part, match) if is_set else Text()
        if value is not None and is_set:
            return value
        if action in ("-", "="):
            default = self._word(part, match)
            if action == "=":
                self.variables[name] = Variable([default])
            return default
        if value is not None:
            return value
        if unset_is_empty or name in ("@", "*"):
            return Text()
        return unknown(self._unset(name, part))

    def _unset(self, name: str, part: Expansion) -> str:
        if name.isdigit():
            return f"argument {name} of the script (at {self._where(part)})"
        after = f"; {self.not_sourced}" if self.not_sourced else ""
        return f"${name}, which is not set in the script (at {self._where(part)}{after})"

    def _word(self, part: Expansion, match: re.Match[str]) -> Text:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            return unknown(f"an expansion nested too deeply (at {self._where(part)})")
        start = part.body_start + match.start("word")
        text = self.one(parse_value(match["word"], self.files[self.file].name, start))
        self._depth -= 1
        return text

    def _lookup(self, name: str, index: str | None) -> Text | None:
        if name == "#":
            return known(str(len(self.positional or ())))
        if name in ("@", "*"):
            return joined(self.positional) if self.positional else None
        if name == "0":
            return known(str(self.files[self.file].path))
        if name.isdigit():
            arguments, place = self.positional or [], int(name) - 1
            return arguments[place] if 0 <= place < len(arguments) else None
        variable = self.variables.get(name)
        if variable is None or (not variable.values and not variable.is_array):
            return None
        if index in ("[@]", "[*]"):
            return joined(variable.values)
        if index is None:
            return variable.values[0] if variable.values else Text()
        number = index[1:-1]
        if not number.isdecimal() or len(number) > 6:
            return unknown(f"${{{name}{index}}}")
        return variable.values[int(number)] if int(number) < len(variable.values) else None

    def _elements(self, part: Expansion) -> list[Text] | None:
        """What ``"${name[@]}"`` and ``"$@"`` become; ``None``: another expansion."""
        if part.kind is not Kind.PARAMETER:
            return None
        if part.body in ("@", "*"):
            return list(self.positional or ())
        match = re.fullmatch(r"([A-Za-z_]\w*)\[[@*]\](?:(:?[-+]).*)?", part.body, re.S)
        if match is None:
            return None
        variable = self.variables.get(match.group(1))
        if match.group(2) in ("-", ":-") and (variable is None or not variable.values):
            return None
        if variable is None:
            return [] if match.group(2) else [unknown(self._unset(match.group(1), part))]
        if match.group(2) in ("+", ":+"):
            inner = re.fullmatch(r'[^+]*\+"?\$\{([A-Za-z_]\w*)\[[@*]\]\}"?', part.body)
            return list(variable.values) if inner and inner.group(1) == match.group(1) else None
        return list(variable.values)

    def _length(self, body: str, part: Expansion) -> Text:
        if not body:
            return known(str(len(self.positional or ())))
        match = re.fullmatch(r"([A-Za-z_]\w*)(\[[@*]\])?", body)
        variable = self.variables.get(match.group(1)) if match else None
        if match is None or variable is None or any(v.unknown for v in variable.values):
            return unknown(f"${{#{body}}} at {self._where(part)}")
        size = len(variable.values) if match.group(2) else len(variable.values[0].text) if variable.values else 0
        return known(str(size))

    def _edited(self, part: Expansion) -> Text:
        """``${name,,}``, ``${name^^}`` and ``${name[*]@Q}``; cutting and replacing are not followed."""
        quoted = re.fullmatch(r"([A-Za-z_]\w*)\[[@*]\]@Q", part.body)
        if quoted and quoted.group(1) in self.variables:
            mark = Text((Piece("'"),))
            return joined([joined([mark, text, mark], "") for text in self.variables[quoted.group(1)].values])
        match = re.fullmatch(r"([A-Za-z_]\w*)(,,|\^\^)", part.body)
        value = self._lookup(match.group(1), None) if match else None
        if match is None or value is None or value.unknown:
            return unknown(f"${{{part.body[:40]}}} at {self._where(part)}")
        return known(value.text.lower() if match.group(2) == ",," else value.text.upper())

    def _where(self, part: Expansion) -> str:
        return self.files[self.file].where(part.start)
