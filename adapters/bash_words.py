"""Bash words with source offsets: quotes, escapes, expansions and redirections, unevaluated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from uniap_tune.errors import InputError

from .bash_tree import Expansion, Kind, Literal, Word

_BLANKS = re.compile(r"(?:[ \t\r]|\\\r?\n)+")
_PLAIN = re.compile(r"[^\s\\'\"$`;&|()<>#]+")
_QUOTED_RUN = re.compile(r"[^\\\"$`]+")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9@*#?$!-]")
_INTERESTING = re.compile(r"[\\'\"`(){}$]")
_HEREDOC = re.compile(r"\d*<<(-?)(?!<)")
_SPACE = re.compile(r"\s+")
_REDIRECT = re.compile(r"\d*(?:&>>|&>|<<<|>>|>&|<&|<>|>\||<|>)(?!\()")


def parse_words(text: str, where: str) -> tuple[Word, ...]:
    """The words of a list of arguments over any number of lines, with comments.

    Raises:
        InputError: unbalanced quotes, or an operator of the shell outside of quotes.
    """
    return tuple(WordParser(text, where).array_words(end=""))


def parse_value(text: str, where: str, offset: int) -> Word:
    """The text after ``:-`` of a parameter expansion as one word; offsets are shifted by ``offset``."""
    return WordParser(text, where, offset).value()


def literal_text(words: Sequence[Word]) -> list[tuple[str, int]]:
    """Every unexpanded piece of the words that looks like an argument's name, with its offset."""
    found = []
    for word in words:
        for part in word.parts:
            if isinstance(part, Literal):
                found += [(m.group(), part.start + m.start()) for m in re.finditer(r"--[A-Za-z][\w-]*", part.text)]
    return found


