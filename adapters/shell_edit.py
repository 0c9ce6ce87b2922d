"""Changes to the text of scripts: what is not changed stays byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from uniap_tune.spec import Cluster

from .bash_text import Origin

_GAP = re.compile(r"(?:[ \t]|\\?\r?\n)+")
_VALUE = re.compile(
    r""""(?:[^"\\]|\\.)*"|'[^']*'|(?:\$\{[^}]*\}|\$\(\([^)]*\)\)|[^\s"'\\;&|()]|\((?=[^\s"']*\))|\)(?=[*|\w]))+"""
)
_NODES = re.compile(r"^#SBATCH[ \t]+(?:--nodes(?:=|[ \t]+)|-N[ \t]*)(\d+)\b(?!-)", re.MULTILINE)
_PER_NODE = re.compile(
    r"^#SBATCH[ \t]+(?:--gpus-per-node(?:=|[ \t]+)|--gres(?:=|[ \t]+)gpu:)(?:[A-Za-z]\w*:)?(\d+)\b", re.MULTILINE
)
_TASKS = re.compile(r"^#SBATCH[ \t]+--ntasks-per-node(?:=|[ \t]+)(\d+)\b", re.MULTILINE)


class Editor:
    """Replacements in several texts, applied together."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(texts)
        self._edits: list[tuple[int, int, int, str]] = []

    def replace(self, file: int, start: int, end: int, text: str) -> None:
        """Replaces ``[start, end)`` of a file's text; doing the same twice does it once."""
        edit = (file, start, end, text)
        if edit not in self._edits:
            self._edits.append(edit)

    def texts(self) -> list[str]:
        """The texts with all replacements. Of deletions that overlap, what any of them deletes is gone."""
        texts = list(self._texts)
        edits = sorted(self._edits, key=lambda edit: (edit[0], edit[1], edit[2]), reverse=True)
        taken: dict[int, int] = {}  # by file, where the replacement behind begins
        for file, start, end, text in edits:
            stop = min(end, taken.get(file, end))
            texts[file] = texts[file][:start] + text + texts[file][max(start, stop) :]
            taken[file] = start
        return texts


def deletion(text: str, flag: Origin, values: int, joined: bool) -> tuple[int, int] | None:
    """What to delete for an argument with its values, ``None`` if its values are not written behind it.

    A line that holds nothing else goes too, except its end where it ends a command continued over lines.
    """
    start, end = flag.start, flag.end
    quote = text[start - 1 : start]
    alone = quote in ("'", '"') and quote != "" and text[end : end + 1] == quote
    if alone:
        start, end = start - 1, end + 1
    for _ in range(0 if joined else values):
        gap = _GAP.match(text, end)
        value = _VALUE.match(text, gap.end() if gap else end)
        if gap is None or value is None or text.startswith("--", value.start()):
            return None
        end = value.end()
    if not alone and quote in ("'", '"') and quote != "" and text[end : end + 1] == quote:
        start, end = start - 1, end + 1  # the whole quoted word is the argument
    return _with_line(text, start, end)


def _with_line(text: str, start: int, end: int) -> tuple[int, int]:
    line_start = text.rfind("\n", 0, start) + 1
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    before, after = text[line_start:start], text[end:line_end]
    if not before.strip() and after.strip() in ("", "\\"):
        continued = text[:line_start].endswith(("\\\n", "\\\r\n"))
        if continued and not after.strip():
            return start, end  # an empty line ends the command as this one did
        return line_start, min(len(text), line_end + 1)
    if not after.strip() or after.strip() == "\\":
        stripped = text[line_start:start].rstrip()
        return line_start + len(stripped), end
    gap = re.match(r"[ \t]+", after)
    return start, end + (gap.end() if gap else 0)


def node_directives(text: str, cluster: Cluster) -> Iterator[tuple[int, int, int]]:
    """Numbers in the directives of Slurm that must become the cluster's: start, end, number."""
    wanted = [(_NODES, cluster.num_nodes), (_PER_NODE, cluster.devices_per_node)]
    devices = _PER_NODE.search(text)
    tasks = _TASKS.search(text)
    if devices and tasks and devices.group(1) == tasks.group(1):  # a task a device
        wanted.append((_TASKS, cluster.devices_per_node))
    for pattern, number in wanted:
        for match in pattern.finditer(text):
            if match.group(1) != str(number):
                yield match.start(1), match.end(1), number
