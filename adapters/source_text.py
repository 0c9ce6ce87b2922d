"""Recipe files of strangers, read without trust: small enough to be parsed at once, UTF-8, with lines to point at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from uniap_tune.errors import InputError

from .documents import printable

# The longest public launch scripts stay below 60 kB; parsing this much takes well under a second.
MAX_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file's text, with line ends as they are."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """The path, printable."""
        return printable(str(self.path))

    def where(self, offset: int) -> str:
        """``file:line`` of an offset."""
        return f"{self.name}:{self.text.count(chr(10), 0, offset) + 1}"


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; a name that no file can have is none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL byte
        return False


def read_source(path: Path, instead: Mapping[Path, str] | None = None) -> SourceFile:
    """The text of a file; ``instead``: texts that stand for those of files, by their resolved paths.

    Raises:
        InputError: missing, unreadable, too large, or not text; names the file, and the line where there is one.
    """
    where = printable(str(path))
    if instead and path.resolve() in instead:
        return SourceFile(path, instead[path.resolve()])
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{where}: cannot be read", why=reason or "", fix="give the path of a recipe") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{where}: larger than {MAX_BYTES // 1024} KiB", fix="give the launch script or configuration")
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise InputError(f"{where}:{line}: not a text file", why="it has NUL bytes", fix="give the path of a recipe")
    try:
        return SourceFile(path, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{where}:{line}: not UTF-8 text", why=error.reason, fix="give the path of a recipe") from None
