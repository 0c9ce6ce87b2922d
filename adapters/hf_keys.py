"""Typed access to the keys of a Hugging Face ``config.json``; every error names the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from uniap_tune.errors import InputError

# Far above every published model; below it arithmetic stays exact and graphs stay buildable.
_LARGEST_SIZE = 1 << 31
_MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Keys:
    """The values of one configuration with its family's defaults and other names of keys.

    Attributes:
        file: where the values come from, for messages.
        values: the JSON object.
        defaults: what ``transformers`` assumes where a key is absent. A key that is present and ``null`` is
            ``None``, as it is there.
        names: for a common key, the names that the family gives it, in order of preference.
    """

    file: str
    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """The value as it stands, the family's default where the key is absent, else ``None``."""
        for name in self.names.get(key, (key,)):
            if name in self.values:
                return self.values[name]
        return self.defaults.get(key)

    def size(self, key: str) -> int:
        """A required positive integer."""
        value = self.optional_size(key)
        if value is None:
            raise InputError(
                f"{self.file}: {self._name(key)} is missing",
                why="the model's size is unknown without it",
                fix=f"add {self._name(key)} to the file",
            )
        return value

    def optional_size(self, key: str) -> int | None:
        """A positive integer, or ``None``."""
        return self._integer(key, least=1)

    def count(self, key: str) -> int:
        """A non-negative integer; absent or ``null`` is 0."""
        return self._integer(key, least=0) or 0

    def layers(self, key: str) -> int:
        """A required number of layers."""
        value = self.size(key)
        if value > _MOST_LAYERS:
            self.refuse(key, f"at most {_MOST_LAYERS}")
        return value

    def flag(self, key: str) -> bool:
        """A boolean; absent or ``null`` is false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def number(self, key: str) -> float:
        """A finite non-negative number; absent or ``null`` is 0."""
        return self.optional_number(key) or 0.0

    def optional_number(self, key: str) -> float | None:
        """A finite non-negative number, or ``None``."""
        value = self.get(key)
        if value is None:
            return None
        # abs(value) < inf before float(value): an integer may be too large for a float
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            self.refuse(key, "a number of at least zero")
        if value > _LARGEST_SIZE:
            self.refuse(key, f"at most {_LARGEST_SIZE}")
        return float(value)

    def text(self, key: str) -> str:
        """A string; absent or ``null`` is empty."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a string")
        return value or ""

    def nested(self, key: str) -> Mapping[str, Any] | None:
        """An object, or ``None``."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object")
        return value

    def sequence(self, key: str) -> list[Any] | None:
        """A list, or ``None``."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            self.refuse(key, "a list")
        return value

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Reject the value of ``key``.

        Raises:
            InputError: always.
        """
        name = self._name(key)
        shown = repr(self.get(key))
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise InputError(f"{self.file}: {name} must be {expected}, not {shown}", fix=f"correct {name}")

    def _integer(self, key: str, *, least: int) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(key, "a positive integer" if least else "an integer of at least zero")
        if value > _LARGEST_SIZE:
            self.refuse(key, f"at most {_LARGEST_SIZE}")
        return int(value)

    def _name(self, key: str) -> str:
        """The name the file uses for the key, or the family's preferred one."""
        names = self.names.get(key, (key,))
        return next((name for name in names if name in self.values), names[0])
