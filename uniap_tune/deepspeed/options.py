"""What the user tells the planner: the ``uniap`` block of the DeepSpeed JSON and the ``--uniap_*`` arguments."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from uniap_tune.errors import InputError
from uniap_tune.space import Knobs, parse_knobs

FLAG = "--uniap_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The keys of the ``uniap`` block; ``None``: not given.

    Attributes:
        model: a config.json, its folder, or a shipped name.
        cluster: as for ``uniap-tune plan --cluster``; the hostfile and ``--num_*`` choose a part of it.
        seq_length: tokens of a sample.
        global_batch: samples of a step; overrides the JSON's batch keys.
        max_seconds: seconds for planning and checking, after which the best plan so far is taken.
        fix, max, forbid: knobs, as ``{"tp": 2}`` or ``["tp=2"]``.
        memory_fraction: part of each device's memory a plan may use.
        pipeline: whether the script builds a ``PipelineModule``; by default its text is searched for one.
        tensor: whether the script feeds tensor-parallel ranks the same samples; by default whether the JSON has a
            ``tensor_parallel`` section.
        check: whether the result is tried on DeepSpeed before anything runs (default true).
    """

    model: str | None = None
    cluster: str | None = None
    seq_length: int | None = None
    global_batch: int | None = None
    max_seconds: float | None = None
    fix: tuple[str, ...] = ()
    max: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    memory_fraction: float | None = None
    pipeline: bool | None = None
    tensor: bool | None = None
    check: bool = True

    def knobs(self) -> Knobs:
        """The knobs the user set."""
        return parse_knobs(list(self.fix), list(self.max), list(self.forbid))


KEYS = tuple(item.name for item in fields(Options))


def read_options(block: Mapping[str, Any], flags: Mapping[str, str], where: str) -> Options:
    """The block of the JSON, overridden by the arguments.

    Args:
        block: the JSON object ``autotuning.uniap`` or ``uniap``.
        flags: ``--uniap_KEY VALUE`` arguments by key, as text.
        where: names the JSON in errors.

    Raises:
        InputError: an unknown key or a value that is none.
    """
    values: dict[str, Any] = {}
    for source, entries in ((f"{where}: uniap.", block), (FLAG, flags)):
        for key, value in entries.items():
            if key not in KEYS:
                raise _unknown(source, key)
            values[key] = _READERS[key](value, f"{source}{key}")
    return Options(**values)


def split_flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments without ``--uniap_KEY VALUE`` and ``--uniap_KEY=VALUE``, and those by key.

    Raises:
        InputError: such an argument without its value.
    """
    rest: list[str] = []
    flags: dict[str, str] = {}
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith(FLAG):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix(FLAG).partition("=")
        if not equals:
            following = next(waiting, None)
            if following is None:
                raise InputError(f"{argument}: the value is missing", fix=f"write {argument} VALUE")
            value = following
        flags[key] = value
    return rest, flags


def _unknown(source: str, key: str) -> InputError:
    near = difflib.get_close_matches(key[:40], KEYS, n=1, cutoff=0.5)
    why = f"did you mean {near[0]}?" if near else "known keys: " + ", ".join(KEYS)
    return InputError(f"{source}{key[:40]}: unknown key", why=why, fix="correct or remove it")


def _wrong(where: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{where}: must be {wanted}, not {json.dumps(value)[:60]}", fix="correct it")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(where, value, "text")
    return value


def _count(value: Any, where: str) -> int:
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= 10**12:
        raise _wrong(where, value, "a whole number above zero")
    return number


def _positive(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise _wrong(where, value, "a number above zero")
    return number


def _fraction(value: Any, where: str) -> float:
    number = _positive(value, where)
    if number > 1:
        raise _wrong(where, value, "a number above 0 and at most 1")
    return number


def _flag(value: Any, where: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str) and value.lower() in known:
        return known[value.lower()]
    if not isinstance(value, bool):
        raise _wrong(where, value, "true or false")
    return value


def _knobs(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if isinstance(value, dict):
        return tuple(f"{knob}={setting}" for knob, setting in value.items())
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise _wrong(where, value, 'an object such as {"tp": 2} or a list such as ["tp=2"]')


_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "model": _text,
    "cluster": _text,
    "seq_length": _count,
    "global_batch": _count,
    "max_seconds": _positive,
    "fix": _knobs,
    "max": _knobs,
    "forbid": _knobs,
    "memory_fraction": _fraction,
    "pipeline": _flag,
    "tensor": _flag,
    "check": _flag,
}
