"""What a launch script would start, found without running it.

Assignments, arrays, functions, loops over known words and tests of known values are followed; whatever depends on the
machine, the environment or a command's output is *unknown*, with the reason and the line, and spreads to what uses it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uniap_tune.errors import InputError

from .bash_expand import Expander
from .bash_syntax import parse_script
from .bash_test import arithmetic_truth, test
from .bash_text import Origin, Piece, Text, Variable, command_words, joined, known, unknown
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
from .bash_words import literal_text
from .source_text import SourceFile, is_there, read_source

_MAX_STEPS = 20_000
_MAX_FILES = 16
_MAX_CALLS = 20
_TESTS = frozenset({"[", "[[", "test"})
_DECLARE = frozenset({"export", "declare", "local", "readonly", "typeset"})
_SHELLS = frozenset({"bash", "sh", "/bin/bash", "/bin/sh", "zsh"})
# Commands that may name a training script without starting it.
_INERT = frozenset({"echo", "printf", "cat", "ls", "cp", "mv", "rm", "sed", "grep", "tee", "ln", "chmod", "touch"})


@dataclass(frozen=True, slots=True)
class Launch:
    """A python script that is started.

    ``words`` are all words of the command, ``script`` the place of the ``.py`` among them. ``command`` is the statement
    in the source (of ``file``); ``reparsed``: a second shell took the words from a string, ``is_last``: nothing comes
    after them in it.
    """

    words: tuple[Text, ...]
    script: int
    environment: Mapping[str, Text]
    command: Simple
    file: int
    reparsed: bool = False
    is_last: bool = True

    @property
    def arguments(self) -> tuple[Text, ...]:
        """The words after the script's name."""
        return self.words[self.script + 1 :]

    @property
    def launcher(self) -> tuple[Text, ...]:
        """The words before the script's name."""
        return self.words[: self.script]


@dataclass(slots=True)
class ScriptRun:
    """Everything found in a script and the files it sources.

    ``skipped``: arguments in branches not followed; ``unfollowed``: why a branch that starts python was not.
    """

    files: list[SourceFile] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    skipped: dict[str, tuple[Origin, str]] = field(default_factory=dict)
    unfollowed: str = ""

    def where(self, origin: Origin | None) -> str:
        """``file:line`` of an origin."""
        if origin is None:
            return self.files[0].name
        return self.files[origin.file].where(origin.start)


def run_script(
    path: Path, given: Mapping[str, str] | None = None, instead: Mapping[Path, str] | None = None
) -> ScriptRun:
    """Follow a script.

    Args:
        path: the script.
        given: values of variables the user supplies for what the script leaves open.
        instead: texts that stand for those of files, by their resolved paths.

    Raises:
        InputError: it cannot be read or parsed, or expands without end; names file and line.
    """
    runner = _Runner(given or {}, instead or {})
    runner.file(path)
    return runner.result


