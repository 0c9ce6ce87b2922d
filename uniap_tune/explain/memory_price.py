"""How much memory a better plan would need, and how little memory any plan needs: by solving again.

The objective falls in steps as the memory limit rises; where the next step is, is found by bisection on the limit, with
what one limit teaches kept for the others (:mod:`uniap_tune.frontier.epsilon`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.explain.summary import NOTABLE, UNLIMITED, Alternative, compare
from uniap_tune.formulate import Pricer
from uniap_tune.frontier.branches import branches, places
from uniap_tune.frontier.epsilon import EpsilonSearch
from uniap_tune.plan import Plan
from uniap_tune.planner import Planning, Request, attempt, build
from uniap_tune.problem import Status
from uniap_tune.space import Space
from uniap_tune.units import GIB

# To how many bytes the least memory of a plan is found: half of the last digit that is shown.
RESOLUTION_BYTES = 0.05 * GIB
# The next plan must be better by this much, or by half of what unlimited memory gains where that is less.
_WORTHWHILE = 0.01
# So many better plans are looked at until one is better in the simulation, too [Empirical].
_TRIALS = 4
# The first limit tried above one that is too small.
_MORE = 1.05


@dataclass(frozen=True, slots=True)
class MemoryStep:
    """A better plan that more memory would allow.

    Attributes:
        limit_bytes: bytes of every device that must be usable for it.
        other: the best plan with so much memory.
        stages: its stages that exceed the limit of the request.
    """

    limit_bytes: float
    other: Alternative
    stages: tuple[int, ...]

    @property
    def gain(self) -> float:
        """Relative gain, proven and in the simulation."""
        return -max(self.other.slower, self.other.slower_proven)


@dataclass(frozen=True, slots=True)
class MemoryPrice:
    """What more memory would buy; nothing where it does not bind.

    Attributes:
        following: the smallest limit that allows a notably better plan; ``None`` if only ``unlimited`` is.
        unlimited: the best plan of all, and what it needs.
    """

    following: MemoryStep | None = None
    unlimited: MemoryStep | None = None


def memory_price(planning: Planning, deadline: Deadline | None = None) -> MemoryPrice | None:
    """What more memory on every device would buy; ``None`` if time runs out."""
    deadline = deadline or Deadline()
    request, plan = planning.request, planning.plan
    most = request.with_memory_limit(UNLIMITED * request.memory_limit_bytes)
    free = attempt(most, prices=planning.prices, deadline=deadline)
    if free.result.status is Status.LIMIT:
        return None
    unlimited = _step(free.plan, free.plan.peak_memory_bytes, plan)
    if unlimited.gain <= NOTABLE:
        return MemoryPrice()
    try:
        return MemoryPrice(_following(planning, unlimited, deadline), unlimited)
    except DeadlineError:
        return None


def _following(planning: Planning, unlimited: MemoryStep, deadline: Deadline) -> MemoryStep | None:
    """The first step of the objective that the simulation confirms."""
    request, plan = planning.request, planning.plan
    reserved = planning.prices.costs.reserved_bytes()
    low, wanted = request.memory_limit_bytes - reserved, min(_WORTHWHILE, unlimited.gain / 2)
    cutoff = plan.objective_s * (1 - wanted)
    search = _all_problems(planning.space, planning.prices, deadline)
    for _ in range(_TRIALS):
        least = _least_bytes(search, low=low, guess=_MORE * low, cutoff=cutoff)
        found = attempt(request.with_memory_limit(least + reserved), prices=planning.prices, deadline=deadline)
        if found.result.status is Status.LIMIT:
            raise DeadlineError
        step = _step(found.plan, least + reserved, plan)
        if step.gain >= wanted:
            return step
        low, cutoff = least, found.plan.objective_s * (1 - wanted)
        if cutoff < unlimited.other.plan.objective_s:
            return None
    return None


def _step(other: Plan, limit_bytes: float, plan: Plan) -> MemoryStep:
    over = tuple(i for i, stage in enumerate(other.stages) if stage.peak_bytes > plan.memory_limit_bytes)
    return MemoryStep(limit_bytes, compare(other, plan), over)


def leanest(request: Request, prices: Pricer, deadline: Deadline | None = None) -> Plan | None:
    """The plan that needs least memory, for a request that none fits; its limit stays the request's.

    ``None`` if there is none with all the memory in the world.

    Raises:
        DeadlineError: time ran out.
    """
    space, pricer = build(request, prices=prices)
    reserved, deadline = pricer.costs.reserved_bytes(), deadline or Deadline()
    search = _all_problems(space, pricer, deadline)
    low, most = pricer.limit_bytes, UNLIMITED * pricer.limit_bytes
    if search.fastest(most) is None:
        return None
    least = _least_bytes(search, low=low, guess=min(most, max(low, search.least_bytes() * (1 + 1e-9))))
    found = attempt(request.with_memory_limit(least + reserved), prices=prices, deadline=deadline)
    if not found.plans:
        raise DeadlineError
    return replace(found.plan, memory_limit_bytes=request.memory_limit_bytes)


def _all_problems(space: Space, prices: Pricer, deadline: Deadline) -> EpsilonSearch:
    free = prices.with_limit(UNLIMITED * prices.limit_bytes)
    return EpsilonSearch(branches(places(space), free), deadline=deadline)


def _least_bytes(search: EpsilonSearch, *, low: float, guess: float, cutoff: float = math.inf) -> float:
    """Bytes for layers of a device: the peak of a plan with an objective of at most ``cutoff`` seconds.

    With :data:`RESOLUTION_BYTES` less there is none.

    Args:
        search: every problem of the space; some plan in it must be good enough.
        low: a limit at which there is no such plan.
        guess: a limit at which there may be one.
        cutoff: seconds.

    Raises:
        DeadlineError: time ran out.
    """
    high, limit = math.inf, guess
    halved = True
    while high - low > RESOLUTION_BYTES:
        found = search.fastest(limit, cutoff)
        if found is not None:
            high = min(high, found.peak_bytes)
        elif math.isinf(high):
            low, limit = limit, limit + 2 * (limit - low) if limit > low else _MORE * limit
            continue
        else:
            low = limit
        # what was found is often the answer: a trial just below it, which proves that, comes before the next halving
        limit = max(high - RESOLUTION_BYTES, (low + high) / 2) if halved else (low + high) / 2
        halved = not halved
    return high
