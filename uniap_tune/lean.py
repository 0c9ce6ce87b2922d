"""From prices alone, before any array is built: how little memory a (pp, c, family) may need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

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
    without virtual stages where blocks are equal and have one strategy at each place; else every block counts as
    the leanest, and memory as if a stage filled its leanest chunks first.
    """
    table = _stage_bytes(pricer, pp, c, family, leading)
    return math.inf if table is None else _bottleneck(table, pricer.num_blocks)


def least_seconds(pricer: Pricer, pp: int, c: int, family: Family, leading: int, limit_bytes: float) -> float:
    """A lower bound on TPI under a memory limit, for a family that has one strategy at each place and one chunk a
    stage; else 0.

    The slowest stage takes at least what the best balance of the blocks takes where no stage holds more than fit.
    """
    if family.virtual_stages > 1 or len(family.blocks) > 1 + family.leading:
        return 0.0
    table = _stage_bytes(pricer, pp, c, family, leading)
    if table is None:
        return math.inf
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


def _stage_bytes(pricer: Pricer, pp: int, c: int, family: Family, leading: int) -> FloatArray | None:
    """[stage, blocks held] least bytes; ``None`` if no chunk may hold a block."""
    costs: dict[LayerKind, list[LayerCost]] = {kind: [] for kind in LayerKind}
    recomputed: list[LayerCost] = []
    for kind in pricer.type_counts:
        for strategy in family.strategies(kind):
            is_leading = family.leading and kind.kind is LayerKind.BLOCK and strategy.recompute is Recompute.FULL
            cost = pricer.cost(kind, strategy, pp, c, family.virtual_stages)
            (recomputed if is_leading else costs[kind.kind]).append(cost)
    blocks = pricer.num_blocks
    flights = _flights(pp, c, family.virtual_stages)
    plain = costs[LayerKind.BLOCK]
    each = _in_flight(plain, flights)
    most = blocks if family.virtual_stages == 1 else min(blocks, _most_of_a_chunk(pricer, pp, c, family))
    lead = min(leading, most)
    units = [np.repeat(each, most - lead, axis=1)]
    update = _least(plain, lambda cost: cost.static + cost.step_bytes)
    transient = _least(plain, lambda cost: cost.transient_bytes)
    if recomputed:
        units.append(np.repeat(_in_flight(recomputed, flights), lead, axis=1))
        update = min(update, _least(recomputed, lambda cost: cost.static + cost.step_bytes))
        transient = _least(recomputed, lambda cost: cost.transient_bytes)
    held = np.cumsum(np.sort(np.concatenate(units, axis=1), axis=1)[:, :blocks], axis=1)
    held = np.concatenate([np.zeros((pp, 1)), held], axis=1)
    updated = np.tile(update * np.arange(held.shape[1]), (pp, 1))
    spike = np.full(held.shape, transient)
    spike[:, 0] = 0.0
    for end, stage, chunk in ((LayerKind.EMBEDDING, 0, 0), (LayerKind.HEAD, pp - 1, -1)):
        held[stage] += _in_flight(costs[end], flights[stage, chunk])
        updated[stage] += _least(costs[end], lambda cost: cost.static + cost.step_bytes)
        spike[stage] = np.maximum(spike[stage], _least(costs[end], lambda cost: cost.transient_bytes))
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


def _least(costs: Sequence[LayerCost], size: Callable[[LayerCost], float]) -> float:
    return min(size(cost) for cost in costs)


def _in_flight(costs: Sequence[LayerCost], flights: IntArray) -> FloatArray:
    """Least bytes held, for each number of micro-batches in flight."""
    held: FloatArray = np.minimum.reduce([cost.static + cost.microbatch * flights for cost in costs])
    return held


@lru_cache(maxsize=1024)
def _flights(pp: int, c: int, virtual_stages: int) -> IntArray:
    """[pp, chunks] micro-batches in flight."""
    return np.array([chunks_in_flight(i, pp, c, virtual_stages) for i in range(pp)], dtype=np.int64)