class _Runner:
    def __init__(self, given: Mapping[str, str], instead: Mapping[Path, str]) -> None:
        self.instead = instead
        self.result = ScriptRun()
        self.expander = Expander(self.result.files, {name: Variable.of(text) for name, text in given.items()})
        self.functions: dict[str, Body] = {}
        self.current = 0
        self.steps = 0
        self.calls = 0

    @property
    def variables(self) -> dict[str, Variable]:
        return self.expander.variables

    def file(self, path: Path) -> None:
        if len(self.result.files) >= _MAX_FILES:
            raise InputError(f"{path}: more than {_MAX_FILES} files are sourced", fix="give a self-contained script")
        source = read_source(path, self.instead)
        before = self.current
        self.current = self.expander.file = len(self.result.files)
        self.result.files.append(source)
        self.body(parse_script(source.text, source.name))
        self.current = self.expander.file = before

    def where(self, offset: int) -> str:
        return self.result.files[self.current].where(offset)

    # -- statements -----------------------------------------------------------------------------------------------

    def body(self, commands: Body) -> bool | None:
        """Runs the commands; the last one's success, ``None`` if it cannot be known."""
        success: bool | None = True
        for command in commands:
            success = self.command(command)
        return success

    def command(self, command: Command) -> bool | None:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            name = self.result.files[0].name
            raise InputError(f"{name}: follows more than {_MAX_STEPS} statements", fix="read it with --execute")
        match command:
            case Simple():
                return self.simple(command)
            case AndOr():
                return self.and_or(command)
            case If():
                self.branches(command)
            case For():
                self.loop(command)
            case While():
                self.while_loop(command)
            case Case():
                self.case(command)
            case Function(name, body):
                self.functions[name] = body
            case Group(body):
                return self.body(body)
            case Arithmetic(text, _):
                return arithmetic_truth(self.variables, text)
        return True

    def and_or(self, command: AndOr) -> bool | None:
        success: bool | None = True
        for operator, negated, item in command.items:
            if (operator == "&&" and success is False) or (operator == "||" and success is True):
                continue
            if operator in ("&&", "||") and success is None:
                self.skip((item,), "the command before it may fail")
                continue
            success = self.command(item)
            if negated and success is not None:
                success = not success
        return success

    def condition(self, commands: Body) -> bool | None:
        """A condition; commands other than tests may fail, so they decide nothing."""
        if len(commands) == 1 and isinstance(commands[0], Simple):
            words = commands[0].words
            if words and words[0].bare not in (*_TESTS, "true", "false", ":"):
                return None
        return self.body(commands)

    def branches(self, command: If) -> None:
        for place, (condition, body) in enumerate(command.branches):
            truth = self.condition(condition) if condition else True
            if truth is None:
                reason = f"the condition at {self.where(command.start)} is not known"
                for _, skipped in command.branches[place:]:
                    self.skip(skipped, reason)
                return
            if truth:
                self.body(body)
                return

    def loop(self, command: For) -> None:
        if command.words is None:
            self.skip(command.body, f"the loop at {self.where(command.start)} is not followed")
            return
        for text in self.words(command.words):
            if text.unknown:
                self.skip(command.body, f"the loop at {self.where(command.start)} runs over {text.unknown}")
                return
            self.variables[command.name] = Variable([text])
            self.body(command.body)

    def while_loop(self, command: While) -> None:
        truth = self.condition(command.condition)
        if truth is None or truth is not command.negated:
            self.skip(command.body, f"the loop at {self.where(command.start)} is not followed")

    def case(self, command: Case) -> None:
        word = self.expander.one(command.word, unset_is_empty=True)
        if word.unknown:
            for _, body in command.arms:
                self.skip(body, f"the case at {self.where(command.start)} depends on {word.unknown}")
            return
        for patterns, body in command.arms:
            texts = [self.expander.one(pattern, unset_is_empty=True).text for pattern in patterns]
            if any(fnmatch.fnmatchcase(word.text, text) for text in texts):
                self.body(body)
                return

    def skip(self, commands: Body, reason: str) -> None:
        """Leaves commands out: what they would set is unknown, and the arguments in them are remembered."""
        pending = list(commands)
        while pending:
            command = pending.pop()
            match command:
                case Simple():
                    self.skip_simple(command, reason)
                case AndOr(items):
                    pending += [item for _, _, item in items]
                case If(branches, _):
                    pending += [c for condition, body in branches for c in (*condition, *body)]
                case For(_, _, body, _) | While(_, body, _, _) | Group(body):
                    pending += body
                case Case(_, arms, _):
                    pending += [c for _, body in arms for c in body]
                case Arithmetic() | Function():
                    pass

    def skip_simple(self, command: Simple, reason: str) -> None:
        words: list[Word] = list(command.words)
        for assign in command.assigns:
            is_array = isinstance(assign.value, tuple)
            words += assign.value if isinstance(assign.value, tuple) else [assign.value]
            if not is_array and not assign.append:
                self.variables[assign.name] = Variable([unknown(f"${assign.name} ({reason})")])
        if any((word.bare or "").endswith(".py") for word in words):
            self.result.unfollowed = reason
        name = words[0].bare if words else ""
        if self.expander.positional and (name == "shift" or (name == "set" and any(w.bare == "--" for w in words))):
            self.expander.positional = [unknown(f"$@ ({reason})")]
        for name, offset in literal_text(words):
            self.result.skipped.setdefault(name, (Origin(self.current, offset, offset + len(name)), reason))

    # -- simple commands ------------------------------------------------------------------------------------------

    def words(self, words: Sequence[Word]) -> list[Text]:
        return [text for word in words for text in self.expander.fields(word)]

    def simple(self, command: Simple) -> bool | None:
        name = command.words[0].bare if command.words else ""
        if name in _TESTS:
            texts = [self.expander.one(word, unset_is_empty=True) for word in command.words]
            return test(texts, self.variables)
        if not command.words or name in _DECLARE:
            for assign in command.assigns:
                self.assign(assign, exported=name == "export")
            for text in self.words(command.words[1:]):
                if name == "export" and text.text in self.variables:
                    self.variables[text.text].exported = True
            return True
        words = self.words(command.words)
        if not words:
            return True
        return self.run(words, command)

    def run(self, words: list[Text], command: Simple) -> bool | None:
        first = words[0].text
        if first in ("true", ":", "false"):
            return first != "false"
        if first in self.functions:
            self.call(first, words[1:])
        elif first in ("source", ".") and len(words) > 1:
            self.source(words[1], command)
        elif first == "shift":
            self.shift(words[1:], command)
        elif first == "set" and any(text.text == "--" for text in words):
            start = next(place for place, text in enumerate(words) if text.text == "--")
            self.expander.positional = words[start + 1 :]
        elif first == "unset":
            for text in words[1:]:
                self.variables.pop(text.text, None)
        elif first in ("read", "mapfile", "readarray", "getopts"):
            for text in words[1:]:
                if text.text.isidentifier():
                    self.variables[text.text] = Variable([unknown(f"${text.text}, read by the script while it runs")])
        elif first not in _INERT:
            self.find_launch(words, command)
        return True

    def shift(self, count: list[Text], command: Simple) -> None:
        """Drops the first arguments; more than there are, and bash keeps them all."""
        positional = self.expander.positional
        if not positional:
            return
        text = count[0] if count else known("1")
        if text.unknown or not text.text.isdecimal():
            self.expander.positional = [unknown(f"$@ after the shift at {self.where(command.start)}")]
        elif int(text.text) <= len(positional):
            self.expander.positional = positional[int(text.text) :]

    def assign(self, assign: Assign, *, exported: bool) -> None:
        name, before = assign.name, self.variables.get(assign.name)
        if assign.indexed:
            self.variables[name] = Variable([unknown(f"${name}, whose elements are set one by one")], is_array=True)
            return
        if isinstance(assign.value, tuple):
            values, is_array = self.words(assign.value), True
        else:
            values, is_array = [self.expander.one(assign.value)], False
        if assign.append and before is not None:
            if is_array:
                values = [*before.values, *values]
            else:
                first = before.values[0] if before.values else Text()
                values = [Text(first.pieces + values[0].pieces), *before.values[1:]]
            is_array = is_array or before.is_array
        exported = exported or (before is not None and before.exported)
        self.variables[name] = Variable(values, is_array=is_array, exported=exported)

    def call(self, name: str, arguments: list[Text]) -> None:
        if self.calls >= _MAX_CALLS:
            raise InputError(f"{self.result.files[0].name}: {name}() calls itself", fix="read it with --execute")
        self.calls += 1
        before = self.expander.positional
        self.expander.positional = arguments
        self.body(self.functions[name])
        self.expander.positional = before
        self.calls -= 1

    def source(self, path: Text, command: Simple) -> None:
        target = Path(self.result.files[self.current].path).parent / path.text
        if path.unknown or not (is_there(target) and target.is_file()):
            what = path.unknown or f"{path.text}, which is not there"
            self.expander.not_sourced = f"{self.where(command.start)} sources {what}"
            return
        self.file(target)

    # -- launches -------------------------------------------------------------------------------------------------

    def find_launch(self, words: list[Text], command: Simple) -> None:
        inner = _inner_command(words)
        if inner is None:
            self.add_launch(words, command)
            return
        commands = command_words(inner)
        for again in commands:
            redirects = any(">" in text.text or "<" in text.text for text in again)
            self.add_launch(again, command, reparsed=True, is_last=again is commands[-1] and not redirects)

    def add_launch(self, words: list[Text], command: Simple, *, reparsed: bool = False, is_last: bool = True) -> None:
        script = next((place for place, text in enumerate(words) if text.text.endswith(".py")), None)
        if script is None:
            return
        environment = {name: joined(variable.values) for name, variable in self.variables.items() if variable.exported}
        for assign in command.assigns:
            if isinstance(assign.value, Word):
                environment[assign.name] = self.expander.one(assign.value)
        for text in words[:script]:
            name, equals, value = text.text.partition("=")
            if equals and name.isidentifier():
                environment[name] = Text((Piece(value, None, text.unknown),))
        self.result.launches.append(Launch(tuple(words), script, environment, command, self.current, reparsed, is_last))


def _inner_command(words: list[Text]) -> Text | None:
    """The command that is handed to a second shell, if any."""
    if words[0].text == "eval":
        return joined(words[1:])
    for place, text in enumerate(words[:-2]):
        following = words[place + 1].text
        if text.text in _SHELLS and following.startswith("-") and following.endswith("c"):
            return words[place + 2]
    return None
