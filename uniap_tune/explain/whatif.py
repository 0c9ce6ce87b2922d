"""What another choice would cost: every question about a plan is answered by solving again, with proof.

Layers keep their prices from one answer to the next; only another cluster or job (:mod:`.sensitivity`) is priced anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from uniap_tune.deadline import Deadline, DeadlineError
from uniap_tune.explain.memory_price import leanest
from uniap_tune.explain.summary import Alternative, compare
from uniap_tune.legality import conflict, without_each
from uniap_tune.plan import Plan
from uniap_tune.planner import Planning, attempt, build
from uniap_tune.problem import Status
from uniap_tune.search import SearchOptions, search
from uniap_tune.space import Family, Knobs, Space
from uniap_tune.strategy import Strategy, Target
from uniap_tune.targets import unsupported

# What leaves no plan although strategies are legal and memory is plenty.
_UNEVEN = "an interleaved pipeline needs chunks of nearly one length, into which {} blocks cannot be cut so"


class Verdict(StrEnum):
    """What comes of fixing knobs."""

    SAME = "same"  # the plan has these values
    COSTS = "costs"
    TOO_LARGE = "does not fit"
    ILLEGAL = "not legal"
    OPEN = "not solved in time"


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The answer to "what if these knobs were fixed?".

    Attributes:
        asked: the knobs and their values.
        verdict: how it ends.
        other: the best plan with them; where none fits, the one that needs least memory.
        reasons: where none is legal, the rules that forbid it.
        stage: where none fits, the fullest stage of the leanest plan.
        over_bytes: by how much that stage exceeds the memory.
    """

    asked: Mapping[str, str]
    verdict: Verdict
    other: Alternative | None = None
    reasons: tuple[str, ...] = ()
    stage: int | None = None
    over_bytes: float = 0.0


def whatif(planning: Planning, asked: Mapping[str, str], deadline: Deadline | None = None) -> WhatIf:
    """Fix some knobs and plan again; other restrictions stay, but for those on the knobs asked about.

    Args:
        planning: the plan in question, and what it was found from.
        asked: values by knob, as ``Knobs.fix`` has them.
        deadline: when to stop.
    """
    plan, request = planning.plan, replace(planning.request, knobs=_fixed(planning.request.knobs, asked))
    clash = conflict(build(request, prices=planning.prices)[0])
    if clash is not None:
        return WhatIf(asked=asked, verdict=Verdict.ILLEGAL, reasons=clash.reasons)
    found = attempt(request, prices=planning.prices, deadline=deadline)
    if found.result.status is Status.OPTIMAL:
        other = compare(found.plan, plan)
        return WhatIf(asked=asked, verdict=Verdict.SAME if _same(found.plan, plan) else Verdict.COSTS, other=other)
    if found.result.status is Status.LIMIT:
        return WhatIf(asked=asked, verdict=Verdict.OPEN)
    try:
        lean = leanest(request, planning.prices, deadline)
    except DeadlineError:
        return WhatIf(asked=asked, verdict=Verdict.OPEN)
    if lean is None:
        return WhatIf(asked=asked, verdict=Verdict.ILLEGAL, reasons=(_UNEVEN.format(request.model.num_layers),))
    stage = max(range(lean.pp), key=lambda i: lean.stages[i].peak_bytes)
    return WhatIf(
        asked=asked,
        verdict=Verdict.TOO_LARGE,
        other=compare(lean, plan),
        stage=stage,
        over_bytes=lean.stages[stage].peak_bytes - request.memory_limit_bytes,
    )


def _fixed(knobs: Knobs, asked: Mapping[str, str]) -> Knobs:
    """The knobs with those asked about fixed, whatever was said of them before."""
    return Knobs(
        fix={**knobs.fix, **asked},
        maximum={knob: cap for knob, cap in knobs.maximum.items() if knob not in asked},
        forbid=frozenset((knob, value) for knob, value in knobs.forbid if knob not in asked),
    )


def _same(a: Plan, b: Plan) -> bool:
    """Whether two plans do the same."""
    return a.stages == b.stages and a.num_microbatches == b.num_microbatches


# -- what restrictions cost --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Restriction:
    """What one restriction costs.

    Attributes:
        option: as on the command line: ``--fix tp=8``.
        without: the best plan without it; ``slower`` is negative where the restriction costs time.
    """

    option: str
    without: Alternative


def restriction_costs(planning: Planning, deadline: Deadline | None = None) -> tuple[Restriction, ...]:
    """For each --fix, --max and --forbid, the best plan without it; those that time runs out for are left out."""
    found = []
    for option, knobs in without_each(planning.request.knobs):
        freed = attempt(replace(planning.request, knobs=knobs), prices=planning.prices, deadline=deadline)
        if freed.result.status is Status.OPTIMAL:
            found.append(Restriction(option, compare(freed.plan, planning.plan)))
    return tuple(found)


def target_prices(
    planning: Planning, targets: tuple[Target, ...], deadline: Deadline | None = None
) -> Mapping[str, float | None]:
    """For each target, how much longer (relative) its best plan takes than the one found, under the same prices.

    ``None``: it has none, because none fits or it cannot train the model. Targets that time runs out for are left out.
    """
    deadline = deadline or Deadline()
    request, best_s = planning.request, planning.plan.objective_s
    slower: dict[str, float | None] = {}
    knobs, asked = request.knobs, {*request.knobs.fix, *request.knobs.maximum}
    left_out = {name: 1 for name in ("cp", "vpp") if name not in asked}  # compare within the space of the request
    knobs = replace(knobs, maximum={**knobs.maximum, **left_out})
    for target in targets:
        if unsupported(request.model, request.job, target):
            slower[str(target)] = None
            continue
        restricted = replace(request, target=target, knobs=knobs)
        result = search(*build(restricted, prices=planning.prices), SearchOptions(deadline=deadline))
        if result.status is not Status.LIMIT:
            slower[str(target)] = result.candidates[0].objective_s / best_s - 1 if result.candidates else None
    return slower


# -- the next choice that is really another ----------------------------------------------------------------------------

Grid = tuple[int, ...]


def other_grid(planning: Planning, deadline: Deadline | None = None) -> Alternative | None:
    """The best plan on another grid: other degrees, not only another ZeRO stage, recomputation or micro-batch.

    Where layers differ, the grid of most blocks must be another. ``None``: no other fits, or time ran out.
    """
    plan = planning.plan
    blocks = [_grid(s) for stage in plan.stages for s in stage.block_strategies()]
    taken = max(dict.fromkeys(blocks), key=blocks.count)
    values = {item.name: getattr(planning.space, item.name) for item in fields(Space)}
    rest = _WithoutGrid(**values, taken=(plan.pp, taken))
    found = attempt(planning.request, prices=planning.prices, within=rest, deadline=deadline)
    return compare(found.plan, plan) if found.result.status is Status.OPTIMAL else None


def _grid(strategy: Strategy) -> Grid:
    return (strategy.tp, strategy.cp, strategy.dp, strategy.ep, strategy.etp)


@dataclass(frozen=True, slots=True, kw_only=True)
class _WithoutGrid(Space):
    """A space without the strategies of one grid, which is (pp, grid of a layer)."""

    taken: tuple[int, Grid]

    def families(self, pp: int, num_microbatches: int) -> list[Family]:
        """The families without the strategies of the grid."""
        found = Space.families(self, pp, num_microbatches)
        if pp != self.taken[0]:
            return found
        left = [replace(f, blocks=tuple(s for s in f.blocks if _grid(s) != self.taken[1])) for f in found]
        return [family for family in left if family.blocks]
