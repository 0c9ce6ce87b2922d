"""What more memory buys, against planning with more memory by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.test_whatif import REQUESTS, planned
from uniap_tune.deadline import Deadline
from uniap_tune.explain.memory_price import RESOLUTION_BYTES, MemoryPrice, leanest, memory_price
from uniap_tune.planner import Planning, run
from uniap_tune.space import Knobs

NAMES = ("tight", "two nodes", "deepspeed", "any", "experts")


def priced(name: str) -> tuple[Planning, MemoryPrice]:
    planning = planned(name)
    price = memory_price(planning)
    assert price is not None
    return planning, price


@pytest.mark.parametrize("name", NAMES)
def test_the_next_step_is_where_planning_again_finds_it(name: str) -> None:
    planning, price = priced(name)
    step, plan = price.following, planning.plan
    assert step is not None
    assert step.limit_bytes > plan.memory_limit_bytes
    assert step.other.plan == run(planning.request.with_memory_limit(step.limit_bytes)).plan
    assert step.gain == -max(step.other.slower, step.other.slower_proven) > 0
    below = planning.request.with_memory_limit(max(plan.memory_limit_bytes, step.limit_bytes - 1.01 * RESOLUTION_BYTES))
    assert run(below).plan.objective_s > step.other.plan.objective_s
    assert step.stages == tuple(
        i for i, stage in enumerate(step.other.plan.stages) if stage.peak_bytes > plan.memory_limit_bytes
    )
    assert step.stages


@pytest.mark.parametrize("name", NAMES)
def test_the_most_that_memory_can_buy(name: str) -> None:
    planning, price = priced(name)
    assert price.unlimited is not None
    free = run(replace(planning.request, memory_fraction=1e5)).plan
    assert price.unlimited.other.plan.objective_s == pytest.approx(free.objective_s, rel=1e-9)
    assert price.unlimited.limit_bytes == price.unlimited.other.plan.peak_memory_bytes
    if price.following is not None:
        assert price.following.limit_bytes <= price.unlimited.limit_bytes * (1 + 1e-9)


def test_memory_that_does_not_bind_has_no_price() -> None:
    roomy = run(replace(REQUESTS["roomy"], memory_fraction=1e4))
    assert memory_price(roomy) == MemoryPrice()


def test_the_leanest_plan_keeps_the_limit_it_exceeds() -> None:
    request = replace(REQUESTS["tight"], knobs=Knobs(fix={"zero": "0", "recompute": "none"}), memory_fraction=0.1)
    lean = leanest(request, planned("tight").prices)
    assert lean is not None
    assert lean.memory_limit_bytes == request.memory_limit_bytes < lean.peak_memory_bytes
    strategies = [s for stage in lean.stages for s in stage.block_strategies()]
    assert {(s.zero, str(s.recompute)) for s in strategies} == {(0, "none")}


def test_no_memory_is_enough_for_a_cut_that_does_not_exist() -> None:
    request = replace(REQUESTS["experts"], knobs=Knobs(fix={"vpp": "3", "pp": "2"}))
    assert leanest(request, planned("experts").prices) is None


def test_without_time_there_is_no_price() -> None:
    for name in NAMES:
        price = memory_price(planned(name), Deadline(at=0.0))
        assert price is None or price == memory_price(planned(name))
