"""The ``solve`` problem format: cost tables of one's own as JSON (schema_version 1; docs/reference/solve.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uniap_tune.errors import InputError
from uniap_tune.problem import EdgeTable, FloatArray, IntArray, LayerTable, Problem
from uniap_tune.schedule import Schedule

SCHEMA_VERSION = 1
_MAX_BYTES = 256 << 20
# Sums and products of numbers up to here stay finite; whatever is measured in seconds or bytes is far below.
_LARGEST = 1e100
_MOST = 10**9  # stages or micro-batches
_TOP = {"schema_version", "num_stages", "num_microbatches", "schedule", "memory_limit_bytes", "layers", "edges"}
_LAYER = {
    "name",
    "layout",
    "time_s",
    "step_time_s",
    "static_bytes",
    "microbatch_bytes",
    "transient_bytes",
    "step_bytes",
}
_EDGE = {"from", "to", "reshard_s", "send_s"}


def read_problem(path: Path) -> Problem:
    """Read a problem file (``-``: standard input is up to the caller).

    Raises:
        InputError: whatever is wrong, with the file and the key.
    """
    where = str(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{where}: larger than {_MAX_BYTES >> 20} MiB", fix="give a smaller problem")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{where}: cannot be read", why=error.strerror or str(error), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text", fix="give a JSON file") from error
    return parse_problem(text, where)


def parse_problem(text: str, where: str) -> Problem:
    """The problem a JSON text describes; see :func:`read_problem`."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON", why=str(error), fix="see docs/reference/solve.md") from error
    top = _object(data, where, _TOP)
    version = top.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise InputError(f"{where}: schema_version must be {SCHEMA_VERSION}, not {_shown(version)}")
    entries = _list(top, "layers", where)
    if not entries:
        raise InputError(f"{where}: layers is empty", fix="give at least one layer")
    interned: dict[bytes, LayerTable] = {}
    layers = tuple(_layer(entry, f"{where}: layers[{u}]", interned) for u, entry in enumerate(entries))
    num_layouts = 1 + max(int(table.layout.max()) for table in layers)
    return Problem(
        num_stages=_count(top, "num_stages", where),
        num_microbatches=_count(top, "num_microbatches", where),
        schedule=_schedule(top.get("schedule", "1f1b"), where),
        memory_limit_bytes=_limit(top, where),
        num_layouts=num_layouts,
        layers=layers,
        edges=_edges(top.get("edges", []), where, len(layers), num_layouts),
    )


def _layer(entry: object, where: str, interned: dict[bytes, LayerTable]) -> LayerTable:
    """Equal layers become one object: that is how the solvers recognize them."""
    layer = _object(entry, where, _LAYER)
    time_s = _numbers(layer, "time_s", where, None)
    size = len(time_s)
    if not size:
        raise InputError(f"{where}.time_s is empty", fix="give each layer at least one strategy")
    zeros = np.zeros(size)
    table = LayerTable(
        layout=_layouts(layer, where, size),
        time_s=time_s,
        step_time_s=_numbers(layer, "step_time_s", where, size) if "step_time_s" in layer else zeros,
        static_bytes=_numbers(layer, "static_bytes", where, size),
        microbatch_bytes=_numbers(layer, "microbatch_bytes", where, size),
        transient_bytes=_numbers(layer, "transient_bytes", where, size) if "transient_bytes" in layer else zeros,
        step_bytes=_numbers(layer, "step_bytes", where, size) if "step_bytes" in layer else zeros,
    )
    columns = (table.time_s, table.step_time_s, table.static_bytes, table.microbatch_bytes)
    more = (table.transient_bytes, table.step_bytes)
    key = table.layout.tobytes() + b"".join(column.tobytes() for column in (*columns, *more))
    return interned.setdefault(key, table)