class WordParser:
    """A position in a script and what reads words from there.

    Args:
        text: the script.
        where: its name in errors.
        offset: added to every offset of a word, for text that is itself part of a script.
    """

    def __init__(self, text: str, where: str, offset: int = 0) -> None:
        self.text, self.where, self.offset = text, where, offset
        self.pos = 0
        self.heredocs: list[tuple[str, bool]] = []

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        line = self.text.count("\n", 0, self.pos if at is None else at) + 1
        raise InputError(f"{self.where}:{line}: {what}", fix="correct the script, or read it with --execute")

    def _blanks(self) -> None:
        while True:
            match = _BLANKS.match(self.text, self.pos)
            if match:
                self.pos = match.end()
            if self.text.startswith("#", self.pos) and self._at_word_start():
                end = self.text.find("\n", self.pos)
                self.pos = len(self.text) if end < 0 else end
            elif not match:
                return

    def _at_word_start(self) -> bool:
        return self.pos == 0 or self.text[self.pos - 1] in " \t\r\n;&|()"

    def _newline(self) -> None:
        self.pos += 1
        for delimiter, strip in self.heredocs:
            while self.pos < len(self.text):
                end = self.text.find("\n", self.pos)
                end = len(self.text) if end < 0 else end
                line = self.text[self.pos : end].rstrip("\r")
                self.pos = min(end + 1, len(self.text))
                if (line.lstrip("\t") if strip else line) == delimiter:
                    break
        self.heredocs.clear()

    def array_words(self, end: str) -> list[Word]:
        """Words up to the character ``end`` (consumed), or to the end of the text if it is empty."""
        start = self.pos
        words: list[Word] = []
        while True:
            self._blanks()
            char = self.text[self.pos : self.pos + 1]
            if char == "\n":
                self.pos += 1
            elif end and char == end:
                self.pos += 1
                return words
            elif not char:
                if end:
                    self.fail("'(' of an array is never closed", start)
                return words
            elif char in ";&|()<>":
                self.fail(f"unexpected {char!r}")
            else:
                words.append(self._word())

    def _redirect(self) -> bool:
        heredoc = _HEREDOC.match(self.text, self.pos)
        if heredoc:
            self.pos = heredoc.end()
            self._blanks()
            word = self._word()
            delimiter = "".join(p.text for p in word.parts if isinstance(p, Literal))
            self.heredocs.append((delimiter, bool(heredoc.group(1))))
            return True
        match = _REDIRECT.match(self.text, self.pos)
        if match is None or (match.group()[0].isdigit() and not self._at_word_start()):
            return False
        self.pos = match.end()
        self._blanks()
        self._word()
        return True

    def _test_word(self) -> Word:
        for operator in ("&&", "||", "(", ")", "<", ">"):
            if self.text.startswith(operator, self.pos):
                start = self.pos
                self.pos += len(operator)
                return Word((Literal(operator, start, self.pos, False),), start, self.pos)
        return self._word(stops=";")

    def _word(self, stops: str = ";&|()<>") -> Word:
        start, text = self.pos, self.text
        parts: list[Literal | Expansion] = []
        while self.pos < len(text):
            char = text[self.pos]
            if text.startswith(("<(", ">("), self.pos):  # a process substitution: a file nobody here reads
                end = self._balanced(self.pos + 2, ")")
                parts.append(self._expansion(Kind.COMMAND, self.pos, self.pos + 2, end, end + 1, False))
                self.pos = end + 1
            elif char in " \t\r\n" or char in stops:
                break
            elif char == "\\":
                self._escape(parts)
            elif char in "'\"":
                self._quotes(parts, char)
            elif char in "$`":
                self._dollar(parts, quoted=False)
            else:
                match = _PLAIN.match(text, self.pos)
                end = match.end() if match else self.pos + 1
                parts.append(Literal(text[self.pos : end], self.pos + self.offset, end + self.offset, False))
                self.pos = end
        if self.pos == start and self.pos < len(text) and text[self.pos] not in " \t\r\n;&|)":
            self.fail(f"unexpected {text[self.pos]!r}")
        return Word(tuple(parts), start + self.offset, self.pos + self.offset)

    def value(self) -> Word:
        """Everything to the end as one word, blanks included."""
        parts: list[Literal | Expansion] = []
        while self.pos < len(self.text):
            word = self._word(stops="")
            parts += word.parts
            blank = _SPACE.match(self.text, self.pos)
            if blank:
                at = self.pos + self.offset
                parts.append(Literal(blank.group(), at, at + len(blank.group()), False))
                self.pos = blank.end()
        return Word(tuple(parts), self.offset, self.offset + len(self.text))

    def _escape(self, parts: list[Literal | Expansion]) -> None:
        at = self.pos + self.offset
        following = self.text[self.pos + 1 : self.pos + 2]
        if following != "\n" and not self.text.startswith("\\\r\n", self.pos):
            parts.append(Literal(following, at, at + 1 + len(following), True))
        self.pos += 3 if self.text.startswith("\\\r\n", self.pos) else 2

    def _quotes(self, parts: list[Literal | Expansion], quote: str) -> None:
        start = self.pos
        self.pos += 1
        if quote == "'":
            end = self.text.find("'", self.pos)
            if end < 0:
                self.fail("' is never closed", start)
            parts.append(Literal(self.text[self.pos : end], self.pos + self.offset, end + self.offset, True))
            self.pos = end + 1
            return
        empty = True
        while True:
            char = self.text[self.pos : self.pos + 1]
            if not char:
                self.fail('" is never closed', start)
            if char == '"':
                break
            empty = False
            self._in_quotes(parts, char)
        if empty:
            parts.append(Literal("", self.pos + self.offset, self.pos + self.offset, True))
        self.pos += 1

    def _in_quotes(self, parts: list[Literal | Expansion], char: str) -> None:
        if char in "$`":
            self._dollar(parts, quoted=True)
        elif char == "\\":
            if self.text[self.pos + 1 : self.pos + 2] in ("$", "`", '"', "\\", "\n", "\r", ""):
                self._escape(parts)
            else:
                at = self.pos + self.offset
                parts.append(Literal("\\", at, at + 1, True))
                self.pos += 1
        else:
            match = _QUOTED_RUN.match(self.text, self.pos)
            end = match.end() if match else self.pos + 1
            parts.append(Literal(self.text[self.pos : end], self.pos + self.offset, end + self.offset, True))
            self.pos = end

    def _dollar(self, parts: list[Literal | Expansion], *, quoted: bool) -> None:
        text, start = self.text, self.pos
        if text[start] == "`":
            end = text.find("`", start + 1)
            if end < 0:
                self.fail("` is never closed", start)
            parts.append(self._expansion(Kind.COMMAND, start, start + 1, end, end + 1, quoted))
        elif text.startswith("$((", start) and text.startswith("))", self._balanced(start + 3, ")")):
            end = self._balanced(start + 3, ")")
            parts.append(self._expansion(Kind.ARITHMETIC, start, start + 3, end, end + 2, quoted))
        elif text.startswith("$(", start):
            end = self._balanced(start + 2, ")")
            parts.append(self._expansion(Kind.COMMAND, start, start + 2, end, end + 1, quoted))
        elif text.startswith("${", start):
            end = self._balanced(start + 2, "}")
            parts.append(self._expansion(Kind.PARAMETER, start, start + 2, end, end + 1, quoted))
        elif text.startswith("$'", start) and not quoted:
            self.pos += 1
            self._quotes(parts, "'")
            return
        else:
            match = _PARAMETER.match(text, start + 1)
            if match is None:
                parts.append(Literal("$", start + self.offset, start + self.offset + 1, quoted))
                self.pos = start + 1
                return
            parts.append(self._expansion(Kind.PARAMETER, start, start + 1, match.end(), match.end(), quoted))
        self.pos = parts[-1].end - self.offset

    def _expansion(self, kind: Kind, start: int, first: int, last: int, end: int, quoted: bool) -> Expansion:
        shift = self.offset
        return Expansion(kind, self.text[first:last], start + shift, end + shift, quoted, first + shift)

    def _balanced(self, at: int, closing: str) -> int:
        """Where the bracket that was opened before ``at`` closes; quotes and nested brackets are passed over."""
        start, stack = at, [closing]
        while stack:
            match = _INTERESTING.search(self.text, at)
            if match is None:
                self.fail("a bracket or quote is never closed", start - 1)
            char, at = match.group(), match.end()
            if char == "\\":
                at += 1
            elif char == stack[-1]:
                stack.pop()
            elif stack[-1] == '"' and char != "$":
                continue
            elif char == "'":
                end = self.text.find("'", at)
                at = len(self.text) if end < 0 else end + 1
            elif char in '"`':
                stack.append(char)
            elif char == "$" and self.text[at : at + 1] in ("(", "{"):
                stack.append(")" if self.text[at] == "(" else "}")
                at += 1
            elif char in "({" and (stack[-1] == ")") == (char == "("):
                stack.append(")" if char == "(" else "}")
        return at - 1
