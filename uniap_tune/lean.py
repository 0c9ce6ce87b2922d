"""From prices alone, before any array is built: how little memory a (pp, c, family) may need."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from uniap_tune.cost.parts import LayerCost
from uniap_tune.formulate import Pricer
from uniap_tune.graph import LayerKind, LayerType
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
    transients. Where types differ it is the largest of the bounds for all blocks, as if each stage could choose the
    leanest, and for those of each type. Chunks are filled as if the leanest came first.
    """
    return max(_bottleneck(table, count) for _, count, table in _stage_bytes(pricer, pp, c, family, leading))


def least_seconds(pricer: Pricer, pp: int, c: int, family: Family, leading: int, limit_bytes: float) -> float:
    """A lower bound on TPI under a memory limit, for a family that has one strategy at each place; else 0.

    The slowest stage takes at least what the best balance of the blocks takes where no stage holds more than fit. With
    v chunks on each stage, each recomputes its first N blocks.
    """
    if len(family.blocks) > 1 + family.leading:
        return 0.0
    v = family.virtual_stages
    again = math.inf  # what recomputing a block adds
    ends = {LayerKind.EMBEDDING: 0.0, LayerKind.HEAD: 0.0}
    blocks: dict[LayerType, list[float]] = {}
    for kind, count in pricer.type_counts.items():
        times = [pricer.cost(kind, s, pp, c).time for s in family.strategies(kind)]
        if kind.kind is LayerKind.BLOCK:
            blocks[kind] = [min(times)] * count
            again = min(again, max(times) - min(times))
        else:
            ends[kind.kind] = min(times)
    slowest = 0.0
    for kinds, count, table in _stage_bytes(pricer, pp, c, family, leading):
        held = np.arange(table.shape[1])
        twice = np.minimum(held, leading) if v == 1 else np.full(len(held), v * leading)
        if len(kinds) < len(blocks):  # which of the blocks are recomputed is not known
            twice = np.zeros(len(held))
        shortest = np.concatenate([[0.0], np.cumsum(sorted(chain.from_iterable(blocks[kind] for kind in kinds)))])
        seconds = np.tile(shortest[: len(held)] + twice * again, (pp, 1))
        seconds[0] += ends[LayerKind.EMBEDDING]
        seconds[-1] += ends[LayerKind.HEAD]
        fits = table * (1 - _ROUNDING) <= limit_bytes
        slowest = max(slowest, _bottleneck(np.where(fits, seconds, np.inf), count))
    links = (pp - 1) * pricer.least_send(pp, c, family)
    whole = sum(map(sum, blocks.values())) + sum(ends.values())
    whole += again * (min(leading, pricer.num_blocks) if v == 1 else pp * v * leading)
    return (whole / v + links + (c - 1 / v) * slowest) * (1 - _ROUNDING)


def _bottleneck(table: FloatArray, blocks: int) -> float:
    """The least bound on all entries used when ``blocks`` blocks are spread over stages, given [stage, blocks held].

    Entries rise with the blocks held.
    """
    needed = float(table[:, 0].max())
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


@dataclass(frozen=True, slots=True)
class _Choices:
    """What layers may need: of blocks by type, with how many there are of it."""

    blocks: Mapping[LayerType, tuple[int, Sequence[_Bytes]]]
    recomputed: Mapping[LayerType, Sequence[_Bytes]]
    ends: Mapping[LayerKind, Sequence[_Bytes]]

    def all(self) -> Iterator[_Bytes]:
        """All of them."""
        for sizes in (*(sizes for _, sizes in self.blocks.values()), *self.recomputed.values(), *self.ends.values()):
            yield from sizes

    def only(self, kind: LayerType) -> _Choices:
        """Those of one type of blocks, and of the ends."""
        recomputed = {kind: self.recomputed[kind]} if self.recomputed else {}
        return _Choices({kind: self.blocks[kind]}, recomputed, self.ends)

    def within(self, level: float) -> _Choices:
        """Those whose transients are no larger."""

        def low(sizes: Sequence[_Bytes]) -> list[_Bytes]:
            return [size for size in sizes if size.transient <= level]

        blocks = {kind: (count, kept) for kind, (count, sizes) in self.blocks.items() if (kept := low(sizes))}
        return _Choices(blocks, {}, {kind: low(sizes) or [_NEVER] for kind, sizes in self.ends.items()})


_NEVER = _Bytes(math.inf, math.inf, math.inf, math.inf)


def _stage_bytes(
    pricer: Pricer, pp: int, c: int, family: Family, leading: int
) -> Iterator[tuple[Collection[LayerType], int, FloatArray]]:
    """Types of blocks, how many there are of them, and [stage, blocks held] least bytes: of all types, and of each.

    With one type alone the blocks of the others count as nothing; the bound for all types lets every stage have the
    leanest of them.
    """
    choices = _choices(pricer, pp, c, family)
    yield list(choices.blocks), pricer.num_blocks, _bytes_of(choices, pricer, pp, c, family, leading)
    if len(choices.blocks) > 1:
        for kind, (count, _) in choices.blocks.items():
            yield [kind], count, _bytes_of(choices.only(kind), pricer, pp, c, family, leading)


