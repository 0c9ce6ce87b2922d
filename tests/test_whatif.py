"""What other choices cost, against planning again by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import pytest

from tests.tiny import tiny_model
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.deadline import Deadline
from uniap_tune.errors import InfeasibleError, InputError
from uniap_tune.explain.memory_price import RESOLUTION_BYTES
from uniap_tune.explain.summary import time_shares
from uniap_tune.explain.whatif import Verdict, WhatIf, other_grid, restriction_costs, target_prices, whatif
from uniap_tune.planner import Planning, Request, run
from uniap_tune.space import Knobs, parse_knobs
from uniap_tune.spec import Job, Moe
from uniap_tune.strategy import Target

EXPERTS = replace(tiny_model(4, hidden_size=512), moe=Moe(num_experts=4, top_k=2, expert_ffn_size=512))
LARGE = tiny_model(8, hidden_size=2048)

# Jobs of which some knobs fit, some do not, and some are illegal.
REQUESTS = {
    "roomy": Request(model=LARGE, cluster=read_cluster("1x4:l4"), job=Job(global_batch=16, seq_length=2048)),
    "tight": Request(
        model=LARGE, cluster=read_cluster("1x4:l4"), job=Job(global_batch=16, seq_length=2048), memory_fraction=0.185
    ),
    "two nodes": Request(
        model=LARGE, cluster=read_cluster("2x4:l4"), job=Job(global_batch=8, seq_length=1024), memory_fraction=0.15
    ),
    "deepspeed": Request(
        model=LARGE,
        cluster=read_cluster("1x4:l4"),
        job=Job(global_batch=16, seq_length=1024),
        target=Target.DEEPSPEED,
        memory_fraction=0.195,
    ),
    "any": Request(
        model=tiny_model(4, hidden_size=1024),
        cluster=read_cluster("1x4:l4"),
        job=Job(global_batch=8, seq_length=512),
        target=Target.ANY,
        memory_fraction=0.091,
    ),
    "experts": Request(
        model=EXPERTS, cluster=read_cluster("1x4:l4"), job=Job(global_batch=8, seq_length=1024), memory_fraction=0.08
    ),
}
VALUES: Mapping[str, tuple[str, ...]] = {
    "pp": ("1", "2", "3", "4"),
    "vpp": ("1", "2", "3"),
    "tp": ("1", "2", "3", "4", "8"),
    "cp": ("1", "2"),
    "dp": ("1", "2", "4", "8"),
    "ep": ("1", "2"),
    "zero": ("0", "1", "2", "3"),
    "recompute": ("none", "selective", "full"),
    "mbs": ("1", "2", "3", "4"),
    "microbatches": ("1", "2", "4", "5", "8"),
}


@cache
def planned(name: str) -> Planning:
    return run(REQUESTS[name])


def pairs() -> Iterator[tuple[str, dict[str, str]]]:
    """Random jobs and knobs; one knob in a third of them, up to three in the others."""
    draw = random.Random(7)
    for _ in range(90):
        name = draw.choice(sorted(REQUESTS))
        knobs = draw.sample(sorted(VALUES), draw.choice((1, 2, 3)))
        yield name, {knob: draw.choice(VALUES[knob]) for knob in knobs}


def by_hand(request: Request, answer: WhatIf, *, ties: bool = True) -> Verdict:
    """Plan with the knobs fixed, from scratch, and compare with the answer; with ``ties`` also between plans of equal
    time."""
    fixed = replace(request, knobs=Knobs(fix=answer.asked))
    try:
        expected = run(fixed).plan
    except InfeasibleError:
        if answer.verdict is Verdict.ILLEGAL:  # not even with all the memory in the world
            with pytest.raises(InfeasibleError):
                run(replace(fixed, memory_fraction=1e6))
            return Verdict.ILLEGAL
        check_leanest(fixed, answer)
        return Verdict.TOO_LARGE
    except InputError:
        assert answer.verdict is Verdict.ILLEGAL
        assert answer.reasons
        return Verdict.ILLEGAL
    assert answer.verdict in (Verdict.COSTS, Verdict.SAME)
    assert answer.other is not None
    found = answer.other.plan
    assert found.bound_s == pytest.approx(expected.bound_s, rel=1e-9)
    assert found.objective_s == pytest.approx(expected.objective_s, rel=1e-9)
    assert not ties or replace(found, bound_s=expected.bound_s, gap=expected.gap) == expected
    return answer.verdict


def check_leanest(request: Request, answer: WhatIf) -> None:
    """The overflow is that of a plan, and no plan needs notably less."""
    assert answer.verdict is Verdict.TOO_LARGE
    assert answer.other is not None
    assert answer.stage is not None
    lean, limit = answer.other.plan, request.memory_limit_bytes
    assert lean.memory_limit_bytes == limit
    assert answer.over_bytes == lean.stages[answer.stage].peak_bytes - limit == lean.peak_memory_bytes - limit > 0
    memory = request.cluster.device.memory_bytes
    enough = replace(request, memory_fraction=lean.peak_memory_bytes * (1 + 1e-9) / memory)
    assert run(enough).plan.peak_memory_bytes <= lean.peak_memory_bytes * (1 + 1e-9)
    less = replace(request, memory_fraction=(lean.peak_memory_bytes - 1.01 * RESOLUTION_BYTES) / memory)
    with pytest.raises(InfeasibleError):
        run(less)


def test_answers_are_those_of_planning_again() -> None:
    ends = []
    for name, asked in pairs():
        answer = whatif(planned(name), asked)
        assert answer.asked == asked
        ends.append(by_hand(REQUESTS[name], answer))
    counts = {verdict: ends.count(verdict) for verdict in Verdict}
    assert len(ends) >= 50
    assert min(counts[Verdict.COSTS], counts[Verdict.ILLEGAL]) >= 15
    assert counts[Verdict.TOO_LARGE] >= 10


def test_the_knobs_of_the_plan_are_the_plan() -> None:
    planning = planned("roomy")
    first = planning.plan.strategies[0]
    answer = whatif(planning, {"pp": str(planning.plan.pp), "tp": str(first.tp), "zero": str(first.zero)})
    assert answer.verdict is Verdict.SAME
    assert answer.other is not None
    assert answer.other.slower == 0.0


def test_what_was_said_of_a_knob_gives_way_to_the_question() -> None:
    request = replace(REQUESTS["roomy"], knobs=parse_knobs(["tp=1"], ["pp=1"], ["zero=3"]))
    planning = run(request)
    answer = whatif(planning, {"tp": "2"})
    assert answer.other is not None
    expected = run(replace(request, knobs=parse_knobs(["tp=2"], ["pp=1"], ["zero=3"])))
    assert answer.other.plan.stages == expected.plan.stages
    assert whatif(planning, {"pp": "2"}).verdict is Verdict.COSTS
    assert whatif(planning, {"zero": "3"}).verdict is Verdict.COSTS


def test_parts_of_a_difference_add_up() -> None:
    planning = planned("roomy")
    for asked in ({"pp": "2"}, {"tp": "4"}, {"recompute": "full"}):
        answer = whatif(planning, asked)
        assert answer.other is not None
        other = answer.other
        difference = other.plan.step_time_s - planning.plan.step_time_s
        assert sum(other.parts.values()) == pytest.approx(difference, abs=1e-9 * planning.plan.step_time_s)
        assert other.slower == pytest.approx(difference / planning.plan.step_time_s)
        assert other.slower_proven >= -1e-9
        assert set(other.parts) == {*time_shares(planning.plan), *time_shares(other.plan)}


def test_restrictions_cost_what_planning_without_them_saves() -> None:
    knobs = parse_knobs(["tp=4"], ["pp=1"], ["recompute=full", "zero=3"])
    planning = run(replace(REQUESTS["roomy"], knobs=knobs))
    without = {
        "--fix tp=4": parse_knobs([], ["pp=1"], ["recompute=full", "zero=3"]),
        "--max pp=1": parse_knobs(["tp=4"], [], ["recompute=full", "zero=3"]),
        "--forbid recompute=full": parse_knobs(["tp=4"], ["pp=1"], ["zero=3"]),
        "--forbid zero=3": parse_knobs(["tp=4"], ["pp=1"], ["recompute=full"]),
    }
    found = restriction_costs(planning)
    assert [item.option for item in found] == list(without)
    for item in found:
        expected = run(replace(REQUESTS["roomy"], knobs=without[item.option])).plan
        assert item.without.plan == expected
        assert item.without.slower_proven == expected.objective_s / planning.plan.objective_s - 1 <= 1e-9
    assert found[0].without.slower < -0.01  # tp 4 costs something here


def test_restriction_to_a_target() -> None:
    asked = replace(REQUESTS["any"], memory_fraction=None)
    planning = run(asked)
    prices = target_prices(planning, (Target.MEGATRON, Target.DEEPSPEED))
    assert set(prices) == {"megatron", "deepspeed"}
    assert all(price is not None and price >= -1e-9 for price in prices.values())


@pytest.mark.parametrize("name", ["roomy", "tight", "two nodes", "experts"])
def test_the_other_grid_is_the_best_with_other_degrees(name: str) -> None:
    planning = planned(name)
    plan, first = planning.plan, planning.plan.strategies[0]
    found = other_grid(planning)
    assert found is not None
    key = (plan.pp, first.tp, first.cp, first.dp, first.ep, first.etp)
    grids = {}
    for pp, tp, cp, dp, ep, etp in all_grids(planning):
        fix = {"pp": pp, "tp": tp, "cp": cp, "dp": dp, "ep": ep, "etp": etp}
        answer = whatif(planning, {knob: str(value) for knob, value in fix.items()})
        if (pp, tp, cp, dp, ep, etp) != key and answer.verdict is Verdict.COSTS:
            assert answer.other is not None
            grids[pp, tp, cp, dp, ep, etp] = answer.other.plan.objective_s
    assert found.plan.objective_s == pytest.approx(min(grids.values()), rel=1e-9)


def all_grids(planning: Planning) -> set[tuple[int, ...]]:
    """Every grid of a space."""
    space = planning.space
    return {
        (pp, s.tp, s.cp, s.dp, s.ep, s.etp)
        for pp in space.pipeline_sizes()
        for c in space.microbatch_counts()
        for family in space.families(pp, c)
        for s in family.blocks
    }


def test_where_layers_differ_the_grid_of_most_blocks_is_another() -> None:
    planning = planned("any")
    found = other_grid(planning)
    assert found is not None
    assert found.plan.stages != planning.plan.stages
    blocks = [s for stage in planning.plan.stages for s in stage.block_strategies()]
    grids = [(s.tp, s.dp) for s in blocks]
    most = max(set(grids), key=grids.count)
    others = [s for stage in found.plan.stages for s in stage.block_strategies()]
    assert found.plan.pp != planning.plan.pp or most not in {(s.tp, s.dp) for s in others}


def test_without_time_nothing_false_is_claimed() -> None:
    for name, asked in list(pairs())[:20]:
        answer = whatif(planned(name), asked, Deadline(at=0.0))
        if answer.verdict is not Verdict.OPEN:
            by_hand(REQUESTS[name], answer, ties=False)


def test_layers_that_no_cut_makes_even() -> None:
    answer = whatif(planned("experts"), {"vpp": "3", "pp": "2"})
    assert answer.verdict is Verdict.ILLEGAL
    assert answer.reasons == (
        "an interleaved pipeline needs chunks of nearly one length, into which 4 blocks cannot be cut so",
    )
