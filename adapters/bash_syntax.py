"""Bash scripts -> syntax tree: the part of the language that launch scripts are written in.

Nothing is evaluated here. What the grammar does not cover is an error with its line, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .bash_tree import (
    AndOr,
    Arithmetic,
    Assign,
    Body,
    Case,
    Command,
    For,
    Function,
    Group,
    If,
    Simple,
    While,
    Word,
)
from .bash_words import WordParser

_MAX_DEPTH = 60
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\[[^\]\n]*\])?(\+?=)")
_KEYWORD = re.compile(r"[a-z]+|[}!]")
_OPERATOR = re.compile(r"&&|\|\||\|&|\|")
_BRACE = re.compile(r"\{[\s\\]")
_FUNCTION = re.compile(r"([A-Za-z_][\w.:-]*)[ \t]*\(\)")
_FUNCTION_NAME = re.compile(r"([A-Za-z_][\w.:-]*)[ \t]*(?:\(\))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEYWORD_END = frozenset({"then", "else", "elif", "fi", "do", "done", "esac", "}"})


def parse_script(text: str, where: str) -> Body:
    """The commands of a script.

    Args:
        text: the script.
        where: its name in errors.

    Raises:
        InputError: unbalanced quotes or keywords, or syntax that is not covered; names the line.
    """
    parser = _Parser(text, where)
    body = parser.body(frozenset())
    if parser.pos < len(text):
        parser.fail(f"unexpected {text[parser.pos : parser.pos + 10]!r}")
    return body


class _Parser(WordParser):
    def __init__(self, text: str, where: str) -> None:
        super().__init__(text, where)
        self.depth = 0

    def body(self, ends: frozenset[str], close: str = "") -> Body:
        """Commands up to a keyword of ``ends`` or the character ``close``, neither of which is consumed."""
        commands: list[Command] = []
        while True:
            self._separators()
            if self.pos >= len(self.text) or (close and self.text.startswith(close, self.pos)):
                break
            if self._keyword() in ends:
                break
            before = self.pos
            commands.append(self._and_or())
            if self.pos == before:
                self.fail(f"unexpected {self.text[self.pos]!r}")
        return tuple(commands)

    def _separators(self) -> None:
        while self.pos < len(self.text):
            self._blanks()
            char = self.text[self.pos : self.pos + 1]
            if char == "\n":
                self._newline()
            elif char and char in ";&" and not self.text.startswith((";;", "&&", "&>"), self.pos):
                self.pos += 1
            else:
                return

    def _keyword(self) -> str:
        match = _KEYWORD.match(self.text, self.pos)
        if match is None:
            return ""
        following = self.text[match.end() : match.end() + 1]
        return match.group() if following in ("", " ", "\t", "\r", "\n", ";", "(", ")", "&", "|", "\\") else ""

    def _take(self, keyword: str) -> None:
        self._separators()
        if self._keyword() != keyword:
            self.fail(f"{keyword!r} expected")
        self.pos += len(keyword)

    def _and_or(self) -> Command:
        items: list[tuple[str, bool, Command]] = []
        operator = ""
        while True:
            self._blanks()
            negated = False
            if self._keyword() == "!":
                self.pos += 1
                negated = True
                self._blanks()
            items.append((operator, negated, self._command()))
            self._blanks()
            match = _OPERATOR.match(self.text, self.pos)
            if match is None:
                break
            operator = "|" if match.group() == "|&" else match.group()
            self.pos = match.end()
            self._skip_newlines()
        if len(items) == 1 and not items[0][1]:
            return items[0][2]
        return AndOr(tuple(items))

    def _skip_newlines(self) -> None:
        self._blanks()
        while self.text.startswith("\n", self.pos):
            self._newline()
            self._blanks()

    def _command(self) -> Command:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.fail("nested too deeply")
        command = self._one_command()
        self.depth -= 1
        return command

    def _one_command(self) -> Command:
        start, keyword = self.pos, self._keyword()
        if keyword in ("while", "until"):
            self.pos += len(keyword)
            condition = self.body(frozenset({"do"}))
            return While(condition, self._do(), keyword == "until", start)
        compounds: dict[str, Callable[[int], Command]] = {
            "if": self._if,
            "for": self._for,
            "case": self._case,
            "function": self._function,
        }
        compound = compounds.get(keyword)
        if compound is not None:
            self.pos += len(keyword)
            return self._redirected(compound(start))
        if keyword in _KEYWORD_END:
            self.fail(f"unexpected {keyword!r}")
        if self.text.startswith("((", self.pos):
            end = self._balanced(self.pos + 2, ")")
            if self.text.startswith("))", end):
                self.pos = end + 2
                return Arithmetic(self.text[start + 2 : end], start)
        if self.text.startswith("(", self.pos):
            return self._redirected(self._group("(", ")"))
        if _BRACE.match(self.text, self.pos):
            return self._redirected(self._group("{", "}"))
        function = _FUNCTION.match(self.text, self.pos)
        if function:
            self.pos = function.end()
            return self._function_body(function.group(1))
        return self._simple()

    def _redirected(self, command: Command) -> Command:
        self._blanks()
        while self._redirect():
            self._blanks()
        return command

    def _group(self, opening: str, closing: str) -> Group:
        start = self.pos
        self.pos += len(opening)
        body = self.body(frozenset({"}"}) if closing == "}" else frozenset(), close=")" if closing == ")" else "")
        self._separators()
        if not self.text.startswith(closing, self.pos):
            self.fail(f"{opening!r} is never closed", start)
        self.pos += 1
        return Group(body)

    def _function(self, _start: int) -> Function:
        self._blanks()
        match = _FUNCTION_NAME.match(self.text, self.pos)
        if match is None:
            self.fail("a function needs a name")
        self.pos = match.end()
        return self._function_body(match.group(1))

    def _function_body(self, name: str) -> Function:
        self._skip_newlines()
        command = self._command()
        return Function(name, command.body if isinstance(command, Group) else (command,))

    def _do(self) -> Body:
        self._take("do")
        body = self.body(frozenset({"done"}))
        self._take("done")
        self._redirected(Group(()))
        return body

    def _if(self, start: int) -> If:
        branches: list[tuple[Body, Body]] = []
        while True:
            condition = self.body(frozenset({"then"}))
            self._take("then")
            body = self.body(frozenset({"elif", "else", "fi"}))
            branches.append((condition, body))
            keyword = self._keyword()
            if not keyword:
                self.fail("'if' is never closed", start)
            self.pos += len(keyword)
            if keyword == "else":
                branches.append(((), self.body(frozenset({"fi"}))))
                self._take("fi")
            if keyword != "elif":
                return If(tuple(branches), start)

    def _for(self, start: int) -> For:
        self._blanks()
        if self.text.startswith("((", self.pos):
            end = self._balanced(self.pos + 2, ")")
            self.pos = end + 2
            return For("", None, self._do(), start)
        match = _NAME.match(self.text, self.pos)
        if match is None:
            self.fail("'for' needs a name")
        self.pos = match.end()
        self._skip_newlines()
        words: list[Word] | None = None
        if self._keyword() == "in":
            self.pos += 2
            words = []
            self._blanks()
            while (char := self.text[self.pos : self.pos + 1]) not in ("", "\n", ";"):
                if char in "&|()":
                    self.fail(f"unexpected {char!r}")
                words.append(self._word())
                self._blanks()
        return For(match.group(), tuple(words) if words is not None else None, self._do(), start)

    def _case(self, start: int) -> Case:
        self._blanks()
        word = self._word()
        self._take("in")
        arms: list[tuple[tuple[Word, ...], Body]] = []
        while True:
            self._separators()
            if self._keyword() == "esac":
                self.pos += 4
                return Case(word, tuple(arms), start)
            if self.pos >= len(self.text):
                self.fail("'case' is never closed", start)
            if self.text.startswith("(", self.pos):
                self.pos += 1
            patterns = [self._pattern()]
            while self.text.startswith("|", self.pos):
                self.pos += 1
                patterns.append(self._pattern())
            if not self.text.startswith(")", self.pos):
                self.fail("')' expected after a pattern of 'case'")
            self.pos += 1
            body = self.body(frozenset({"esac"}), close=";;")
            if self.text.startswith(";;", self.pos):
                self.pos += 3 if self.text.startswith(";;&", self.pos) else 2
            arms.append((tuple(patterns), body))

    def _pattern(self) -> Word:
        self._blanks()
        word = self._word()
        self._blanks()
        return word

    def _simple(self) -> Simple:
        start = self.pos
        assigns: list[Assign] = []
        words: list[Word] = []
        end = start
        while True:
            self._blanks()
            if self._redirect():
                continue
            char = self.text[self.pos : self.pos + 1]
            inside_test = bool(words) and words[0].bare == "[[" and words[-1].bare != "]]"
            if inside_test and char == ";":
                self.fail("']]' expected")
            if inside_test and char not in ("", "\n"):
                words.append(self._test_word())
            elif char in ("", "\n", ";", "&", "|", ")", "("):
                if inside_test and char == "\n":
                    self._newline()
                    continue
                break
            else:
                self._assign_or_word(assigns, words)
            end = self.pos
        return Simple(tuple(assigns), tuple(words), start, end)

    def _assign_or_word(self, assigns: list[Assign], words: list[Word]) -> None:
        declares = bool(words) and words[0].bare in ("export", "declare", "local", "readonly", "typeset")
        match = _ASSIGNMENT.match(self.text, self.pos) if not words or declares else None
        if match is None:
            words.append(self._word())
            return
        start, append = self.pos, match.group(3) == "+="
        self.pos = match.end()
        value: Word | tuple[Word, ...]
        if self.text.startswith("(", self.pos):
            self.pos += 1
            value = tuple(self.array_words(end=")"))
        else:
            value = self._word()
        assigns.append(Assign(match.group(1), append, value, bool(match.group(2)), start, self.pos))