def _bytes_of(choices: _Choices, pricer: Pricer, pp: int, c: int, family: Family, leading: int) -> FloatArray:
    """[stage, blocks held] least bytes.

    A stage pays for its largest transient: with several strategies, for each level of it those within the level.
    """
    blocks = sum(count for count, _ in choices.blocks.values())
    most = blocks if family.virtual_stages == 1 else min(blocks, _most_of_a_chunk(pricer, pp, c, family))
    flights = _flights(pp, c, family.virtual_stages)
    is_whole = blocks == pricer.num_blocks
    if choices.recomputed or len(family.blocks) == 1:
        return _table(choices, flights, min(leading, most), most, is_whole)
    table = np.full((pp, 1 + min(blocks, family.virtual_stages * most)), np.inf)
    for level in sorted({each.transient for each in choices.all()}):
        within = choices.within(level)
        if within.blocks:
            lower = _table(within, flights, 0, most, is_whole, level)
            table[:, : lower.shape[1]] = np.minimum(table[:, : lower.shape[1]], lower)
    return table


def _choices(pricer: Pricer, pp: int, c: int, family: Family) -> _Choices:
    blocks: dict[LayerType, tuple[int, list[_Bytes]]] = {}
    recomputed: dict[LayerType, list[_Bytes]] = {}
    ends: dict[LayerKind, list[_Bytes]] = {LayerKind.EMBEDDING: [], LayerKind.HEAD: []}
    for kind, count in pricer.type_counts.items():
        plain: list[_Bytes] = []
        again: list[_Bytes] = []
        for strategy in family.strategies(kind):
            is_leading = family.leading and kind.kind is LayerKind.BLOCK and strategy.recompute is Recompute.FULL
            size = _bytes(pricer.cost(kind, strategy, pp, c, family.virtual_stages))
            (again if is_leading else plain).append(size)
        if kind.kind is LayerKind.BLOCK:
            blocks[kind] = count, _undominated(plain)
            recomputed |= {kind: again} if again else {}
        else:
            ends[kind.kind] = _undominated(plain)
    return _Choices(blocks, recomputed, ends)


def _undominated(sizes: Sequence[_Bytes]) -> list[_Bytes]:
    """Those that none beats in all respects, by rising transients."""
    kept: list[_Bytes] = []
    for size in sorted(sizes):
        if not any(all(a <= b for a, b in zip(other[1:], size[1:], strict=True)) for other in kept):
            kept.append(size)
    return kept


def _table(
    choices: _Choices, flights: IntArray, lead: int, most: int, is_whole: bool, level: float = 0.0
) -> FloatArray:
    """[stage, blocks held] least bytes where each stage pays at least ``level`` for transients.

    Args:
        choices: what a layer may need; the first ``lead`` blocks of a chunk are recomputed.
        flights: [stage, chunk] micro-batches in flight.
        most: blocks a chunk may hold.
        is_whole: these are all blocks of the model, so that stages between the ends hold some.
    """
    pp, chunks = flights.shape
    units, updates, transients = [], [], []
    again = []
    for kind, (count, sizes) in choices.blocks.items():
        repeated = choices.recomputed.get(kind, ())
        # of a part of the model's blocks, any may be the recomputed ones
        units.append(_units(count, sizes, flights, most - lead if is_whole else most))
        if repeated:
            again.append(_units(count, repeated, flights, lead))
        updates += [min(size.update for size in (*sizes, *repeated))] * count
        transients += [min(size.transient for size in (repeated if is_whole and repeated else (*sizes, *repeated)))]
    if again:
        units.append(np.sort(np.concatenate(again, axis=1), axis=1)[:, : chunks * lead])
    number = min(len(updates), chunks * most)
    held = np.cumsum(np.sort(np.concatenate(units, axis=1), axis=1)[:, :number], axis=1)
    held = np.concatenate([np.zeros((pp, 1)), held], axis=1)
    updated = np.tile(np.concatenate([[0.0], np.cumsum(sorted(updates))])[: held.shape[1]], (pp, 1))
    spike = np.full(held.shape, max(min(transients), level))
    spike[:, 0] = level
    for end, stage, chunk in ((LayerKind.EMBEDDING, 0, 0), (LayerKind.HEAD, pp - 1, -1)):
        held[stage] += _in_flight(choices.ends[end], flights[stage, chunk])
        updated[stage] += min(size.update for size in choices.ends[end])
        spike[stage] = np.maximum(spike[stage], min(size.transient for size in choices.ends[end]))
    table: FloatArray = np.maximum(held + spike, updated)
    if is_whole:
        table[1:-1, 0] = table[1:-1, 1]
    return table


def _units(count: int, sizes: Sequence[_Bytes], flights: IntArray, most: int) -> FloatArray:
    """[stage, blocks] rising bytes of the blocks of one type, of which a chunk may hold ``most``."""
    each = _in_flight(sizes, flights)
    return np.sort(np.repeat(each, min(most, count), axis=1), axis=1)[:, :count]


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
