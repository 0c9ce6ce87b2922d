"""The block of lines that tuning adds to a script: variables, and the arguments that win."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from uniap_tune.recipe import Changes

from .arguments import occurrences, shown
from .bash_text import Origin, known

BEGIN, END = "# >>> uniap-tune", "# <<< uniap-tune"
HEADER = "# Tuned by uniap-tune"
_BLOCK = re.compile(rf"^([ \t]*){BEGIN}\n(.*?)^[ \t]*{END}\n", re.MULTILINE | re.DOTALL)
_HEADER = re.compile(rf"^{HEADER}.*\n", re.MULTILINE)
_ARRAY = re.compile(r"TUNED_ARGS=\((.*?)^[ \t]*\)", re.MULTILINE | re.DOTALL)
_EXPORT = re.compile(r"^[ \t]*export (\w+)=(\S*)$", re.MULTILINE)
_UNSET = re.compile(r"^[ \t]*unset (\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """The block's contents, and where it is in a text if it is there already."""

    values: Mapping[str, str | bool] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    start: int = 0
    end: int = 0
    indent: str = ""

    def __contains__(self, place: Origin) -> bool:
        return self.start <= place.start < self.end

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return not self.values and not self.environment

    def changed(self, changes: Changes) -> Block:
        """With further changes on top."""
        kept = {name: value for name, value in self.values.items() if name not in changes.removed}
        return Block(kept | dict(changes.values), {**self.environment, **changes.environment})

    def render(self, indent: str) -> str:
        """Its lines."""
        lines = [BEGIN]
        for name, value in self.environment.items():
            lines.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
        lines.append("TUNED_ARGS=(")
        lines += ["  " + " ".join(shlex.quote(word) for word in words) for words in shown(self.values)]
        lines += [")", END]
        return "".join(f"{indent}{line}\n" for line in lines)


def find_block(text: str) -> Block | None:
    """The block of an earlier tuning."""
    match = _BLOCK.search(text)
    if match is None:
        return None
    environment: dict[str, str | None] = {m.group(1): m.group(2) for m in _EXPORT.finditer(match.group(2))}
    environment |= {m.group(1): None for m in _UNSET.finditer(match.group(2))}
    array = _ARRAY.search(match.group(2))
    try:
        words = shlex.split(array.group(1)) if array else []
    except ValueError:  # somebody edited it; what can be read of it was read with the script
        words = []
    values: dict[str, str | bool] = {}
    for item in occurrences([known(word) for word in words]):
        values[item.name] = " ".join(value.text for value in item.values) if item.values else True
    return Block(values, environment, match.start(), match.end(), match.group(1))


def header_line(text: str, header: str) -> tuple[int, int, str]:
    """Where the line that says who tuned the script goes (start, end), and the line."""
    line = f"{HEADER} {header}\n"
    old = _HEADER.search(text)
    if old is not None:
        return old.start(), old.end(), line
    start = text.find("\n") + 1 if text.startswith("#!") else 0
    return start, start, line
