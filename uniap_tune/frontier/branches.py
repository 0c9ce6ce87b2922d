"""A space as branches of :mod:`uniap_tune.frontier.epsilon`. Their bounds come from prices, before arrays are built."""

from __future__ import annotations

from collections.abc import Sequence

from uniap_tune.formulate import Pricer
from uniap_tune.frontier.epsilon import Branch
from uniap_tune.lean import least_bytes, least_seconds
from uniap_tune.problem import Assignment, Problem
from uniap_tune.quick import QuickBounds
from uniap_tune.replay import judged_seconds
from uniap_tune.space import Family, Space

Place = tuple[int, int, Family]  # pp, micro-batches, family


def places(space: Space) -> list[Place]:
    """Every (pp, micro-batches, family) of a space."""
    return [
        (pp, c, family)
        for pp in space.pipeline_sizes()
        for c in space.microbatch_counts()
        for family in space.families(pp, c)
    ]


def branches(found: Sequence[Place], prices: Pricer) -> list[Branch]:
    """The branches of some places, in their order."""
    floors = QuickBounds(prices)
    return [branch_of(prices, floors, *place) for place in found]


def branch_of(prices: Pricer, floors: QuickBounds, pp: int, c: int, family: Family) -> Branch:
    """The problems of a (pp, c, family): one, or one for each number of leading blocks recomputed."""

    def problem(number: int) -> Problem:
        return prices.formulate(pp, c, family, leading=number).problem

    def floor(number: int) -> float:
        return floors.leading(pp, c, family, number) if family.leading else floors(pp, c, family)

    def bound(number: int, limit_bytes: float) -> float:
        return least_seconds(prices, pp, c, family, number, limit_bytes)

    def least(number: int) -> float:
        return least_bytes(prices, pp, c, family, number)

    def judge(number: int, cut: Assignment) -> float:
        return judged_seconds(prices.formulate(pp, c, family, leading=number), cut)

    first = int(family.leading)
    return Branch(
        problem,
        floor,
        bound,
        least,
        first=first,
        last=max(first, family.most_leading(prices.num_blocks, pp)),
        judge=judge if family.virtual_stages > 1 else None,
    )
