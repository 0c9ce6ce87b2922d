"""The cheapest lower bound on a (pp, c, family): from prices alone, before any array is built."""

from __future__ import annotations

import math
from collections import Counter

from uniap_tune.formulate import Pricer
from uniap_tune.graph import LayerKind, LayerType
from uniap_tune.problem import MEMORY_SLACK
from uniap_tune.space import Family


def quick_bound(pricer: Pricer, pp: int, c: int, family: Family) -> float:
    """A lower bound on TPI; ``inf`` when the leanest states alone exceed all the memory there is.

    Every layer at its fastest: the sum over stages is at least their sum, and the slowest stage is at least what
    the best balance of identical blocks between an embedding and a head leaves.
    """
    counts = pricer.type_counts
    fastest: dict[LayerType, float] = {}
    least_step = total_step = 0.0
    leanest = 0.0
    for kind, count in counts.items():
        costs = [pricer.cost(kind, s, pp, c) for s in family.strategies(kind)]  # more virtual stages need no less
        alone = [cost.static + cost.microbatch + cost.transient_bytes for cost in costs]
        if min(alone) > pricer.limit_bytes * (1 + MEMORY_SLACK):
            return math.inf
        fastest[kind] = min(cost.time for cost in costs)
        step = min(cost.step for cost in costs)
        least_step = max(least_step, step)
        total_step += count * step
        leanest += count * min(cost.static for cost in costs)
    if leanest > pp * pricer.limit_bytes * (1 + MEMORY_SLACK):
        return math.inf
    total = sum(fastest[kind] * count for kind, count in counts.items())
    slowest = _slowest_stage(fastest, counts, pp, total)
    links = (pp - 1) * pricer.least_send(pp, c, family)
    v = family.virtual_stages
    once = max(least_step, total_step / pp)
    return (total / v + links + (c - 1 / v) * slowest + once) * (1 - 1e-12)


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
        room = slowest * (1 + 1e-12)
        places = (room - first) // block + (room - last) // block + (pp - 2) * (room // block)
        return places >= blocks

    # the answer is one of k*block, first + k*block, last + k*block; try those from ``least`` on
    steps = sorted(start + math.ceil(max(0.0, least - start) / block) * block for start in (0.0, first, last))
    while not holds(steps[0]):
        steps = sorted([steps[0] + block, *steps[1:]])
    return max(least, steps[0]) if not holds(least) else least
