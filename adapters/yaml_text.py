"""YAML recipes as text with a place for every value, so that lines can be changed and all others stay as they are.

The documents of strangers are read as :mod:`.documents` reads them: small, shallow, without anchors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from uniap_tune.errors import InputError

from .documents import MAX_BYTES, compose_yaml
from .source_text import SourceFile, read_source

_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+\Z")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"})


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with a plain value, or a list of them joined by blanks: where key and value are written."""

    path: tuple[str, ...]
    value: str
    is_text: bool
    key_start: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class YamlText:
    """A document, its entries by path, and its mappings by path (with the offset of their first key)."""

    file: SourceFile
    entries: dict[tuple[str, ...], Entry]
    mappings: dict[tuple[str, ...], tuple[int, bool]]

    def where(self, path: tuple[str, ...]) -> str:
        """``file:line`` of a key."""
        entry = self.entries.get(path)
        return self.file.where(entry.key_start) if entry is not None else self.file.name


def read_yaml_text(path: Path) -> YamlText:
    """A YAML file.

    Raises:
        InputError: unreadable, too large, malformed, or not a mapping; names file and line.
    """
    return parse_yaml_text(read_source(path))


def parse_yaml_text(file: SourceFile) -> YamlText:
    """The entries of a document; see :func:`read_yaml_text`."""
    if len(file.text) > MAX_BYTES:
        raise InputError(f"{file.name}: larger than {MAX_BYTES // 1024} KiB", fix="give a configuration file")
    root = compose_yaml(file.text, file.name)
    document = YamlText(file, {}, {})
    _collect(document, root, ())
    return document


def _collect(document: YamlText, node: yaml.MappingNode, path: tuple[str, ...]) -> None:
    first = node.value[0][0].start_mark.index if node.value else node.start_mark.index
    document.mappings[path] = (first, bool(node.flow_style))
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        inner = (*path, key.value)
        if isinstance(value, yaml.MappingNode):
            _collect(document, value, inner)
        else:
            is_list = isinstance(value, yaml.SequenceNode)
            items = [item.value for item in value.value if isinstance(item, yaml.ScalarNode)] if is_list else []
            start, end = value.start_mark.index, value.end_mark.index
            while end > start and document.file.text[end - 1].isspace():
                end -= 1  # what spans lines ends behind its last one
            document.entries[inner] = Entry(
                inner,
                " ".join(items) if is_list else value.value,
                is_list or value.style is not None,
                key.start_mark.index,
                start,
                end,
            )


def scalar(value: str) -> str:
    """A value as YAML text that reads back as the same text (or number)."""
    if _PLAIN.match(value) and value.lower() not in _WORDS:
        return value
    return "'" + value.replace("'", "''") + "'"


class YamlEditor:
    """Changes of entries, applied together."""

    def __init__(self, document: YamlText) -> None:
        self._document = document
        self._edits: list[tuple[int, int, str]] = []
        self._added: dict[tuple[str, ...], list[str]] = {}

    def set(self, path: tuple[str, ...], value: str) -> None:
        """Gives a key this value (YAML text), adding it behind the last key of its mapping if it is not there.

        Raises:
            InputError: its mapping is not there, or not written one key a line.
        """
        entry = self._document.entries.get(path)
        if entry is None:
            self._added.setdefault(path[:-1], []).append(f"{path[-1]}: {value}")
            return
        gap = "" if self._document.file.text[entry.start - 1 : entry.start] in (" ", "\t") else " "
        self._edits.append((entry.start, entry.end, gap + value))

    def remove(self, path: tuple[str, ...]) -> None:
        """Takes a key and its line out."""
        text, entry = self._document.file.text, self._document.entries[path]
        start = text.rfind("\n", 0, entry.key_start) + 1
        end = text.find("\n", entry.end)
        rest = text[entry.end : end if end >= 0 else len(text)]
        if text[start : entry.key_start].strip() or rest.split("#")[0].strip():
            raise InputError(
                f"{self._document.where(path)}: {path[-1]} must go, but shares its line",
                fix="write one key a line",
            )
        self._edits.append((start, len(text) if end < 0 else end + 1, ""))

    def text(self, heading: str, comment_start: str) -> str:
        """The document with the changes, under one line of comment that replaces the one of an earlier time."""
        text = self._document.file.text
        edits = [*self._edits, *self._insertions()]
        for start, end, new in sorted(edits, reverse=True):
            text = text[:start] + new + text[end:]
        old = re.search(rf"^{re.escape(comment_start)}.*\n", text, re.MULTILINE)
        line = f"{comment_start} {heading}\n"
        if old is not None:
            return text[: old.start()] + line + text[old.end() :]
        return line + text

    def _insertions(self) -> Iterator[tuple[int, int, str]]:
        document, text = self._document, self._document.file.text
        for path, lines in self._added.items():
            if path not in document.mappings:
                raise InputError(f"{document.file.name}: has no {'.'.join(path)}", fix="add it")
            first, is_flow = document.mappings[path]
            last = max(self._ends(path), default=None)
            if is_flow:
                raise InputError(
                    f"{document.file.where(first)}: {'.'.join(path)} is written in braces", fix="write one key a line"
                )
            indent = text[text.rfind("\n", 0, first) + 1 : first]
            end = text.find("\n", last) if last is not None else first - len(indent) - 1
            head = "\n" if end < 0 and last is not None else ""
            at = len(text) if head else end + 1
            yield at, at, head + "".join(f"{indent}{line}\n" for line in lines)

    def _ends(self, path: tuple[str, ...]) -> Iterator[int]:
        """Where the plain entries of a mapping end."""
        for key, entry in self._document.entries.items():
            if key[:-1] == path:
                yield entry.end
