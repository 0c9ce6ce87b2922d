"""The cheapest lower bound on a (pp, c, family): from prices alone, before any array is built."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from uniap_tune.formulate import Pricer
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.problem import MEMORY_SLACK
from uniap_tune.space import Family
from uniap_tune.strategy import Strategy

# A quotient may miss a whole number by rounding.
_ROUNDING = 1e-9
# Sums in another order differ in the last digits; a bound stays below them.
_BELOW = 1 - 1e-12


@dataclass(frozen=True, slots=True)
class _Terms:
    """What the bound is made of: seconds, and the bytes without which there is no plan."""

    total_s: float
    slowest_s: float
    links_s: float
    once_s: float
    largest_layer: float
    leanest_states: float
    # of blocks: seconds of the shortest and longest without recompute, the least that recomputing one takes
    shortest_s: float = 0.0
    longest_s: float = 0.0
    again_s: float = 0.0
    ends_s: float = 0.0  # the longer of embedding and head


class QuickBounds:
    """Lower bounds on TPI for the families of one pricer; those differing only in virtual stages share their terms."""

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer
        self._terms: dict[tuple[int, int, tuple[Strategy, ...]], _Terms] = {}

    def leading(self, pp: int, c: int, family: Family, count: int) -> float:
        """The bound of a family that recomputes the first N = ``count`` blocks of each stage (or model chunk), for
        plans that are not those of recomputing every block: some stage holds more than N, and takes as long as that.

        The slowest stage takes at least the mean of all, so it holds at least (mean - ends) / longest blocks, of which
        it recomputes N. A model chunk always holds N blocks.
        """
        floor = self(pp, c, family)
        if math.isinf(floor):
            return floor
        terms, v = self._find(pp, c, family), family.virtual_stages
        if v > 1:
            return floor + terms.again_s * count * (pp + c * v - 1) * _BELOW
        blocks = self._pricer.num_blocks
        held = 0
        if terms.longest_s > 0:
            held = max(0, math.ceil((terms.total_s / pp - terms.ends_s) / terms.longest_s * (1 - _ROUNDING)))
        slowest = terms.slowest_s + terms.again_s * min(held if pp > 1 else blocks, count)
        slowest = max(slowest, (count + 1) * terms.shortest_s + count * terms.again_s)
        more = (c - 1) * (slowest - terms.slowest_s) + terms.again_s * min(blocks, count)
        return floor + more * _BELOW

    def _find(self, pp: int, c: int, family: Family) -> _Terms:
        key = (pp, c, family.blocks)
        terms = self._terms.get(key)
        if terms is None:
            terms = self._terms[key] = _terms(self._pricer, pp, c, family)
        return terms

    def __call__(self, pp: int, c: int, family: Family) -> float:
        """Seconds; ``inf`` when the leanest states alone exceed all the memory there is."""
        terms = self._find(pp, c, family)
        limit = self._pricer.limit_bytes * (1 + MEMORY_SLACK)
        if terms.largest_layer > limit or terms.leanest_states > pp * limit:
            return math.inf
        v = family.virtual_stages
        return (terms.total_s / v + terms.links_s + (c - 1 / v) * terms.slowest_s + terms.once_s) * _BELOW


def _terms(pricer: Pricer, pp: int, c: int, family: Family) -> _Terms:
    """Every layer at its fastest: the sum over stages is at least their sum, and the slowest stage is at least what
    the best balance of identical blocks between an embedding and a head leaves."""
    counts = pricer.type_counts
    fastest: dict[LayerType, float] = {}
    again = math.inf
    least_step = total_step = largest = leanest = 0.0
    for kind, count in counts.items():
        costs = [pricer.cost(kind, s, pp, c) for s in family.strategies(kind)]  # more virtual stages need no less
        largest = max(largest, min(cost.static + cost.microbatch + cost.transient_bytes for cost in costs))
        fastest[kind] = min(cost.time for cost in costs)
        if kind.kind is LayerKind.BLOCK:
            again = min(again, max(cost.time for cost in costs) - fastest[kind])
        step = min(cost.step for cost in costs)
        least_step = max(least_step, step)
        total_step += count * step
        leanest += count * min(cost.static for cost in costs)
    total = sum(fastest[kind] * count for kind, count in counts.items())
    slowest = _slowest_stage(fastest, counts, pp, total)
    links = (pp - 1) * pricer.least_send(pp, c, family)
    blocks = [time for kind, time in fastest.items() if kind.kind is LayerKind.BLOCK]
    ends = max((time for kind, time in fastest.items() if kind.kind is not LayerKind.BLOCK), default=0.0)
    once = max(least_step, total_step / pp)
    return _Terms(total, slowest, links, once, largest, leanest, min(blocks), max(blocks), again, ends)


def _slowest_stage(fastest: dict[LayerType, float], counts: Counter[LayerType], pp: int, total: float) -> float:
    """Least possible time of the slowest stage."""
    ends = {LayerKind.EMBEDDING: 0.0, LayerKind.HEAD: 0.0}
    block, blocks = math.inf, 0
    for kind, time in fastest.items():
        if kind.kind is LayerKind.BLOCK:
            block, blocks = min(block, time), blocks + counts[kind]
        else:
            ends[kind.kind] = time
    if pp == 1 or block <= 0:
        return total / pp
    first, last = ends.values()
    least = max(total / pp, block, first, last)

    def holds(slowest: float) -> bool:
        room = slowest / _BELOW
        places = (room - first) // block + (room - last) // block + (pp - 2) * (room // block)
        return places >= blocks

    # the answer is one of k*block, first + k*block, last + k*block; try those from ``least`` on
    steps = sorted(start + math.ceil(max(0.0, least - start) / block) * block for start in (0.0, first, last))
    while not holds(steps[0]):
        steps = sorted([steps[0] + block, *steps[1:]])
    return max(least, steps[0]) if not holds(least) else least
