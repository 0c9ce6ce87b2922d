"""From prices alone, before any array is built: how little memory a (pp, c, family) may need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from uniap_tune.cost.parts import LayerCost
from uniap_tune.formulate import Pricer
from uniap_tune.graph import LayerKind
from uniap_tune.interleave import EVEN
from uniap_tune.problem import FloatArray, IntArray
from uniap_tune.schedule import chunks_in_flight
from uniap_tune.space import Family
from uniap_tune.spec import Recompute

# A quotient may miss a whole number by rounding.
_ROUNDING = 1e-9


def least_bytes(pricer: Pricer, pp: int, c: int, family: Family, leading: int = 0) -> float:
    """A lower bound on the bytes of the fullest stage; ``leading`` is N of a family that recomputes N blocks a chunk.

    The bytes of a stage rise with the blocks it holds, so as many blocks fit under a limit as the table
    bytes[stage, blocks held] has entries within it: the least limit is the B-th smallest entry, for B blocks. Exact
    without virtual stages where blocks are equal and have one strategy at each place, or one leanest for each level of
    transients; else every block counts as the leanest, and memory as if a stage filled its leanest chunks first.
    """
    table = _stage_bytes(pricer, pp, c, family, leading)
    return _bottleneck(table, pricer.num_blocks)


def least_seconds(pricer: Pricer, pp: int, c: int, family: Family, leading: int, limit_bytes: float) -> float:
    """A lower bound on TPI under a memory limit, for a family that has one strategy at each place and one chunk a
    stage; else 0.

    The slowest stage takes at least what the best balance of the blocks takes where no stage holds more than fit.
    """
    if family.virtual_stages > 1 or len(family.blocks) > 1 + family.leading:
        return 0.0
    table = _stage_bytes(pricer, pp, c, family, leading)
    plain, again = math.inf, math.inf  # seconds of a block, and what recomputing it adds
    ends = {LayerKind.EMBEDDING: 0.0, LayerKind.HEAD: 0.0}
    total = 0.0
    for kind, count in pricer.type_counts.items():
        times = [pricer.cost(kind, s, pp, c).time for s in family.strategies(kind)]
        total += count * min(times)
        if kind.kind is LayerKind.BLOCK:
            plain, again = min(plain, *times), min(again, max(times) - min(times))
        else:
            ends[kind.kind] = min(times)
    held = np.arange(table.shape[1])
    seconds = np.tile(held * plain + np.minimum(held, leading) * again, (pp, 1))
    seconds[0] += ends[LayerKind.EMBEDDING]
    seconds[-1] += ends[LayerKind.HEAD]
    fits = table * (1 - _ROUNDING) <= limit_bytes
    slowest = _bottleneck(np.where(fits, seconds, np.inf), pricer.num_blocks)
    links = (pp - 1) * pricer.least_send(pp, c, family)
    whole = total + again * min(leading, pricer.num_blocks)
    return (whole + links + (c - 1) * slowest) * (1 - _ROUNDING)


def _bottleneck(table: FloatArray, blocks: int) -> float:
    """The least bound on all entries used when ``blocks`` blocks are spread over stages, given [stage, blocks held].

    Entries rise with the blocks held. The first and the last stage may hold none, any other holds some.
    """
    needed = max(float(table[0, 0]), float(table[-1, 0]), float(table[1:-1, 1].max(initial=0.0)))
    entries = table[:, 1:].ravel()
    if len(entries) < blocks:
        return math.inf
    return max(needed, float(np.partition(entries, blocks - 1)[blocks - 1]))


class _Bytes(NamedTuple):
    """What a layer needs under one strategy; ``update``: when the optimizer runs."""

    transient: float
    static: float
    microbatch: float
    update: float


def _bytes(cost: LayerCost) -> _Bytes:
    return _Bytes(cost.transient_bytes, cost.static, cost.microbatch, cost.static + cost.step_bytes)


def _stage_bytes(pricer: Pricer, pp: int, c: int, family: Family, leading: int) -> FloatArray:
    """[stage, blocks held] least bytes.

    A stage pays for its largest transient: with several strategies, for each level of it those within the level.
    """
    choices: dict[LayerKind, list[_Bytes]] = {kind: [] for kind in LayerKind}
    recomputed: list[_Bytes] = []
    for kind in pricer.type_counts:
        for strategy in family.strategies(kind):
            is_leading = family.leading and kind.kind is LayerKind.BLOCK and strategy.recompute is Recompute.FULL
            size = _bytes(pricer.cost(kind, strategy, pp, c, family.virtual_stages))
            (recomputed if is_leading else choices[kind.kind]).append(size)
    blocks = pricer.num_blocks
    most = blocks if family.virtual_stages == 1 else min(blocks, _most_of_a_chunk(pricer, pp, c, family))
    flights = _flights(pp, c, family.virtual_stages)
    lead = min(leading, most)
    if recomputed or len(choices[LayerKind.BLOCK]) == 1:
        return _table(choices, recomputed, flights, lead, most, blocks)
    useful = {kind: _undominated(sizes) for kind, sizes in choices.items()}
    tables = []
    for level in sorted({size.transient for sizes in useful.values() for size in sizes}):
        within = {kind: [size for size in sizes if size.transient <= level] for kind, sizes in useful.items()}
        if all(within.values()):
            tables.append(_table(within, [], flights, lead, most, blocks, level))
        elif within[LayerKind.BLOCK]:  # stages without an embedding or a head
            ends = {kind: within[kind] or [_NEVER] for kind in within}
            tables.append(_table(ends, [], flights, lead, most, blocks, level))
    table: FloatArray = np.minimum.reduce(tables)
    return table


_NEVER = _Bytes(math.inf, math.inf, math.inf, math.inf)


def _undominated(sizes: Sequence[_Bytes]) -> list[_Bytes]:
    """Those that none beats in all respects, by rising transients."""
    kept: list[_Bytes] = []
    for size in sorted(sizes):
        if not any(all(a <= b for a, b in zip(other[1:], size[1:], strict=True)) for other in kept):
            kept.append(size)
    return kept


def _table(
    choices: Mapping[LayerKind, Sequence[_Bytes]],
    recomputed: Sequence[_Bytes],
    flights: IntArray,
    lead: int,
    most: int,
    blocks: int,
    level: float = 0.0,
) -> FloatArray:
    """[stage, blocks held] least bytes where each stage pays at least ``level`` for transients.

    Args:
        choices, recomputed: what a layer may need; the first ``lead`` blocks of a chunk are the recomputed ones.
        flights: [stage, chunk] micro-batches in flight.
        most: blocks a chunk may hold.
        blocks: blocks of the model.
    """
    pp = len(flights)
    plain = choices[LayerKind.BLOCK]
    units = [np.repeat(_in_flight(plain, flights), most - lead, axis=1)]
    update = min(size.update for size in plain)
    transient = min(size.transient for size in plain)
    if recomputed:
        units.append(np.repeat(_in_flight(recomputed, flights), lead, axis=1))
        update = min(update, *(size.update for size in recomputed))
        transient = min(size.transient for size in recomputed)
    held = np.cumsum(np.sort(np.concatenate(units, axis=1), axis=1)[:, :blocks], axis=1)
    held = np.concatenate([np.zeros((pp, 1)), held], axis=1)
    updated = np.tile(update * np.arange(held.shape[1]), (pp, 1))
    spike = np.full(held.shape, max(transient, level))
    spike[:, 0] = level
    for end, stage, chunk in ((LayerKind.EMBEDDING, 0, 0), (LayerKind.HEAD, pp - 1, -1)):
        held[stage] += _in_flight(choices[end], flights[stage, chunk])
        updated[stage] += min(size.update for size in choices[end])
        spike[stage] = np.maximum(spike[stage], min(size.transient for size in choices[end]))
    table: FloatArray = np.maximum(held + spike, updated)
    return table


def _most_of_a_chunk(pricer: Pricer, pp: int, c: int, family: Family) -> int:
    """How many blocks the longest chunk an interleaved pipeline may have can hold; see :mod:`uniap_tune.interleave`."""
    total, shortest = 0.0, math.inf
    for kind, count in pricer.type_counts.items():
        seconds = min(pricer.cost(kind, s, pp, c).time for s in family.strategies(kind))
        total += count * seconds
        if kind.kind is LayerKind.BLOCK:
            shortest = min(shortest, seconds)
    longest = (1 + EVEN) * total / (pp * family.virtual_stages)
    return max(1, math.floor(longest / shortest * (1 + _ROUNDING))) if shortest > 0 else pricer.num_blocks


def _in_flight(sizes: Sequence[_Bytes], flights: IntArray) -> FloatArray:
    """Least bytes held, for each number of micro-batches in flight."""
    held: FloatArray = np.minimum.reduce([size.static + size.microbatch * flights for size in sizes])
    return held


@lru_cache(maxsize=1024)
def _flights(pp: int, c: int, virtual_stages: int) -> IntArray:
    """[pp, chunks] micro-batches in flight."""
    return np.array([chunks_in_flight(i, pp, c, virtual_stages) for i in range(pp)], dtype=np.int64)
