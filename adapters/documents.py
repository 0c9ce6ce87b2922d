"""YAML and TOML files of strangers, read without trust: small, shallow, no aliases, no duplicated keys.

YAML scalars stay text, whoever knows the key knows the type; that also keeps ``4e9`` (a string in YAML 1.1) and
``10:30`` (a number in YAML 1.1) what they look like.
"""

from __future__ import annotations

import tomllib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from uniap_tune.errors import InputError

MAX_BYTES = 64 * 1024
_MAX_DEPTH = 16


def read_document(path: Path) -> dict[str, object]:
    """The mapping at the top of a TOML (``.toml``) or YAML file (any other name; JSON is YAML).

    Raises:
        InputError: missing, unreadable, too large, malformed, or not a mapping.
    """
    text = _read_text(path)
    where = printable(str(path))
    return parse_toml(text, where) if path.suffix.lower() == ".toml" else parse_yaml(text, where)


def printable(text: str) -> str:
    """The text on one line, without control characters, fit for an error message."""
    return "".join(char if char.isprintable() else "?" for char in text)


def parse_toml(text: str, where: str) -> dict[str, object]:
    """The tables of a TOML document. ``where`` names the document in errors.

    Raises:
        InputError: malformed, or nested too deeply.
    """
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid TOML", why=str(error)[:200], fix="correct the file") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply", fix="a flat table is expected") from None


def parse_yaml(text: str, where: str) -> dict[str, object]:
    """The mapping of a YAML document with every scalar as text. ``where`` names the document in errors.

    Raises:
        InputError: malformed, not a mapping, nested too deeply, or using anchors and aliases.
    """
    try:
        document = yaml.load(text, _PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise InputError(
            f"{where}: not valid YAML", why=f"{place}{error.problem}"[:200], fix="correct the file"
        ) from None
    except yaml.YAMLError as error:
        raise InputError(
            f"{where}: not valid YAML", why=str(error).splitlines()[0][:200], fix="correct the file"
        ) from None
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise InputError(f"{where}: must be a mapping of keys to values", fix="write one 'key: value' a line")
    return document


def compose_yaml(text: str, where: str) -> yaml.MappingNode:
    """The mapping of a YAML document as nodes with their places, read with the same care as :func:`parse_yaml`.

    Raises:
        InputError: malformed, not a mapping, nested too deeply, or using anchors and aliases.
    """
    loader: _PlainLoader | None = None
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            loader.construct_document(node)  # finds duplicated keys
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = getattr(error, "position", None)  # of a character YAML does not allow
        line = mark.line if mark else text.count("\n", 0, position) if position is not None else None
        place = f"{where}:{line + 1}" if line is not None else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{place}: not valid YAML", why=str(problem)[:200], fix="correct the file") from None
    except TypeError:  # a key that is a list or a mapping
        raise InputError(f"{where}: not valid YAML", why="a key is not plain text", fix="correct the file") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{where}: must be a mapping of keys to values", fix="write one 'key: value' a line")
    return node


def _read_text(path: Path) -> str:
    where = printable(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{where}: cannot be read", why=reason or "", fix="give the path of a readable file") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{where}: larger than {MAX_BYTES // 1024} KiB", fix="give a cluster or settings file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text", why=f"byte {error.start}: {error.reason}") from None


class _PlainLoader(yaml.BaseLoader):
    """Builds text, lists and dicts only, and refuses what can make a small file explode."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not accepted", problem_mark=event.start_mark)
        if self._depth >= _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"duplicated key {key.value[:40]!r}"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
