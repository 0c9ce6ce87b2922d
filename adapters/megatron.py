"""Arguments read from any format -> :class:`~uniap_tune.recipe.Recipe`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from uniap_tune.errors import InputError
from uniap_tune.recipe import Argument, ClusterHints, Recipe, Source

from .megatron_arguments import read_job, read_model, read_runtime
from .megatron_flags import CHOICES, COUNTS, COUNTS_FROM_ZERO, NUMBERS, RELEVANT, SWITCHES

_LARGEST = 10**9
_REQUIRED = (
    "num-layers", "hidden-size", "num-attention-heads", "seq-length", "micro-batch-size", "global-batch-size",
)  # fmt: skip


def build_recipe(
    path: Path,
    source: Source,
    arguments: Mapping[str, Argument],
    *,
    environment: Mapping[str, str] | None = None,
    hints: ClusterHints | None = None,
    zero: frozenset[int] = frozenset({0, 1, 2, 3}),
    manages_environment: bool = False,
    unsayable: frozenset[str] = frozenset(),
    for_virtual_stages: frozenset[str] = frozenset(),
    notes: tuple[str, ...] = (),
) -> Recipe:
    """The recipe of Megatron arguments; see :class:`~uniap_tune.recipe.Recipe` for its parts.

    Raises:
        InputError: an argument that matters is missing, unknown or wrong; names file and line.
    """
    for name in _REQUIRED:
        if name not in arguments:
            raise InputError(
                f"{source.name}: --{name} is not given",
                why="a recipe must say what is trained, and with which batches",
                fix=f"add --{name}",
            )
    fields = {name: _typed(argument) for name, argument in arguments.items() if name in RELEVANT}
    assumptions = list(notes)
    try:
        model = read_model({"name": path.stem, **fields}, assumptions)
        job = read_job(fields, assumptions)
    except InputError as error:  # combinations; single values are checked with their lines
        raise InputError(f"{source.name}: {error.what}", why=error.why, fix=error.fix) from None
    return Recipe(
        name=source.name,
        source=source,
        model=model,
        job=job,
        arguments=arguments,
        environment=environment or {},
        runtime=read_runtime(fields),
        hints=hints or ClusterHints(),
        expressible_zero=zero,
        manages_environment=manages_environment,
        unsayable=unsayable,
        for_virtual_stages=for_virtual_stages,
        notes=tuple(assumptions),
    )


def _typed(argument: Argument) -> object:
    """The value as the shared reading of arguments wants it.

    Raises:
        InputError: not known, or not a value of this argument.
    """
    name, value = argument.name, argument.value
    if argument.unknown:
        raise InputError(
            f"{argument.where}: the value of --{name} is not known",
            why=f"it depends on {argument.unknown}",
            fix="give it with --set NAME=VALUE, or let the script run with --execute",
        )
    if name in SWITCHES:
        return True
    if value is True:
        raise InputError(f"{argument.where}: --{name} has no value", fix="give it one")
    text = str(value)
    if name in COUNTS or name in COUNTS_FROM_ZERO:
        least = 1 if name in COUNTS else 0
        if not (text.isascii() and text.isdecimal()) or len(text) > 12 or not least <= int(text) <= _LARGEST:
            _refuse(argument, f"a whole number of at least {least}")
        return int(text)
    if name in NUMBERS:
        return _number(argument, text)
    if name in CHOICES and text not in CHOICES[name]:
        _refuse(argument, "one of " + ", ".join(sorted(CHOICES[name])))
    return text


def _number(argument: Argument, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        _refuse(argument, "a number")
    return value


def _refuse(argument: Argument, wanted: str) -> NoReturn:
    value = str(argument.value)[:40]
    raise InputError(f"{argument.where}: --{argument.name} must be {wanted}, not {value!r}", fix="correct it")
