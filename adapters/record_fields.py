"""Reading fields of a measurement record without trusting them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from uniap_tune.errors import InputError

Fields = Mapping[str, object]
_LARGEST = 10**12  # nothing counted in a record is larger


class SkippedRecordError(InputError):
    """The record is understood, and it is not a job the cost model can mean (fine-tuning with adapters, no model)."""


def mapping(record: Fields, key: str) -> Fields | None:
    """A nested object, or ``None`` where it is absent.

    Raises:
        InputError: it is there and is no object.
    """
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(f"record key {key!r} must be an object", fix="see the reference of predict for the fields")
    return value


def count(record: Fields, *keys: str, least: int = 1) -> int | None:
    """The first of the keys that is present, as a whole number of at least ``least``; ``None`` where all are absent.

    Raises:
        InputError: the value is no such number.
    """
    for key in keys:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, str) and value.strip().isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"record key {key!r} must be a number, not {_shown(value)}", fix=f"correct {key}")
        if value != int(value) or not least <= value <= _LARGEST:
            raise InputError(
                f"record key {key!r} must be a whole number of at least {least}, not {_shown(value)}",
                fix=f"correct {key}",
            )
        return int(value)
    return None


def required(record: Fields, *keys: str, least: int = 1) -> int:
    """:func:`count`, where one of the keys must be present."""
    value = count(record, *keys, least=least)
    if value is None:
        raise SkippedRecordError(f"record has no {' or '.join(keys)}", fix=f"add {keys[0]}")
    return value


def number(record: Fields, *keys: str) -> float | None:
    """The first of the keys that is present, as a positive number; ``None`` where all are absent or not positive."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
    return None


def text(record: Fields, *keys: str) -> str:
    """The first of the keys that is present, as text; empty where all are absent."""
    for key in keys:
        value = record.get(key)
        if value is not None and not isinstance(value, dict | list):
            return str(value)
    return ""


def flag(record: Fields, key: str) -> bool | None:
    """A truth value, or ``None`` where it is absent."""
    value = record.get(key)
    if value is None:
        return None
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def counts(record: Fields, key: str, *, least: int = 0) -> list[int] | None:
    """A list of whole numbers, or ``None`` where it is absent.

    Raises:
        InputError: it is there and is no such list.
    """
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not value or len(value) > 4096:
        raise InputError(f"record key {key!r} must be a list of numbers", fix=f"correct {key}")
    return [required({key: entry}, key, least=least) for entry in value]


def names(values: Iterable[object]) -> list[str]:
    """The texts among the values."""
    return [value for value in values if isinstance(value, str)]


def _shown(value: object) -> str:
    return repr(value)[:40]