def _edges(value: object, where: str, num_layers: int, num_layouts: int) -> tuple[EdgeTable, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: edges must be a list, not {_kind(value)}")
    sums: dict[tuple[int, int], tuple[FloatArray, FloatArray]] = {}
    for number, entry in enumerate(value):
        at = f"{where}: edges[{number}]"
        edge = _object(entry, at, _EDGE)
        u, v = _index(edge, "from", at, num_layers), _index(edge, "to", at, num_layers)
        if u >= v:
            raise InputError(f"{at}: from ({u}) must be before to ({v})", why="layers are in topological order")
        reshard = _matrix(edge, "reshard_s", at, num_layouts)
        send = _matrix(edge, "send_s", at, num_layouts)
        known = sums.get((u, v))
        sums[u, v] = (reshard, send) if known is None else (known[0] + reshard, known[1] + send)
    shared: dict[bytes, FloatArray] = {}

    def intern(matrix: FloatArray) -> FloatArray:
        return shared.setdefault(matrix.tobytes(), matrix)

    return tuple(EdgeTable(u, v, intern(r), intern(s)) for (u, v), (r, s) in sorted(sums.items()))


def _object(value: object, where: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, not {_kind(value)}")
    unknown = sorted(set(value) - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise InputError(
            f"{where}: unknown key {_shown(unknown[0])}", why=f"the keys are {names}", fix="remove or correct it"
        )
    return value


def _list(top: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = top.get(key)
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} must be a list, not {_kind(value)}")
    return value


def _count(top: Mapping[str, Any], key: str, where: str) -> int:
    value = top.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise InputError(f"{where}: {key} must be a whole number from 1 to {_MOST}, not {_shown(value)}")
    return value


def _limit(top: Mapping[str, Any], where: str) -> float:
    value: Any = top.get("memory_limit_bytes")
    if not _is_number(value) or value < 1 / _LARGEST:
        raise InputError(
            f"{where}: memory_limit_bytes must be a number above 0, at most {_LARGEST:g}, not {_shown(value)}"
        )
    return float(value)


def _schedule(value: object, where: str) -> Schedule:
    if not isinstance(value, str) or value not in set(Schedule):
        known = ", ".join(Schedule)
        raise InputError(f"{where}: schedule must be one of {known}, not {_shown(value)}")
    return Schedule(value)


def _index(edge: Mapping[str, Any], key: str, where: str, num_layers: int) -> int:
    value = edge.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_layers:
        raise InputError(f"{where}.{key} must be a layer from 0 to {num_layers - 1}, not {_shown(value)}")
    return value


def _numbers(layer: Mapping[str, Any], key: str, where: str, size: int | None) -> FloatArray:
    value = layer.get(key)
    if not isinstance(value, list):
        raise InputError(f"{where}.{key} must be a list of numbers, not {_kind(value)}")
    if size is not None and len(value) != size:
        raise InputError(f"{where}.{key} has {len(value)} entries, time_s has {size}", fix="one for each strategy")
    for place, number in enumerate(value):
        if not _is_number(number) or number < 0:
            raise InputError(f"{where}.{key}[{place}] must be a number from 0 to {_LARGEST:g}, not {_shown(number)}")
    return np.array(value, dtype=np.float64)


def _layouts(layer: Mapping[str, Any], where: str, size: int) -> IntArray:
    value = layer.get("layout", [0] * size)
    if not isinstance(value, list) or len(value) != size:
        raise InputError(f"{where}.layout must be a list of {size} layouts, one for each strategy")
    for place, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 4096:
            raise InputError(f"{where}.layout[{place}] must be a whole number from 0, not {_shown(number)}")
    return np.array(value, dtype=np.int64)


def _matrix(edge: Mapping[str, Any], key: str, where: str, size: int) -> FloatArray:
    if key not in edge:
        return np.zeros((size, size))
    rows = edge[key]
    if (
        not isinstance(rows, list)
        or len(rows) < size
        or any(not isinstance(r, list) or len(r) != len(rows) for r in rows)
    ):
        raise InputError(f"{where}.{key} must be a square matrix over all {size} layouts")
    return np.array([_numbers({key: row}, key, f"{where} row {n}", None) for n, row in enumerate(rows)])[:size, :size]


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return float(value) <= _LARGEST
    except OverflowError:
        return False


def _kind(value: object) -> str:
    return "missing or null" if value is None else type(value).__name__


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
