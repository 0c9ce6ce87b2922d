"""Finding the reader of a source through entry points.

A format is added by a class with the three members of :class:`ModelReader` and a line in the table
``[project.entry-points."uniap_tune.adapters"]`` of its package; nothing here changes.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from uniap_tune.errors import InputError
from uniap_tune.spec import Model

GROUP = "uniap_tune.adapters"


class ModelReader(Protocol):
    """Reads the model out of one format."""

    name: str

    def matches(self, source: str) -> bool:
        """Whether the source is in this format, judged by its name and kind alone."""

    def read(self, source: str) -> Model:
        """The model.

        Raises:
            InputError: the source is not what it claims to be; names the file and key.
        """


def model_readers() -> tuple[ModelReader, ...]:
    """Every registered reader, in the order of their names."""
    return tuple(point.load()() for point in sorted(entry_points(group=GROUP), key=lambda point: point.name))


def read_model(source: str | Path) -> Model:
    """The model that ``source`` (a path or the name of a shipped model) describes.

    Raises:
        InputError: no reader knows the format, or its reader found a fault in it.
    """
    text = str(source)
    readers = model_readers()
    for reader in readers:
        if reader.matches(text):
            return reader.read(text)
    known = ", ".join(reader.name for reader in readers) or "none is registered: install the package again"
    raise InputError(
        f"{text}: no reader knows this kind of file",
        why=f"known formats: {known}",
        fix="give a config.json, a folder holding one, or the name of a shipped model",
    )
