"""What binds a plan, and the sentences about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plans import make_plan
from tests.tiny import tiny_model
from uniap_tune.adapters.cluster import read_cluster
from uniap_tune.assemble import simulated_seconds
from uniap_tune.explain.summary import (
    PART_NAMES,
    binding,
    bubble_fraction,
    compare,
    grid,
    recompute_text,
    summarize_strategies,
    time_shares,
)
from uniap_tune.plan import Plan
from uniap_tune.planner import Request, build, run
from uniap_tune.space import Knobs
from uniap_tune.spec import Job, Recompute
from uniap_tune.strategy import Strategy, Target

JOB = Job(global_batch=16, seq_length=2048)


def request(fraction: float | None = None, knobs: Knobs | None = None) -> Request:
    return Request(
        model=tiny_model(8, hidden_size=2048),
        cluster=read_cluster("1x4:l4"),
        job=JOB,
        knobs=knobs or Knobs(),
        memory_fraction=fraction,
    )


def test_memory_binds_exactly_where_more_of_it_would_help() -> None:
    roomy = run(request(0.95))
    found = binding(roomy.plan, *build(roomy.request))
    assert "memory does not bind" in found.sentence
    assert found.faster_without_limit == 0.0
    tight = run(request(0.2))
    found = binding(tight.plan, *build(tight.request))
    assert found.sentence.startswith("memory on stage ")
    free = roomy.result.candidates[0].objective_s
    assert found.faster_without_limit == pytest.approx(1 - free / tight.plan.objective_s, abs=1e-6)


def test_a_pipeline_that_fits_is_bound_by_its_slowest_stage() -> None:
    planning = run(request(0.95, Knobs(fix={"pp": "4"})))
    found = binding(planning.plan, *build(planning.request))
    slowest = max(range(4), key=lambda i: planning.plan.stages[i].time_s)
    assert found.sentence.startswith(f"compute on stage {slowest}")


def uniform(pp: int, c: int, stage_s: float = 1.0, step_s: float = 0.0) -> Plan:
    made = make_plan(Target.MEGATRON, [2] * pp, Strategy(), Job(global_batch=c, seq_length=8), microbatches=c)
    stages = tuple(
        replace(
            s, time_s=stage_s, time={"compute": stage_s}, step_s=step_s, step={"optimizer": step_s} if step_s else {}
        )
        for s in made.stages
    )
    return replace(made, stages=stages, step_time_s=(c + pp - 1) * stage_s + step_s)


@pytest.mark.parametrize(("pp", "c"), [(1, 4), (2, 8), (4, 8), (8, 8)])
@pytest.mark.parametrize("step", [0.0, 0.7])
def test_bubble_of_uniform_stages(pp: int, c: int, step: float) -> None:
    """(p - 1) / (m + p - 1) of the pipeline's time, arXiv 2104.04473 section 2.2."""
    assert bubble_fraction(uniform(pp, c, step_s=step)) == pytest.approx((pp - 1) / (c + pp - 1))


def test_shares_of_time_add_up_to_the_step() -> None:
    made = uniform(4, 8, stage_s=0.5, step_s=0.25)
    shares = time_shares(made)
    assert shares == pytest.approx({"compute": 4.0, "optimizer": 0.25, "bubble": 1.5})
    assert sum(shares.values()) == pytest.approx(made.step_time_s)
    assert "bubble" not in time_shares(uniform(1, 4))


def test_shares_of_a_real_plan_add_up() -> None:
    for knobs in (Knobs(), Knobs(fix={"pp": "4"}), Knobs(fix={"tp": "2"})):
        found = run(request(0.9, knobs)).plan
        assert sum(time_shares(found).values()) == pytest.approx(found.step_time_s, rel=1e-9)


def test_strategies_in_runs() -> None:
    full = make_plan(Target.MEGATRON, [4], Strategy(tp=2, dp=2), JOB, microbatches=4, full=[3])
    assert summarize_strategies(full.stages[0]) == [(1, "tp2 dp2 z0"), (3, "tp2 dp2 z0 rc-full"), (2, "tp2 dp2 z0")]


def test_grid_and_recompute_in_one_line() -> None:
    made = make_plan(Target.MEGATRON, [2, 2], Strategy(tp=2, dp=2, zero=1), JOB, microbatches=4)
    assert grid(made) == "pp 2, tp 2, dp 2, zero 1, micro-batch 2 x 4, recompute none"
    assert recompute_text(made) == "none"
    some = make_plan(Target.MEGATRON, [2, 2], Strategy(), JOB, microbatches=4, full=[1, 0])
    assert recompute_text(some) == "full 1/4 + none 3/4"
    every = make_plan(Target.MEGATRON, [2, 2], Strategy(recompute=Recompute.FULL), JOB, microbatches=4)
    assert recompute_text(every) == "full"
    context = make_plan(Target.MEGATRON, [4], Strategy(cp=2, dp=2), JOB, microbatches=4)
    assert "cp 2" in grid(context)
    mixed = replace(
        made, stages=(made.stages[0], make_plan(Target.ANY, [2], Strategy(dp=4), JOB, microbatches=4).stages[0])
    )
    assert "strategies differ by layer" in grid(mixed)


def test_transfers_are_what_links_without_time_would_save() -> None:
    """Two stages that wait for each other's transfers: the rest of the wait is the bubble."""
    made = uniform(2, 4, stage_s=1.0)
    stages = (replace(made.stages[0], link_s=0.2), made.stages[1])
    linked = replace(made, stages=stages, step_time_s=simulated_seconds(stages, 4))
    shares = time_shares(linked)
    assert shares["send"] == pytest.approx(linked.step_time_s - made.step_time_s)
    assert shares["bubble"] == pytest.approx(1.0)
    assert sum(shares.values()) == pytest.approx(linked.step_time_s)
    assert set(shares) <= set(PART_NAMES)


def test_comparison_of_two_plans() -> None:
    plan, other = uniform(2, 4, stage_s=1.0), uniform(1, 4, stage_s=1.5, step_s=0.5)
    found = compare(other, replace(plan, objective_s=4.0))
    assert found.plan is other
    assert found.slower == pytest.approx(6.5 / 5.0 - 1)
    assert found.slower_proven == pytest.approx(other.objective_s / 4.0 - 1)
    assert found.parts == pytest.approx({"compute": 2.0, "optimizer": 0.5, "bubble": -1.0})
