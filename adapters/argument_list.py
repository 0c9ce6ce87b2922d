"""A plain list of Megatron arguments in a file, over as many lines as one likes; ``#`` starts a comment."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uniap_tune.errors import InputError
from uniap_tune.recipe import Changes, Recipe
from uniap_tune.spec import Cluster

from .arguments import Occurrence, occurrences, shown, winning
from .bash_text import Origin, Piece, Text
from .bash_tree import Literal
from .bash_words import parse_words
from .megatron import build_recipe
from .shell_edit import Editor, deletion
from .source_text import SourceFile, read_source

_COMMENT = "# Tuned by uniap-tune"


@dataclass(frozen=True, slots=True)
class ListSource:
    """The file a list was read from."""

    file: SourceFile
    found: tuple[Occurrence, ...]

    @property
    def format(self) -> str:
        """What kind of recipe it is."""
        return "list of Megatron-LM arguments"

    @property
    def name(self) -> str:
        """Its path."""
        return self.file.name

    def originals(self) -> dict[str, str]:
        """The file as it is."""
        return {self.file.path.name: self.file.text}

    def rewritten(self, changes: Changes, cluster: Cluster, header: str) -> dict[str, str]:  # noqa: ARG002
        """The file with the changes: values in their places, new arguments at the end."""
        editor = Editor([self.file.text])
        placed = {item.name: item for item in self.found}
        added: dict[str, str | bool] = {}
        for name, value in changes.values.items():
            values = placed[name].values if name in placed else ()
            origin = values[0].origin if len(values) == 1 else None
            if value is True or origin is None:
                added[name] = value
            else:
                editor.replace(0, origin.start, origin.end, shlex.quote(str(value)))
        for item in self.found:
            if item.name in changes.removed:
                place = item.flag.origin
                span = deletion(self.file.text, place, len(item.values), item.joined) if place else None
                if span is None:
                    where = self.file.where(item.flag.place.start if item.flag.place else 0)
                    raise InputError(f"{where}: --{item.name} must go", fix="delete it by hand")
                editor.replace(0, *span, "")
        (text,) = editor.texts()
        stale = (_COMMENT, *(f"# {name}=" for name in changes.environment))
        stale += tuple(f"# unset {name}" for name in changes.environment)
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith(stale)]
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        lines += [" ".join(shlex.quote(word) for word in words) + "\n" for words in shown(added)]
        lines += [f"# unset {n}\n" if v is None else f"# {n}={v}\n" for n, v in changes.environment.items()]
        return {self.file.path.name: f"{_COMMENT} {header}\n" + "".join(lines)}

    def reread(self, files: Mapping[str, str]) -> Recipe:
        """See :class:`~uniap_tune.recipe.Source`."""
        return parse_argument_list(SourceFile(self.file.path, files[self.file.path.name]))


def read_argument_list(path: Path) -> Recipe:
    """The recipe of a list of arguments; nothing in it is expanded.

    Raises:
        InputError: unbalanced quotes, or an argument that matters is missing or wrong; names file and line.
    """
    return parse_argument_list(read_source(path))


def parse_argument_list(file: SourceFile) -> Recipe:
    """As :func:`read_argument_list`, of a text that need not be a file's."""
    words = []
    for word in parse_words(file.text, file.name):
        pieces = []
        for part in word.parts:
            if isinstance(part, Literal):
                pieces.append(Piece(part.text, Origin(0, part.start, part.end)))
            else:
                reason = f"{file.text[part.start : part.end][:40]} at {file.where(part.start)}"
                pieces.append(Piece("", unknown=reason))
        words.append(Text(tuple(pieces)))
    found = tuple(occurrences(words))
    arguments = winning(found, lambda origin: file.where(origin.start) if origin else file.name)
    return build_recipe(file.path, ListSource(file, found), arguments, environment=_environment(file.text))


def _environment(text: str) -> dict[str, str]:
    """Variables a list carries along in comments: ``# NAME=VALUE``."""
    pairs = [line[1:].strip().partition("=") for line in text.splitlines() if line.startswith("#")]
    return {name: value for name, equals, value in pairs if equals and name.isidentifier() and name.isupper()}
